"""Times whole models: flax's layers, after `fuse`, and with `fuse_neighbours` too."""

import dataclasses
import functools
import gc
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax  # type: ignore[import-untyped]
from flax import nnx

import fusednorm
from bench import memory
from bench.contest import Quantiles, in_words
from bench.models.registry import DTYPES, Size, Which, Workload
from bench.truth import GateError

CONTESTANTS = ("flax", "fusednorm", "neighbours")

# Limit of the relative difference of losses and outputs in float32. Tiny models differ
# by 3e-7 in four steps (measured, CPU), and by 2e-5 where rounding moves a relu's input
# to the other side of 0. A norm gain that is wrong by 2 % makes 2e-3.
LIMIT = 1e-4

# In bfloat16 one rounding more or less moves a loss. How far is measured with flax's
# own step, after each parameter is moved by half a spacing of bfloat16. The contestants
# differed by 0.2 to 0.8 of the largest of three such moves (tiny models, CPU). A gain
# that is wrong by 2 % passes in some models; the float32 run of `--quick` catches it.
FACTOR = 2.0
HALF_SPACING = 2.0**-9
NUDGES = 3

Tree = Any


@dataclasses.dataclass(frozen=True)
class Effort:
    """Settings for how much is run.

    Attributes:
      steps: training steps in which losses must agree.
      seconds: approximate time for which the contestants of one model are timed, unless
        that makes fewer rounds than `min_rounds` or more than `max_rounds`.
      sample: least seconds of one sample, which takes up to `max_calls` calls.
      layers: layers of the stack whose compilation is timed.
      compilations: rounds in which each contestant is compiled.
    """

    steps: int = 4
    seconds: float = 10
    min_rounds: int = 10
    max_rounds: int = 60
    sample: float = 0.02
    max_calls: int = 20
    layers: int = 24
    compilations: int = 3

    @classmethod
    def quick(cls) -> "Effort":
        """Returns settings just large enough to show that everything works."""
        return cls(
            steps=2,
            seconds=0,
            min_rounds=3,
            max_rounds=3,
            max_calls=1,
            layers=2,
            compilations=1,
        )


@dataclasses.dataclass(frozen=True)
class Measured:
    """One workload, run by all contestants.

    Attributes:
      model, which: name and kind of the `Workload`.
      size, batch, dtype: what was run.
      attention: "xla" or "cudnn".
      flax: times of a step with flax's layers.
      fusednorm: times of a step after `fusednorm.fuse`.
      neighbours: times of a step with `fusednorm.fuse_neighbours` too, around the loss
        or the forward function.
      memory: bytes on the device that each contestant needs, as its compiler says.
      loss_difference: largest relative difference from flax's losses or outputs.
      limit: limit of `loss_difference`.
      fused: number of layers that `fuse` replaced, by class.
      left: number of norm layers that `fuse` left unchanged.
      ran: kernels, or reasons for the reference, that `fusednorm.explain` reports for a
        step, and how often each occurs; by contestant.
      joined: number of norm calls that were given each kind of neighbour.
    """

    model: str
    which: Which
    size: Size
    batch: int
    dtype: str
    attention: str
    flax: Quantiles
    fusednorm: Quantiles
    neighbours: Quantiles
    memory: dict[str, int]
    loss_difference: float
    limit: float
    fused: dict[str, int]
    left: int
    ran: dict[str, dict[str, int]]
    joined: dict[str, int]

    @property
    def ratio(self) -> float:
        """fusednorm's time over flax's, using first deciles."""
        return self.fusednorm.p10 / self.flax.p10

    @property
    def ratio_neighbours(self) -> float:
        """fusednorm's time with neighbours over flax's, using first deciles."""
        return self.neighbours.p10 / self.flax.p10


@dataclasses.dataclass(frozen=True)
class Stages:
    """Seconds that a function takes before it runs."""

    trace: float
    lower: float
    compile: float


@dataclasses.dataclass(frozen=True)
class Compiling:
    """Time that a training step takes before it runs, from cleared caches.

    Attributes:
      model: name of the model.
      layers: number of layers, unrolled by a Python loop.
      size: size of a layer.
      flax, fusednorm: medians with flax's layers and with ours.
    """

    model: str
    layers: int
    size: Size
    flax: Stages
    fusednorm: Stages

    @property
    def ratio(self) -> float:
        """fusednorm's sum of the stages over flax's."""
        ours, flaxs = (
            sum(dataclasses.astuple(stages)) for stages in (self.fusednorm, self.flax)
        )
        return ours / flaxs


# --- what runs ------------------------------------------------------------------------


class State(NamedTuple):
    """Arrays that a step needs.

    Attributes:
      moving: arrays that the step updates and returns; they are donated.
      held: arrays that the step only reads.
    """

    moving: list[Any]
    held: list[Any]


class Step:
    """A workload's step by one contestant, as a pure function of lists of arrays.

    jax flattens lists in no time. A model's state would take milliseconds.
    """

    def __init__(
        self,
        workload: Workload,
        graph: nnx.GraphDef[Any],
        templates: tuple[Tree, Tree],
        *,
        neighbours: bool = False,
    ):
        """Builds the function, without tracing it.

        Args:
          workload: what is run.
          graph: graph of the model, with flax's layers or with ours.
          templates: trees like those that `arrange` returns.
          neighbours: whether `fuse_neighbours` wraps `workload.run`.
        """
        run = fusednorm.fuse_neighbours(workload.run) if neighbours else workload.run
        step = {
            "training step": _training_step,
            "forward": _forward,
            "decode": _decode,
        }[workload.which]
        moving, held = (jax.tree.structure(template) for template in templates)

        def flat(moving_leaves: list[Any], held_leaves: list[Any]) -> Any:
            before = jax.tree.unflatten(moving, moving_leaves)
            given = jax.tree.unflatten(held, held_leaves)
            after, output = step(graph, run, before, given)
            return jax.tree.leaves(after), output

        self.jitted = jax.jit(flat, donate_argnums=0)

    def compile(self, state: State) -> None:
        """Compiles the step."""
        self.compiled = self.jitted.trace(state.moving, state.held).lower().compile()

    def __call__(self, state: State) -> tuple[State, jax.Array]:
        """Returns the state after the step; and the loss before it, or the outputs."""
        moving, output = self.compiled(state.moving, state.held)
        return State(moving, state.held), output

    @property
    def memory(self) -> int:
        """Bytes of arguments, results and temporaries; aliased ones count once."""
        return memory.with_arguments(self.compiled)


OPTIMIZER = optax.adamw(1e-4)


def arrange(
    workload: Workload, params: Tree, rest: Tree, examples: tuple[Any, ...]
) -> tuple[Tree, Tree]:
    """Returns what a step of the workload updates, and what it only reads.

    Args:
      workload: what is run.
      params, rest: the model's `nnx.Param`s and its other state.
      examples: the inputs.
    """
    match workload.which:
        case "training step":
            return (params, rest, OPTIMIZER.init(params)), examples
        case "forward":
            return (), (params, rest, examples)
        case "decode":
            *inputs, cache = examples
            return cache, (params, rest, tuple(inputs))


def _training_step(graph: Any, run: Any, moving: Any, inputs: Any) -> Any:
    params, rest, moments = moving

    def loss(params: Any) -> Any:
        model = nnx.merge(graph, params, rest, copy=True)
        value = run(model, *inputs)
        return value, nnx.state(model, nnx.Not(nnx.Param))

    (value, rest), grads = jax.value_and_grad(loss, has_aux=True)(params)
    updates, moments = OPTIMIZER.update(grads, moments, params)
    return (optax.apply_updates(params, updates), rest, moments), value


def _forward(graph: Any, run: Any, moving: Any, held: Any) -> Any:
    params, rest, inputs = held
    return moving, run(nnx.merge(graph, params, rest), *inputs)


def _decode(graph: Any, run: Any, cache: Any, held: Any) -> Any:
    params, rest, inputs = held
    output, cache = run(nnx.merge(graph, params, rest), *inputs, cache)
    return cache, output


class Contest:
    """A workload with all contestants, which share one state.

    Attributes:
      workload, size, dtype: what is run.
      report: what `fuse` returned.
      steps: compiled steps, by contestant.
    """

    def __init__(
        self,
        workload: Workload,
        size: Size,
        dtype: str | None = None,
        others: Sequence[str] = CONTESTANTS[1:],
    ):
        """Builds and compiles the contestants' steps.

        Args:
          workload: what is run.
          size: size of the workload.
          dtype: dtype of its activations; None takes the usual one of the size.
          others: contestants beside flax.
        """
        self.workload, self.size = workload, size
        self.dtype = dtype = dtype or DTYPES[size]
        parts: Any = nnx.split(workload.model(size, dtype), nnx.Param, ...)
        graph, self._params, self._rest = parts
        self._examples = workload.examples(size, dtype)
        fused = nnx.eval_shape(lambda: workload.model(size, dtype))
        self.report = fusednorm.fuse(fused)
        fused_graph = nnx.graphdef(fused)
        templates = self._arranged()
        self.steps = {"flax": Step(workload, graph, templates)}
        for name in others:
            with_neighbours = name == "neighbours"
            self.steps[name] = Step(
                workload, fused_graph, templates, neighbours=with_neighbours
            )
        for step in self.steps.values():
            step.compile(self._state())

    def _arranged(self, seed: int | None = None) -> tuple[Tree, Tree]:
        params = self._params if seed is None else nudged(self._params, seed)
        return arrange(self.workload, params, self._rest, self._examples)

    def _state(self, seed: int | None = None) -> State:
        """Returns the first state, or one with nudged parameters."""
        moving, held = map(jax.tree.leaves, self._arranged(seed))
        return State([jnp.copy(leaf) for leaf in moving], held)

    def results(
        self, contestant: str, count: int, seed: int | None = None
    ) -> list[np.ndarray]:
        """Returns the losses of the first steps, or the outputs, in float64.

        Args:
          contestant: name of the contestant.
          count: training steps. Other workloads run once, because every run gives the
            same.
          seed: seed of nudged parameters; None does not nudge them.
        """
        state, found = self._state(seed), []
        for _ in range(count if self.workload.which == "training step" else 1):
            state, output = self.steps[contestant](state)
            found.append(np.asarray(output, np.float64))
        return found

    def check(self, count: int) -> tuple[float, float]:
        """Compares the contestants with flax.

        Args:
          count: training steps.

        Returns:
          The largest difference, and the limit.

        Raises:
          GateError: a difference exceeds the limit, or is NaN.
        """
        expected = self.results("flax", count)
        limit = LIMIT
        if self.dtype != "float32":
            nudges = [
                difference(self.results("flax", count, seed), expected)
                for seed in range(NUDGES)
            ]
            limit = FACTOR * max(nudges)
        found = {
            name: difference(self.results(name, count), expected)
            for name in self.steps
            if name != "flax"
        }
        for name, value in found.items():
            if not value <= limit:  # not `>`, so that NaN fails too
                what = "loss" if self.workload.which == "training step" else "output"
                raise GateError(
                    f"{name}: the {what} differs from flax's by {value:.1e}; "
                    f"the limit is {limit:.1e}"
                )
        return max(found.values()), limit

    def time(self, effort: Effort) -> dict[str, Quantiles]:
        """Times the contestants in turn, A B C A B C. They pass one state along."""
        state = self._state()
        seconds = dict.fromkeys(self.steps, 0.0)
        for _ in range(2):  # the first warms up
            for name in self.steps:
                state, seconds[name] = self._sample(name, state, 1)
        slowest, total = max(seconds.values()), sum(seconds.values())
        calls = min(max(1, round(effort.sample / slowest)), effort.max_calls)
        wanted = round(effort.seconds / (total * calls))
        samples: dict[str, list[float]] = {name: [] for name in self.steps}
        for _ in range(min(max(wanted, effort.min_rounds), effort.max_rounds)):
            for name in self.steps:
                state, sample = self._sample(name, state, calls)
                samples[name].append(sample)
        return {name: Quantiles.of(found) for name, found in samples.items()}

    def _sample(self, name: str, state: State, calls: int) -> tuple[State, float]:
        """Returns the state after some calls, and the host's seconds per call."""
        step = self.steps[name]
        start = time.perf_counter()
        for _ in range(calls):
            state, output = step(state)
        jax.block_until_ready((state.moving, output))
        return state, (time.perf_counter() - start) / calls

    def choices(self, contestant: str) -> tuple[Any, ...]:
        """Returns what `fusednorm.explain` says about each norm in a step."""
        state = jax.eval_shape(self._state)
        return fusednorm.explain(self.steps[contestant].jitted, *state).choices


def nudged(params: Tree, seed: int) -> Tree:
    """Moves each parameter up or down by half a spacing of bfloat16, at random."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(
        structure,
        [
            leaf * (1 + HALF_SPACING * jax.random.rademacher(key, leaf.shape))
            for leaf, key in zip(leaves, keys, strict=True)
        ],
    )


def difference(results: list[np.ndarray], expected: list[np.ndarray]) -> float:
    """Returns the largest rms(result - expected) / rms(expected) of all results.

    For a scalar, that is the relative difference.
    """
    return max(
        float(np.sqrt(np.mean(np.square(a - b)) / np.mean(np.square(b))))
        for a, b in zip(results, expected, strict=True)
    )


def measure(
    workload: Workload, size: Size, effort: Effort, attention: str = "xla"
) -> Measured:
    """Checks and times one workload.

    Args:
      workload: what is run.
      size: size of the workload.
      effort: how much is run.
      attention: the attention implementation in use, for the record.

    Raises:
      GateError: losses or outputs do not agree.
    """
    # Float32 matrix products stay in float32, so that only the norms differ.
    with jax.default_matmul_precision("float32" if size == "tiny" else None):
        contest = Contest(workload, size)
    off, limit = contest.check(effort.steps)
    times = contest.time(effort)
    choices = {name: contest.choices(name) for name in CONTESTANTS[1:]}
    return Measured(
        model=workload.name,
        which=workload.which,
        size=size,
        batch=workload.batch[size],
        dtype=contest.dtype,
        attention=attention,
        **times,
        memory={name: step.memory for name, step in contest.steps.items()},
        loss_difference=off,
        limit=limit,
        fused=dict(Counter(after for _, _, after in contest.report.replaced)),
        left=len(contest.report.left),
        ran={
            name: dict(Counter(f"{c.backend}: {in_words(c.plan)}" for c in found))
            for name, found in choices.items()
        },
        joined={
            what: sum(bool(getattr(choice, what)) for choice in choices["neighbours"])
            for what in ("activation", "shortcut", "residual")
        },
    )


# --- what comes before it runs --------------------------------------------------------


def compiling(workload: Workload, size: Size, effort: Effort) -> Compiling:
    """Times tracing, lowering and compiling of a deep model's training step.

    JAX's caches are cleared before each round, as in a fresh process.

    Args:
      workload: a training step of a model whose configuration has a `depth`.
      size: size of a layer.
      effort: number of layers and of rounds.
    """
    config = dataclasses.replace(workload.sizes[size], depth=effort.layers)
    deep = dataclasses.replace(workload, sizes={size: config})
    dtype = DTYPES[size]
    model = nnx.eval_shape(lambda: deep.model(size, dtype))
    fused = nnx.eval_shape(lambda: deep.model(size, dtype))
    fusednorm.fuse(fused)
    parts: Any = nnx.split(model, nnx.Param, ...)
    _, params, rest = parts
    templates = jax.eval_shape(
        functools.partial(arrange, deep),
        params,
        rest,
        jax.eval_shape(lambda: deep.examples(size, dtype)),
    )
    state = State(*map(jax.tree.leaves, templates))
    samples: dict[str, list[Stages]] = {"flax": [], "fusednorm": []}
    for _ in range(effort.compilations):
        for name, one in (("flax", model), ("fusednorm", fused)):
            step = Step(deep, nnx.graphdef(one), templates)
            samples[name].append(_stages(step, state))
    return Compiling(
        model=workload.name,
        layers=effort.layers,
        size=size,
        flax=_medians(samples["flax"]),
        fusednorm=_medians(samples["fusednorm"]),
    )


def _stages(step: Step, state: State) -> Stages:
    jax.clear_caches()
    gc.collect()
    return Stages(*_seconds(step, state))


def _seconds(step: Step, state: State) -> Iterator[float]:
    done: Any = None
    todo: list[Callable[[], Any]] = [
        lambda: step.jitted.trace(state.moving, state.held),
        lambda: done.lower(),
        lambda: done.compile(),
    ]
    for stage in todo:
        start = time.perf_counter()
        done = stage()
        yield time.perf_counter() - start


def _medians(samples: list[Stages]) -> Stages:
    columns = zip(*map(dataclasses.astuple, samples), strict=True)
    return Stages(*(statistics.median(column) for column in columns))
