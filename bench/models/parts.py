"""What several models are built of."""

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
    """A context in which attention is traced for XLA, or for cuDNN's own kernels."""
    token = _implementation.set(implementation)
    try:
        yield
    finally:
        _implementation.reset(token)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, **options: Any) -> jax.Array:
    """`jax.nn.dot_product_attention` with the implementation in use.

    Args:
      q: (batch, tokens, heads, width).
      k, v: (batch, others, heads or fewer, width).
      options: of `jax.nn.dot_product_attention`.

    Returns:
      As q.
    """
    return jax.nn.dot_product_attention(
        q, k, v, implementation=_implementation.get(), **options
    )


class Attention(nnx.Module):
    """Multi-head attention of tokens to themselves, or to a context."""

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
        """Makes the four products.

        Args:
          features: of x and of the result.
          heads: which share the features.
          context: features of the context; None is those of x.
          use_bias: of queries, keys and values.
          dtype: of the result.
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
        """x: (batch, tokens, features); context: (batch, others, its features)."""
        context = x if context is None else context
        q, k, v = self.query(x), self.key(context), self.value(context)
        y = attend(*(split_heads(a, self.heads) for a in (q, k, v)))
        return self.out(y.reshape(x.shape))


def split_heads(x: jax.Array, heads: int) -> jax.Array:
    """(..., features) -> (..., heads, width)."""
    return x.reshape(*x.shape[:-1], heads, -1)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean over all labels, in float32.

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
    """Images, (batch, image, image, 3), and labels, (batch,).

    Args:
      config: has `image`, pixels of a side, and `classes`.
      batch: how many.
      dtype: of the images.
      rngs: draw both.
    """
    shape = (batch, config.image, config.image, 3)
    images = jax.random.normal(rngs(), shape, jnp.dtype(dtype))
    return images, jax.random.randint(rngs(), (batch,), 0, config.classes)


def classification_loss(model: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Cross-entropy of the model's logits."""
    return cross_entropy(model(images), labels)
