"""Llama-3.2-1B: Grattafiori et al. 2024 (arXiv:2407.21783), sizes of Meta's model card.

Each head's queries and keys pass through an RMSNorm, as in Qwen3 (arXiv:2505.09388).
Llama 3's rescaling of low frequencies, for contexts beyond 8192 tokens, is left out.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from bench.models.parts import attend, cross_entropy, split_heads

# The keys and values of one layer, each (batch, tokens, kv_heads, width).
Cache = tuple[jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the model and its inputs.

    Attributes:
      depth: number of layers.
      features: features per token.
      heads, kv_heads: heads of the queries, and of the keys and values.
      hidden: features inside the MLP.
      vocabulary: number of distinct tokens.
      tokens: tokens per sequence, or per cache.
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
        """Features per head."""
        return self.features // self.heads


REAL = Config()
TINY = Config(
    depth=2, features=64, heads=4, kv_heads=2, hidden=128, vocabulary=96, tokens=24
)


class Attention(nnx.Module):
    """Grouped-query attention with normalized and rotated queries and keys."""

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
        """Applies causal attention to x, (batch, tokens, features)."""
        y = attend(*self._heads(x, jnp.arange(x.shape[1])), is_causal=True)
        return self.out(y.reshape(x.shape))

    def decode(
        self, x: jax.Array, position: jax.Array, cache: Cache
    ) -> tuple[jax.Array, Cache]:
        """Decodes one token, x: (batch, 1, features), and adds it to the cache."""
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
    """Applies the rotary embedding of Su et al. 2021 (arXiv:2104.09864).

    Halves are paired as in Llama.

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
    """Attention and SwiGLU, each after an RMSNorm."""

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
        """Applies the block to x, (batch, tokens, features)."""
        return self._mlp(x + self.attention(self.attention_norm(x)))

    def decode(
        self, x: jax.Array, position: jax.Array, cache: Cache
    ) -> tuple[jax.Array, Cache]:
        """Decodes one token, like `Attention.decode`."""
        y, cache = self.attention.decode(self.attention_norm(x), position, cache)
        return self._mlp(x + y), cache

    def _mlp(self, x: jax.Array) -> jax.Array:
        y = self.mlp_norm(x)
        return x + self.down(nnx.silu(self.gate(y)) * self.up(y))


class Llama(nnx.Module):
    """Blocks between an embedding and its transpose.

    In training, a block keeps only its input and recomputes the rest. With 16 blocks on
    8192 tokens, XLA's attention would otherwise keep 3 GB per block.
    """

    def __init__(self, config: Config, dtype: Any, rngs: nnx.Rngs):
        kind: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        self.embed = nnx.Embed(config.vocabulary, config.features, **kind)
        self.blocks = nnx.List(Block(config, **kind) for _ in range(config.depth))
        self.norm = nnx.RMSNorm(config.features, epsilon=1e-5, **kind)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Returns logits, (batch, tokens, vocabulary), of tokens, (batch, tokens)."""
        x = self.embed(tokens)
        for block in self.blocks:
            x = nnx.remat(Block.__call__)(block, x)
        return self.embed.attend(self.norm(x))

    def decode(
        self, token: jax.Array, position: jax.Array, caches: list[Cache]
    ) -> tuple[jax.Array, list[Cache]]:
        """Decodes a token, (batch, 1).

        Returns:
          Logits, (batch, 1, vocabulary), and the caches.
        """
        x, now = self.embed(token), []
        for block, cache in zip(self.blocks, caches, strict=True):
            x, cache = block.decode(x, position, cache)
            now.append(cache)
        return self.embed.attend(self.norm(x)), now


def inputs(
    config: Config, batch: int, dtype: Any, rngs: nnx.Rngs
) -> tuple[jax.Array, jax.Array]:
    """Draws tokens and those that follow them, both (batch, tokens), for any dtype."""
    shape = (batch, config.tokens + 1)
    drawn = jax.random.randint(rngs(), shape, 0, config.vocabulary)
    return drawn[:, :-1], drawn[:, 1:]


def loss(model: Llama, tokens: jax.Array, following: jax.Array) -> jax.Array:
    """Returns the cross-entropy of the following tokens."""
    return cross_entropy(model(tokens), following)


def decode_inputs(
    config: Config, batch: int, dtype: Any, rngs: nnx.Rngs
) -> tuple[jax.Array, jax.Array, list[Cache]]:
    """Draws a token, (batch, 1), for the last position, and caches filled up to it."""
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
    """Returns the logits of one more token, and the caches that include it."""
    return model.decode(token, position, caches)
