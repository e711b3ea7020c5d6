"""python -m bench tune: times other ways to cut a kernel's work beside the current one.

A short function of geometry and dtypes in kernels/gpu/ decides how a GPU kernel cuts
its work. The measurements behind it are written next to it. For each case, this command
starts from what that function returns, and changes one number at a time to the next
value. It goes on from the fastest setting until no neighbour is faster. Each setting is
compiled, checked against float64, and timed in turn with the current one. Nothing is
changed: the command prints what it would change, and why.
"""

import argparse
import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import jax
from flax import nnx
from rich.console import Console
from rich.table import Table

import fusednorm
from bench import terminal, truth
from bench.cases import CASES, FEW, SWEEP, Block, Case, chosen, draw
from bench.contest import (
    FLUSHING,
    Pass,
    Quantiles,
    Settings,
    copy_of,
    on_device,
    passes,
    said,
)
from bench.report import earlier, head, save
from bench.terminal import STYLE
from fusednorm.kernels.gpu import strips, tiles

HERE = Path(__file__).resolve().parent
PASSES = ("forward", "backward")
WORTH = 0.98  # of the current time; a smaller gain is noise

Setting = dict[str, int]
Turns = Sequence[tuple[str, Callable[[], Any]]]
Clock = Callable[[Turns], dict[str, list[float]]]


class UnfitError(ValueError):
    """The setting is impossible for any kernel."""


@dataclasses.dataclass(frozen=True)
class Asked:
    """One call of a function that cuts the work, and its answer."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    answer: Any


# --- what can be set ------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Knob:
    """A function that cuts the work, described by named numbers.

    Attributes:
      module, function: the module and name of the function.
      read: returns the numbers of the function's answer; {} if it has none.
      values: returns the values that each number may have, in order.
      make: makes the answer for other numbers, or raises `UnfitError`.
      optional: whether {} is a setting too.
    """

    module: Any
    function: str
    read: Callable[[Asked], Setting]
    values: Callable[[Asked], dict[str, Sequence[int]]]
    make: Callable[[Asked, Setting], Any]
    optional: bool = False

    @property
    def name(self) -> str:
        return f"{self.module.__name__.rpartition('.')[2]}.{self.function}"

    def near(self, asked: Asked, setting: Setting) -> Iterator[Setting]:
        """Yields the settings one step away: one number up or down, or {}."""
        if setting and self.optional:
            yield {}
        for name, values in self.values(asked).items():
            if name not in setting:
                continue
            below = [v for v in values if v < setting[name]]
            above = [v for v in values if v > setting[name]]
            for value in below[-1:] + above[:1]:
                yield setting | {name: value}


def _remade(asked: Asked, setting: Setting) -> Any:
    """Cuts the rows of a forward by other numbers."""
    return tiles.configure(*asked.args, **asked.kwargs | setting)


def _of_strip(config: strips.Config) -> Setting:
    names = ("width", "blocks", "warpgroups")
    return {name: getattr(config, name) for name in names}


def _resident(asked: Asked, setting: Setting) -> Any:
    """Cuts strips that stay on the chip. Returns None for {}: two reads."""
    if not setting:
        return None
    _, _, kept, _ = asked.args
    return _cut(asked, setting, resident=True, kept=kept)


def _in_two_reads(asked: Asked, setting: Setting) -> Any:
    """Cuts the strips of the first read, and the reduction of its blocks' partials."""
    _, last = asked.answer
    config = _cut(asked, setting, resident=False, kept=())
    return config, dataclasses.replace(last, pixels=config.blocks)


def _cut(
    asked: Asked, setting: Setting, *, resident: bool, kept: Sequence[int]
) -> strips.Config:
    """Cuts the strips of a setting, with loads of the width that was asked for."""
    view, itemsize, *_, shared = asked.args
    load = asked.kwargs["load"]
    config = strips._config(
        view, itemsize=itemsize, resident=resident, load=load, **setting
    )
    if config.shared(kept) > shared or len(config.chunks) > strips.MAX_CHUNKS:
        raise UnfitError(f"{config.shared(kept)} bytes, {len(config.chunks)} chunks")
    return config


KNOBS = (
    Knob(
        tiles,
        "share",
        read=lambda asked: dataclasses.asdict(asked.answer),
        values=lambda asked: {
            "columns": (4, 8, 16, 32),
            "threads": (256, 384, 512, 640, 768, 896, 1024, 1280),
            "ahead": (0, 36, 56, 64, 100),
        },
        make=lambda asked, setting: tiles.Share(**setting),
    ),
    Knob(
        tiles,
        "configure",
        read=lambda asked: {
            name: asked.kwargs[name] for name in ("per_lane", "of_long", "in_warp")
        },
        values=lambda asked: {
            "per_lane": (8, 16, 32, 64),
            "of_long": (16, 32, 64, 96, 160),
            "in_warp": (512, 1024, 2048, 4096),
        },
        make=_remade,
    ),
    Knob(
        strips,
        "in_two_reads",
        read=lambda asked: _of_strip(asked.answer[0]),
        values=lambda asked: {
            "width": _widths(asked.args[0], 1),
            "blocks": [2**i for i in range(12)],
            "warpgroups": (1, 2, 4),
        },
        make=_in_two_reads,
    ),
    Knob(
        strips,
        "resident",
        read=lambda asked: {} if asked.answer is None else _of_strip(asked.answer),
        values=lambda asked: {
            "width": _widths(asked.args[0], asked.args[0].k),
            "blocks": (1, 2, 4, 8),
            "warpgroups": (1, 2, 4),
        },
        make=_resident,
        optional=True,
    ),
)


def _widths(view: Any, of: int) -> Sequence[int]:
    """Returns widths of strips: multiples of `of` that divide the channels."""
    return [*strips._multiples(of, view.features // of)]


@contextlib.contextmanager
def turned(knob: Knob, setting: Setting | None) -> Iterator[list[Asked]]:
    """Makes the knob's function answer with a setting, if any; records its calls."""
    asked: list[Asked] = []
    original = getattr(knob.module, knob.function)

    def function(*args: Any, **kwargs: Any) -> Any:
        asked.append(Asked(args, kwargs, original(*args, **kwargs)))
        if setting is None:
            return asked[-1].answer
        with mock.patch.object(knob.module, knob.function, original):
            return knob.make(asked[-1], setting)

    with mock.patch.object(knob.module, knob.function, function):
        yield asked


# --- the search -----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Trial:
    """One setting, timed in turn with the current one, or why it could not be timed.

    Attributes:
      setting: the numbers of the setting.
      cut: the kernel's own description of how it cuts its work.
      time, present: seconds per call with this setting and with the current one.
      failure: why it has no time.
    """

    setting: Setting
    cut: str = ""
    time: Quantiles | None = None
    present: Quantiles | None = None
    failure: str = ""

    @property
    def ratio(self) -> float:
        """Its time over the current one's, using medians; infinite without a time."""
        if self.time is None or self.present is None:
            return float("inf")
        return self.time.p50 / self.present.p50


@dataclasses.dataclass(frozen=True)
class Tuned:
    """One pass of a case, and the settings that were tried for it.

    Attributes:
      case, dtype, shape, which: as in `bench.contest.Result`.
      function: the function that cuts the work.
      setting, cut: the current setting, and the kernel's description of it.
      trials: the trials, in the order in which they were made.
    """

    case: str
    dtype: str
    shape: tuple[int, ...]
    which: str
    function: str
    setting: Setting
    cut: str
    trials: list[Trial]

    @property
    def best(self) -> Trial | None:
        """The fastest trial, if it is worth a change."""
        best = min(self.trials, key=lambda trial: trial.ratio, default=None)
        return best if best and best.ratio < WORTH else None


class Bench:
    """One pass of a case, which is compiled and checked again for each setting.

    Attributes:
      present: the pass with the current setting.
    """

    def __init__(self, case: Case, which: str, tensor_bytes: float):
        block = Block(case, nnx.Rngs(0))
        inputs, cotangents = draw(case, tensor_bytes)
        true = truth.forward(block, inputs)
        cotangents = truth.away_from_kinks(case, true, cotangents)
        self._true = truth.backward(block, true, cotangents) | true.outputs
        self._flax = passes(block, inputs, cotangents, [which])[which]()
        fused = nnx.clone(block)
        fusednorm.fuse(fused)
        self.present = passes(fused, inputs, cotangents, [which])[which]
        self.check(self.present)

    def check(self, run: Pass) -> None:
        """Raises `GateError` if the results of a run are wrong."""
        truth.check("fusednorm", self._flax, run(), self._true)

    def again(self) -> tuple[Pass, str]:
        """Recompiles the pass. Also returns how its kernels say that they cut it."""
        jax.clear_caches()
        function = jax.jit(self.present.function.__wrapped__)
        run = Pass(function, self.present.arguments)
        choices = fusednorm.explain(function, *run.arguments).choices
        cut = "; ".join(getattr(choice.plan, "block", "") for choice in choices)
        _ = run.compiled
        return run, cut


def tune(
    case: Case,
    which: str,
    tensor_bytes: float,
    clock: Clock,
    knobs: Sequence[Knob] = KNOBS,
) -> Tuned | None:
    """Searches for a faster setting of one pass.

    Args:
      case: one of the cases.
      which: one of `PASSES`.
      tensor_bytes: approximate bytes of a tensor.
      clock: times functions in turn, and returns seconds of each call, by name.
      knobs: what may be set. The first knob whose function is called is tuned.

    Returns:
      What was tried, or None if no kernel of ours runs.

    Raises:
      GateError: the results with the current setting are wrong.
    """
    bench = Bench(case, which, tensor_bytes)
    for knob in knobs:
        with turned(knob, None) as calls:
            _, cut = bench.again()
        if calls:
            break
    else:
        return None
    asked = calls[-1]
    now = knob.read(asked)
    found = Tuned(
        case.name,
        case.dtype,
        case.shape(tensor_bytes),
        which,
        knob.name,
        now,
        cut,
        trials=[],
    )
    best, best_ratio = now, 1.0
    tried = [now]
    while True:
        for setting in knob.near(asked, best):
            if setting not in tried:
                tried.append(setting)
                found.trials.append(_try(bench, knob, setting, clock))
        fastest = min(found.trials, key=lambda trial: trial.ratio, default=None)
        if fastest is None or fastest.ratio > WORTH * best_ratio:
            return found
        best, best_ratio = fastest.setting, fastest.ratio


def _try(bench: Bench, knob: Knob, setting: Setting, clock: Clock) -> Trial:
    try:
        with turned(knob, setting):
            run, cut = bench.again()
            bench.check(run)
            samples = clock([("present", bench.present), ("candidate", run)])
    except Exception as error:  # a compiler's: too many registers, too much memory
        return Trial(setting, failure=said(error))
    times = {name: Quantiles.of(seconds) for name, seconds in samples.items()}
    return Trial(setting, cut, times["candidate"], times["present"])


# --- the command ----------------------------------------------------------------------


def main(arguments: Sequence[str]) -> int:
    """Tunes the cases that the command line names.

    Returns:
      0, or 2 if there is nothing to tune.
    """
    options = _parser().parse_args(arguments)
    names = chosen([case.name for case in (*CASES, *SWEEP, *FEW)], options.cases)
    cases = [case for case in (*CASES, *SWEEP, *FEW) if case.name in names]
    if not cases:
        print(
            f"no case is named {' or '.join(options.cases)}; see python -m bench --list"
        )
        return 2
    if jax.default_backend() != "gpu":
        print(
            f"nothing to tune on a {jax.default_backend().upper()}: it is how the "
            "kernels of NVIDIA GPUs cut their work"
        )
        return 2
    settings = Settings.usual()
    flush = copy_of(FLUSHING)

    def clock(turns: Turns) -> dict[str, list[float]]:
        flushed = [turn for one in turns for turn in (("flush", flush), one)]
        return on_device(flushed, settings.max_rounds, calls=settings.calls)[0]

    console = terminal.console()
    until = time.monotonic() + options.seconds
    record = earlier(options.out, "tune") or {**head(), "tuned": [], "failures": {}}
    left = []
    for case in cases:
        for which in options.passes:
            name = f"{case.name}, {which}"
            if time.monotonic() > until:
                left.append(name)
                continue
            try:
                found = tune(case, which, settings.tensor_bytes, clock)
            except Exception as error:  # the other cases still run
                record["failures"][name] = said(error)
                console.print(f"FAILED: {name}: {said(error)}", style="bold red")
                continue
            if found is not None:
                keep(record, found)
                save(record, options.out, "tune")
                show(found, console)
    if left:
        console.print(f"no time was left for {'; '.join(left)}")
    if record["tuned"]:
        path = os.path.relpath(save(record, options.out, "tune"))
        console.print(f"wrote {path}", highlight=False)
    return 0


def keep(record: dict[str, Any], found: Tuned) -> None:
    """Puts it into the record, in place of an earlier one of the same case and pass."""
    record["tuned"] = [
        one
        for one in record["tuned"]
        if (one["case"], one["which"]) != (found.case, found.which)
    ]
    record["tuned"].append(dataclasses.asdict(found))


def show(one: Tuned, console: Console) -> None:
    """Prints what was tried, and what would be changed."""
    table = Table(
        title=f"\n{one.case}, {one.dtype}, {one.which}: {one.function} says "
        f"{_in_words(one.setting)} ({one.cut})",
        **STYLE,
    )
    table.add_column("instead")
    for name in ("us", "present us", "ratio"):
        table.add_column(name, justify="right")
    for trial in sorted(one.trials, key=lambda trial: trial.ratio):
        changed = {
            name: value
            for name, value in trial.setting.items()
            if value != one.setting.get(name)
        }
        if trial.time is None or trial.present is None:
            table.add_row(_in_words(changed), trial.failure)
        else:
            table.add_row(
                _in_words(changed),
                _microseconds(trial.time),
                _microseconds(trial.present),
                f"{trial.ratio:.3f}",
            )
    console.print(table)
    if one.best is None:
        console.print("no change: none is faster by 2 %")
    else:
        console.print(
            f"would change {one.function} to {_in_words(one.best.setting)}: "
            f"{one.best.ratio:.3f} of the time"
        )


def _in_words(setting: Setting) -> str:
    return (
        ", ".join(f"{name} {value}" for name, value in setting.items()) or "two reads"
    )


def _microseconds(found: Quantiles) -> str:
    low, middle, high = (f"{1e6 * t:.1f}" for t in (found.p10, found.p50, found.p90))
    return f"{middle} ({low}-{high})"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench tune",
        description=__doc__.partition("\n\n")[2] if __doc__ else None,
        epilog="Example: python -m bench tune --cases 'rms_*' --passes backward",
    )
    parser.add_argument(
        "--cases",
        nargs="+",
        default=[case.name for case in CASES],
        metavar="PATTERN",
        help="cases whose name matches (default: those named after real models)",
    )
    parser.add_argument(
        "--passes",
        nargs="+",
        default=list(PASSES),
        choices=PASSES,
        help="what of each case is tuned (default: %(default)s)",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=420,
        help="after these none is begun (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=HERE / "results" / "local",
        metavar="DIR",
        help="where the JSON goes (default: bench/results/local, ignored by git)",
    )
    return parser
