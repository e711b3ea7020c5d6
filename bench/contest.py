"""Compiles, checks and times flax.nnx, fusednorm and others on one case, in turn."""

import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.experimental.mosaic.gpu.profiler import Cupti

import fusednorm
from bench import memory, truth
from bench.cases import Block, Case, draw
from fusednorm.kernels.dispatch import Fallback, Kernel

if TYPE_CHECKING:  # not needed by callers that compile passes without timing them
    from pytest_benchmark.fixture import BenchmarkFixture

PASSES = ("forward", "forward+backward")
# The two halves of "forward+backward", timed apart, as a model's other layers separate
# them: a forward that keeps what the backward needs, and the backward.
HALVES = ("forward with statistics", "backward")

# Bytes. One pass over 34 MB takes 0.3 s on two cores, and timing its case takes 30 s.
LARGEST_ON_CPU = 24e6

# Bytes: more than twice the L2 cache of an H100 (50 MB) or H200 (60 MB).
FLUSHING = int(160e6)

Named = dict[str, Any]


class Peer(Protocol):
    """Another implementation of the cases' blocks."""

    name: str

    def passes(
        self,
        block: Block,
        inputs: tuple[Any, ...],
        cotangents: Named,
        wanted: Iterable[str],
    ) -> dict[str, Callable[[], Any]]:
        """Builds the same passes as `passes`, or raises an error that says why not."""

    def read(self, found: Named) -> Named:
        """Converts the results of a pass to JAX arrays. This is not timed."""


@dataclasses.dataclass(frozen=True)
class Pass:
    """A jitted function and its arguments, none of them a constant in its code.

    Attributes:
      function: the jitted function.
      arguments: its arguments.
      options: XLA options for this compilation.
    """

    function: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any] | None = None

    @functools.cached_property
    def compiled(self) -> Any:
        """The function, compiled for the arguments."""
        lowered = self.function.lower(*self.arguments)
        return lowered.compile(compiler_options=self.options)

    def __call__(self) -> Any:
        return self.compiled(*self.arguments)

    @property
    def memory(self) -> int:
        """Bytes that it needs beside its arguments: results and temporaries."""
        return memory.beside_arguments(self.compiled)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings for how much is run.

    Attributes:
      tensor_bytes: approximate bytes of a block's largest tensor.
      largest: limit of a sample's bytes; cases with larger samples are left out.
      calls: calls of a pass per timing sample.
      seconds: approximate time for which one pass of one case is timed, unless that
        makes fewer rounds than `min_rounds` or more than `max_rounds`.
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
        """Returns the usual settings for the current device."""
        if jax.default_backend() == "cpu":
            return cls(tensor_bytes=12e6, largest=LARGEST_ON_CPU)
        # Tensors must exceed the L2 cache (50 MB on H100, 126 MB on B200); otherwise
        # the figures would be the cache's.
        if jax.default_backend() == "gpu":  # its own clock varies little
            return cls(tensor_bytes=160e6, calls=3, max_rounds=20)
        # Calls are queued, so the launch of one is hidden behind another.
        return cls(tensor_bytes=160e6, calls=20)

    @classmethod
    def quick(cls) -> "Settings":
        """Returns settings just large enough to show that everything works."""
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
    """Seconds per call: first decile, median and last decile of the samples."""

    p10: float
    p50: float
    p90: float

    @classmethod
    def of(cls, samples: list[float]) -> "Quantiles":
        return cls(*(float(q) for q in np.quantile(samples, (0.1, 0.5, 0.9))))


@dataclasses.dataclass(frozen=True)
class Result:
    """Times of one pass of one case.

    Rates and ratios use first deciles, because other load on the machine only adds
    time.

    Attributes:
      case, layer, shape, dtype: as in `Case`.
      which: one of `PASSES` or `HALVES`.
      backend, plan: the backend that ran fusednorm, and its kernels or the reason for
        the reference, as `fusednorm.explain` reports them.
      floor_bytes: bytes that must cross device memory, or None; see `Case.floor`.
      copy_bytes: bytes that `copy` reads and writes.
      clock: source of the times: "host", or "device", the sum of a GPU's kernels
        without the gaps between them.
      rounds: timed rounds; each gives every contestant at least one sample.
      flax, fusednorm, copy: times of each.
      kernels: median seconds of each GPU kernel, by contestant and kernel name.
      errors: errors of flax, fusednorm and the peers against float64, by result.
      memory: the bytes of `Pass.memory`, of flax and fusednorm.
      peers: times of other libraries, by name.
      peers_without: reason why a peer has no figure here, by name.
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
    memory: dict[str, int] = dataclasses.field(default_factory=dict)
    peers: dict[str, Quantiles] = dataclasses.field(default_factory=dict)
    peers_without: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """fusednorm's time over flax's. Below 1 is faster."""
        return self.fusednorm.p10 / self.flax.p10

    @property
    def copy_rate(self) -> float:
        """Bytes that the copy reads and writes per second."""
        return self.copy_bytes / self.copy.p10

    @property
    def rate(self) -> float | None:
        """Bytes that must cross device memory per second of fusednorm's time."""
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


def passes(
    block: Block,
    inputs: tuple[Any, ...],
    cotangents: Named,
    wanted: Iterable[str] = PASSES,
) -> dict[str, Pass]:
    """Builds the block's forward, its forward and backward, and the latter's halves.

    Returns:
      The wanted passes, by the names of `PASSES` and `HALVES`. Forwards return the
      block's outputs by name, and BatchNorm's running averages as "statistics".
      Backwards return the gradients: dx, dscale and so on. "forward with statistics"
      returns the outputs and what the backward needs.
    """
    graph, params, *rest = nnx.split(block, nnx.Param, ...)

    def apply(params: Any, inputs: Any, rest: Any) -> tuple[Named, Any]:
        merged = nnx.merge(graph, params, *rest, copy=True)
        return merged(*inputs), nnx.state(merged, nnx.BatchStat)

    def with_vjp(params: Any, inputs: Any, rest: Any) -> tuple[Named, Any, Any]:
        def of(params: Any, inputs: Any) -> tuple[Named, Any]:
            return apply(params, inputs, rest)

        return jax.vjp(of, params, inputs, has_aux=True)

    def gradients(vjp: Any, cotangents: Named) -> Named:
        dparams, dinputs = vjp(cotangents)
        found = {f"d{path[-1]}": leaf[...] for path, leaf in nnx.to_flat_state(dparams)}
        if block.case.residual == "after":  # before the norm, its gradient is dx
            found["dresidual"] = dinputs[1]
        if block.case.modulated:
            found |= {"dscale": dinputs[1], "dbias": dinputs[2]}
        return {**found, "dx": dinputs[0]}

    @jax.jit
    def forward(params: Any, inputs: Any, rest: Any) -> Named:
        outputs, statistics = apply(params, inputs, rest)
        return {**outputs, "statistics": statistics}

    @jax.jit
    def forward_backward(params: Any, inputs: Any, rest: Any, cotangents: Named) -> Any:
        outputs, vjp, statistics = with_vjp(params, inputs, rest)
        # Other layers run in between in a model. Without the barrier, XLA would share
        # reads of x between forward and backward.
        outputs, cotangents = lax.optimization_barrier((outputs, cotangents))
        return {**outputs, **gradients(vjp, cotangents), "statistics": statistics}

    @jax.jit
    def forward_with_statistics(params: Any, inputs: Any, rest: Any) -> Any:
        outputs, vjp, statistics = with_vjp(params, inputs, rest)
        return {**outputs, "statistics": statistics}, vjp

    given = params, inputs, rest
    found = {
        "forward": Pass(forward, given),
        "forward+backward": Pass(forward_backward, (*given, cotangents)),
    }
    if set(wanted) & set(HALVES):
        first = Pass(forward_with_statistics, given)
        _, vjp = first()
        found["forward with statistics"] = first
        found["backward"] = Pass(jax.jit(gradients), (vjp, cotangents))
    return {which: found[which] for which in wanted}


def results_of(passes: dict[str, Any]) -> Iterable[tuple[str, Named]]:
    """Yields each pass's name and its results, by name."""
    for which, run in passes.items():
        found = run()
        yield which, found[0] if which == "forward with statistics" else found


def copy_of(nbytes: int) -> Pass:
    """Builds a copy of `nbytes` bytes in device memory: the roof of all data movement.

    The copy adds a zero that XLA does not know, so XLA can neither drop nor alias it.
    """
    source, zero = jnp.zeros(nbytes // 4, jnp.float32), jnp.float32(0)
    return Pass(jax.jit(jnp.add), (source, zero))


class Contest:
    """One case, ready to be timed: all contestants are compiled and checked.

    Attributes:
      case: the case.
      shape: shape of the norm's input.
      tensor_bytes: bytes of y.
      backend, plan: as in `Result`.
      flax, fused: passes of flax and of fusednorm, by name.
      peers: passes of other libraries, by library.
      copy: copies a tensor of `tensor_bytes`.
      flush: copies a tensor that fills the caches, before each sample.
      errors: errors of all contestants against float64, by result.
      failures: reason why a peer has no figure here, by name.
    """

    def __init__(
        self,
        case: Case,
        tensor_bytes: float,
        wanted: Sequence[str] = PASSES,
        peers: Iterable[Peer] = (),
    ):
        """Compiles and checks all contestants.

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
        self.flax = passes(block, inputs, cotangents, wanted)
        self.fused = passes(fused_block, inputs, cotangents, wanted)
        self.tensor_bytes = cotangents["y"].nbytes
        self.copy = copy_of(self.tensor_bytes)
        self.flush = self.copy
        if self.tensor_bytes < FLUSHING and jax.default_backend() == "gpu":
            self.flush = copy_of(FLUSHING)
        choices = [
            choice
            for one in self.fused.values()
            for choice in fusednorm.explain(one.function, *one.arguments).choices
        ]
        self.backend = " and ".join(dict.fromkeys(c.backend for c in choices))
        self.plan = "; ".join(dict.fromkeys(in_words(c.plan) for c in choices))

        # Check every pass of the very functions that are timed.
        results = truth.backward(block, true, cotangents) | true.outputs
        flax_results = dict(results_of(self.flax))
        self.errors: Named = {}
        for which, found in results_of(self.fused):
            errors = truth.check("fusednorm", flax_results[which], found, results)
            self.errors |= {f"{name}, {which}": error for name, error in errors.items()}
        self.peers: dict[str, dict[str, Any]] = {}
        self.failures: dict[str, str] = {}
        for peer in peers:
            try:
                runs = peer.passes(block, inputs, cotangents, wanted)
                for which, found in results_of(runs):
                    errors = truth.check(
                        peer.name,
                        flax_results[which],
                        peer.read(found),
                        results,
                        lenient=True,
                    )
                    for name, error in errors.items():
                        self.errors[f"{name}, {which}"] |= error
            except Exception as error:  # another library may raise anything
                self.failures[peer.name] = said(error)
            else:
                self.peers[peer.name] = runs

    def time(
        self, which: str, benchmark: "BenchmarkFixture", settings: Settings
    ) -> Result:
        """Times one of the wanted passes, all contestants in turn.

        A copy runs before each one, so that all find the caches in the same state.
        """
        contestants = {"flax": self.flax[which], "fusednorm": self.fused[which]}
        contestants |= {name: runs[which] for name, runs in self.peers.items()}
        before = ("copy" if self.flush is self.copy else "flush", self.flush)
        turns = [turn for one in contestants.items() for turn in (before, one)]
        if self.flush is not self.copy:
            turns += [before, ("copy", self.copy)]
        rounds = _suitable_rounds([function for _, function in turns], settings)
        kernels: dict[str, dict[str, float]] = {}
        if jax.default_backend() == "gpu":
            clock = "device"
            samples, kernels = on_device(turns, rounds, calls=settings.calls)
        else:
            clock = "host"
            samples = interleave(benchmark, turns, rounds, calls=settings.calls)
        times = {name: Quantiles.of(found) for name, found in samples.items()}
        tensors = (
            self.case.floor
            and {
                "forward": self.case.floor[0],
                "forward with statistics": self.case.floor[0],
                "backward": self.case.floor[1],
                "forward+backward": sum(self.case.floor),
            }[which]
        )
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
            flax=times["flax"],
            fusednorm=times["fusednorm"],
            copy=times["copy"],
            kernels=kernels,
            errors=self.errors,
            memory={
                "flax": self.flax[which].memory,
                "fusednorm": self.fused[which].memory,
            },
            peers={name: times[name] for name in self.peers},
            peers_without=self.failures,
        )


def said(error: BaseException) -> str:
    """Returns an error's class and the first line of its message."""
    first, *_ = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {first}"


def in_words(plan: Kernel | Fallback) -> str:
    """Returns the kernel's name, or the reason why there is none."""
    return plan.name if isinstance(plan, Kernel) else plan.reason


# --- how it is timed ------------------------------------------------------------------


def interleave(
    benchmark: "BenchmarkFixture",
    turns: Sequence[tuple[str, Callable[[], Any]]],
    rounds: int,
    *,
    calls: int = 1,
    before: Callable[[], Any] = lambda: None,
) -> dict[str, list[float]]:
    """Times functions in turn, A B A B, so that other load on the machine hits all.

    Args:
      benchmark: pytest-benchmark's fixture; every sample is one of its rounds.
      turns: names and functions, already warm; a name may come twice.
      rounds: how often each turn comes.
      calls: calls of the function per sample.
      before: runs before each sample, untimed.

    Returns:
      Seconds per call, by name, in the order in which they were taken.
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
    turns: Sequence[tuple[str, Callable[[], Any]]], rounds: int, *, calls: int = 1
) -> tuple[dict[str, list[float]], dict[str, dict[str, float]]]:
    """Times functions in turn by the GPU's clock, kernel by kernel.

    The host's clock would add the time that Python and the driver need per call: 20
    microseconds of 80 at these sizes, and more with more arguments.

    Args:
      turns: names and functions; a name may come twice.
      rounds: how often each turn comes.
      calls: calls of the function per turn, each of them a sample; one more call warms
        up.

    Returns:
      Seconds of all kernels of a call together, by turn, in the order in which they
      were taken; and the median of each kernel, by turn and kernel.
    """
    cupti = Cupti(finalize=False)  # type: ignore[call-arg]  # mypy sees no dataclass
    found: dict[str, list[dict[str, float]]] = {name: [] for name, _ in turns}
    for _ in range(rounds):
        for name, turn in turns:
            # Cupti first makes a warm-up call and drops its results.
            measure = cupti.measure(turn, aggregate=False, iterations=calls)
            _, timings = measure()
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
    """Sums CUPTI's milliseconds per launch into seconds per kernel name."""
    seconds: dict[str, float] = {}
    for name, milliseconds in timings:
        seconds[name] = seconds.get(name, 0.0) + milliseconds / 1e3
    return seconds


def _suitable_rounds(functions: Iterable[Callable[[], Any]], settings: Settings) -> int:
    """Chooses how many rounds to time; running each function also warms it up."""
    seconds = 0.0
    for function in functions:
        _run(function, 1)
        start = time.perf_counter()
        _run(function, settings.calls)
        seconds += time.perf_counter() - start
    wanted = round(settings.seconds / seconds)
    return min(max(wanted, settings.min_rounds), settings.max_rounds)


def _run(function: Callable[[], Any], calls: int) -> None:
    for _ in range(calls):
        result = function()
    jax.block_until_ready(result)
