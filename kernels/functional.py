"""Layer, RMS, group, instance and batch normalization of plain arrays.

Each function turns its axes into one `Norm`, checks its arguments against it, and calls
the op of `kernels/norm.py`. The functions share these arguments:

  x: float32, bfloat16, float16, float64 or complex. Integers are converted to float32,
    or to float64 if the output is float64.
  scale, bias: real or complex, each with its own dtype, or None to omit it. They are
    used in float32 (float64 if the output is float64), not rounded to the output's
    dtype first. A scale or bias of x's rank may also vary along the axes before the
    features, for example (batch, 1, features) or (batch, tokens, features). This is
    adaptive layer norm (Peebles and Xie 2022, arXiv:2212.09748, section 3.2), where
    `scale_offset=1.0` gives 1 + scale.
  dtype: dtype of the output. None means the dtype that jax.numpy promotes x, scale,
    bias and residual to, and float32 for integers.
  mask: bool, broadcastable to x. It selects the elements that enter the statistics; all
    elements are normalized. Where it selects nothing, the mean is 0 and the variance 1.
  axis_name, axis_index_groups: mapped axes over which the statistics are combined, as
    in `jax.lax.psum`. Each device is weighted by its own count of elements.
  activation: None, "relu", "silu", "gelu" or "gelu_tanh", applied to y in the dtype of
    the arithmetic, before y is rounded to `dtype`. "gelu" is the exact one,
    `jax.nn.gelu(y, approximate=False)`; `jax.nn.gelu(y)` is "gelu_tanh".
  scale_offset: number added to the scale, in float32. Use 1.0 if the scale is stored as
    its distance from 1; weight decay then pulls the effective scale to 1.
  residual: an array of x's shape. `layer_norm` and `rms_norm` add it before the norm,
    as pre-norm transformers do. They normalize h = x + residual and return `y, h`. h is
    rounded to the dtype that x (converted to float if it is integer) and residual
    promote to. A kernel adds the two as it reads them, and its backward adds dx to the
    cotangent of h. The other functions add it after the norm, as in a ResNet:
    y = act(norm(x) + residual), in float32.

They also share these errors:

  TypeError: epsilon or scale_offset is no real number, or the program computes the
    scale_offset.
  ValueError: an axis is out of range, the mask is not bool or does not broadcast to x,
    the residual has another shape, epsilon is more than one number, there is a
    scale_offset but no scale, the activation is unknown or applied to complex x or
    output, or `dtype` is not a float or complex type.
  NotImplementedError: a backend that `use_backend` names cannot run the call.

Statistics are at least float32, and the variance is centred, sum((x - mean)^2) / n. The
reference may instead take both statistics in one pass, if its platform is known: on a
CPU or TPU the variance is then sum(x^2) / n - mean^2 where the mean is within two
deviations of 0, which loses about three bits; on a GPU both are sums about an estimate
of the mean.
"""

import math
import operator
from collections.abc import Hashable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from fusednorm.kernels import norm as op
from fusednorm.reference import ACTIVATIONS, Norm, at_least_float32, is_per_element

Axes = int | Iterable[int]
Maybe = ArrayLike | None


def layer_norm(
    x: ArrayLike,
    scale: Maybe = None,
    bias: Maybe = None,
    *,
    epsilon: float = 1e-6,
    reduction_axes: Axes = -1,
    feature_axes: Axes = -1,
    dtype: DTypeLike | None = None,
    mask: Maybe = None,
    axis_name: Hashable | None = None,
    axis_index_groups: Any = None,
    activation: str | None = None,
    scale_offset: float = 0.0,
    residual: Maybe = None,
) -> Any:
    """Applies layer normalization.

    y = (x - mean) * rsqrt(var + epsilon) * scale + bias.

    Args:
      x: array of any shape.
      scale, bias: shape (features,), where features is the product of x's sizes along
        `feature_axes`; or an array of x's rank that broadcasts to x, if the feature
        axes are the last ones; or None.
      epsilon: added to the variance, inside the square root.
      reduction_axes: axes that share one mean and variance.
      feature_axes: axes along which scale and bias vary.
      dtype, mask, axis_name, axis_index_groups, activation, scale_offset,
        residual: see `help(fusednorm.kernels.functional)`.

    Returns:
      Array y of x's shape; (y, h) if there is a residual.

    Raises:
      TypeError: scale or bias does not fit x along `feature_axes`.
      TypeError, ValueError, NotImplementedError: those that all functions share.

    Source: Ba et al. 2016 (arXiv:1607.06450), eq. 3 and 4.
    """
    return _normalize_axes(
        x,
        scale,
        bias,
        reduction_axes=reduction_axes,
        feature_axes=feature_axes,
        center=True,
        epsilon=epsilon,
        dtype=dtype,
        mask=mask,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        activation=activation,
        scale_offset=scale_offset,
        residual=residual,
    )


def rms_norm(
    x: ArrayLike,
    scale: Maybe = None,
    *,
    bias: Maybe = None,
    epsilon: float = 1e-6,
    reduction_axes: Axes = -1,
    feature_axes: Axes = -1,
    dtype: DTypeLike | None = None,
    mask: Maybe = None,
    axis_name: Hashable | None = None,
    axis_index_groups: Any = None,
    activation: str | None = None,
    scale_offset: float = 0.0,
    residual: Maybe = None,
) -> Any:
    """Applies root-mean-square normalization.

    y = x * rsqrt(mean(x^2) + epsilon) * scale.

    Arguments and result are the same as for `layer_norm`, except that the bias is a
    keyword argument.

    Raises:
      TypeError, ValueError, NotImplementedError: as for `layer_norm`.

    Source: Zhang and Sennrich 2019 (arXiv:1910.07467), eq. 4.
    """
    return _normalize_axes(
        x,
        scale,
        bias,
        reduction_axes=reduction_axes,
        feature_axes=feature_axes,
        center=False,
        epsilon=epsilon,
        dtype=dtype,
        mask=mask,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        activation=activation,
        scale_offset=scale_offset,
        residual=residual,
    )


def group_norm(
    x: ArrayLike,
    scale: Maybe = None,
    bias: Maybe = None,
    *,
    num_groups: int,
    epsilon: float = 1e-6,
    reduction_axes: Axes | None = None,
    dtype: DTypeLike | None = None,
    mask: Maybe = None,
    axis_name: Hashable | None = None,
    axis_index_groups: Any = None,
    activation: str | None = None,
    scale_offset: float = 0.0,
    residual: Maybe = None,
) -> jax.Array:
    """Applies group normalization: one mean and variance per sample and group.

    Args:
      x: shape (batch, ..., channels).
      scale, bias: shape (channels,), or x's rank and broadcastable to x; or None.
      num_groups: number of equal groups that the channels are split into.
      epsilon: added to the variance, inside the square root.
      reduction_axes: axes that share one mean and variance. They must include the last
        axis, the channels. None means all axes but the first.
      dtype, mask, axis_name, axis_index_groups, activation, scale_offset,
        residual: see `help(fusednorm.kernels.functional)`.

    Returns:
      Array of x's shape.

    Raises:
      TypeError: scale or bias does not fit the channels.
      ValueError: `num_groups` does not divide the channels, or `reduction_axes` lacks
        the last axis.
      TypeError, ValueError, NotImplementedError: those that all functions share.

    Source: Wu and He 2018 (arXiv:1803.08494), eq. 1 to 3 and 7.
    """
    x, dtype = _promote(x, scale, bias, residual, dtype=dtype)
    num_groups = operator.index(num_groups)
    valid = x.ndim > 0 and num_groups >= 1
    if not valid or not (is_symbolic(x.shape[-1]) or x.shape[-1] % num_groups == 0):
        raise ValueError(
            f"num_groups={num_groups} must divide the channels, the last axis of x "
            f"with shape {x.shape}."
        )
    if reduction_axes is None:
        reduction_axes = (*range(1, x.ndim), -1)
    axes = _axes(reduction_axes, x.ndim, "reduction_axes")
    if x.ndim - 1 not in axes:
        raise ValueError(
            f"reduction_axes={reduction_axes} must include the last axis, "
            f"{x.ndim - 1}: the channels of x with shape {x.shape} are what it groups."
        )
    spec = Norm(
        reduction_axes=axes[:-1],
        feature_axes=(x.ndim - 1,),
        num_groups=num_groups,
        epsilon=_epsilon(epsilon),
        dtype=dtype,
        activation=_activation(activation, x, dtype),
        scale_offset=_offset(scale_offset, scale),
    )
    return op.normalize(
        spec,
        x,
        *_params(scale, bias, mask, residual, spec, x),
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
    )


def instance_norm(
    x: ArrayLike,
    scale: Maybe = None,
    bias: Maybe = None,
    *,
    epsilon: float = 1e-6,
    feature_axes: Axes = -1,
    dtype: DTypeLike | None = None,
    mask: Maybe = None,
    axis_name: Hashable | None = None,
    axis_index_groups: Any = None,
    activation: str | None = None,
    scale_offset: float = 0.0,
    residual: Maybe = None,
) -> jax.Array:
    """Applies instance normalization: one mean and variance per sample and channel.

    Args:
      x: shape (batch, ...), with the channels along `feature_axes`.
      scale, bias: shape (features,), or x's rank and broadcastable to x; or None.
      epsilon: added to the variance, inside the square root.
      feature_axes: axes of the channels. All other axes except the first are reduced.
      dtype, mask, axis_name, axis_index_groups, activation, scale_offset,
        residual: see `help(fusednorm.kernels.functional)`.

    Returns:
      Array of x's shape.

    Raises:
      TypeError: scale or bias does not fit x along `feature_axes`.
      ValueError: `feature_axes` includes the first axis.
      TypeError, ValueError, NotImplementedError: those that all functions share.

    Source: Ulyanov et al. 2016 (arXiv:1607.08022), eq. 2.
    """
    ndim = jnp.ndim(x)
    features = _axes(feature_axes, ndim, "feature_axes")
    if 0 in features:
        raise ValueError(
            "The channel axes cannot include the leading dimension, which is the "
            f"batch: feature_axes={feature_axes}, x has shape {jnp.shape(x)}."
        )
    reduction_axes = [axis for axis in range(1, ndim) if axis not in features]
    return _normalize_axes(
        x,
        scale,
        bias,
        reduction_axes=reduction_axes,
        feature_axes=features,
        center=True,
        epsilon=epsilon,
        dtype=dtype,
        mask=mask,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        activation=activation,
        scale_offset=scale_offset,
        shortcut=residual,
    )


def batch_norm(
    x: ArrayLike,
    scale: Maybe = None,
    bias: Maybe = None,
    *,
    epsilon: float = 1e-5,
    axis: Axes = -1,
    dtype: DTypeLike | None = None,
    mask: Maybe = None,
    axis_name: Hashable | None = None,
    axis_index_groups: Any = None,
    activation: str | None = None,
    scale_offset: float = 0.0,
    residual: Maybe = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Applies batch normalization with the statistics of the batch, as in training.

    Args:
      x: array of any shape.
      scale, bias: shape (features,), or x's rank and broadcastable to x; or None.
      epsilon: added to the variance, inside the square root.
      axis: one or several axes of the features. All other axes are reduced.
      dtype, mask, axis_name, axis_index_groups, activation, scale_offset,
        residual: see `help(fusednorm.kernels.functional)`.

    Returns:
      y: x's shape.
      mean: x's sizes along `axis`, at least float32; 0 where nothing was counted.
      var: the biased variance, in mean's shape and dtype; 1 where nothing was counted.

    Raises:
      TypeError: scale or bias does not fit x along `axis`.
      TypeError, ValueError, NotImplementedError: those that all functions share.

    Source: Ioffe and Szegedy 2015 (arXiv:1502.03167), algorithm 1.
    """
    x, dtype = _promote(x, scale, bias, residual, dtype=dtype)
    spec = _batch_spec(x, scale, axis, epsilon, dtype, activation, scale_offset)
    y, mean, var = op.normalize_with_moments(
        spec,
        x,
        *_params(scale, bias, mask, residual, spec, x),
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
    )
    assert mean is not None  # only RMSNorm has none
    return (
        y,
        jnp.squeeze(mean, spec.reduction_axes),
        jnp.squeeze(var, spec.reduction_axes),
    )


def batch_norm_inference(
    x: ArrayLike,
    mean: ArrayLike,
    var: ArrayLike,
    scale: Maybe = None,
    bias: Maybe = None,
    *,
    epsilon: float = 1e-5,
    axis: Axes = -1,
    dtype: DTypeLike | None = None,
    activation: str | None = None,
    scale_offset: float = 0.0,
    residual: Maybe = None,
) -> jax.Array:
    """Applies batch normalization with given statistics, as in inference.

    The work is elementwise, and XLA fuses it into its neighbours. No kernel would do
    better.

    Args:
      x: array of any shape.
      mean, var: shape (features,), used in at least float32.
      scale, bias, epsilon, axis, dtype, activation, scale_offset, residual: as for
        `batch_norm`.

    Returns:
      Array of x's shape.

    Raises:
      TypeError: mean, var, scale or bias does not fit x along `axis`.
      TypeError, ValueError: those that all functions share.

    Source: Ioffe and Szegedy 2015 (arXiv:1502.03167), algorithm 2.
    """
    x, dtype = _promote(x, scale, bias, residual, dtype=dtype)
    spec = _batch_spec(x, scale, axis, epsilon, dtype, activation, scale_offset)
    shape = spec.statistic_shape(x.shape)
    mean, var = (
        jnp.reshape(_flat_param(value, name, spec, x), shape).astype(spec.compute_dtype)
        for value, name in ((mean, "mean"), (var, "var"))
    )
    flat_scale, flat_bias, _, shortcut = _params(scale, bias, None, residual, spec, x)
    return op.infer(spec, x, mean, var, flat_scale, flat_bias, shortcut)


def anything_counted(
    x: jax.Array,
    *,
    axis: Axes,
    mask: Maybe,
    axis_name: Hashable | None,
    axis_index_groups: Any,
) -> jax.Array | bool:
    """Tells for which features the batch statistics count at least one element.

    Args:
      x, axis, mask, axis_name, axis_index_groups: as for `batch_norm`.

    Returns:
      A bool array of the shape of `batch_norm`'s mean if there is a mask; else a bool.

    Raises:
      ValueError: an axis is out of range, or the mask does not fit, as in `batch_norm`.
    """
    features = _axes(axis, x.ndim, "axis")
    reduced = tuple(a for a in range(x.ndim) if a not in features)
    if mask is None:
        return 0 not in [x.shape[a] for a in reduced]
    counted = jnp.any(jnp.broadcast_to(_mask(mask, x), x.shape), axis=reduced)
    if axis_name is not None:
        ones = counted.astype(jnp.int32)
        counted = jax.lax.psum(ones, axis_name, axis_index_groups=axis_index_groups) > 0
    return counted


# --- shared ---------------------------------------------------------------------------


def _batch_spec(
    x: jax.Array,
    scale: Maybe,
    axis: Axes,
    epsilon: Any,
    dtype: Any,
    activation: str | None,
    scale_offset: float,
) -> Norm:
    features = _axes(axis, x.ndim, "axis")
    return Norm(
        reduction_axes=tuple(a for a in range(x.ndim) if a not in features),
        feature_axes=features,
        epsilon=_epsilon(epsilon),
        dtype=dtype,
        activation=_activation(activation, x, dtype),
        scale_offset=_offset(scale_offset, scale),
    )


def _normalize_axes(
    x: ArrayLike,
    scale: Maybe,
    bias: Maybe,
    *,
    reduction_axes: Axes,
    feature_axes: Axes,
    center: bool,
    epsilon: float,
    dtype: DTypeLike | None,
    mask: Maybe,
    axis_name: Hashable | None,
    axis_index_groups: Any,
    activation: str | None,
    scale_offset: float,
    residual: Maybe = None,
    shortcut: Maybe = None,
) -> Any:
    x, dtype = _promote(x, scale, bias, residual, shortcut, dtype=dtype)
    spec = Norm(
        reduction_axes=_axes(reduction_axes, x.ndim, "reduction_axes"),
        feature_axes=_axes(feature_axes, x.ndim, "feature_axes"),
        center=center,
        epsilon=_epsilon(epsilon),
        dtype=dtype,
        activation=_activation(activation, x, dtype),
        scale_offset=_offset(scale_offset, scale),
    )
    operands = _params(scale, bias, mask, shortcut, spec, x)
    across = {"axis_name": axis_name, "axis_index_groups": axis_index_groups}
    if residual is None:
        return op.normalize(spec, x, *operands, **across)
    return op.normalize_sum(spec, x, _residual(residual, x), *operands, **across)


def _residual(residual: ArrayLike, x: jax.Array) -> jax.Array:
    residual = jnp.asarray(residual)
    if residual.shape != x.shape:
        raise ValueError(
            f"residual has shape {residual.shape}, expected that of x, {x.shape}: "
            "broadcast it first."
        )
    return residual


def _activation(name: str | None, x: jax.Array, dtype: Any) -> str | None:
    if name is None:
        return None
    if name not in ACTIVATIONS:
        raise ValueError(
            f"activation={name!r} is unknown; expected one of "
            f"{', '.join(map(repr, ACTIVATIONS))}, or None."
        )
    for what, kind in (("x", x.dtype), ("the output", dtype)):
        if jnp.issubdtype(kind, jnp.complexfloating):
            raise ValueError(
                f"activation={name!r} takes real numbers, but {what} is {kind}: call "
                "the activation on the result."
            )
    return name


def _offset(scale_offset: Any, scale: Maybe) -> float:
    """Returns a scale_offset as a float."""
    offset = _number(scale_offset)
    if offset is None:
        raise TypeError(
            "scale_offset must be a real number that is known when the call is traced, "
            f"got {scale_offset!r}: add an array to the scale instead."
        )
    if offset and scale is None:
        raise ValueError(f"scale_offset={offset} is added to the scale: pass a scale.")
    return offset


def _number(value: Any) -> float | None:
    """Returns one real number, of any type, as a float; None for anything else."""
    if isinstance(value, jax.core.Tracer) or np.size(value) != 1:
        return None
    number = np.asarray(value).item()
    return float(number) if isinstance(number, int | float) else None


def _epsilon(epsilon: Any) -> Any:
    """Returns epsilon as a float, or as a scalar array if the program computes it."""
    if hasattr(epsilon, "__jax_array__"):  # a Variable
        epsilon = jnp.asarray(epsilon)
    if np.size(epsilon) != 1:
        raise ValueError(
            "epsilon must be one number, added to every variance; got an array of "
            f"shape {np.shape(epsilon)}."
        )
    if isinstance(epsilon, jax.core.Tracer):
        return epsilon.reshape(())
    number = _number(epsilon)
    if number is None:
        raise TypeError(f"epsilon must be a real number, got {epsilon!r}.")
    return number


def _promote(
    x: ArrayLike, *params: Maybe, dtype: DTypeLike | None
) -> tuple[jax.Array, jnp.dtype]:
    """Returns x as an inexact array, and the dtype of the output."""
    x, *others = (
        a if hasattr(a, "dtype") else jnp.asarray(a)
        for a in (x, *params)
        if a is not None
    )
    if dtype is None:
        dtype = jnp.result_type(x, *others)
        if not jnp.issubdtype(dtype, jnp.inexact):
            dtype = jnp.promote_types(dtype, jnp.float32)
    dtype = jax.dtypes.canonicalize_dtype(dtype)  # float is float32, if x64 is off
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise ValueError(
            f"Dtype must be inexact (float or complex), got dtype={dtype}."
        )
    is_inexact = jnp.issubdtype(x.dtype, jnp.inexact)
    becomes_real = jnp.iscomplexobj(x) and not jnp.issubdtype(
        dtype, jnp.complexfloating
    )
    if is_inexact and not becomes_real:
        return jnp.asarray(x), dtype
    # Convert NumPy integers directly: 64-bit ones may not fit jax's integers.
    return jnp.asarray(x, at_least_float32(dtype)), dtype


def _axes(axes: Axes, ndim: int, name: str) -> tuple[int, ...]:
    """Returns the axes sorted, nonnegative and without duplicates."""
    try:
        indices = [operator.index(a) for a in (axes if np.iterable(axes) else (axes,))]
    except TypeError:
        raise TypeError(f"{name} must be an axis or axes, got {axes!r}.") from None
    if any(not -ndim <= axis < ndim for axis in indices):
        raise np.exceptions.AxisError(  # a ValueError, and an IndexError as in flax
            f"{name}={axes} is out of range for x with {ndim} axes."
        )
    return tuple(sorted({axis % ndim for axis in indices}))


def _params(
    scale: Any, bias: Any, mask: Maybe, shortcut: Any, spec: Norm, x: jax.Array
) -> tuple[Any, Any, Any, Any]:
    """Returns scale, bias, mask and shortcut in the form that the op takes.

    A bias that differs for each element of x becomes part of the shortcut.
    """
    scale, bias = _param(scale, "scale", spec, x), _param(bias, "bias", spec, x)
    wide = spec.compute_dtype
    if shortcut is not None:
        shortcut = _residual(shortcut, x)
    if bias is not None and is_per_element(bias, x):
        shortcut = bias if shortcut is None else bias.astype(wide) + shortcut
        bias = None
    if shortcut is not None and not jnp.issubdtype(shortcut.dtype, jnp.inexact):
        shortcut = shortcut.astype(wide)
    return scale, bias, _mask(mask, x), shortcut


def _param(param: Maybe, name: str, spec: Norm, x: jax.Array) -> Any:
    """Returns the parameter as (*leading, features).

    `leading` are the leading axes of x along which the parameter varies, if any.
    """
    if param is None:
        return None
    param = jnp.asarray(param)
    first = x.ndim - len(spec.feature_axes)  # the first feature axis, if they are last
    before, sizes = x.shape[:first], x.shape[first:]
    varies = (
        param.ndim == x.ndim > len(sizes)
        and spec.feature_axes == tuple(range(first, x.ndim))
        and all(own in (1, n) for own, n in zip(param.shape, x.shape, strict=True))
    )
    if not varies:
        return _flat_param(param, name, spec, x)
    lead = param.shape[:first]
    param = jnp.broadcast_to(param, (*lead, *sizes))
    while lead and lead[-1] == 1 and (lead != before or set(lead) == {1}):
        lead = lead[:-1]
    return param.reshape(*lead, math.prod(sizes))


def is_symbolic(size: Any) -> bool:
    """Returns whether a size is a symbol in an export, of which jax checks later that
    it fits."""
    return not isinstance(size, int)


def _flat_param(param: ArrayLike, name: str, spec: Norm, x: jax.Array) -> jax.Array:
    """Returns the parameter in shape (features,)."""
    param = jnp.asarray(param)
    sizes = tuple(x.shape[axis] for axis in spec.feature_axes)
    features = math.prod(sizes)
    if param.size != features and not is_symbolic(features):
        varies = (
            " One that varies along other axes must have x's rank and broadcast to it, "
            "and the feature axes be the last."
        )
        raise TypeError(
            f"{name} has shape {param.shape}, expected ({features},): x with "
            f"shape {x.shape} has sizes {sizes} along its feature axes "
            f"{spec.feature_axes}.{varies if param.ndim > 1 else ''}"
        )
    return param.reshape(-1)


def _mask(mask: Maybe, x: jax.Array) -> Any:
    if mask is None:
        return None
    mask = jnp.asarray(mask)
    if mask.dtype != bool:
        raise ValueError(f"mask must be an array of bool, got {mask.dtype}.")
    try:
        fits = jnp.broadcast_shapes(mask.shape, x.shape) == x.shape
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"mask has shape {mask.shape}, which does not broadcast to x with shape "
            f"{x.shape}."
        )
    return mask.reshape((1,) * (x.ndim - mask.ndim) + mask.shape)
