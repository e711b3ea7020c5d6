"""The differentiable normalization: three primitives and their rules.

    norm_p       x, scale, bias -> y (and mean, var when a derivative will need them)
    tangent_p    x_dot, scale_dot, bias_dot, shortcut_dot -> y_dot, linear in these four
    gradient_p   dy, x, scale, mean, var -> dx, dscale, dbias, dshortcut

A shortcut of x's shape can be added to x_hat * scale + bias, and an activation can
follow. The activation's slope depends on bias and shortcut, so tangent_p and gradient_p
then take these too.

If there is a residual, norm_p normalizes h = x + residual. `carries` makes it return h
too, or x if there is no residual. The tangent of h passes through tangent_p unchanged.
The transpose of tangent_p therefore receives the cotangent of h, and gradient_p adds dx
to it.

A scale or bias can have leading axes: the axes of x along which it varies. These run
over samples or rows, or come from vmap.

The rules of the primitives:

    jvp of norm_p           norm_p with statistics, and tangent_p for the tangent of y
    transpose of tangent_p  gradient_p: the backward kernel of every reverse pass
    jvp of the other two    the jvp of their jax.numpy formulas, so every order exists
    Taylor series (jet)     the series of the formulas
    checkify                a check of the results for NaN
    vmap                    one more leading axis, and the same primitive again
    abstract evaluation     the formulas' own, which know shardings and manual axes
    lowering                what kernels/lowering.py chooses for the platform and the
                            partitioning; the formula of tangent_p

So reverse mode runs one forward and one backward kernel, whatever vmap, remat, scan or
jit is around it, and jvp, Hessians and export work too. `jax.custom_vjp` would refuse
forward mode, and a choice of platform at trace time would break export.

The primitives keep the caller's rank. The kernels' view x[N, S, G, K] is made inside an
implementation, because a reshape at this level would make XLA gather a sharded array.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import jet
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

try:  # JAX has no public way to give a primitive a check for NaN
    from jax._src import checkify
except ImportError:
    checkify = None  # type: ignore[assignment]

from fusednorm import reference
from fusednorm.kernels import dispatch, lowering, parts
from fusednorm.kernels.geometry import is_rowwise
from fusednorm.reference import Norm

# An array, or None if it is absent: no bias, or a tangent that is zero.
Maybe = jax.Array | None

# Why a call runs the reference with JAX's own derivatives, and no primitive.
COMPLEX = "complex numbers"
COMPUTED_EPSILON = "an epsilon that the program computes"
CROSSES_VMAP = "statistics that cross an axis of jax.vmap, or groups (axis_name)"


def normalize(
    norm: Norm,
    x: jax.Array,
    scale: Maybe = None,
    bias: Maybe = None,
    mask: Maybe = None,
    shortcut: Maybe = None,
    *,
    axis_name: Hashable | None = None,
    axis_index_groups: Any = None,
) -> jax.Array:
    """Computes y = act((x - mean) * rsqrt(var + epsilon) * scale + bias + shortcut).

    Args:
      norm: the normalization; see `fusednorm.reference.Norm`.
      x: float or complex array of any shape.
      scale, bias: shape (features,), after the leading axes of x along which they vary;
        or None.
      mask: None, or a bool array of x's rank that broadcasts to x.
      shortcut: array of x's shape, or None.
      axis_name: mapped axes over which the statistics are combined too.
      axis_index_groups: as for `jax.lax.psum`.

    Returns:
      Array of x's shape, dtype `norm.dtype`.
    """
    norm = _combined_over(norm, axis_name, axis_index_groups, x, scale, mask)
    if why := _why_plain(norm, x.dtype):
        return _plain(why, norm, x, scale, bias, mask, shortcut)[0]
    operands = _typed_alike(x, scale, bias, mask, None, shortcut)
    return fusednorm_normalize(norm, dispatch.current_backend(), *operands)[0]


def normalize_with_moments(
    norm: Norm,
    x: jax.Array,
    scale: Maybe = None,
    bias: Maybe = None,
    mask: Maybe = None,
    shortcut: Maybe = None,
    *,
    axis_name: Hashable | None = None,
    axis_index_groups: Any = None,
) -> tuple[jax.Array, Maybe, jax.Array]:
    """Normalizes like `normalize`, and returns the statistics too.

    BatchNorm keeps running averages of them.

    Returns:
      y: x's shape.
      mean, var: x's rank, with size 1 along reduced axes; mean is None without
        centring.
    """
    norm = _combined_over(norm, axis_name, axis_index_groups, x, scale, mask)
    if why := _why_plain(norm, x.dtype):
        y, mean, var = _plain(why, norm, x, scale, bias, mask, shortcut)
    else:
        operands = _typed_alike(x, scale, bias, mask, None, shortcut)
        y, *statistics = fusednorm_normalize(
            norm, dispatch.current_backend(), *operands, statistics=True
        )
        mean, var = statistics if norm.center else (None, *statistics)
    # Axes of size 1, which `_combined_over` leaves out: a psum tells JAX that the
    # statistics are the same along them.
    if left_out := _varies(var) & set(_names(axis_name)):
        mean, var = lax.psum((mean, var), tuple(left_out))
    return y, mean, var


def normalize_sum(
    norm: Norm,
    x: jax.Array,
    residual: jax.Array,
    scale: Maybe = None,
    bias: Maybe = None,
    mask: Maybe = None,
    shortcut: Maybe = None,
    *,
    axis_name: Hashable | None = None,
    axis_index_groups: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Normalizes h = x + residual like `normalize`, and returns h too.

    Returns:
      y: x's shape, dtype `norm.dtype`.
      h: x's shape, in the dtype that x and residual promote to.
    """
    has_params = scale is not None or bias is not None
    rowwise = is_rowwise(norm, x.shape, has_params=has_params)
    crosses = axis_name is not None
    if not rowwise or crosses or _why_plain(norm, x.dtype, residual.dtype):
        h = reference.add(x, residual)
        across = {"axis_name": axis_name, "axis_index_groups": axis_index_groups}
        return normalize(norm, h, scale, bias, mask, shortcut, **across), h
    operands = _typed_alike(x, scale, bias, mask, residual, shortcut)
    y, h = fusednorm_normalize(
        norm, dispatch.current_backend(), *operands, carries=True
    )
    return y, h


def _combined_over(
    norm: Norm,
    axis_name: Any,
    axis_index_groups: Any,
    x: jax.Array,
    scale: Maybe,
    mask: Maybe,
) -> Norm:
    """Returns `norm` with statistics that are combined over mapped axes too."""
    if axis_name is None:
        return norm
    names = _names(axis_name)
    groups = None
    if axis_index_groups is not None:
        groups = tuple(tuple(map(int, group)) for group in axis_index_groups)
        if not all((groups, *groups)):
            raise ValueError(
                "axis_index_groups must list the devices of at least one group, and "
                f"none may be empty; got {axis_index_groups}."
            )
    varying = _varies(x) | _varies(mask)  # none unless JAX tracks them (`check_vma`)
    one_scale = bool(varying) and not _varies(scale) & set(names)
    if groups is None:  # combining statistics of one device, or of equal x, is needless
        mesh = jax.sharding.get_abstract_mesh()
        same = {name for name in mesh.manual_axes if mesh.shape[name] == 1}
        same |= set(mesh.manual_axes) - varying if varying else set()
        names = tuple(name for name in names if name not in same)
    return dataclasses.replace(
        norm, axis_names=names, axis_index_groups=groups, one_scale=one_scale
    )


def _names(axis_name: Any) -> tuple[Hashable, ...]:
    return tuple(axis_name) if isinstance(axis_name, tuple | list) else (axis_name,)


def _why_plain(norm: Norm, *dtypes: Any) -> str:
    """Returns why the reference takes the call without a primitive, or "".

    Mapped axes that are not manual axes of a `jax.shard_map` are axes of a vmap.
    """
    if any(jnp.issubdtype(d, jnp.complexfloating) for d in (norm.dtype, *dtypes)):
        return COMPLEX
    if not isinstance(norm.epsilon, float):
        return COMPUTED_EPSILON
    manual = jax.sharding.get_abstract_mesh().manual_axes
    if norm.axis_index_groups is not None or not set(norm.axis_names) <= set(manual):
        return CROSSES_VMAP
    return ""


def _typed_alike(x: jax.Array, *others: Maybe) -> tuple[Any, ...]:
    """Makes all operands strongly typed, and vary over the same manual axes.

    The axes are manual ones, of a `jax.shard_map`. Parameters are the same on every
    device of an axis, but x is not. The cast marks the parameters as varying, and its
    transpose is the psum that sums dscale and dbias over the devices. The conversion
    changes weak types alone; its transpose makes the gradients weakly typed again, as
    JAX's own are.
    """
    operands = tuple(
        None if a is None else lax.convert_element_type(a, a.dtype)
        for a in (x, *others)
    )
    varying: frozenset[Hashable] = frozenset().union(*map(_varies, operands))
    return tuple(
        a
        if a is None or not (missing := varying - _varies(a))
        else lax.pcast(a, tuple(missing), to="varying")
        for a in operands
    )


def _varies(a: Maybe) -> frozenset[Hashable]:
    return frozenset() if a is None else jax.typeof(a).manual_axis_type.varying


# There is one jit around each op: its cache makes the second norm of a shape cheap to
# trace. Profiles and HLO show the function's name.
@functools.partial(
    jax.jit, static_argnames=("norm", "backend", "carries", "statistics")
)
def fusednorm_normalize(
    norm: Norm,
    backend: str,
    x: jax.Array,
    scale: Maybe,
    bias: Maybe,
    mask: Maybe,
    residual: Maybe,
    shortcut: Maybe,
    carries: bool = False,
    statistics: bool = False,
) -> list[jax.Array]:
    operands, tree = jax.tree.flatten((x, scale, bias, mask, residual, shortcut))
    return norm_p.bind(
        *operands,
        tree=tree,
        norm=norm,
        backend=backend,
        carries=carries,
        statistics=statistics,
    )


def _plain(
    why: str, norm: Norm, *operands: Maybe
) -> tuple[jax.Array, Maybe, jax.Array]:
    backend = dispatch.current_backend()
    if backend not in ("auto", "reference"):
        raise dispatch.cannot_run(backend, "forward", why)
    norm, epsilon = _without_epsilon(norm)
    if epsilon is None:
        return fusednorm_plain(norm, *operands)
    return fusednorm_computed_epsilon(norm, *operands, epsilon)


def _without_epsilon(norm: Norm) -> tuple[Norm, Maybe]:
    """Returns the norm as a cache key, and its epsilon if the program computes it."""
    if isinstance(norm.epsilon, float):
        return norm, None
    return dataclasses.replace(norm, epsilon=math.nan), norm.epsilon


# Calls for which `_why_plain` has a reason run the reference with JAX's derivatives.
# `explain` recognizes these functions by their names.
@functools.partial(jax.jit, static_argnames="norm")
def fusednorm_plain(
    norm: Norm,
    x: jax.Array,
    scale: Maybe,
    bias: Maybe,
    mask: Maybe,
    shortcut: Maybe,
) -> tuple[jax.Array, Maybe, jax.Array]:
    return reference.forward(norm, x, scale, bias, mask, shortcut)


@functools.partial(jax.jit, static_argnames="norm")
def fusednorm_computed_epsilon(
    norm: Norm,
    x: jax.Array,
    scale: Maybe,
    bias: Maybe,
    mask: Maybe,
    shortcut: Maybe,
    epsilon: jax.Array,
) -> tuple[jax.Array, Maybe, jax.Array]:
    norm = dataclasses.replace(norm, epsilon=epsilon)
    return reference.forward(norm, x, scale, bias, mask, shortcut)


def infer(
    norm: Norm,
    x: jax.Array,
    mean: Maybe,
    var: jax.Array,
    scale: Maybe,
    bias: Maybe,
    shortcut: Maybe,
) -> jax.Array:
    """Normalizes like `normalize`, but with given statistics.

    Args:
      norm: axes of the features, epsilon, activation, dtype of y.
      x: array of any shape.
      mean, var: x's rank, with size 1 along reduced axes.
      scale, bias, shortcut: as for `normalize`.
    """
    norm, epsilon = _without_epsilon(norm)
    return fusednorm_inference(norm, x, mean, var, scale, bias, shortcut, epsilon)


# BatchNorm with running statistics is elementwise, and XLA fuses it with its
# neighbours.
@functools.partial(jax.jit, static_argnames="norm")
def fusednorm_inference(
    norm: Norm,
    x: jax.Array,
    mean: Maybe,
    var: jax.Array,
    scale: Maybe,
    bias: Maybe,
    shortcut: Maybe,
    epsilon: Maybe,
) -> jax.Array:
    if epsilon is not None:
        norm = dataclasses.replace(norm, epsilon=epsilon)
    apply: Callable[..., jax.Array] = functools.partial(reference.apply, norm)
    if x.dtype.itemsize < norm.compute_dtype.itemsize:
        # A derivative shall keep x, and not x - mean in float32.
        apply = jax.checkpoint(apply, prevent_cse=False)
    return apply(x, mean, var, scale, bias, shortcut)


# --- the primitives -------------------------------------------------------------------
# A primitive's operands are flat. `tree` puts them into the tuple that its formula
# takes, with None for an operand that is absent. A formula returns a flat list.


def _norm_formula(
    operands: tuple[Any, ...],
    *,
    norm: Norm,
    carries: bool,
    statistics: bool,
    tuned_for: reference.TunedFor = None,
) -> list[jax.Array]:
    x, scale, bias, mask, residual, shortcut = operands
    h = x if residual is None else reference.add(x, residual, tuned_for=tuned_for)
    addends = () if residual is None else (x, residual)
    y, mean, var = reference.forward(
        norm, h, scale, bias, mask, shortcut, tuned_for=tuned_for, addends=addends
    )
    results = [y, h] if carries else [y]
    return results + [r for r in (mean, var) if statistics and r is not None]


def _tangent_formula(
    operands: tuple[Any, ...], *, norm: Norm, carries: bool
) -> list[jax.Array]:
    y_dot = reference.tangent(norm, *operands)
    return [y_dot, operands[0]] if carries else [y_dot]


def _gradient_formula(
    operands: tuple[Any, ...],
    *,
    norm: Norm,
    wanted: tuple[bool, bool, bool, bool],
    own_params: int,
    tuned_for: reference.TunedFor = None,
) -> list[jax.Array]:
    results = reference.backward(
        norm, *operands, own_params=own_params, wanted=wanted[:3], tuned_for=tuned_for
    )
    return [result for result, want in zip(results, wanted, strict=True) if want]


def _primitive(
    name: str, formula: Callable[..., list[jax.Array]], *, has_kernels: bool = True
) -> Primitive:
    """Returns a primitive that is defined by `formula`."""
    primitive = Primitive(name)
    primitive.multiple_results = True

    # The jit is for its cache: shapes seen before are not traced again, here or in
    # lowering.
    @functools.partial(
        jax.jit,
        static_argnames=(
            "tree",
            "norm",
            "carries",
            "statistics",
            "tuned_for",
            "wanted",
            "own_params",
        ),
    )
    def flat_formula(*flat: jax.Array, tree: Any, **params: Any) -> list[jax.Array]:
        return formula(tree.unflatten(flat), **params)

    def run(*flat: Any, backend: str, **params: Any) -> list[jax.Array]:
        return flat_formula(*flat, **params)

    def abstract(*avals: Any, **params: Any) -> Sequence[Any]:
        return jax.make_jaxpr(functools.partial(run, **params))(*avals).out_avals

    def taylor(primals_in: Any, series_in: Any, **params: Any) -> Any:
        # jet's rules take and return unscaled coefficients.
        along = functools.partial(run, **params)
        return jet.jet(along, primals_in, series_in, factorial_scaled=False)

    lower: Callable[..., Any]
    if has_kernels:
        lower = functools.partial(lowering.lower, primitive, flat_formula)
    else:
        lower = mlir.lower_fun(run, multiple_results=True)
    primitive.def_impl(run)  # reached only under jax.disable_jit()
    primitive.def_abstract_eval(abstract)
    mlir.register_lowering(primitive, lower)
    jet.jet_rules[primitive] = taylor
    if checkify is not None:
        check = functools.partial(checkify.nan_error_check, primitive)
        checkify.error_checks[primitive] = check
    return primitive


norm_p = _primitive("norm", _norm_formula)
tangent_p = _primitive("norm_tangent", _tangent_formula, has_kernels=False)
gradient_p = _primitive("norm_gradient", _gradient_formula)


# --- derivatives ----------------------------------------------------------------------


def _norm_jvp(
    primals: Sequence[Any],
    tangents: Sequence[Any],
    *,
    tree: Any,
    norm: Norm,
    backend: str,
    carries: bool,
    statistics: bool,
) -> tuple[list[Any], list[Any]]:
    h, scale, bias, mask, residual, shortcut = tree.unflatten(primals)
    if norm.activation is None:
        bias = shortcut = None  # no derivative depends on them
    h_dot, scale_dot, bias_dot, _, residual_dot, shortcut_dot = tree.unflatten(
        [None if isinstance(t, ad.Zero) else t for t in tangents]
    )
    y, *moments = norm_p.bind(
        *primals,
        tree=tree,
        norm=norm,
        backend=backend,
        carries=carries,
        statistics=True,
    )
    if carries:
        h, *moments = moments
    if residual is not None:
        dots = [d.astype(h.dtype) for d in (h_dot, residual_dot) if d is not None]
        if dots:
            h_dot = parts.resharded_like(jax.typeof(h), functools.reduce(jnp.add, dots))
    mean, var = moments if norm.center else (None, *moments)
    passes = carries and h_dot is not None
    of_tangent = (h_dot, scale_dot, bias_dot, shortcut_dot)
    flat, tangent_tree = jax.tree.flatten(
        (*of_tangent, h, scale, bias, mean, var, mask, shortcut)
    )
    dots = tangent_p.bind(
        *flat, tree=tangent_tree, norm=norm, backend=backend, carries=passes
    )
    results = [y]
    if carries:
        results.append(h)
        dots += [] if passes else [ad.Zero(jax.typeof(h))]
    if not statistics:
        return results, dots
    if h_dot is None:
        moments_dot: list[Any] = [ad.Zero(jax.typeof(moment)) for moment in moments]
    else:
        mean_dot, var_dot = reference.moments_tangent(norm, h_dot, h, mean, mask)
        moments_dot = [mean_dot, var_dot] if norm.center else [var_dot]
    return [*results, *moments], [*dots, *moments_dot]


def _tangent_transpose(
    cotangents: Sequence[Any],
    *flat: Any,
    tree: Any,
    norm: Norm,
    backend: str,
    carries: bool,
) -> list[Any]:
    dy, *others = cotangents
    *dots, x, scale, bias, mean, var, mask, shortcut = tree.unflatten(flat)
    wanted = [ad.is_undefined_primal(dot) for dot in dots]
    avals = [dot.aval for dot in dots if ad.is_undefined_primal(dot)]
    dh = others[0] if carries and wanted[0] else None  # cotangent of the carried x_dot
    dh = None if isinstance(dh, ad.Zero) else dh
    if isinstance(dy, ad.Zero):
        gradients: list[Any] = [ad.Zero(aval) for aval in avals]
        if dh is not None:
            gradients[0] = dh
    else:
        # Without an activation dz is dy, and so is the shortcut's gradient.
        adds_dy = wanted[3] and norm.activation is None
        wanted[3] = wanted[3] and not adds_dy
        # If each element has its own scale, dscale is elementwise, not a sum.
        each = scale is not None and reference.is_per_element(scale, x)
        summed = [
            dot.aval
            for dot in (dots[2:3] if each else dots[1:3])
            if ad.is_undefined_primal(dot)
        ]
        operands, gradient_tree = jax.tree.flatten(
            (dy, x, scale, bias, mean, var, mask, dh, shortcut)
        )
        gradients = []
        if any(wanted):
            gradients = gradient_p.bind(
                *operands,
                tree=gradient_tree,
                norm=norm,
                backend=backend,
                wanted=tuple(wanted),
                own_params=max((len(aval.shape) - 1 for aval in summed), default=0),
            )
        gradients += [dy] if adds_dy else []
        gradients = [_sum_to(g, a) for g, a in zip(gradients, avals, strict=True)]
    left = iter(gradients)
    return [next(left) if ad.is_undefined_primal(a) else None for a in flat]


def _sum_to(value: jax.Array, aval: Any) -> jax.Array:
    """Sums a gradient (*own, features) over the axes along which its parameter is
    shared. In explicit mode the result is sharded as the type of the parameter says."""
    if value.ndim > 1 and value.shape != aval.shape:
        *lead, features = aval.shape
        aligned = (*lead, *[1] * (value.ndim - len(aval.shape)), features)
        shared = [
            axis
            for axis, (own, kept) in enumerate(zip(value.shape, aligned, strict=True))
            if own != kept
        ]
        value = jnp.sum(value, axis=shared, keepdims=True).reshape(aval.shape)
    return parts.resharded_like(aval, value).astype(aval.dtype)


def _formula_jvp(
    primitive: Primitive,
    formula: Callable[..., list[jax.Array]],
    primals: Sequence[Any],
    tangents: Sequence[Any],
    *,
    tree: Any,
    backend: str,
    **params: Any,
) -> tuple[list[Any], list[Any]]:
    """Differentiates tangent_p and gradient_p, for the second order.

    The primal is the primitive itself; the tangent is the derivative of its formula.
    """
    results = primitive.bind(*primals, tree=tree, backend=backend, **params)
    moving = [i for i, dot in enumerate(tangents) if not isinstance(dot, ad.Zero)]

    def along(*values: Any) -> list[jax.Array]:
        flat = list(primals)
        for i, value in zip(moving, values, strict=True):
            flat[i] = value
        return formula(tree.unflatten(flat), **params)

    _, dots = jax.jvp(
        along, [primals[i] for i in moving], [tangents[i] for i in moving]
    )
    return results, dots


ad.primitive_jvps[norm_p] = _norm_jvp
ad.primitive_transposes[tangent_p] = _tangent_transpose
for _p, _formula in ((tangent_p, _tangent_formula), (gradient_p, _gradient_formula)):
    ad.primitive_jvps[_p] = functools.partial(_formula_jvp, _p, _formula)


# --- vmap -----------------------------------------------------------------------------

# Positions of the operands that are a scale, a bias or the tangent of one, and of the
# mask.
_PARAMS = {norm_p: (1, 2), tangent_p: (1, 2, 5, 6), gradient_p: (2, 3)}
_MASK = {norm_p: 3, tangent_p: 9, gradient_p: 6}


def _batch(
    primitive: Primitive,
    flat: Sequence[Any],
    dims: Sequence[int | None],
    *,
    tree: Any,
    norm: Norm,
    **params: Any,
) -> tuple[list[Any], list[int]]:
    """Makes the mapped axis the first axis of x, and binds the same primitive again.

    A parameter that is not mapped stays shared, with shape (features,). A mapped
    parameter gets a leading axis, (batch, features), which the formulas align with the
    first axis of x.
    """
    (size,) = {
        operand.shape[dim]
        for operand, dim in zip(flat, dims, strict=True)
        if dim is not None
    }

    def to_front(index: int, operand: Any, dim: int | None) -> Any:
        if operand is None:
            return None
        if dim is not None:
            return jnp.moveaxis(operand, dim, 0)
        if index in _PARAMS[primitive] and operand.ndim == 1:
            return operand
        if index == _MASK[primitive]:
            return operand[None]
        return jnp.broadcast_to(operand, (size, *operand.shape))

    operands = [
        to_front(index, operand, dim)
        for index, (operand, dim) in enumerate(
            zip(tree.unflatten(flat), tree.unflatten(dims), strict=True)
        )
    ]
    if primitive is gradient_p:
        params["own_params"] += 1
    results = primitive.bind(
        *[operand for operand in operands if operand is not None],
        tree=tree,
        norm=norm.with_leading_axes(1),
        **params,
    )
    return results, [0] * len(results)


for _p in (norm_p, tangent_p, gradient_p):
    batching.primitive_batchers[_p] = functools.partial(_batch, _p)
