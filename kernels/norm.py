"""The differentiable normalization: three primitives and their rules.

    norm_p       x, scale, bias -> y (and mean, var when a derivative will need them)
    tangent_p    x_dot, scale_dot, bias_dot, shortcut_dot -> y_dot, linear in these four
    gradient_p   dy, x, scale, mean, var -> dx, dscale, dbias, dshortcut

To x_hat * scale + bias a shortcut of x's shape can be added, and an activation follow,
whose slope depends on bias and shortcut: tangent_p and gradient_p take these too then.
With a residual norm_p normalizes h = x + residual. It can return h too, or x where
there is none (`carries`): its tangent goes through tangent_p unchanged, so that the
transpose of that primitive has its cotangent in hand, and gradient_p adds dx to it.

A scale or bias can have leading axes, those of x along which it varies: of each sample,
or of each row, or what vmap has made of it.

How they hang together:

    jvp of norm_p           norm_p with statistics, and tangent_p for the tangent of y
    transpose of tangent_p  gradient_p: the backward kernel of every reverse pass
    jvp of the other two    that of their jax.numpy formulas, so every order exists
    Taylor series (jet)     those of the formulas
    vmap                    one more leading axis, and the same primitive again
    abstract evaluation     that of the formulas, which know shardings and manual axes
    lowering                what `plan` chose for the platform and partitioning at hand

So reverse mode runs one forward and one backward kernel, whatever vmap, remat, scan or
jit is around it, and jvp, Hessians and export work too. `jax.custom_vjp` would refuse
forward mode; a choice of platform at trace time would break export.

The primitives keep the caller's rank. The kernels' view x[N, S, G, K] is made inside an
implementation, for a reshape out here would make XLA gather a sharded array.
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

from fusednorm import reference
from fusednorm.kernels import dispatch, parts
from fusednorm.kernels.geometry import is_rowwise
from fusednorm.reference import Norm

# An array, or None where there is none: no bias, a tangent that is zero.
Maybe = jax.Array | None


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
    """y = act((x - mean) * rsqrt(var + epsilon) * scale + bias + shortcut).

    Args:
      norm: what is normalized over what; see `fusednorm.reference.Norm`.
      x: float or complex array of any shape.
      scale, bias: shape (features,), behind leading axes of x along which they vary; or
        None.
      mask: None, or bool of x's rank that broadcasts to x.
      shortcut: x's shape, or None.
      axis_name: mapped axes over which the statistics are combined too.
      axis_index_groups: as for `jax.lax.psum`.

    Returns:
      Array of x's shape, dtype `norm.dtype`.
    """
    norm = _over(norm, axis_name, axis_index_groups, x, scale, mask)
    if _is_plain(norm, x.dtype):
        return _plain(norm, x, scale, bias, mask, shortcut)[0]
    operands = _alike_over_devices(norm, x, scale, bias, mask, None, shortcut)
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
    """As `normalize`, and the statistics, of which BatchNorm keeps running averages.

    Returns:
      y: x's shape.
      mean, var: x's rank, with size 1 along reduced axes; mean is None without
        centring.
    """
    norm = _over(norm, axis_name, axis_index_groups, x, scale, mask)
    if _is_plain(norm, x.dtype):
        return _plain(norm, x, scale, bias, mask, shortcut)
    operands = _alike_over_devices(norm, x, scale, bias, mask, None, shortcut)
    y, *statistics = fusednorm_normalize(
        norm, dispatch.current_backend(), *operands, statistics=True
    )
    mean, var = statistics if norm.center else (None, *statistics)
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
    """`normalize` of h = x + residual, and h.

    Returns:
      y: x's shape, dtype `norm.dtype`.
      h: x's shape, in the dtype that x and residual promote to.
    """
    has_params = scale is not None or bias is not None
    rowwise = is_rowwise(norm, x.shape, has_params=has_params)
    crosses = axis_name is not None
    if not rowwise or crosses or _is_plain(norm, x.dtype, residual.dtype):
        h = reference.add(x, residual)
        crossing = {"axis_name": axis_name, "axis_index_groups": axis_index_groups}
        return normalize(norm, h, scale, bias, mask, shortcut, **crossing), h
    operands = _alike_over_devices(norm, x, scale, bias, mask, residual, shortcut)
    y, h = fusednorm_normalize(
        norm, dispatch.current_backend(), *operands, carries=True
    )
    return y, h


def _over(
    norm: Norm,
    axis_name: Any,
    axis_index_groups: Any,
    x: jax.Array,
    scale: Maybe,
    mask: Maybe,
) -> Norm:
    """The same with statistics that cross mapped axes."""
    if axis_name is None:
        return norm
    names = axis_name if isinstance(axis_name, tuple | list) else (axis_name,)
    groups = None
    if axis_index_groups is not None:
        groups = tuple(tuple(map(int, group)) for group in axis_index_groups)
    one_scale = False
    if varying := _varies(x):  # jax keeps account of what varies (`check_vma`)
        one_scale = not _varies(scale) & set(names)
        if groups is None:  # statistics of what is the same are those of each
            manual = set(jax.sharding.get_abstract_mesh().manual_axes)
            same = manual - varying - _varies(mask)
            names = [name for name in names if name not in same]
    return dataclasses.replace(
        norm, over=tuple(names), groups=groups, one_scale=one_scale
    )


def _is_plain(norm: Norm, *dtypes: Any) -> bool:
    """Whether it is no primitive's: of complex numbers, with an epsilon that the
    program computes, with `axis_index_groups`, or over other mapped axes than those
    that a `jax.shard_map` has in hand (of a vmap)."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    return (
        norm.groups is not None
        or not isinstance(norm.epsilon, float)
        or not set(norm.over) <= set(manual)
        or any(jnp.issubdtype(d, jnp.complexfloating) for d in (norm.dtype, *dtypes))
    )


def _alike_over_devices(norm: Norm, x: jax.Array, *others: Maybe) -> tuple[Any, ...]:
    """Makes all operands vary over the same manual axes of a `jax.shard_map`.

    Parameters are the same on every device of the axis, x is not: the cast says so, and
    its transpose is the psum that adds up dscale and dbias over the devices.
    """
    operands = (x, *others)
    over: frozenset[Hashable] = frozenset().union(*(_varies(a) for a in operands))
    if over:  # where jax keeps account of what varies
        over |= set(norm.over)
    return tuple(
        a
        if a is None or not (missing := over - _varies(a))
        else lax.pcast(a, tuple(missing), to="varying")
        for a in operands
    )


def _varies(a: Maybe) -> frozenset[Hashable]:
    return frozenset() if a is None else jax.typeof(a).manual_axis_type.varying


# One jit around each op: its cache makes the second norm of a shape cheap to trace. Its
# name is what profiles and HLO show.
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


def _plain(norm: Norm, *operands: Maybe) -> tuple[jax.Array, Maybe, jax.Array]:
    norm, epsilon = _without_epsilon(norm)
    if epsilon is None:
        return fusednorm_plain(norm, *operands)
    return fusednorm_computed_epsilon(norm, *operands, epsilon)


def _without_epsilon(norm: Norm) -> tuple[Norm, Maybe]:
    """The norm as the key of a cache, and its epsilon where the program computes it."""
    if isinstance(norm.epsilon, float):
        return norm, None
    return dataclasses.replace(norm, epsilon=math.nan), norm.epsilon


# What `_is_plain`: the reference with JAX's own derivatives. `explain` knows it by the
# functions' names.
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
    """`normalize` for statistics given.

    Args:
      norm: axes of the features, epsilon, activation, dtype of y.
      x: any shape.
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
    return reference.apply(norm, x, mean, var, scale, bias, shortcut)


# --- the primitives -------------------------------------------------------------------
# A primitive's operands are flat, and `tree` puts them, and None where there is none,
# into the tuple that its formula takes. A formula returns a flat list.


def _norm_formula(
    operands: tuple[Any, ...],
    *,
    norm: Norm,
    carries: bool,
    statistics: bool,
    sparing: reference.Sparing = None,
) -> list[jax.Array]:
    x, scale, bias, mask, residual, shortcut = operands
    h = x if residual is None else reference.add(x, residual, sparing=sparing)
    y, mean, var = reference.forward(
        norm, h, scale, bias, mask, shortcut, sparing=sparing
    )
    found = [y, h] if carries else [y]
    return found + [r for r in (mean, var) if statistics and r is not None]


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
    sparing: reference.Sparing = None,
) -> list[jax.Array]:
    results = reference.backward(
        norm, *operands, own_params=own_params, wanted=wanted[:3], sparing=sparing
    )
    return [result for result, want in zip(results, wanted, strict=True) if want]


def _primitive(name: str, formula: Callable[..., list[jax.Array]]) -> Primitive:
    """A primitive that means `formula`."""
    primitive = Primitive(name)
    primitive.multiple_results = True

    # A jit, for its cache: shapes seen before are not traced again, here or in
    # lowering.
    @functools.partial(
        jax.jit,
        static_argnames=(
            "tree",
            "norm",
            "carries",
            "statistics",
            "sparing",
            "wanted",
            "own_params",
        ),
    )
    def meaning(*flat: jax.Array, tree: Any, **params: Any) -> list[jax.Array]:
        return formula(tree.unflatten(flat), **params)

    def abstract(*avals: Any, backend: str, **params: Any) -> Sequence[Any]:
        return jax.make_jaxpr(functools.partial(meaning, **params))(*avals).out_avals

    def lower(ctx: Any, *flat: Any, backend: str, **params: Any) -> Any:
        implementation: Callable[..., Any] = functools.partial(meaning, **params)
        if primitive is not tangent_p:
            target = dispatch.target_of(ctx)
            call, answer, spread = choose(
                primitive, ctx.avals_in, params, target, backend
            )
            bind = functools.partial(primitive.bind, **{**params, "backend": backend})
            if sparing := _sparing(call, target):
                implementation = functools.partial(implementation, sparing=sparing)
            if isinstance(answer, dispatch.Fallback):
                pass
            elif spread is not None:
                implementation = parts.mapped(spread, bind, ctx.avals_out)
            elif target.partitioned > 1:
                ctx = parts.lowering_on(target.mesh, ctx)
                implementation = parts.by_xla(
                    params["norm"],
                    shapes_of(primitive, ctx.avals_in, params),
                    call.x,
                    implementation,
                    bind,
                    f"{primitive} {params} {backend}",
                )
            else:
                implementation = functools.partial(_launch, answer, params)
        return mlir.lower_fun(implementation, multiple_results=True)(ctx, *flat)

    def taylor(primals_in: Any, series_in: Any, **params: Any) -> Any:
        del params["backend"]  # a rule of jet has and returns unscaled coefficients
        along = functools.partial(meaning, **params)
        return jet.jet(along, primals_in, series_in, factorial_scaled=False)

    def run(*flat: Any, backend: str, **params: Any) -> list[jax.Array]:
        return meaning(*flat, **params)  # only jax.disable_jit() comes here

    primitive.def_impl(run)
    primitive.def_abstract_eval(abstract)
    mlir.register_lowering(primitive, lower)
    jet.jet_rules[primitive] = taylor
    return primitive


def _sparing(call: dispatch.Call, target: dispatch.Target) -> reference.Sparing:
    """Whose work the reference should spare, if one device's; see reference/norm.py.

    On a TPU only the forward: both sums are then part of the convolution that makes x,
    and x is read once less. Compiled for a v5e, 200 x 28 x 28 x 512 in bfloat16 between
    two convolutions: 4.3 tensors for 5.3, flax's 4.3.

    On a CPU not the forward where XLA makes one loop of the whole norm, which a branch
    would break up: it does from 4096 statistics on. Sparing and not, in times flax's:
    4095 rows of 512 float32 features 0.97 and 1.26, 100000 of 64 1.25 and 1.01;
    bfloat16, 732 rows of 8192 1.07 and 1.25, 16384 of 1024 2.89 and 1.26. In float16
    the loop is slow: 100000 rows of 64 0.22 and 0.86. Of groups it makes none: 512
    images of 2 x 2 x 512 0.41 and 1.06, (1024, 1024) 0.31 and 1.17; but (64, 128), with
    2048 statistics of 4 numbers each, for whose branch they are many, 1.48 and 1.04.

    Nor the backward of rows of which dx alone is wanted, or dscale and dbias: that is
    one loop too. 4096 rows of 512, dx of LayerNorm 1.52 and 0.76, RMSNorm 1.22 and
    0.88, dscale of RMSNorm 2.2 and 0.94; but with fewer rows, 2048 of 2048, dx 0.90 and
    2.1, and in bfloat16, 3940 of 768, 0.22 and 1.12; dx and dscale 0.1 and 0.31. Of
    groups the loop is slow: dx of (8192, 256) in 64 0.90 and 1.63.
    """
    rowwise = is_rowwise(call.norm, call.x.shape, has_params=call.has_params)
    in_groups = call.norm.num_groups not in (None, 1)
    statistics = math.prod(call.norm.statistic_shape(call.x.shape))
    known = isinstance(statistics, int)  # not so in an export for any shape
    many = known and statistics >= 4096
    if call.op != "forward":
        dx, *params, _ = call.wanted
        one_loop = not dx or (many and call.x.dtype.itemsize > 2 and not any(params))
        one_loop = one_loop and rowwise and not in_groups
        return "cpu" if target == dispatch.ONE_CPU and not one_loop else None
    if target != dispatch.ONE_CPU:
        return "tpu" if target == dispatch.ONE_TPU else None
    one_loop = many and call.x.dtype != jnp.float16
    if in_groups:
        one_loop = rowwise and not many
    return None if one_loop else "cpu"


def _launch(
    kernel: dispatch.Kernel, params: dict[str, Any], *flat: jax.Array
) -> list[jax.Array]:
    *operands, beside, shortcut = params["tree"].unflatten(flat)
    if params["norm"].over:
        halves = _backward_halves if "wanted" in params else _forward_halves
        return halves(kernel.launch, params, (*operands, beside, shortcut))
    name = "dh" if "wanted" in params else "residual"
    given = dispatch.present(**{name: beside, "shortcut": shortcut})
    results: list[jax.Array] = kernel.launch(*operands, **given)
    if params.get("carries") and beside is None:
        results.insert(1, operands[0])
    return results


def _forward_halves(
    launch: Callable[..., Any], params: dict[str, Any], operands: tuple[Any, ...]
) -> list[jax.Array]:
    """Mean and variance of what is here by the kernel, of all devices by psums."""
    norm = params["norm"]
    x, scale, bias, _, residual, shortcut = operands
    beside = dispatch.present(residual=residual)
    *found, var = launch(x, None, None, None, **beside)
    mean = found.pop() if norm.center else None
    (h,) = found or [x]
    mean, var = reference.over_devices(norm, h, mean, var)
    y = reference.apply(norm, h, mean, var, scale, bias, shortcut)
    results = [y, h] if params["carries"] else [y]
    return results + [r for r in (mean, var) if params["statistics"] and r is not None]


def _backward_halves(
    launch: Callable[..., Any], params: dict[str, Any], operands: tuple[Any, ...]
) -> list[jax.Array]:
    """c1 and c2 of what is here by the kernel, of all devices by psums.

    Where each channel has a mean of its own, n times these are scale * dscale and
    scale * dbias: the psums of dscale and dbias serve both then, for XLA makes one of
    two that are alike. Not where each device may have a scale of its own.
    """
    norm = params["norm"]
    dy, x, scale, bias, mean, var, mask, dh, shortcut = operands
    wants_dx, wants_dscale, wants_dbias, wants_dshortcut = params["wanted"]
    given = (dy, x, scale, bias, mean, var)
    behind = dispatch.present(shortcut=shortcut)
    results: list[jax.Array] = launch(*given, mask, **behind)
    dz = reference.before_activation(norm, *given, shortcut)
    if wants_dx:
        products = 1 + norm.center
        inner, outer = results[:products], results[products:]
        channelwise = _mean_per_feature(params, x, scale)
        if channelwise and scale is not None and wants_dscale and wants_dbias:
            count = x.size // var.size * lax.axis_size(norm.over)
            weight = norm.weight(scale.astype(var.dtype))
            totals = lax.psum(outer[:products], norm.over)
            means = [(weight * total / count).reshape(var.shape) for total in totals]
        else:
            means = lax.pmean(inner, norm.over)
        c1, c2 = means if norm.center else (*means, None)
        dx = reference.input_gradient(norm, dz, x, scale, mean, var, c1, c2, dh=dh)
        results = [dx, *outer]
    if wants_dshortcut:
        results.append(dz.astype(dy.dtype if shortcut is None else shortcut.dtype))
    return results


def _mean_per_feature(params: dict[str, Any], x: jax.Array, scale: Maybe) -> bool:
    """Whether all that shares a scale shares a mean, on all devices that combine, and
    nothing else does."""
    norm = params["norm"]
    every = sorted((*norm.reduction_axes, *norm.feature_axes))
    own = max(params["own_params"], 0 if scale is None else scale.ndim - 1)
    shared = norm.one_scale and own == 0
    return shared and norm.num_groups is None and every == [*range(x.ndim)]


norm_p = _primitive("norm", _norm_formula)
tangent_p = _primitive("norm_tangent", _tangent_formula)
gradient_p = _primitive("norm_gradient", _gradient_formula)


def choose(
    primitive: Primitive,
    avals: Sequence[Any],
    params: dict[str, Any],
    target: dispatch.Target,
    backend: str,
) -> tuple[dispatch.Call, dispatch.Kernel | dispatch.Fallback, parts.Parts | None]:
    """What one bound norm_p or gradient_p gets.

    Returns:
      call: its work, of one device where the types of the operands tell its part.
      answer: what `plan` says to that.
      spread: these parts, or None.
    """
    call = call_of(primitive, avals, params)
    spread = None
    if len(params["norm"].feature_axes) > 1:
        # XLA may have split one that `parts` does not, and would gather x.
        target = dataclasses.replace(target, mesh=None)
    if target.partitioned > 1:
        operands = params["tree"].unflatten(avals)
        shapes = shapes_of(primitive, avals, params)
        spread = parts.of_types(params["norm"], call.x, shapes, operands)
    if spread is not None:
        left = target.partitioned // parts.explicit_devices(spread.mesh)
        target = dataclasses.replace(target, partitioned=left, mesh=None)
        mine = [
            None if follows is None else spread.part(aval, follows)
            for aval, follows in zip(operands, shapes.operands, strict=True)
        ]
        call = call_of(
            primitive, jax.tree.leaves(mine), {**params, "norm": spread.norm}
        )
    return call, dispatch.plan(call, target, backend), spread


def shapes_of(
    primitive: Primitive, avals: Sequence[Any], params: dict[str, Any]
) -> parts.Shapes:
    """How the axes of a norm_p's or gradient_p's arrays go along with x's."""
    operands, norm = params["tree"].unflatten(avals), params["norm"]
    if primitive is norm_p:
        given = params["carries"], params["statistics"]
        return parts.forward_shapes(norm, operands, *given)
    given = params["wanted"], params["own_params"]
    return parts.backward_shapes(norm, operands, *given)


def call_of(
    primitive: Primitive, avals: Sequence[Any], params: dict[str, Any]
) -> dispatch.Call:
    """What `plan` must know of one bound norm_p or gradient_p."""
    operands = [dispatch.describe(aval) for aval in params["tree"].unflatten(avals)]
    if primitive is norm_p:
        x, scale, bias, mask, residual, shortcut = operands
        return dispatch.Call(
            op="forward",
            norm=params["norm"],
            x=x,
            scale=scale,
            bias=bias,
            beside=residual,
            shortcut=shortcut,
            mask=mask is not None,
            statistics=params["statistics"],
        )
    dy, x, scale, bias, _, _, mask, dh, shortcut = operands
    return dispatch.Call(
        op="backward",
        norm=params["norm"],
        x=x,
        scale=scale,
        bias=bias,
        dy=dy,
        beside=dh,
        shortcut=shortcut,
        mask=mask is not None,
        wanted=params["wanted"],
        own_params=params["own_params"],
    )


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
            h_dot = parts.lying_as(jax.typeof(h), functools.reduce(jnp.add, dots))
    mean, var = moments if norm.center else (None, *moments)
    passes = carries and h_dot is not None
    moving = (h_dot, scale_dot, bias_dot, shortcut_dot)
    flat, tangent_tree = jax.tree.flatten(
        (*moving, h, scale, bias, mean, var, mask, shortcut)
    )
    dots = tangent_p.bind(
        *flat, tree=tangent_tree, norm=norm, backend=backend, carries=passes
    )
    found = [y]
    if carries:
        found.append(h)
        dots += [] if passes else [ad.Zero(jax.typeof(h))]
    if not statistics:
        return found, dots
    if h_dot is None:
        moments_dot: list[Any] = [ad.Zero(jax.typeof(moment)) for moment in moments]
    else:
        mean_dot, var_dot = reference.moments_tangent(norm, h_dot, h, mean, mask)
        moments_dot = [mean_dot, var_dot] if norm.center else [var_dot]
    return [*found, *moments], [*dots, *moments_dot]


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
    dh = others[0] if carries and wanted[0] else None  # of x_dot as it went through
    dh = None if isinstance(dh, ad.Zero) else dh
    if isinstance(dy, ad.Zero):
        found: list[Any] = [ad.Zero(aval) for aval in avals]
        if dh is not None:
            found[0] = dh
    else:
        # Without an activation dz is dy.
        adds_dy = wanted[3] and norm.activation is None
        wanted[3] = wanted[3] and not adds_dy
        # Nothing adds up where each element has its own scale.
        each = scale is not None and reference.each_its_own(scale, x)
        summed = [
            dot.aval
            for dot in (dots[2:3] if each else dots[1:3])
            if ad.is_undefined_primal(dot)
        ]
        operands, gradient_tree = jax.tree.flatten(
            (dy, x, scale, bias, mean, var, mask, dh, shortcut)
        )
        found = []
        if any(wanted):
            found = gradient_p.bind(
                *operands,
                tree=gradient_tree,
                norm=norm,
                backend=backend,
                wanted=tuple(wanted),
                own_params=max((len(aval.shape) - 1 for aval in summed), default=0),
            )
        found += [dy] if adds_dy else []
        found = [_sum_to(value, aval) for value, aval in zip(found, avals, strict=True)]
    next_found = iter(found)
    return [next(next_found) if ad.is_undefined_primal(a) else None for a in flat]


def _sum_to(value: jax.Array, aval: Any) -> jax.Array:
    """Adds up a gradient (*own, features) over the axes that its parameter shares; it
    lies where types say that what it is of does (explicit mode)."""
    *lead, features = aval.shape
    if value.ndim > 1 and value.shape != aval.shape:
        aligned = (*lead, *[1] * (value.ndim - len(aval.shape)), features)
        shared = [
            axis
            for axis, (own, kept) in enumerate(zip(value.shape, aligned, strict=True))
            if own != kept
        ]
        value = jnp.sum(value, axis=shared, keepdims=True).reshape(aval.shape)
    return parts.lying_as(aval, value).astype(aval.dtype)


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
    """Second order: the primitive as it is, its tangent by the formula's derivative."""
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

# Which operands are a scale or a bias, or the tangent of one.
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
    """The mapped axis becomes x's first one, and the same primitive is bound again.

    A parameter that is not mapped stays shared, (features,). One that is mapped gets a
    leading axis, (batch, features), which the formulas set against x's first axis.
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
        norm=norm.behind(1),
        **params,
    )
    return results, [0] * len(results)


for _p in (norm_p, tangent_p, gradient_p):
    batching.primitive_batchers[_p] = functools.partial(_batch, _p)
