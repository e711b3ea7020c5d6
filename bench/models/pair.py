"""The pair stack of AlphaFold 2: Jumper et al. 2021, supplement, algorithms 11 to 15.

doi.org/10.1038/s41586-021-03819-2. The model has the pair half of some of the 48
Evoformer blocks, without MSA and dropout, and the distogram head (supplement, 1.9.8).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from bench.models.parts import attend, cross_entropy, split_heads


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the model and its inputs.

    Attributes:
      depth: number of blocks.
      channels: channels per pair.
      heads: heads of the triangle attention.
      hidden: channels inside the attention.
      expansion: factor of the channels inside the transition.
      residues: residues of a crop.
      bins: bins of the distogram.
    """

    depth: int = 4
    channels: int = 128
    heads: int = 4
    hidden: int = 128
    expansion: int = 4
    residues: int = 256
    bins: int = 64


REAL = Config()
TINY = Config(depth=2, channels=32, heads=2, hidden=32, residues=12, bins=8)


class TriangleProduct(nnx.Module):
    """The triangle product: algorithms 11 (outgoing edges) and 12 (incoming edges)."""

    def __init__(self, config: Config, outgoing: bool, dtype: Any, rngs: nnx.Rngs):
        kind: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        c = config.channels
        self.sum = "ikc,jkc->ijc" if outgoing else "kic,kjc->ijc"
        self.norm_in = nnx.LayerNorm(c, epsilon=1e-5, **kind)
        self.left, self.left_gate = (nnx.Linear(c, c, **kind) for _ in range(2))
        self.right, self.right_gate = (nnx.Linear(c, c, **kind) for _ in range(2))
        self.norm_out = nnx.LayerNorm(c, epsilon=1e-5, **kind)
        self.out, self.gate = (nnx.Linear(c, c, **kind) for _ in range(2))

    def __call__(self, z: jax.Array) -> jax.Array:
        """Returns an update of the pairs z, (residues, residues, channels)."""
        z = self.norm_in(z)
        left = nnx.sigmoid(self.left_gate(z)) * self.left(z)
        right = nnx.sigmoid(self.right_gate(z)) * self.right(z)
        y = self.norm_out(jnp.einsum(self.sum, left, right))
        return nnx.sigmoid(self.gate(z)) * self.out(y)


class TriangleAttention(nnx.Module):
    """Triangle attention: algorithms 13 (starting node) and 14 (ending node)."""

    def __init__(self, config: Config, starting: bool, dtype: Any, rngs: nnx.Rngs):
        kind: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        c, hidden = config.channels, config.hidden
        self.starting, self.heads = starting, config.heads
        self.norm = nnx.LayerNorm(c, epsilon=1e-5, **kind)
        self.query = nnx.Linear(c, hidden, use_bias=False, **kind)
        self.key = nnx.Linear(c, hidden, use_bias=False, **kind)
        self.value = nnx.Linear(c, hidden, use_bias=False, **kind)
        self.bias = nnx.Linear(c, config.heads, use_bias=False, **kind)
        self.gate = nnx.Linear(c, hidden, **kind)
        self.out = nnx.Linear(hidden, c, **kind)

    def __call__(self, z: jax.Array) -> jax.Array:
        """Returns an update of the pairs z, (residues, residues, channels)."""
        z = z if self.starting else z.swapaxes(0, 1)
        z = self.norm(z)
        parts = (self.query(z), self.key(z), self.value(z))
        q, k, v = (split_heads(a, self.heads) for a in parts)
        bias = self.bias(z).transpose(2, 0, 1)[None]
        y = attend(q, k, v, bias=bias).reshape(*z.shape[:-1], -1)
        y = self.out(nnx.sigmoid(self.gate(z)) * y)
        return y if self.starting else y.swapaxes(0, 1)


class Transition(nnx.Module):
    """The pair transition: algorithm 15."""

    def __init__(self, config: Config, dtype: Any, rngs: nnx.Rngs):
        kind: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        c, hidden = config.channels, config.expansion * config.channels
        self.norm = nnx.LayerNorm(c, epsilon=1e-5, **kind)
        self.up = nnx.Linear(c, hidden, **kind)
        self.down = nnx.Linear(hidden, c, **kind)

    def __call__(self, z: jax.Array) -> jax.Array:
        """Returns an update of the pairs z, (residues, residues, channels)."""
        return self.down(nnx.relu(self.up(self.norm(z))))


class Block(nnx.Module):
    """The pair half of an Evoformer block: algorithm 6, lines 6 to 10."""

    def __init__(self, config: Config, dtype: Any, rngs: nnx.Rngs):
        kind: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        self.updates = nnx.List(
            [
                TriangleProduct(config, outgoing=True, **kind),
                TriangleProduct(config, outgoing=False, **kind),
                TriangleAttention(config, starting=True, **kind),
                TriangleAttention(config, starting=False, **kind),
                Transition(config, **kind),
            ]
        )

    def __call__(self, z: jax.Array) -> jax.Array:
        """Returns the updated pairs, (residues, residues, channels)."""
        for update in self.updates:
            z = z + update(z)
        return z


class PairStack(nnx.Module):
    """Blocks, and the distogram of their result."""

    def __init__(self, config: Config, dtype: Any, rngs: nnx.Rngs):
        kind: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        self.blocks = nnx.List(Block(config, **kind) for _ in range(config.depth))
        self.head = nnx.Linear(config.channels, config.bins, **kind)

    def __call__(self, z: jax.Array) -> jax.Array:
        """Returns logits, (..., bins), of pairs z, (residues, residues, channels)."""
        for block in self.blocks:
            z = block(z)
        logits = self.head(z)
        return logits + logits.swapaxes(0, 1)


def inputs(
    config: Config, batch: int, dtype: Any, rngs: nnx.Rngs
) -> tuple[jax.Array, jax.Array]:
    """Draws pairs, (residues, residues, channels), and the bins of their distances.

    There is no batch axis: the stack takes one protein at a time.
    """
    if batch != 1:
        raise ValueError(f"the pair stack takes one protein at a time: {batch=}")
    shape = (config.residues, config.residues)
    pairs = jax.random.normal(rngs(), (*shape, config.channels), jnp.dtype(dtype))
    return pairs, jax.random.randint(rngs(), shape, 0, config.bins)


def loss(model: PairStack, pairs: jax.Array, bins: jax.Array) -> jax.Array:
    """Returns the cross-entropy of the distogram."""
    return cross_entropy(model(pairs), bins)
