"""The UNet of Stable Diffusion 1.5: Rombach et al. 2021 (arXiv:2112.10752).

Sizes are those of CompVis' v1-inference.yaml, without dropout. The spatial transformer
follows the paper's appendix E.2.1, with GEGLU (arXiv:2002.05202).
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from bench.models.parts import Attention


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the model and its inputs.

    Attributes:
      channels: channels of each level; all levels but the last have transformers.
      depth: residual blocks per level on the way down; one more on the way up.
      groups: groups of each GroupNorm.
      heads: heads of the attention.
      latent: pixels of a latent's side.
      latent_channels: channels of the input and the output.
      words, context: tokens of the text, and features per token.
    """

    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    depth: int = 2
    groups: int = 32
    heads: int = 8
    latent: int = 64
    latent_channels: int = 4
    words: int = 77
    context: int = 768


REAL = Config()
TINY = Config(
    channels=(32, 64), depth=1, groups=8, heads=2, latent=8, words=5, context=24
)


class ResidualBlock(nnx.Module):
    """Two times GroupNorm, SiLU and 3x3 convolution, with the time added in between."""

    def __init__(
        self,
        config: Config,
        channels_in: int,
        channels: int,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        kind: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        self.norm1 = nnx.GroupNorm(channels_in, config.groups, epsilon=1e-5, **kind)
        self.conv1 = nnx.Conv(channels_in, channels, (3, 3), **kind)
        self.time = nnx.Linear(4 * config.channels[0], channels, **kind)
        self.norm2 = nnx.GroupNorm(channels, config.groups, epsilon=1e-5, **kind)
        self.conv2 = nnx.Conv(channels, channels, (3, 3), **kind)
        self.skip = nnx.data(None)
        if channels_in != channels:
            self.skip = nnx.Conv(channels_in, channels, (1, 1), **kind)

    def __call__(self, x: jax.Array, time: jax.Array) -> jax.Array:
        """Applies the block.

        Args:
          x: (batch, height, width, channels_in).
          time: (batch, its features).
        """
        y = self.conv1(nnx.silu(self.norm1(x)))
        y = y + self.time(nnx.silu(time))[:, None, None]
        y = self.conv2(nnx.silu(self.norm2(y)))
        return y + (x if self.skip is None else self.skip(x))


class SpatialTransformer(nnx.Module):
    """Attention of pixels to each other, then to the text; then GEGLU."""

    def __init__(self, config: Config, channels: int, dtype: Any, rngs: nnx.Rngs):
        kind: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        self.norm = nnx.GroupNorm(channels, config.groups, **kind)
        self.enter = nnx.Conv(channels, channels, (1, 1), **kind)
        self.norm1 = nnx.LayerNorm(channels, epsilon=1e-5, **kind)
        self.attention1 = Attention(channels, config.heads, use_bias=False, **kind)
        self.norm2 = nnx.LayerNorm(channels, epsilon=1e-5, **kind)
        self.attention2 = Attention(
            channels, config.heads, context=config.context, use_bias=False, **kind
        )
        self.norm3 = nnx.LayerNorm(channels, epsilon=1e-5, **kind)
        self.up = nnx.Linear(channels, 8 * channels, **kind)
        self.down = nnx.Linear(4 * channels, channels, **kind)
        self.leave = nnx.Conv(channels, channels, (1, 1), **kind)

    def __call__(self, x: jax.Array, text: jax.Array) -> jax.Array:
        """Applies the transformer.

        Args:
          x: (batch, height, width, channels).
          text: (batch, words, context).
        """
        pixels = self.enter(self.norm(x))
        y = pixels.reshape(x.shape[0], -1, x.shape[-1])
        y = y + self.attention1(self.norm1(y))
        y = y + self.attention2(self.norm2(y), text)
        value, gate = jnp.split(self.up(self.norm3(y)), 2, axis=-1)
        y = y + self.down(value * nnx.gelu(gate, approximate=False))
        return x + self.leave(y.reshape(x.shape))


class Stage(nnx.Module):
    """A residual block and, on most levels, a transformer."""

    def __init__(
        self,
        config: Config,
        channels_in: int,
        level: int,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        kind: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        channels = config.channels[level]
        self.residual = ResidualBlock(config, channels_in, channels, **kind)
        self.transformer = nnx.data(None)
        if level < len(config.channels) - 1:
            self.transformer = SpatialTransformer(config, channels, **kind)

    def __call__(self, x: jax.Array, time: jax.Array, text: jax.Array) -> jax.Array:
        """Applies the stage to x, (batch, height, width, channels_in)."""
        x = self.residual(x, time)
        return x if self.transformer is None else self.transformer(x, text)


class UNet(nnx.Module):
    """Stages down the levels and up again; each one up also reads an earlier result."""

    def __init__(self, config: Config, dtype: Any, rngs: nnx.Rngs):
        kind: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        first, deepest = config.channels[0], config.channels[-1]
        levels = range(len(config.channels))
        self.time1 = nnx.Linear(first, 4 * first, **kind)
        self.time2 = nnx.Linear(4 * first, 4 * first, **kind)
        self.enter = nnx.Conv(config.latent_channels, first, (3, 3), **kind)

        down: list[nnx.Module] = []
        kept = [first]
        for level in levels:
            channels = config.channels[level]
            for _ in range(config.depth):
                down.append(Stage(config, kept[-1], level, **kind))
                kept.append(channels)
            if level < levels[-1]:
                down.append(nnx.Conv(channels, channels, (3, 3), 2, **kind))
                kept.append(channels)
        self.down = nnx.List(down)

        self.middle1 = ResidualBlock(config, deepest, deepest, **kind)
        self.middle2 = SpatialTransformer(config, deepest, **kind)
        self.middle3 = ResidualBlock(config, deepest, deepest, **kind)

        up: list[nnx.Module] = []
        above = deepest
        for level in reversed(levels):
            channels = config.channels[level]
            for _ in range(config.depth + 1):
                up.append(Stage(config, above + kept.pop(), level, **kind))
                above = channels
            if level > 0:
                up.append(nnx.Conv(channels, channels, (3, 3), **kind))
        self.up = nnx.List(up)

        self.norm = nnx.GroupNorm(first, config.groups, epsilon=1e-5, **kind)
        self.leave = nnx.Conv(first, config.latent_channels, (3, 3), **kind)

    def __call__(self, x: jax.Array, times: jax.Array, text: jax.Array) -> jax.Array:
        """Predicts the noise in x.

        Args:
          x: (batch, height, width, latent channels).
          times: (batch,).
          text: (batch, words, context).
        """
        waves = sinusoids(times, self.time1.in_features).astype(x.dtype)
        time = self.time2(nnx.silu(self.time1(waves)))
        x = self.enter(x)
        kept = [x]
        for step in self.down:
            x = step(x, time, text) if isinstance(step, Stage) else step(x)
            kept.append(x)
        x = self.middle1(x, time)
        x = self.middle3(self.middle2(x, text), time)
        for step in self.up:
            if isinstance(step, Stage):
                x = step(jnp.concatenate([x, kept.pop()], axis=-1), time, text)
            else:
                x = step(x.repeat(2, axis=1).repeat(2, axis=2))
        return self.leave(nnx.silu(self.norm(x)))


def sinusoids(times: jax.Array, features: int) -> jax.Array:
    """Embeds times, (batch,), as (batch, features) in float32."""
    half = features // 2
    frequencies = jnp.exp(-math.log(10000) * jnp.arange(half) / half)
    angles = times[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def inputs(
    config: Config, batch: int, dtype: Any, rngs: nnx.Rngs
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Draws the arguments of `UNet.__call__`."""
    shape = (batch, config.latent, config.latent, config.latent_channels)
    words = (batch, config.words, config.context)
    latents = jax.random.normal(rngs(), shape, jnp.dtype(dtype))
    times = jax.random.randint(rngs(), (batch,), 0, 1000)
    return latents, times, jax.random.normal(rngs(), words, jnp.dtype(dtype))


def training_inputs(
    config: Config, batch: int, dtype: Any, rngs: nnx.Rngs
) -> tuple[jax.Array, ...]:
    """Draws the same as `inputs`, and the noise, which has x's shape."""
    x, *others = inputs(config, batch, dtype, rngs)
    return x, *others, jax.random.normal(rngs(), x.shape, x.dtype)


def forward(model: UNet, x: jax.Array, times: jax.Array, text: jax.Array) -> jax.Array:
    """Predicts the noise in x."""
    return model(x, times, text)


def loss(
    model: UNet, x: jax.Array, times: jax.Array, text: jax.Array, noise: jax.Array
) -> jax.Array:
    """Returns the mean squared error of the noise, in float32."""
    off = model(x, times, text).astype(jnp.float32) - noise.astype(jnp.float32)
    return jnp.mean(off**2)
