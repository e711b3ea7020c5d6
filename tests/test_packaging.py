"""Tests of the wheel, the sdist, their installation, and the bare import."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOT_FOLDERS = ("kernels", "layers", "reference")  # installed below fusednorm


def run(*command: str | Path, cwd: Path, **env: str) -> str:
    """Runs a command without this process's PYTHONPATH; returns its output."""
    inherited = {name: v for name, v in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=inherited | {"JAX_PLATFORMS": "cpu"} | env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}"
    return done.stdout


def copy_tree(target: Path) -> None:
    """Copies the files that a commit could hold: tracked or not, but never ignored."""
    if not (ROOT / ".git").exists():  # the tree was copied here without its repository
        ignore = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "dist")
        shutil.copytree(ROOT, target, symlinks=True, ignore=ignore)
        return
    listing = run(
        *("git", "-c", "safe.directory=*", "ls-files", "-z"),
        *("--cached", "--others", "--exclude-standard"),
        cwd=ROOT,
    )
    for name in filter(None, listing.split("\0")):
        source = ROOT / name
        if source.is_symlink() or source.is_file():  # not if deleted but still tracked
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target / name, follow_symlinks=False)


def modules_of(tree: Path) -> set[str]:
    """Returns the modules that a wheel of the tree must hold, as paths in the wheel."""
    own = {f"fusednorm/{path.name}" for path in tree.glob("src/fusednorm/*.py")}
    linked = {
        f"fusednorm/{path.relative_to(tree).as_posix()}"
        for folder in ROOT_FOLDERS
        for path in (tree / folder).rglob("*.py")
    }
    return own | linked


@dataclass(frozen=True)
class Build:
    tree: Path
    wheel: Path
    sdist: Path


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Builds the sdist, and the wheel from it, offline."""
    tree = tmp_path_factory.mktemp("copy") / "tree"
    copy_tree(tree)
    dist = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "-o", dist, cwd=tree)
    (wheel,) = dist.glob("*.whl")
    (sdist,) = dist.glob("*.tar.gz")
    return Build(tree, wheel, sdist)


def test_tree_has_the_modules_that_are_compared(build: Build) -> None:
    assert modules_of(build.tree) >= {
        "fusednorm/__init__.py",
        *(f"fusednorm/{folder}/__init__.py" for folder in ROOT_FOLDERS),
    }


def test_wheel_holds_the_modules_of_the_tree(build: Build) -> None:
    with zipfile.ZipFile(build.wheel) as wheel:
        modules = {name for name in wheel.namelist() if name.endswith(".py")}
    assert modules == modules_of(build.tree)


def test_sdist_holds_the_modules_of_the_tree(build: Build) -> None:
    with tarfile.open(build.sdist) as sdist:
        files = [member.name for member in sdist.getmembers() if not member.isdir()]
    inside = {name.partition("/")[2] for name in files}  # without fusednorm-VERSION/
    modules = {name for name in inside if name.endswith(".py")}
    assert modules == {f"src/{name}" for name in modules_of(build.tree)}
    assert {"LICENSE", "README.md", "src/fusednorm/py.typed"} <= inside


def test_wheel_installs_one_name_only(build: Build) -> None:
    with zipfile.ZipFile(build.wheel) as wheel:
        names = wheel.namelist()
    stray = [
        name
        for name in names
        if name.split("/")[0] != "fusednorm" and ".dist-info/" not in name
    ]
    assert not stray
    assert "fusednorm/py.typed" in names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_installed_wheel_imports_from_anywhere(build: Build, tmp_path: Path) -> None:
    target, elsewhere = tmp_path / "target", tmp_path / "elsewhere"
    elsewhere.mkdir()
    run(
        *(sys.executable, "-m", "pip", "install", "--no-index", "--no-deps"),
        *("--target", target, build.wheel),
        cwd=elsewhere,
    )
    top_level = {path.name for path in target.iterdir()}
    assert {name for name in top_level if not name.endswith(".dist-info")} == {
        "fusednorm"
    }
    program = f"""
import importlib
for name in {ROOT_FOLDERS}:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        importlib.import_module("fusednorm." + name)
    else:
        raise SystemExit(f"a top-level {{name}} is importable")
from importlib.metadata import version
import fusednorm
assert fusednorm.__version__ == version("fusednorm"), version("fusednorm")
print(fusednorm.__file__)
"""
    output = run(sys.executable, "-c", program, cwd=elsewhere, PYTHONPATH=str(target))
    assert Path(output.strip()) == target / "fusednorm" / "__init__.py"


def test_editable_install_needs_no_network(tmp_path: Path) -> None:
    tree, prefix = tmp_path / "tree", tmp_path / "prefix"
    copy_tree(tree)
    run(
        *(sys.executable, "-m", "pip", "install", "--no-index", "--no-deps"),
        # Install next to the environment that runs this test, not into it.
        *("--no-build-isolation", "--ignore-installed", "--prefix", prefix, "-e", "."),
        cwd=tree,
    )
    (path_file,) = prefix.rglob("*.pth")
    assert path_file.read_text().split() == [str(tree / "src")]


# Refuses to import the languages of the kernels, as a jax without them does.
REFUSE = """
import sys

REFUSED = ("jax.experimental.pallas.mosaic_gpu", "jax.experimental.pallas.tpu")

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.startswith(REFUSED):
            raise ImportError(f"refused: {name}")

sys.meta_path.insert(0, Refuse())
"""


def test_import_and_call_without_mosaic(tmp_path: Path) -> None:
    program = f"""{REFUSE}
import jax.numpy as jnp
from flax import nnx
import fusednorm

for name in REFUSED:  # the refusal is real
    try:
        __import__(name)
    except ImportError as error:
        assert "refused" in str(error), error
    else:
        raise SystemExit(f"{{name}} was not refused")
y = fusednorm.LayerNorm(8, rngs=nnx.Rngs(0))(jnp.arange(16.0).reshape(2, 8))
assert jnp.allclose(y.mean(-1), 0, atol=1e-6), y
"""
    run(sys.executable, "-c", program, cwd=tmp_path, PYTHONPATH=str(ROOT / "src"))


def test_import_loads_no_kernel_language(tmp_path: Path) -> None:
    program = f"""{REFUSE}
sys.meta_path.pop(0)
import fusednorm
print(*(name for name in sys.modules if name.startswith(REFUSED)))
"""
    output = run(
        sys.executable, "-c", program, cwd=tmp_path, PYTHONPATH=str(ROOT / "src")
    )
    assert output.split() == []
