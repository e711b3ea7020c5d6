"""Parts that several models share."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

Implementation = Literal["xla", "cudnn"]

_implementation: contextvars.ContextVar[Implementation] = contextvars.ContextVar(
    "attention", default="xla"
)


@contextlib.contextmanager
def use_attention(implementation: Implementation) -> Iterator[None]:
    """Traces attention for XLA, or for cuDNN's own kernels, inside a context."""
    token = _implementation.set(implementation)
    try:
        yield
    finally:
        _implementation.reset(token)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, **options: Any) -> jax.Array:
    """Calls `jax.nn.dot_product_attention` with the implementation in use.

    Args:
      q: (batch, tokens, heads, width).
      k, v: (batch, others, heads or fewer, width).
      options: further arguments of `jax.nn.dot_product_attention`.

    Returns:
      An array of q's shape.
    """
    return jax.nn.dot_product_attention(
        q, k, v, implementation=_implementation.get(), **options
    )


class Attention(nnx.Module):
    """Multi-head attention of tokens to each other, or to a context."""

    def __init__(
        self,
        features: int,
        heads: int,
        *,
        context: int | None = None,
        use_bias: bool = True,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        """Makes the four linear layers.

        Args:
          features: features of x and of the result.
          heads: number of heads, which share the features.
          context: features of the context; None takes those of x.
          use_bias: whether queries, keys and values have a bias.
          dtype: dtype of the result.
          rngs: draw the weights.
        """
        kind: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        context = features if context is None else context
        self.heads = heads
        self.query = nnx.Linear(features, features, use_bias=use_bias, **kind)
        self.key = nnx.Linear(context, features, use_bias=use_bias, **kind)
        self.value = nnx.Linear(context, features, use_bias=use_bias, **kind)
        self.out = nnx.Linear(features, features, **kind)

    def __call__(self, x: jax.Array, context: jax.Array | None = None) -> jax.Array:
        """Lets x attend to a context.

        Args:
          x: (batch, tokens, features).
          context: (batch, others, its features); None is x.
        """
        context = x if context is None else context
        q, k, v = self.query(x), self.key(context), self.value(context)
        y = attend(*(split_heads(a, self.heads) for a in (q, k, v)))
        return self.out(y.reshape(x.shape))


def split_heads(x: jax.Array, heads: int) -> jax.Array:
    """Reshapes (..., features) to (..., heads, width)."""
    return x.reshape(*x.shape[:-1], heads, -1)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the mean cross-entropy over all labels, in float32.

    Args:
      logits: (..., classes).
      labels: (...), int.
    """
    logs = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.take_along_axis(logs, labels[..., None], axis=-1).mean()


# --- classification of images ---------------------------------------------------------


def labelled_images(
    config: Any, batch: int, dtype: Any, rngs: nnx.Rngs
) -> tuple[jax.Array, jax.Array]:
    """Draws images, (batch, image, image, 3), and labels, (batch,).

    Args:
      config: has `image`, the pixels of a side, and `classes`.
      batch: number of images.
      dtype: dtype of the images.
      rngs: draw both.
    """
    shape = (batch, config.image, config.image, 3)
    images = jax.random.normal(rngs(), shape, jnp.dtype(dtype))
    return images, jax.random.randint(rngs(), (batch,), 0, config.classes)


def classification_loss(model: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the cross-entropy of the model's logits."""
    return cross_entropy(model(images), labels)
