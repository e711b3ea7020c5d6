"""ViT-B/16: Dosovitskiy et al. 2020 (arXiv:2010.11929).

The model follows table 1 and equations 1 to 4, without dropout.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from bench.models.parts import Attention


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the model and its inputs.

    Attributes:
      depth: number of layers.
      features: features per token.
      heads: heads of the attention.
      hidden: features inside the MLP.
      patch, image: pixels of a patch's and an image's side.
      classes: number of labels.
    """

    depth: int = 12
    features: int = 768
    heads: int = 12
    hidden: int = 3072
    patch: int = 16
    image: int = 224
    classes: int = 1000


REAL = Config()
TINY = Config(depth=2, features=64, heads=4, hidden=128, patch=8, image=32, classes=10)


class Layer(nnx.Module):
    """Attention and MLP, each after a LayerNorm."""

    def __init__(self, config: Config, dtype: Any, rngs: nnx.Rngs):
        kind: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        self.attention_norm = nnx.LayerNorm(config.features, **kind)
        self.attention = Attention(config.features, config.heads, **kind)
        self.mlp_norm = nnx.LayerNorm(config.features, **kind)
        self.up = nnx.Linear(config.features, config.hidden, **kind)
        self.down = nnx.Linear(config.hidden, config.features, **kind)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the layer to x, (batch, tokens, features)."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.down(nnx.gelu(self.up(self.mlp_norm(x)), approximate=False))


class ViT(nnx.Module):
    """Layers on patches and a class token, which a linear layer then classifies."""

    def __init__(self, config: Config, dtype: Any, rngs: nnx.Rngs):
        kind: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        features, patch = config.features, (config.patch, config.patch)
        tokens = (config.image // config.patch) ** 2 + 1
        self.embed = nnx.Conv(3, features, patch, patch, padding="VALID", **kind)
        self.token = nnx.Param(jnp.zeros((1, 1, features)))
        self.positions = nnx.Param(
            0.02 * jax.random.normal(rngs(), (1, tokens, features))
        )
        self.layers = nnx.List(Layer(config, **kind) for _ in range(config.depth))
        self.norm = nnx.LayerNorm(features, **kind)
        self.head = nnx.Linear(features, config.classes, **kind)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Returns logits, (batch, classes), of images, (batch, height, width, 3)."""
        x = self.embed(images)
        batch, *_, features = x.shape
        token = jnp.broadcast_to(self.token[...], (batch, 1, features)).astype(x.dtype)
        x = jnp.concatenate([token, x.reshape(batch, -1, features)], axis=1)
        x = x + self.positions[...].astype(x.dtype)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x)[:, 0])
