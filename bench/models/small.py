"""A small transformer and a small ResNet on plain flax.nnx, and digits for them."""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from sklearn.datasets import load_digits


class TransformerBlock(nnx.Module):
    """LayerNorm and attention, with normalized queries and keys; RMSNorm and MLP."""

    def __init__(self, features: int, heads: int, rngs: nnx.Rngs):
        self.attention_norm = nnx.LayerNorm(features, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            heads, features, normalize_qk=True, decode=False, rngs=rngs
        )
        self.mlp_norm = nnx.RMSNorm(features, rngs=rngs)
        self.up = nnx.Linear(features, 2 * features, rngs=rngs)
        self.down = nnx.Linear(2 * features, features, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the block to x, (batch, tokens, features)."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.down(nnx.gelu(self.up(self.mlp_norm(x))))


class Transformer(nnx.Module):
    """A transformer that reads an image of 8x8 pixels as 16 tokens of 2x2."""

    def __init__(self, rngs: nnx.Rngs, features: int = 64, depth: int = 3):
        self.embed = nnx.Linear(4, features, rngs=rngs)
        self.positions = nnx.Param(0.02 * jax.random.normal(rngs(), (16, features)))
        self.blocks = nnx.List(
            TransformerBlock(features, heads=4, rngs=rngs) for _ in range(depth)
        )
        self.norm = nnx.LayerNorm(features, rngs=rngs)
        self.head = nnx.Linear(features, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Returns logits, (batch, 10), of images, (batch, 8, 8, 1)."""
        batch = images.shape[0]
        patches = images.reshape(batch, 4, 2, 4, 2).swapaxes(2, 3)
        x = self.embed(patches.reshape(batch, 16, 4)) + self.positions[...]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(axis=1))


class ResidualBlock(nnx.Module):
    """Two 3x3 convolutions, each with its norm, and a 1x1 convolution as their skip."""

    def __init__(
        self,
        channels_in: int,
        channels: int,
        norm: Callable[[int, nnx.Rngs], nnx.Module],
        rngs: nnx.Rngs,
        stride: int = 1,
    ):
        self.conv1 = _conv(channels_in, channels, 3, stride, rngs)
        self.norm1 = norm(channels, rngs)
        self.conv2 = _conv(channels, channels, 3, 1, rngs)
        self.norm2 = norm(channels, rngs)
        self.skip = _conv(channels_in, channels, 1, stride, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the block to x, (batch, height, width, channels_in)."""
        y = nnx.silu(self.norm1(self.conv1(x)))
        return nnx.silu(self.norm2(self.conv2(y)) + self.skip(x))


class ResNet(nnx.Module):
    """A stage with BatchNorm on 8x8 pixels, and one with GroupNorm on 4x4."""

    def __init__(self, rngs: nnx.Rngs, channels: int = 32):
        self.stem = _conv(1, channels, 3, 1, rngs)
        self.norm = _batch_norm(channels, rngs)
        self.blocks = nnx.List(
            [
                ResidualBlock(channels, channels, _batch_norm, rngs),
                ResidualBlock(channels, channels, _batch_norm, rngs),
                ResidualBlock(channels, 2 * channels, _group_norm, rngs, stride=2),
                ResidualBlock(2 * channels, 2 * channels, _group_norm, rngs),
            ]
        )
        self.head = nnx.Linear(2 * channels, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Returns logits, (batch, 10), of images, (batch, 8, 8, 1)."""
        x = nnx.silu(self.norm(self.stem(images)))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(axis=(1, 2)))


def _conv(
    channels_in: int, channels: int, size: int, stride: int, rngs: nnx.Rngs
) -> nnx.Conv:
    return nnx.Conv(
        channels_in,
        channels,
        kernel_size=(size, size),
        strides=stride,
        use_bias=False,
        rngs=rngs,
    )


def _batch_norm(channels: int, rngs: nnx.Rngs) -> nnx.Module:
    return nnx.BatchNorm(channels, momentum=0.9, rngs=rngs)


def _group_norm(channels: int, rngs: nnx.Rngs) -> nnx.Module:
    return nnx.GroupNorm(channels, num_groups=8, rngs=rngs)


MODELS: dict[str, Callable[[nnx.Rngs], nnx.Module]] = {
    "transformer": Transformer,
    "resnet": ResNet,
}


def digits(batch: int, seed: int = 0) -> Iterator[tuple[jax.Array, jax.Array]]:
    """Draws endless batches of scikit-learn's digits at random.

    Yields:
      images: (batch, 8, 8, 1) float32, with mean 0 and deviation 1 over the set.
      labels: (batch,) int32, 0 to 9.
    """
    images, labels = load_digits(return_X_y=True)
    images = (images - images.mean()) / images.std()
    images = images.reshape(-1, 8, 8, 1).astype(np.float32)
    rng = np.random.default_rng(seed)
    while True:
        chosen = rng.choice(len(images), batch, replace=False)
        yield jnp.asarray(images[chosen]), jnp.asarray(labels[chosen], jnp.int32)
