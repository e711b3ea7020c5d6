"""ResNet-50: He et al. 2015, "Deep Residual Learning" (arXiv:1512.03385), table 1.

This is the v1.5 of torchvision and NVIDIA: in a block, the 3x3 convolution has the
stride, not the 1x1 convolution before it.
"""

import dataclasses
from typing import Any

import jax
from flax import nnx


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the model and its inputs.

    Attributes:
      depths: number of blocks of each stage.
      width: channels of the stem and inside the first stage's blocks; the latter double
        from stage to stage.
      image: pixels of an image's side.
      classes: number of labels.
    """

    depths: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64
    image: int = 224
    classes: int = 1000


REAL = Config()
TINY = Config(depths=(1, 1), width=16, image=32, classes=10)


class Bottleneck(nnx.Module):
    """1x1, 3x3 and 1x1 convolutions, each with its norm, and a skip connection."""

    def __init__(
        self, channels_in: int, width: int, stride: int, dtype: Any, rngs: nnx.Rngs
    ):
        kind: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        channels = 4 * width
        self.conv1 = _conv(channels_in, width, 1, **kind)
        self.norm1 = _norm(width, **kind)
        self.conv2 = _conv(width, width, 3, stride, **kind)
        self.norm2 = _norm(width, **kind)
        self.conv3 = _conv(width, channels, 1, **kind)
        self.norm3 = _norm(channels, **kind)
        self.project = nnx.data(None)
        if stride != 1 or channels_in != channels:
            self.project = nnx.Sequential(
                _conv(channels_in, channels, 1, stride, **kind), _norm(channels, **kind)
            )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the block to x, (batch, height, width, channels_in)."""
        y = nnx.relu(self.norm1(self.conv1(x)))
        y = nnx.relu(self.norm2(self.conv2(y)))
        y = self.norm3(self.conv3(y))
        return nnx.relu(y + (x if self.project is None else self.project(x)))


class ResNet(nnx.Module):
    """A stem, stages of bottlenecks, and a classifier."""

    def __init__(self, config: Config, dtype: Any, rngs: nnx.Rngs):
        kind: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        channels = config.width
        self.stem = _conv(3, channels, 7, 2, **kind)
        self.norm = _norm(channels, **kind)
        blocks = []
        for stage, depth in enumerate(config.depths):
            width = config.width * 2**stage
            for at in range(depth):
                stride = 2 if at == 0 and stage > 0 else 1
                blocks.append(Bottleneck(channels, width, stride, **kind))
                channels = 4 * width
        self.blocks = nnx.List(blocks)
        self.head = nnx.Linear(channels, config.classes, **kind)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Returns logits, (batch, classes), of images, (batch, height, width, 3)."""
        x = nnx.relu(self.norm(self.stem(images)))
        x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(axis=(1, 2)))


def _conv(
    channels_in: int,
    channels: int,
    size: int,
    stride: int = 1,
    *,
    dtype: Any,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    return nnx.Conv(
        channels_in,
        channels,
        (size, size),
        stride,
        use_bias=False,
        dtype=dtype,
        rngs=rngs,
    )


def _norm(channels: int, dtype: Any, rngs: nnx.Rngs) -> nnx.BatchNorm:
    return nnx.BatchNorm(channels, momentum=0.9, dtype=dtype, rngs=rngs)
