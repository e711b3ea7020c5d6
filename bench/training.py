"""Trains a model, and the same model after `fusednorm.fuse`, on the same batches."""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax  # type: ignore[import-untyped]
from flax import nnx
from pytest_benchmark.fixture import BenchmarkFixture

import fusednorm
from bench.contest import Quantiles, in_words, interleave
from bench.models.small import MODELS, digits
from bench.truth import GateError

BATCH = 128

# Limit of both differences. They are a few float32 roundings of 1e-7 each: at most 8e-7
# in 30 steps (measured, CPU). A norm whose gain is wrong by 2 % makes a difference of
# 1e-3 in the first loss.
LIMIT = 1e-5

Tree = Any


@dataclasses.dataclass(frozen=True)
class Training:
    """A model's training with flax's layers, and after `fusednorm.fuse`.

    Attributes:
      model: name of the model.
      fused: number of layers that `fuse` replaced, by class.
      left: number of norm layers that `fuse` left unchanged.
      ran: kernels, or reasons for the reference, that `fusednorm.explain` reports for a
        training step, and how often each occurs.
      flax_losses, fused_losses: loss of each step.
      loss_difference: largest difference between the two, relative to flax's loss.
      gradient_difference: difference of the gradients on the first batch, as the
        function `gradient_difference` measures it.
      flax, fusednorm: times of a step.
    """

    model: str
    fused: dict[str, int]
    left: int
    ran: dict[str, int]
    flax_losses: list[float]
    fused_losses: list[float]
    loss_difference: float
    gradient_difference: float
    flax: Quantiles
    fusednorm: Quantiles

    @property
    def ratio(self) -> float:
        """fusednorm's time per step over flax's, using first deciles."""
        return self.fusednorm.p10 / self.flax.p10


@dataclasses.dataclass(frozen=True)
class Tracing:
    """Times to trace and lower a training step, before any compiling.

    Attributes:
      model: name of the model.
      flax, fusednorm: times with flax's layers and with ours.
    """

    model: str
    flax: Quantiles
    fusednorm: Quantiles

    @property
    def ratio(self) -> float:
        """fusednorm's time over flax's, using first deciles."""
        return self.fusednorm.p10 / self.flax.p10


class Trainee:
    """A model and its optimizer, as a state and pure functions of it."""

    def __init__(self, model: nnx.Module):
        optimizer = nnx.Optimizer(model, optax.sgd(0.02, momentum=0.9), wrt=nnx.Param)
        self.graph, self.state = nnx.split((model, optimizer))
        self.losses: list[jax.Array] = []
        self._step = jax.jit(self.step)

    def step(
        self, state: Tree, images: jax.Array, labels: jax.Array
    ) -> tuple[Tree, jax.Array, Tree]:
        """Computes one step of gradient descent.

        Returns:
          The state after the step; the loss before it, and its gradients.
        """
        model, optimizer = nnx.merge(self.graph, state)
        loss, grads = nnx.value_and_grad(_loss)(model, images, labels)
        optimizer.update(model, grads)
        return nnx.state((model, optimizer)), loss, grads

    def advance(self, images: jax.Array, labels: jax.Array) -> Tree:
        """Takes one step, and returns the gradients."""
        self.state, loss, grads = self._step(self.state, images, labels)
        self.losses.append(loss)
        return grads


def _loss(model: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
    logits = model(images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


class Pair:
    """A model, and a clone of it after `fusednorm.fuse`.

    Attributes:
      name: name of the model in `MODELS`.
      flax, fused: the model and the clone.
      report: what `fuse` returned.
    """

    def __init__(self, name: str):
        model = MODELS[name](nnx.Rngs(0))
        clone = nnx.clone(model)
        self.name = name
        self.report = fusednorm.fuse(clone)
        self.flax, self.fused = Trainee(model), Trainee(clone)


def gradient_difference(grads: Tree, others: Tree) -> float:
    """Returns the relative difference of the gradients of the worst parameter.

    It is rms(grad - other) / (rms(grad) + rms(all grads) / 1000). The second term is
    for parameters whose gradient is 0 by symmetry, so that only noise remains.
    """
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(grads)]
    other_leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(others)]
    overall = _rms(np.concatenate([leaf.ravel() for leaf in leaves]))
    return max(
        _rms(leaf - other) / (_rms(leaf) + overall / 1000)
        for leaf, other in zip(leaves, other_leaves, strict=True)
    )


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


# All matrix products are in float32, so that only the norms differ.
@jax.default_matmul_precision("float32")
def train(pair: Pair, benchmark: BenchmarkFixture, steps: int) -> Training:
    """Trains both models, step by step in turn.

    Args:
      pair: the model with flax's layers and with ours.
      benchmark: pytest-benchmark's fixture; every step is one of its rounds.
      steps: number of steps that each model takes.

    Raises:
      GateError: losses or gradients do not agree.
    """
    flax, fused = pair.flax, pair.fused
    source = digits(BATCH)
    first = next(source)
    explanation = fusednorm.explain(fused.step, fused.state, *first)

    gradients = gradient_difference(flax.advance(*first), fused.advance(*first))
    batches = itertools.islice(source, steps - 1)
    pairs = ((one, batch) for batch in batches for one in (flax, fused))

    def advance() -> jax.Array:
        trainee, batch = next(pairs)
        return trainee.advance(*batch)

    turns = [("flax", advance), ("fusednorm", advance)]
    samples = interleave(benchmark, turns, rounds=steps - 1)
    flax_losses = [float(loss) for loss in flax.losses]
    fused_losses = [float(loss) for loss in fused.losses]
    losses = max(
        abs(ours - flaxs) / abs(flaxs)
        for flaxs, ours in zip(flax_losses, fused_losses, strict=True)
    )
    # `not ... <=` rather than `>`, so that NaN fails too.
    if not (losses <= LIMIT and gradients <= LIMIT):
        raise GateError(
            f"training differs from flax's by {losses:.1e} in the loss and "
            f"{gradients:.1e} in the gradients; the limit is {LIMIT:.0e}"
        )
    return Training(
        model=pair.name,
        fused=dict(Counter(after for _, _, after in pair.report.replaced)),
        left=len(pair.report.left),
        ran=dict(
            Counter(f"{c.backend}: {in_words(c.plan)}" for c in explanation.choices)
        ),
        flax_losses=flax_losses,
        fused_losses=fused_losses,
        loss_difference=losses,
        gradient_difference=gradients,
        flax=Quantiles.of(samples["flax"]),
        fusednorm=Quantiles.of(samples["fusednorm"]),
    )


def trace(pair: Pair, benchmark: BenchmarkFixture, rounds: int) -> Tracing:
    """Times tracing and lowering of a training step.

    JAX's caches are cleared before each sample, as in a fresh process.

    Args:
      pair: the model with flax's layers and with ours.
      benchmark: pytest-benchmark's fixture; every sample is one of its rounds.
      rounds: number of samples of each model.
    """
    batch = next(digits(BATCH))

    def lower(trainee: Trainee) -> Callable[[], None]:
        def run() -> None:
            jax.jit(trainee.step).trace(trainee.state, *batch).lower()

        return run

    turns = [("flax", lower(pair.flax)), ("fusednorm", lower(pair.fused))]
    samples = interleave(benchmark, turns, rounds, before=jax.clear_caches)
    return Tracing(
        model=pair.name,
        flax=Quantiles.of(samples["flax"]),
        fusednorm=Quantiles.of(samples["fusednorm"]),
    )
