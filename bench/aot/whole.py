"""Compiles layers and a model as a user would: ours, and flax's through XLA alone."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax  # type: ignore[import-untyped]
from flax import nnx
from jax import lax

import fusednorm
from bench.aot import hlo
from bench.aot.chips import Chip
from bench.aot.compile import Compiled, compile_for
from bench.cases import Block, Case, draw
from fusednorm.kernels import dispatch

Pass = Literal["forward", "forward+backward"]
PASSES: tuple[Pass, ...] = ("forward", "forward+backward")


@dataclasses.dataclass(frozen=True)
class Whole:
    """Kernels and bytes of a compiled function.

    Attributes:
      kernels: number of kernels, where one in a loop counts as often as it runs.
      ours: number of these that are Pallas kernels.
      nbytes: bytes of device memory moved if each kernel reads and writes its arrays
        once.
      floor: bytes that must be moved, or 0 where that is not known.
      memory: bytes that a call allocates beyond its arguments.
    """

    kernels: int
    ours: int
    nbytes: int
    floor: int = 0
    memory: int = 0

    @classmethod
    def of(cls, compiled: Compiled, floor: int = 0) -> "Whole":
        """Counts the kernels and bytes of a compiled function."""
        found = hlo.kernels(compiled.hlo)
        return cls(
            kernels=sum(kernel.times for kernel in found),
            ours=sum(kernel.times for kernel in found if kernel.ours),
            nbytes=hlo.total(found),
            floor=floor,
            memory=compiled.memory,
        )


def layer(
    chip: Chip, case: Case, tensor_bytes: float, which: Pass, fused: bool
) -> Whole:
    """Compiles the norm layer of a benchmark case, alone.

    Args:
      chip: the chip to compile for.
      case: the case; only its norm is compiled.
      tensor_bytes: bytes of x.
      which: the pass to compile.
      fused: whether to compile our layer, with the chip's backend named, rather than
        flax's.
    """
    shape, dtype = case.shape(tensor_bytes), jnp.dtype(case.dtype)
    norm = case.norm(shape[-1], dtype=dtype, rngs=nnx.Rngs(0))
    function, params = pure(norm, fused=fused)
    if fused:
        backend, _ = dispatch.KERNELS[chip.platform]
        function = fusednorm.use_backend(backend)(function)
    x = jax.ShapeDtypeStruct(shape, dtype)
    tensor = x.size * dtype.itemsize
    if which == "forward":
        return Whole.of(compile_for(chip, function, params, x), 2 * tensor)
    both = forward_backward(function)
    return Whole.of(compile_for(chip, both, params, x, x), 5 * tensor)


def block(
    chip: Chip, case: Case, tensor_bytes: float, which: Pass, fused: bool
) -> Whole:
    """Compiles the block of a benchmark case, the norm's neighbours included.

    Args:
      chip, tensor_bytes, which: see `layer`.
      case: the case; the operations before and after its norm are compiled with it.
      fused: whether to compile our layers, which choose what runs, rather than flax's.
    """
    function, params = pure(Block(case, nnx.Rngs(0)), fused=fused)
    inputs, _ = jax.eval_shape(functools.partial(draw, case, tensor_bytes))
    if which == "forward":
        return Whole.of(compile_for(chip, function, params, *inputs))
    dy = jax.eval_shape(function, params, *inputs)
    both = forward_backward(function)
    return Whole.of(compile_for(chip, both, params, *inputs, dy))


def pure(model: nnx.Module, *, fused: bool) -> tuple[Callable[..., Any], Any]:
    """Returns the model as a function of parameters and inputs, and the parameters."""
    if fused:
        fusednorm.fuse(model)
    graph, params = nnx.split(model)

    def apply(params: Any, *inputs: Any) -> Any:
        return nnx.merge(graph, params)(*inputs)

    return apply, params


def forward_backward(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function of `function`'s arguments and dy: y and all gradients.

    In a model, the work between forward and backward keeps XLA from sharing their reads
    of x. Here a barrier prevents it.
    """

    def both(*args: Any) -> Any:
        *inputs, dy = args
        y, vjp = jax.vjp(function, *inputs)
        y, dy = lax.optimization_barrier((y, dy))
        return y, vjp(dy)

    return both


# --- a model --------------------------------------------------------------------------


class Layer(nnx.Module):
    """A pre-norm transformer layer."""

    def __init__(self, features: int, heads: int, dtype: Any, rngs: nnx.Rngs):
        kind: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        self.norm_1 = nnx.LayerNorm(features, **kind)
        self.attention = nnx.MultiHeadAttention(
            heads, features, decode=False, deterministic=True, **kind
        )
        self.norm_2 = nnx.RMSNorm(features, **kind)
        self.up = nnx.Linear(features, 4 * features, **kind)
        self.down = nnx.Linear(4 * features, features, **kind)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (batch, tokens, features) to the same shape."""
        x = x + self.attention(self.norm_1(x))
        return x + self.down(nnx.gelu(self.up(self.norm_2(x))))


class Transformer(nnx.Module):
    """Transformer whose layers have two norms each, with a norm at the end."""

    def __init__(
        self,
        layers: int = 4,
        features: int = 1024,
        heads: int = 16,
        vocabulary: int = 8192,
        dtype: Any = jnp.bfloat16,
    ):
        rngs = nnx.Rngs(0)
        kind: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        self.embed = nnx.Embed(vocabulary, features, **kind)
        self.layers = nnx.List(
            [Layer(features, heads, dtype, rngs) for _ in range(layers)]
        )
        self.norm = nnx.LayerNorm(features, **kind)
        self.head = nnx.Linear(features, vocabulary, **kind)
        self.norms = 2 * layers + 1

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps (batch, tokens) integers to (batch, tokens, vocabulary)."""
        x = self.embed(tokens)
        for one in self.layers:
            x = one(x)
        return self.head(self.norm(x))


def training_step(chip: Chip, batch: int, tokens: int, *, fused: bool) -> Whole:
    """Compiles one training step of the transformer: its loss and all gradients."""
    function, params = pure(nnx.eval_shape(Transformer), fused=fused)
    if fused:
        function = fusednorm.fuse_neighbours(function)
    data = jax.ShapeDtypeStruct((batch, tokens), jnp.int32)

    def loss(params: Any, data: Any, labels: Any) -> jax.Array:
        logits = function(params, data)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    step = jax.value_and_grad(loss)
    return Whole.of(compile_for(chip, step, params, data, data))
