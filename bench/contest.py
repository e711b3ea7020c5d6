"""flax.nnx and fusednorm on one case: compiled, checked, and timed in turn."""

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.experimental.mosaic.gpu.profiler import Cupti
from pytest_benchmark.fixture import BenchmarkFixture

import fusednorm
from bench import truth
from bench.cases import Block, Case, draw
from fusednorm.kernels.dispatch import Fallback, Kernel

PASSES = ("forward", "forward+backward")

# Bytes. One pass of 34 MB takes 0.3 s on two cores, and all that is timed of it 30 s.
LARGEST_ON_CPU = 24e6

Named = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Pass:
    """A jitted function and its arguments: none is a constant in its code."""

    function: Any
    arguments: tuple[Any, ...]

    def __call__(self) -> Any:
        return self.function(*self.arguments)


@dataclasses.dataclass(frozen=True)
class Settings:
    """How much is run.

    Attributes:
      tensor_bytes: of a block's largest tensor, about.
      largest: bytes of a sample; a case of larger ones is left out.
      calls: of a pass, for one sample.
      seconds: what one pass of one case is timed for, about, unless that makes fewer
        than `min_rounds` or more than `max_rounds`.
      steps: training steps of each model.
      traces: how often each model's step is traced.
    """

    tensor_bytes: float
    largest: float = math.inf
    calls: int = 1
    seconds: float = 1.2
    min_rounds: int = 15
    max_rounds: int = 60
    steps: int = 30
    traces: int = 6

    @classmethod
    def usual(cls) -> "Settings":
        """Those of the device at hand."""
        if jax.default_backend() == "cpu":
            return cls(tensor_bytes=12e6, largest=LARGEST_ON_CPU)
        # More than an L2 cache holds (50 MB on H100, 126 MB on B200), or the figures
        # are the cache's.
        if jax.default_backend() == "gpu":  # by its own clock, which hardly wanders
            return cls(tensor_bytes=160e6, calls=3, max_rounds=20)
        # Calls are queued: the launch of one hides behind another.
        return cls(tensor_bytes=160e6, calls=20)

    @classmethod
    def quick(cls) -> "Settings":
        """Enough to see that all works."""
        return cls(
            tensor_bytes=2e5,
            largest=LARGEST_ON_CPU,
            seconds=0,
            min_rounds=3,
            steps=3,
            traces=1,
        )


@dataclasses.dataclass(frozen=True)
class Quantiles:
    """Seconds of one call: first decile, median and last decile of the samples."""

    p10: float
    p50: float
    p90: float

    @classmethod
    def of(cls, samples: list[float]) -> "Quantiles":
        return cls(*(float(q) for q in np.quantile(samples, (0.1, 0.5, 0.9))))


@dataclasses.dataclass(frozen=True)
class Result:
    """One pass of one case, timed.

    Rates and ratios are of first deciles: what else the machine does only adds time.

    Attributes:
      case, layer, shape, dtype: as in `Case`.
      which: one of `PASSES`.
      backend, plan: what ran fusednorm, and the kernels or the reason for the
        reference, as `fusednorm.explain` says.
      floor_bytes: bytes that must cross device memory, or None; see `Case.floor`.
      copy_bytes: bytes that `copy` reads and writes.
      clock: whose times these are: the "host"'s, or "device", the sum of a GPU's
        kernels without what lies between them.
      rounds: samples of each contestant.
      flax, fusednorm, copy: their times.
      kernels: by contestant, median seconds of a GPU's kernels by name.
      errors: of both against float64, by result.
    """

    case: str
    layer: str
    shape: tuple[int, ...]
    dtype: str
    which: str
    backend: str
    plan: str
    floor_bytes: int | None
    copy_bytes: int
    clock: str
    rounds: int
    flax: Quantiles
    fusednorm: Quantiles
    copy: Quantiles
    kernels: dict[str, dict[str, float]]
    errors: Named

    @property
    def ratio(self) -> float:
        """fusednorm's time over flax's: below 1 is faster."""
        return self.fusednorm.p10 / self.flax.p10

    @property
    def copy_rate(self) -> float:
        """Bytes per second of the copy, read and written."""
        return self.copy_bytes / self.copy.p10

    @property
    def rate(self) -> float | None:
        """Bytes of the floor per second of fusednorm's time."""
        return self.floor_bytes and self.floor_bytes / self.fusednorm.p10

    @property
    def share(self) -> float | None:
        """fusednorm's rate over the copy's: 1 is as fast as any kernel can be."""
        return self.rate and self.rate / self.copy_rate

    @property
    def flax_share(self) -> float | None:
        """flax's rate over the copy's."""
        return self.share and self.share * self.ratio


# --- what runs ------------------------------------------------------------------------


def passes(block: Block, inputs: tuple[Any, ...], cotangents: Named) -> dict[str, Pass]:
    """The block's forward, and its forward and backward.

    Returns:
      By the names of `PASSES`. The forward returns the block's outputs, the other also
      their gradients: dx, dscale and so on. Both return BatchNorm's running averages as
      "statistics".
    """
    graph, params, *rest = nnx.split(block, nnx.Param, ...)

    def apply(params: Any, inputs: Any, rest: Any) -> tuple[Named, Any]:
        merged = nnx.merge(graph, params, *rest, copy=True)
        return merged(*inputs), nnx.state(merged, nnx.BatchStat)

    @jax.jit
    def forward(params: Any, inputs: Any, rest: Any) -> Named:
        outputs, statistics = apply(params, inputs, rest)
        return {**outputs, "statistics": statistics}

    @jax.jit
    def forward_backward(params: Any, inputs: Any, rest: Any, cotangents: Named) -> Any:
        outputs, vjp, statistics = jax.vjp(
            lambda params, inputs: apply(params, inputs, rest),
            params,
            inputs,
            has_aux=True,
        )
        # As in a model, where other layers run in between: or XLA shares reads of x.
        outputs, cotangents = lax.optimization_barrier((outputs, cotangents))
        dparams, dinputs = vjp(cotangents)
        grads = {f"d{path[-1]}": leaf[...] for path, leaf in nnx.to_flat_state(dparams)}
        if block.case.residual == "after":  # added before, its gradient is dx itself
            grads["dresidual"] = dinputs[1]
        if block.case.modulated:
            grads |= {"dscale": dinputs[1], "dbias": dinputs[2]}
        return {**outputs, **grads, "dx": dinputs[0], "statistics": statistics}

    return {
        "forward": Pass(forward, (params, inputs, rest)),
        "forward+backward": Pass(forward_backward, (params, inputs, rest, cotangents)),
    }


def copy_of(nbytes: int) -> Pass:
    """A copy of `nbytes` bytes in device memory: the roof of all that moves data.

    It adds a zero that XLA does not know, so that it is neither dropped nor aliased.
    """
    source, zero = jnp.zeros(nbytes // 4, jnp.float32), jnp.float32(0)
    return Pass(jax.jit(jnp.add), (source, zero))


class Contest:
    """One case, ready to be timed: both contestants compiled, and their results right.

    Attributes:
      case: the case.
      shape: of the norm's input.
      tensor_bytes: its bytes.
      backend, plan: as in `Result`.
      flax, fused: the passes of both, by name.
      copy: copies a tensor of that size.
      errors: of both against float64, by result.
    """

    def __init__(self, case: Case, tensor_bytes: float):
        """Builds and checks.

        Raises:
          GateError: fusednorm's results are wrong.
        """
        self.case = case
        self.shape = case.shape(tensor_bytes)
        block = Block(case, nnx.Rngs(0))
        inputs, cotangents = draw(case, tensor_bytes)
        true = truth.forward(block, inputs)
        cotangents = truth.away_from_kinks(case, true, cotangents)

        fused_block = nnx.clone(block)
        fusednorm.fuse(fused_block)
        self.flax = passes(block, inputs, cotangents)
        self.fused = passes(fused_block, inputs, cotangents)
        self.tensor_bytes = cotangents["y"].nbytes
        self.copy = copy_of(self.tensor_bytes)
        choices = fusednorm.explain(self.fused["forward+backward"]).choices
        self.backend = " and ".join(dict.fromkeys(c.backend for c in choices))
        self.plan = "; ".join(dict.fromkeys(in_words(c.plan) for c in choices))

        # The very functions that are timed, both passes.
        results = truth.backward(block, true, cotangents) | true.outputs
        self.errors = truth.check(
            self.flax["forward+backward"](), self.fused["forward+backward"](), results
        )
        self.errors |= {
            f"{name} of the forward alone": error
            for name, error in truth.check(
                self.flax["forward"](), self.fused["forward"](), true.outputs
            ).items()
        }

    def time(
        self, which: str, benchmark: BenchmarkFixture, settings: Settings
    ) -> Result:
        """Times one of `PASSES`: flax and fusednorm in turn.

        A copy runs before each, so that both find the caches alike.
        """
        turns = [
            ("copy", self.copy),
            ("flax", self.flax[which]),
            ("copy", self.copy),
            ("fusednorm", self.fused[which]),
        ]
        rounds = _suitable_rounds([function for _, function in turns], settings)
        kernels: dict[str, dict[str, float]] = {}
        if jax.default_backend() == "gpu":
            clock = "device"
            samples, kernels = on_device(turns, rounds, calls=settings.calls)
        else:
            clock = "host"
            samples = interleave(benchmark, turns, rounds, calls=settings.calls)
        tensors = self.case.floor and sum(self.case.floor[: PASSES.index(which) + 1])
        return Result(
            case=self.case.name,
            layer=self.case.layer,
            shape=self.shape,
            dtype=self.case.dtype,
            which=which,
            backend=self.backend,
            plan=self.plan,
            floor_bytes=tensors and tensors * self.tensor_bytes,
            copy_bytes=2 * self.tensor_bytes,
            clock=clock,
            rounds=rounds,
            flax=Quantiles.of(samples["flax"]),
            fusednorm=Quantiles.of(samples["fusednorm"]),
            copy=Quantiles.of(samples["copy"]),
            kernels=kernels,
            errors=self.errors,
        )


def in_words(plan: Kernel | Fallback) -> str:
    """The kernel's name, or the reason why there is none."""
    return plan.name if isinstance(plan, Kernel) else plan.reason


# --- how it is timed ------------------------------------------------------------------


def interleave(
    benchmark: BenchmarkFixture,
    turns: Sequence[tuple[str, Callable[[], Any]]],
    rounds: int,
    *,
    calls: int = 1,
    before: Callable[[], Any] = lambda: None,
) -> dict[str, list[float]]:
    """Times functions in turn, A B A B, so that what else the machine does hits all.

    Args:
      benchmark: pytest-benchmark's fixture; every sample is a round of it.
      turns: names and functions, warm; a name may come twice.
      rounds: how often each turn comes.
      calls: of the function, for one sample.
      before: what is done before each sample, outside of the time.

    Returns:
      Seconds of one call, by name, in the order in which they were taken.
    """
    order = itertools.cycle(function for _, function in turns)

    def setup() -> tuple[tuple[Callable[[], Any], int], dict[str, Any]]:
        before()
        return (next(order), calls), {}

    benchmark.pedantic(_run, setup=setup, rounds=rounds * len(turns))
    assert benchmark.stats is not None, "pytest-benchmark is disabled: under xdist?"
    samples: dict[str, list[float]] = {name: [] for name, _ in turns}
    for i, seconds in enumerate(benchmark.stats.stats.data):
        samples[turns[i % len(turns)][0]].append(seconds / calls)
    return samples


def on_device(
    turns: Sequence[tuple[str, Pass]], rounds: int, *, calls: int = 1
) -> tuple[dict[str, list[float]], dict[str, dict[str, float]]]:
    """Times functions in turn by the clock of the GPU, kernel by kernel.

    The host's clock would add what Python and the driver take for a call: 20
    microseconds of 80 at these sizes, more where there are more arguments.

    Args:
      turns: names and functions; a name may come twice.
      rounds: how often each turn comes.
      calls: of the function, of each of which there is a sample; one more warms up.

    Returns:
      Seconds of a call's kernels together, by name of the turn, in the order in which
      they were taken; and medians of each kernel, by name of the turn and of it.
    """
    cupti = Cupti(finalize=False)  # type: ignore[call-arg]  # mypy sees no dataclass
    found: dict[str, list[dict[str, float]]] = {name: [] for name, _ in turns}
    for _ in range(rounds):
        for name, turn in turns:
            # The warm call before, whose results are dropped, is none of the samples.
            measure = cupti.measure(turn.function, aggregate=False, iterations=calls)
            _, timings = measure(*turn.arguments)
            assert timings, f"{name} launches no kernel"
            each = timings if calls > 1 else [timings]
            found[name] += [by_kernel(kernels) for kernels in each]
    samples = {
        name: [sum(one.values()) for one in each] for name, each in found.items()
    }
    medians = {
        name: {
            kernel: float(np.median([one[kernel] for one in each]))
            for kernel in each[0]
        }
        for name, each in found.items()
    }
    return samples, medians


def by_kernel(timings: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Seconds by name of a kernel, from CUPTI's milliseconds of each launch."""
    seconds: dict[str, float] = {}
    for name, milliseconds in timings:
        seconds[name] = seconds.get(name, 0.0) + milliseconds / 1e3
    return seconds


def _suitable_rounds(functions: Iterable[Pass], settings: Settings) -> int:
    """How often to time these functions; runs each, so that they are warm then."""
    seconds = 0.0
    for function in functions:
        _run(function, 1)
        start = time.perf_counter()
        _run(function, settings.calls)
        seconds += time.perf_counter() - start
    wanted = round(settings.seconds / seconds)
    return min(max(wanted, settings.min_rounds), settings.max_rounds)


def _run(function: Pass, calls: int) -> None:
    for _ in range(calls):
        result = function()
    jax.block_until_ready(result)
