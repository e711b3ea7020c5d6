"""Training in several processes gives the same result as in one."""

import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parent.parent
SECONDS = 180  # timeout per process


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.mark.usefixtures("quickly_compiled")
def test_two_processes_train_as_one(tmp_path: pathlib.Path) -> None:
    """Data-parallel training in 2 processes of 4 devices each matches 1 process of 8.

    Losses and the BatchNorms' running statistics are those of the whole batch.
    """
    pytest.importorskip("sklearn", reason="its digits")  # `make test` always has it
    from tests.data_parallel import STEPS, train

    results, port = tmp_path / "results.npz", free_port()
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "tests.data_parallel",
                "2",
                f"{i}",
                f"{port}",
                results,
            ],
            cwd=ROOT,
            env=os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    try:
        expected = train()
        for process in processes:
            output, _ = process.communicate(timeout=SECONDS)
            assert process.returncode == 0, output
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    found = np.load(results)
    assert set(found) == set(expected)
    assert len(expected) == 1 + 2 * 5  # mean and var of five BatchNorms
    assert expected["losses"].shape == (STEPS,)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6)
