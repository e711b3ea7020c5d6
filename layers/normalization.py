"""LayerNorm, RMSNorm, GroupNorm, BatchNorm and InstanceNorm that replace flax.nnx's.

Each layer subclasses flax's and replaces only its `__call__`. The constructor, state
tree, metadata, `train()`, `eval()`, `nnx.view` and checkpoints are flax's own, and so
are all output shapes and dtypes. A call takes more keywords: `activation`,
`scale_offset` and `residual`, and for LayerNorm and RMSNorm also `scale` and `bias`.
The kernels apply them to the values that they hold in registers. Results differ from
flax's only in their numbers, for the better:

  - The variance is centred wherever the mean is more than two deviations from 0,
    whatever `use_fast_variance` says. Nearer to 0, the reference may take E[x^2] -
    E[x]^2 on a CPU or TPU. This formula is flax's default, and it loses all digits
    where the mean is a few thousand times the deviation. `use_fast_variance` is
    accepted, and has no effect on results or speed.
  - x, scale, bias and running statistics are used at their own precision, in float32
    arithmetic. flax rounds them to `dtype` first.
  - If `axis_name` is given, each device is weighted by its count of elements, so that
    masked statistics are those of the whole batch. flax averages the devices' means.
  - A mask that selects nothing gives mean 0, variance 1 and no gradient through them,
    and leaves running statistics unchanged (an empty batch does the same). flax gives
    NaN.
  - GroupNorm takes any `reduction_axes` that include the last axis, and any mask that
    broadcasts to x. flax repeats its statistics along axis 1 whatever the axes, which
    is wrong for others, and fails on a mask of one channel.

A `promote_dtype` other than flax's default is called as flax calls it, and the arrays
it returns are normalized. What flax does not know comes behind flax's arrays, if a call
has it: an RMSNorm's bias, then a residual.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes

from fusednorm.kernels import functional, parts


def _promote(
    layer: Any, x: Any, *variables: Any, given: Sequence[Any] = (), statistics: int = 0
) -> tuple[list[Any], Any]:
    """Returns the arrays to normalize with, and the output's dtype by flax's rules.

    Args:
      variables: the layer's Variables, or the call's scale and bias in their place. A
        user's `promote_dtype` receives all of them, None included.
      given: arrays of the call. A user's `promote_dtype` receives those that are not
        None.
      statistics: number of leading variables that are running averages. They affect
        flax's own promotion, but not the output dtype after a user's one.

    Raises:
      ValueError: the user's `promote_dtype` returns more or fewer arrays than it got.
    """
    present = [array for array in given if array is not None]
    arrays = (x, *(None if v is None else v[...] for v in variables), *present)
    deciding = arrays
    if layer.promote_dtype is not dtypes.promote_dtype:
        expected = len(arrays)
        arrays = tuple(layer.promote_dtype(arrays, dtype=layer.dtype))
        if len(arrays) != expected:
            raise ValueError(
                f"promote_dtype must return as many arrays as it takes, {expected}; "
                f"it returned {len(arrays)}."
            )
        deciding = (arrays[0], *arrays[1 + statistics :])
    dtype = dtypes.canonicalize_dtype(*deciding, dtype=layer.dtype)
    own, rest = arrays[1 : 1 + len(variables)], iter(arrays[1 + len(variables) :])
    flat = [  # the layer's own parameters hold for all samples, whatever their shape
        jnp.reshape(array, -1)
        if array is not None and isinstance(variable, nnx.Variable)
        else array
        for array, variable in zip(own, variables, strict=True)
    ]
    return [
        arrays[0],
        *flat,
        *(None if a is None else next(rest) for a in given),
    ], dtype


def _own_or_given(layer: Any, name: str, given: Any) -> Any:
    """Returns the layer's scale or bias, or the call's one if the layer has none."""
    own = getattr(layer, name)
    if own is not None and given is not None:
        raise ValueError(
            f"The layer has a {name}, and the call passes another one of shape "
            f"{jnp.shape(given)}: construct the layer with use_{name}=False."
        )
    return own if given is None else jnp.asarray(given)


def _common_arguments(
    layer: Any, dtype: Any, mask: Any, activation: str | None, scale_offset: float
) -> dict[str, Any]:
    """Returns the arguments common to all functions that compute statistics."""
    return {
        "activation": activation,
        "scale_offset": scale_offset,
        "epsilon": layer.epsilon,
        "dtype": dtype,
        "mask": mask,
        "axis_name": layer.axis_name,
        "axis_index_groups": layer.axis_index_groups,
    }


def _with_signature_of[F: Callable[..., Any]](
    layer: type[nnx.Module],
) -> Callable[[F], F]:
    """Gives a `__call__` the signature of flax's for those who inspect it.

    `nnx.Sequential` passes a keyword to the layers whose signature has it, and
    `nnx.vmap` and `nnx.remat` refuse keywords with defaults. They treat our layers as
    they do flax's.
    """

    def decorate(call: F) -> F:
        call.__signature__ = inspect.signature(layer.__call__)  # type: ignore[attr-defined]
        return call

    return decorate


class LayerNorm(nnx.LayerNorm):
    """Layer normalization, a replacement for `flax.nnx.LayerNorm`.

    y = (x - mean) * rsqrt(var + epsilon) * scale + bias. Each example's mean and
    variance are taken over `reduction_axes`. Arguments and state are those of flax.nnx.

    >>> import fusednorm, jax
    >>> from flax import nnx
    >>> x = jax.random.normal(jax.random.key(0), (3, 4, 5, 6))
    >>> layer = fusednorm.LayerNorm(num_features=6, rngs=nnx.Rngs(0))
    >>> nnx.state(layer)
    State({
      'bias': Param( # 6 (24 B)
        value=Array([0., 0., 0., 0., 0., 0.], dtype=float32)
      ),
      'scale': Param( # 6 (24 B)
        value=Array([1., 1., 1., 1., 1., 1.], dtype=float32)
      )
    })
    >>> y = layer(x)

    Source: Ba et al. 2016 (arXiv:1607.06450), eq. 3 and 4.
    """

    @_with_signature_of(nnx.LayerNorm)
    def __call__(
        self,
        x: Any,
        *,
        mask: jax.Array | None = None,
        activation: str | None = None,
        scale_offset: float = 0.0,
        residual: Any = None,
        scale: Any = None,
        bias: Any = None,
    ) -> Any:
        """Normalizes x.

        The signature that `help` and `inspect` show is flax's, so that `nnx.Sequential`
        passes on what it passes to flax's layer. `nnx.remat` and the `static_argnames`
        of `jax.jit` therefore refuse the other keywords: give them a function of your
        own, such as `lambda norm, x, r: norm(x, residual=r)`.

        Args:
          x: array of any shape. The product of its sizes along `feature_axes` is
            `num_features`.
          mask: bool, broadcastable to x: the elements that enter the statistics.
          activation: None, "relu", "silu", "gelu" or "gelu_tanh", applied to the result
            before it is rounded to its dtype.
          scale_offset: added to the scale, in float32. Use 1.0 if the layer stores the
            scale's distance from 1 (`scale_init=nnx.initializers.zeros_init()`).
          residual: array of x's shape. The layer normalizes h = x + residual and also
            returns h, in the dtype that the two promote to:
            `y, h = layer(x, residual=r)`.
          scale, bias: shape (features,), or arrays of x's rank that broadcast to x, for
            adaptive layer norm. A layer takes only what it has none of: construct it
            with `use_scale=False` or `use_bias=False`. (An RMSNorm has no bias.)

        Returns:
          Array of x's shape, with the dtype that flax promotes to; (y, h) if there is a
          residual.

        Raises:
          TypeError: x does not fit scale or bias along `feature_axes`.
          ValueError: an axis is out of range, the mask is not bool or does not
            broadcast to x, the residual has another shape, the call gives a scale or
            bias to a layer that has one, `scale_offset` is given without a scale, the
            activation is unknown or applied to complex x or output, or `dtype` is not a
            float or complex type.
        """
        scale = _own_or_given(self, "scale", scale)
        bias = _own_or_given(self, "bias", bias)
        (x, scale, bias, residual), dtype = _promote(
            self, x, scale, bias, given=[residual]
        )
        return functional.layer_norm(
            x,
            scale,
            bias,
            reduction_axes=self.reduction_axes,
            feature_axes=self.feature_axes,
            residual=residual,
            **_common_arguments(self, dtype, mask, activation, scale_offset),
        )


class RMSNorm(nnx.RMSNorm):
    """Root-mean-square normalization, a replacement for `flax.nnx.RMSNorm`.

    y = x * rsqrt(mean(x^2) + epsilon) * scale, where the mean is over `reduction_axes`.
    Arguments and state are those of flax.nnx.

    >>> import fusednorm, jax
    >>> from flax import nnx
    >>> x = jax.random.normal(jax.random.key(0), (5, 6))
    >>> layer = fusednorm.RMSNorm(num_features=6, rngs=nnx.Rngs(0))
    >>> nnx.state(layer)
    State({
      'scale': Param( # 6 (24 B)
        value=Array([1., 1., 1., 1., 1., 1.], dtype=float32)
      )
    })
    >>> y = layer(x)

    Source: Zhang and Sennrich 2019 (arXiv:1910.07467), eq. 4.
    """

    @_with_signature_of(nnx.RMSNorm)
    def __call__(
        self,
        x: Any,
        mask: jax.Array | None = None,
        *,
        activation: str | None = None,
        scale_offset: float = 0.0,
        residual: Any = None,
        scale: Any = None,
        bias: Any = None,
    ) -> Any:
        """Normalizes x. Arguments, result and errors are those of `LayerNorm`."""
        scale = _own_or_given(self, "scale", scale)
        (x, scale, bias, residual), dtype = _promote(
            self, x, scale, given=[bias, residual]
        )
        return functional.rms_norm(
            x,
            scale,
            bias=bias,
            reduction_axes=self.reduction_axes,
            feature_axes=self.feature_axes,
            residual=residual,
            **_common_arguments(self, dtype, mask, activation, scale_offset),
        )


class GroupNorm(nnx.GroupNorm):
    """Group normalization, a replacement for `flax.nnx.GroupNorm`.

    The formula is `LayerNorm`'s, with one mean and variance per sample and group of
    channels. Arguments and state are those of flax.nnx.

    >>> import fusednorm, jax
    >>> import numpy as np
    >>> from flax import nnx
    >>> x = jax.random.normal(jax.random.key(0), (3, 4, 5, 6))
    >>> layer = fusednorm.GroupNorm(num_features=6, num_groups=3, rngs=nnx.Rngs(0))
    >>> nnx.state(layer)
    State({
      'bias': Param( # 6 (24 B)
        value=Array([0., 0., 0., 0., 0., 0.], dtype=float32)
      ),
      'scale': Param( # 6 (24 B)
        value=Array([1., 1., 1., 1., 1., 1.], dtype=float32)
      )
    })
    >>> y = layer(x)
    >>> y = fusednorm.GroupNorm(num_features=6, num_groups=1, rngs=nnx.Rngs(0))(x)
    >>> layer = fusednorm.LayerNorm(
    ...     num_features=6, reduction_axes=(1, 2, 3), rngs=nnx.Rngs(0)
    ... )
    >>> np.testing.assert_allclose(y, layer(x), rtol=1e-6, atol=1e-6)

    Source: Wu and He 2018 (arXiv:1803.08494), eq. 1 to 3 and 7.
    """

    @_with_signature_of(nnx.GroupNorm)
    def __call__(
        self,
        x: Any,
        *,
        mask: jax.Array | None = None,
        activation: str | None = None,
        scale_offset: float = 0.0,
        residual: Any = None,
    ) -> jax.Array:
        """Normalizes x.

        Args:
          x: shape (batch, ..., num_features).
          mask: bool, broadcastable to x: the elements that enter the statistics.
          activation: None, "relu", "silu", "gelu" or "gelu_tanh", applied to the result
            before it is rounded to its dtype.
          scale_offset: added to the scale, in float32. Use 1.0 if the layer stores the
            scale's distance from 1 (`scale_init=nnx.initializers.zeros_init()`).
          residual: array of x's shape, added to the result before the activation, in
            the dtype of the arithmetic.

        Returns:
          Array of x's shape, with the dtype that flax promotes to.

        Raises:
          TypeError: x's last axis is not `num_features` long.
          ValueError: `reduction_axes` lacks the last axis or is out of range, the mask
            is not bool or does not broadcast to x, the residual has another shape,
            `scale_offset` is given and the layer has no scale, the activation is
            unknown or applied to complex x or output, or `dtype` is not a float or
            complex type.
        """
        channels = self.num_groups * self.group_size
        last = jnp.shape(x)[-1:]
        if last != (channels,) and not any(map(functional.is_symbolic, last)):
            raise TypeError(
                f"x has shape {jnp.shape(x)}, expected {channels} channels along the "
                f"last axis: num_groups={self.num_groups} of "
                f"group_size={self.group_size}."
            )
        (x, scale, bias, residual), dtype = _promote(
            self, x, self.scale, self.bias, given=[residual]
        )
        return functional.group_norm(
            x,
            scale,
            bias,
            num_groups=self.num_groups,
            reduction_axes=self.reduction_axes,
            residual=residual,
            **_common_arguments(self, dtype, mask, activation, scale_offset),
        )


class InstanceNorm(nnx.InstanceNorm):
    """Instance normalization, a replacement for `flax.nnx.InstanceNorm`.

    The formula is `LayerNorm`'s, with one mean and variance per sample and channel.
    Arguments and state are those of flax.nnx.

    >>> import fusednorm, jax
    >>> import numpy as np
    >>> from flax import nnx
    >>> x = jax.random.normal(jax.random.key(0), (2, 3, 4, 5))
    >>> layer = fusednorm.InstanceNorm(5, rngs=nnx.Rngs(0))
    >>> nnx.state(layer, nnx.Param)
    State({
      'bias': Param( # 5 (20 B)
        value=Array([0., 0., 0., 0., 0.], dtype=float32)
      ),
      'scale': Param( # 5 (20 B)
        value=Array([1., 1., 1., 1., 1.], dtype=float32)
      )
    })
    >>> y = layer(x)
    >>> y2 = fusednorm.LayerNorm(
    ...     5, reduction_axes=[1, 2], feature_axes=-1, rngs=nnx.Rngs(0)
    ... )(x)
    >>> np.testing.assert_allclose(y, y2, atol=1e-6)
    >>> y3 = fusednorm.GroupNorm(5, num_groups=5, rngs=nnx.Rngs(0))(x)
    >>> np.testing.assert_allclose(y, y3, atol=1e-6)

    Source: Ulyanov et al. 2016 (arXiv:1607.08022), eq. 2.
    """

    @_with_signature_of(nnx.InstanceNorm)
    def __call__(
        self,
        x: Any,
        *,
        mask: jax.Array | None = None,
        activation: str | None = None,
        scale_offset: float = 0.0,
        residual: Any = None,
    ) -> jax.Array:
        """Normalizes x.

        Args:
          x: shape (batch, ...), with the channels along `feature_axes`.
          mask: bool, broadcastable to x: the elements that enter the statistics.
          activation: None, "relu", "silu", "gelu" or "gelu_tanh", applied to the result
            before it is rounded to its dtype.
          scale_offset: added to the scale, in float32. Use 1.0 if the layer stores the
            scale's distance from 1 (`scale_init=nnx.initializers.zeros_init()`).
          residual: array of x's shape, added to the result before the activation, in
            the dtype of the arithmetic.

        Returns:
          Array of x's shape, with the dtype that flax promotes to.

        Raises:
          TypeError: x does not fit scale or bias along `feature_axes`.
          ValueError: `feature_axes` includes the first axis or is out of range, the
            mask is not bool or does not broadcast to x, the residual has another shape,
            `scale_offset` is given and the layer has no scale, the activation is
            unknown or applied to complex x or output, or `dtype` is not a float or
            complex type.
        """
        (x, scale, bias, residual), dtype = _promote(
            self, x, self.scale, self.bias, given=[residual]
        )
        return functional.instance_norm(
            x,
            scale,
            bias,
            feature_axes=self.feature_axes,
            residual=residual,
            **_common_arguments(self, dtype, mask, activation, scale_offset),
        )


class BatchNorm(nnx.BatchNorm):
    """Batch normalization, a replacement for `flax.nnx.BatchNorm`.

    The formula is `LayerNorm`'s, with the mean and variance of each channel over the
    batch, or with running averages of them. Arguments and state are those of flax.nnx.
    A running average becomes `momentum * average + (1 - momentum) * batch`, using the
    biased variance.

    >>> import fusednorm, jax, jax.numpy as jnp
    >>> from flax import nnx
    >>> x = jax.random.normal(jax.random.key(0), (5, 6))
    >>> layer = fusednorm.BatchNorm(
    ...     num_features=6,
    ...     momentum=0.9,
    ...     epsilon=1e-5,
    ...     dtype=jnp.float32,
    ...     rngs=nnx.Rngs(0),
    ... )
    >>> jax.tree.map(jnp.shape, nnx.state(layer))
    State({
      'bias': Param(
        value=(6,)
      ),
      'mean': BatchStat(
        value=(6,)
      ),
      'scale': Param(
        value=(6,)
      ),
      'var': BatchStat(
        value=(6,)
      )
    })
    >>> # calculate batch norm on input and update batch statistics
    >>> layer.train()
    >>> y = layer(x)
    >>> batch_stats1 = nnx.clone(nnx.state(layer, nnx.BatchStat)) # keep a copy
    >>> y = layer(x)
    >>> batch_stats2 = nnx.clone(nnx.state(layer, nnx.BatchStat))
    >>> assert (batch_stats1['mean'][...] != batch_stats2['mean'][...]).all()
    >>> assert (batch_stats1['var'][...] != batch_stats2['var'][...]).all()
    >>> # use stored batch statistics' running average
    >>> layer.eval()
    >>> y = layer(x)
    >>> batch_stats3 = nnx.state(layer, nnx.BatchStat)
    >>> assert (batch_stats2['mean'][...] == batch_stats3['mean'][...]).all()
    >>> assert (batch_stats2['var'][...] == batch_stats3['var'][...]).all()

    Source: Ioffe and Szegedy 2015 (arXiv:1502.03167), algorithms 1 and 2.
    """

    @_with_signature_of(nnx.BatchNorm)
    def __call__(
        self,
        x: Any,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
        activation: str | None = None,
        scale_offset: float = 0.0,
        residual: Any = None,
    ) -> jax.Array:
        """Normalizes x, and updates the running averages in training.

        Args:
          x: array of any shape, `num_features` long along `axis`.
          use_running_average: whether to normalize with the running averages instead of
            the batch's statistics. It overrides the constructor, `train()` and
            `eval()`.
          mask: bool, broadcastable to x: the elements that enter the statistics.
          activation: None, "relu", "silu", "gelu" or "gelu_tanh", applied to the result
            before it is rounded to its dtype.
          scale_offset: added to the scale, in float32. Use 1.0 if the layer stores the
            scale's distance from 1 (`scale_init=nnx.initializers.zeros_init()`).
          residual: array of x's shape, added to the result before the activation, in
            the dtype of the arithmetic.

        Returns:
          Array of x's shape, with the dtype that flax promotes to.

        Raises:
          TypeError: x is not `num_features` long along `axis`.
          ValueError: `use_running_average` was given nowhere, the axis is out of range,
            the mask is not bool or does not broadcast to x (in training only; running
            averages ignore the mask), the residual has another shape, `scale_offset` is
            given and the layer has no scale, the activation is unknown or applied to
            complex x or output, or `dtype` is not a float or complex type.
        """
        if use_running_average is None:
            use_running_average = self.use_running_average
        if use_running_average is None:
            return super().__call__(x)  # flax's error, which says what to do

        variables = (self.mean, self.var, self.scale, self.bias)
        (x, mean, var, scale, bias, residual), dtype = _promote(
            self, x, *variables, given=[residual], statistics=2
        )
        if use_running_average:
            return functional.batch_norm_inference(
                x,
                mean,
                var,
                scale,
                bias,
                epsilon=self.epsilon,
                axis=self.axis,
                dtype=dtype,
                activation=activation,
                scale_offset=scale_offset,
                residual=residual,
            )
        y, mean, var = functional.batch_norm(
            x,
            scale,
            bias,
            axis=self.axis,
            residual=residual,
            **_common_arguments(self, dtype, mask, activation, scale_offset),
        )
        _move_averages(self, x, mask, mean, var)
        return y


def _move_averages(layer: Any, x: Any, mask: Any, mean: Any, var: Any) -> None:
    """Moves the running averages of a BatchNorm towards the statistics of a batch."""
    if mean.size != jnp.size(layer.mean[...]):
        raise TypeError(
            f"x has sizes {mean.shape} along axis={layer.axis}, expected "
            f"{layer.mean.shape}: the running averages are of "
            f"num_features={layer.num_features}."
        )
    counted = functional.anything_counted(
        x,
        axis=layer.axis,
        mask=mask,
        axis_name=layer.axis_name,
        axis_index_groups=layer.axis_index_groups,
    )
    for average, batch in ((layer.mean, mean), (layer.var, var)):
        before = average[...]
        # If types say how running statistics are sharded, keep that sharding.
        like = jax.typeof(before)
        batch = parts.resharded_like(like, batch)
        moved = layer.momentum * before + (1 - layer.momentum) * batch
        if not isinstance(counted, bool):
            counted = parts.resharded_like(like, counted)
        moved = jnp.where(counted, moved, before)
        moved = jnp.real(moved).astype(before.dtype)
        if moved.shape != before.shape:
            raise ValueError(
                f"A running average of shape {before.shape} would get shape "
                f"{moved.shape}: momentum must be a number, or one per channel. It "
                f"has shape {jnp.shape(layer.momentum)}."
            )
        average.set_value(jax.lax.stop_gradient(moved))
