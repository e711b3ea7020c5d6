"""Llama-3.2-1B: Grattafiori et al. 2024 (arXiv:2407.21783), sizes of Meta's model card.

With an RMSNorm of each head's queries and keys, as in Qwen3 (arXiv:2505.09388), and
without Llama 3's rescaling of low frequencies for contexts beyond 8192 tokens.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from bench.models.parts import attend, cross_entropy, split_heads

# Of one layer: keys and values, each (batch, tokens, kv_heads, width).
Cache = tuple[jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes.

    Attributes:
      depth: layers.
      features: of a token.
      heads, kv_heads: of queries, and of keys and values.
      hidden: features inside the MLP.
      vocabulary: tokens that there are.
      tokens: of a sequence, or of a cache.
      theta: base of the rotary frequencies.
    """

    depth: int = 16
    features: int = 2048
    heads: int = 32
    kv_heads: int = 8
    hidden: int = 8192
    vocabulary: int = 128256
    tokens: int = 2048
    theta: float = 5e5

    @property
    def width(self) -> int:
        """Features of a head."""
        return self.features // self.heads


REAL = Config()
TINY = Config(
    depth=2, features=64, heads=4, kv_heads=2, hidden=128, vocabulary=96, tokens=24
)


class Attention(nnx.Module):
    """Grouped queries, with normalized and rotated queries and keys."""

    def __init__(self, config: Config, dtype: Any, rngs: nnx.Rngs):
        kind: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        features, shared = config.features, config.kv_heads * config.width
        self.config = config
        self.query = nnx.Linear(features, features, use_bias=False, **kind)
        self.key = nnx.Linear(features, shared, use_bias=False, **kind)
        self.value = nnx.Linear(features, shared, use_bias=False, **kind)
        self.out = nnx.Linear(features, features, use_bias=False, **kind)
        self.query_norm = nnx.RMSNorm(config.width, **kind)
        self.key_norm = nnx.RMSNorm(config.width, **kind)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Each token attends to those before it: x is (batch, tokens, features)."""
        y = attend(*self._heads(x, jnp.arange(x.shape[1])), is_causal=True)
        return self.out(y.reshape(x.shape))

    def decode(
        self, x: jax.Array, position: jax.Array, cache: Cache
    ) -> tuple[jax.Array, Cache]:
        """One token, x: (batch, 1, features), which is added to the cache."""
        q, k, v = self._heads(x, position[None])
        keys, values = (
            lax.dynamic_update_slice_in_dim(old, new, position, axis=1)
            for old, new in zip(cache, (k, v), strict=True)
        )
        seen = jnp.full(x.shape[0], position + 1)
        y = attend(q, keys, values, key_value_seq_lengths=seen)
        return self.out(y.reshape(x.shape)), (keys, values)

    def _heads(self, x: jax.Array, positions: jax.Array) -> tuple[jax.Array, ...]:
        config = self.config
        q = self.query_norm(split_heads(self.query(x), config.heads))
        k = self.key_norm(split_heads(self.key(x), config.kv_heads))
        v = split_heads(self.value(x), config.kv_heads)
        return *(rotate(a, positions, config.theta) for a in (q, k)), v


def rotate(x: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
    """Rotary embedding: Su et al. 2021 (arXiv:2104.09864), halves as Llama pairs them.

    Args:
      x: (batch, tokens, heads, width).
      positions: (tokens,).
      theta: base of the frequencies.
    """
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[:, None, None] * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return rotated.astype(x.dtype)


class Block(nnx.Module):
    """Attention and SwiGLU, each behind an RMSNorm."""

    def __init__(self, config: Config, dtype: Any, rngs: nnx.Rngs):
        kind: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        features, hidden = config.features, config.hidden
        self.attention_norm = nnx.RMSNorm(features, epsilon=1e-5, **kind)
        self.attention = Attention(config, **kind)
        self.mlp_norm = nnx.RMSNorm(features, epsilon=1e-5, **kind)
        self.gate = nnx.Linear(features, hidden, use_bias=False, **kind)
        self.up = nnx.Linear(features, hidden, use_bias=False, **kind)
        self.down = nnx.Linear(hidden, features, use_bias=False, **kind)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x: (batch, tokens, features)."""
        return self._mlp(x + self.attention(self.attention_norm(x)))

    def decode(
        self, x: jax.Array, position: jax.Array, cache: Cache
    ) -> tuple[jax.Array, Cache]:
        """As `Attention.decode`."""
        y, cache = self.attention.decode(self.attention_norm(x), position, cache)
        return self._mlp(x + y), cache

    def _mlp(self, x: jax.Array) -> jax.Array:
        y = self.mlp_norm(x)
        return x + self.down(nnx.silu(self.gate(y)) * self.up(y))


class Llama(nnx.Module):
    """Blocks between an embedding and its transpose.

    In training a block keeps what it was given and computes the rest once more: with
    16 blocks on 8192 tokens XLA's attention would keep 3 GB of each block.
    """

    def __init__(self, config: Config, dtype: Any, rngs: nnx.Rngs):
        kind: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        self.embed = nnx.Embed(config.vocabulary, config.features, **kind)
        self.blocks = nnx.List(Block(config, **kind) for _ in range(config.depth))
        self.norm = nnx.RMSNorm(config.features, epsilon=1e-5, **kind)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """tokens: (batch, tokens). Returns logits, (batch, tokens, vocabulary)."""
        x = self.embed(tokens)
        for block in self.blocks:
            x = nnx.remat(Block.__call__)(block, x)
        return self.embed.attend(self.norm(x))

    def decode(
        self, token: jax.Array, position: jax.Array, caches: list[Cache]
    ) -> tuple[jax.Array, list[Cache]]:
        """token: (batch, 1). Returns logits, (batch, 1, vocabulary), and the caches."""
        x, now = self.embed(token), []
        for block, cache in zip(self.blocks, caches, strict=True):
            x, cache = block.decode(x, position, cache)
            now.append(cache)
        return self.embed.attend(self.norm(x)), now


def inputs(
    config: Config, batch: int, dtype: Any, rngs: nnx.Rngs
) -> tuple[jax.Array, jax.Array]:
    """Tokens and those that follow them, both (batch, tokens), whatever the dtype."""
    shape = (batch, config.tokens + 1)
    drawn = jax.random.randint(rngs(), shape, 0, config.vocabulary)
    return drawn[:, :-1], drawn[:, 1:]


def loss(model: Llama, tokens: jax.Array, following: jax.Array) -> jax.Array:
    """Cross-entropy of the next tokens."""
    return cross_entropy(model(tokens), following)


def decode_inputs(
    config: Config, batch: int, dtype: Any, rngs: nnx.Rngs
) -> tuple[jax.Array, jax.Array, list[Cache]]:
    """A token, (batch, 1), the last position, and caches that are full up to there."""
    token = jax.random.randint(rngs(), (batch, 1), 0, config.vocabulary)
    shape = (batch, config.tokens, config.kv_heads, config.width)
    caches = [
        (
            jax.random.normal(rngs(), shape, jnp.dtype(dtype)),
            jax.random.normal(rngs(), shape, jnp.dtype(dtype)),
        )
        for _ in range(config.depth)
    ]
    return token, jnp.int32(config.tokens - 1), caches


def decode(
    model: Llama, token: jax.Array, position: jax.Array, caches: list[Cache]
) -> tuple[jax.Array, list[Cache]]:
    """Logits of one more token, and the caches with it."""
    return model.decode(token, position, caches)
