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
    lowering                what `plan` chooses for the platform and the partitioning

So reverse mode runs one forward and one backward kernel, whatever vmap, remat, scan or
jit is around it, and jvp, Hessians and export work too. `jax.custom_vjp` would refuse
forward mode, and a choice of platform at trace time would break export.

The primitives keep the caller's rank. The kernels' view x[N, S, G, K] is made inside an
implementation, because a reshape at this level would make XLA gather a sharded array.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
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
from fusednorm.kernels import dispatch, parts
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
    norm = _over(norm, axis_name, axis_index_groups, x, scale, mask)
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
    norm = _over(norm, axis_name, axis_index_groups, x, scale, mask)
    if why := _why_plain(norm, x.dtype):
        y, mean, var = _plain(why, norm, x, scale, bias, mask, shortcut)
    else:
        operands = _typed_alike(x, scale, bias, mask, None, shortcut)
        y, *statistics = fusednorm_normalize(
            norm, dispatch.current_backend(), *operands, statistics=True
        )
        mean, var = statistics if norm.center else (None, *statistics)
    # They are the same along axes of size 1, which `_over` left out: JAX shall know it.
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
        crossing = {"axis_name": axis_name, "axis_index_groups": axis_index_groups}
        return normalize(norm, h, scale, bias, mask, shortcut, **crossing), h
    operands = _typed_alike(x, scale, bias, mask, residual, shortcut)
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
    return dataclasses.replace(norm, over=names, groups=groups, one_scale=one_scale)


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
    if norm.groups is not None or not set(norm.over) <= set(manual):
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
    over: frozenset[Hashable] = frozenset().union(*(_varies(a) for a in operands))
    return tuple(
        a
        if a is None or not (missing := over - _varies(a))
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
    tuned_for: reference.TunedFor = None,
) -> list[jax.Array]:
    results = reference.backward(
        norm, *operands, own_params=own_params, wanted=wanted[:3], tuned_for=tuned_for
    )
    return [result for result, want in zip(results, wanted, strict=True) if want]


def _primitive(name: str, formula: Callable[..., list[jax.Array]]) -> Primitive:
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
    def meaning(*flat: jax.Array, tree: Any, **params: Any) -> list[jax.Array]:
        return formula(tree.unflatten(flat), **params)

    def abstract(*avals: Any, backend: str, **params: Any) -> Sequence[Any]:
        return jax.make_jaxpr(functools.partial(meaning, **params))(*avals).out_avals

    def taylor(primals_in: Any, series_in: Any, **params: Any) -> Any:
        del params["backend"]  # jet's rules take and return unscaled coefficients
        along = functools.partial(meaning, **params)
        return jet.jet(along, primals_in, series_in, factorial_scaled=False)

    def run(*flat: Any, backend: str, **params: Any) -> list[jax.Array]:
        return meaning(*flat, **params)  # reached only under jax.disable_jit()

    primitive.def_impl(run)
    primitive.def_abstract_eval(abstract)
    mlir.register_lowering(primitive, functools.partial(_lower, primitive, meaning))
    jet.jet_rules[primitive] = taylor
    if checkify is not None:
        check = functools.partial(checkify.nan_error_check, primitive)
        checkify.error_checks[primitive] = check
    return primitive


def _lower(
    primitive: Primitive,
    meaning: Callable[..., list[jax.Array]],
    ctx: mlir.LoweringRuleContext,
    *flat: Any,
    backend: str,
    **params: Any,
) -> Any:
    """Lowers what is chosen for the target: a kernel, the reference, or a part of the
    work on each device."""
    reference_run = functools.partial(meaning, **params)
    if primitive is tangent_p:
        return mlir.lower_fun(reference_run, multiple_results=True)(ctx, *flat)
    target, avals = dispatch.target_of(ctx), ctx.avals_in
    call, answer, spread = choose(primitive, avals, params, target, backend)
    if tuned_for := _tuned_for(call, target):
        reference_run = functools.partial(reference_run, tuned_for=tuned_for)
    # It outlives the lowering, and ctx must not.
    on_part = functools.partial(_run_on_part, primitive, avals, params, backend)
    run: Callable[..., Any] = reference_run
    rules: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if isinstance(spread, parts.Parts):
        run = parts.mapped(spread, on_part, ctx.avals_out)
    elif spread is parts.BY_XLA:
        (platform,) = target.platforms
        ctx = parts.numbered(ctx)
        run = parts.by_xla(
            params["norm"],
            shapes_of(primitive, avals, params),
            call.x,
            reference_run,
            functools.partial(on_part, asked_on=platform),
            f"{primitive} {params} {backend}",
            evenly=backend != "auto",  # a named kernel takes no mask
        )
    elif isinstance(answer, dispatch.Kernel):
        run, rules = functools.partial(_launch, answer, params), _rules_of_kernels()
    with rules:
        return mlir.lower_fun(run, multiple_results=True)(ctx, *flat)


def _run_on_part(
    primitive: Primitive,
    avals: Sequence[Any],
    params: dict[str, Any],
    backend: str,
    *flat: Any,
    norm: Norm,
    inside: dict[int, jax.Array],
    asked_on: str | None = None,
) -> list[jax.Array]:
    """Runs a primitive on one device's part of its operands.

    Args:
      primitive, avals, params, backend: the primitive as bound to the whole operands.
      flat: the part's operands.
      norm, inside: what `parts.Parts.run` passes.
      asked_on: the platform, if XLA asks for the code of the part. The lowering is over
        by then, and a kernel is lowered by itself.
    """
    params_here = {**params, "norm": norm}
    if inside:
        shapes = shapes_of(primitive, avals, params)
        operands = params["tree"].unflatten(flat)
        operands = _only_inside(primitive, operands, shapes, inside)
        masked, params_here["tree"] = jax.tree.flatten(operands)
        return primitive.bind(*masked, **params_here, backend=backend)
    if asked_on is not None:
        target = dispatch.Target((asked_on,))
        avals_here = [*map(jax.typeof, flat)]
        call, answer, _ = choose(primitive, avals_here, params_here, target, backend)
        if isinstance(answer, dispatch.Kernel):
            return _launch(_lowered_once(answer, call, asked_on), params_here, *flat)
    return primitive.bind(*flat, **params_here, backend=backend)


def _gains_from_parts(
    call: dispatch.Call,
    target: dispatch.Target,
    answer: dispatch.Kernel | dispatch.Fallback,
    backend: str,
) -> bool:
    """Returns whether each device should run the call on its part of x: by a kernel, or
    by the reference's form for one GPU, unless the reference was named."""
    if isinstance(answer, dispatch.Kernel):
        return True
    alone = dataclasses.replace(target, partitioned=1, asks=False)
    return backend == "auto" and _tuned_for(call, alone) == "gpu"


def _only_inside(
    primitive: Primitive,
    operands: Sequence[Any],
    shapes: parts.Shapes,
    inside: dict[int, jax.Array],
) -> tuple[Maybe, ...]:
    """Keeps what lies outside of x out of all sums, on a device that has less of x than
    others (`Parts.inside`).

    That is garbage. It becomes 0 in dy, 1 in all other operands, and False in the mask,
    which there is then.
    """
    of_mask = _MASK[primitive]
    found: list[Maybe] = []
    for at, (operand, axes) in enumerate(zip(operands, shapes.operands, strict=True)):
        if at == of_mask:
            x_ndim = operands[0].ndim
            masks = [_along(axis, x_ndim, in_x) for axis, in_x in inside.items()]
            given = masks if operand is None else [operand, *masks]
            found.append(functools.reduce(jnp.logical_and, given))
            continue
        is_dy = primitive is gradient_p and at == 0
        for along, axis in enumerate(axes or ()):
            if axis in inside:
                in_x = _along(along, operand.ndim, inside[axis])
                operand = jnp.where(in_x, operand, 0 if is_dy else 1)
        found.append(operand)
    return tuple(found)


def _along(axis: int, ndim: int, values: jax.Array) -> jax.Array:
    """Shapes values along one axis to broadcast against an array of `ndim` axes."""
    return jnp.expand_dims(values, [a for a in range(ndim) if a != axis])


def _tuned_for(call: dispatch.Call, target: dispatch.Target) -> reference.TunedFor:
    """Returns the `tuned_for` of the reference: the compiler that it should favour.

    On a TPU only the forward is tuned. Both sums are then part of the convolution
    that makes x, and x is read once less. A norm of 200 x 28 x 28 x 512 in bfloat16
    between two convolutions, compiled for a v5e, then moves 4.3 tensors rather than
    5.3; flax's moves 4.3. If XLA partitions it over several TPUs, only BatchNorm is
    tuned: in other norms, that the devices agree on a branch would be a collective of
    its own.

    On GPUs rows are tuned only in a forward, and not if just y is wanted: from compute
    capability 8.0 on, XLA's GPU code is then one kernel, which reads x once. Tensors
    moved forward and backward, compiled for an A100, with tuning, without, and by
    flax's layer:

    - LayerNorm of 12288 float32 features: 8.1, 15.1, 8.1; of 768: 8.1, 12.0, 8.1
    - BatchNorm of 56 x 56 x 256, 50 samples, float32: 8.0, 9.0, 9.0
    - GroupNorm of 64 x 64 x 320, bfloat16, 2 samples: 8.2, 20.0, 17.0
    """
    forward = call.op == "forward"
    if target.platforms == ("tpu",):
        statistics = enumerate(call.norm.statistic_shape(call.x.shape))
        of_batch = all(n == 1 for a, n in statistics if a not in call.norm.feature_axes)
        return "tpu" if forward and (target.partitioned == 1 or of_batch) else None
    if target.platforms in (("cuda",), ("rocm",)):
        of_rows = _is_rowwise(call)
        if of_rows and not (forward and (call.statistics or _is_before_ampere())):
            return None
        if target.partitioned == 1:
            return "gpu"
        return "gpus" if of_rows else None
    if target != dispatch.ONE_CPU:
        return None
    one_loop = _forward_is_one_loop(call) if forward else _backward_is_one_loop(call)
    return None if one_loop else "cpu"


def _is_before_ampere() -> bool:
    """Returns whether the NVIDIA GPU is too old for XLA's kernels of whole rows."""
    device = dispatch.device_of("cuda")
    return device is not None and float(device.compute_capability) < 8.0


def _forward_is_one_loop(call: dispatch.Call) -> bool:
    """Returns whether a CPU's forward is faster as one loop, which tuning breaks up.

    XLA makes one loop of the whole norm from 4096 statistics on, except in groups.
    Times relative to flax, tuned vs not tuned:

    - float32: 4095 rows of 512 features: 0.97 vs 1.26; 100000 of 64: 1.25 vs 1.01
    - bfloat16: 732 rows of 8192: 1.07 vs 1.25; 16384 of 1024: 2.89 vs 1.26
    - float16, where the loop is slow: 100000 rows of 64: 0.22 vs 0.86
    - groups: 512 images of 2 x 2 x 512: 0.41 vs 1.06; (1024, 1024): 0.31 vs 1.17
    - groups of (64, 128): 1.48 vs 1.04; with 2048 statistics of only 4 numbers each,
      the branch does not pay off
    """
    if _in_groups(call):
        return _is_rowwise(call) and not _has_many_statistics(call)
    return _has_many_statistics(call) and call.x.dtype != jnp.float16


def _backward_is_one_loop(call: dispatch.Call) -> bool:
    """Returns whether a CPU's backward is faster as one loop, which tuning breaks up.

    XLA makes one loop of rows if only dx is wanted, or only dscale and dbias. The tuned
    code is faster all the same for dx with fewer rows or in half precision, and in
    groups, where the loop is slow. Times relative to flax, tuned vs not tuned:

    - 4096 rows of 512, dx of LayerNorm: 1.52 vs 0.76; dx of RMSNorm: 1.22 vs 0.88;
      dscale of RMSNorm: 2.2 vs 0.94
    - fewer rows, 2048 of 2048, dx: 0.90 vs 2.1
    - bfloat16, 3940 rows of 768, dx: 0.22 vs 1.12; dx and dscale: 0.1 vs 0.31
    - groups, dx of (8192, 256) in 64: 0.90 vs 1.63
    """
    if _in_groups(call) or not _is_rowwise(call):
        return False
    dx, dscale, dbias, _ = call.wanted
    if not dx:
        return True
    alone = not (dscale or dbias)
    return alone and _has_many_statistics(call) and call.x.dtype.itemsize > 2


def _in_groups(call: dispatch.Call) -> bool:
    return call.norm.num_groups not in (None, 1)


def _is_rowwise(call: dispatch.Call) -> bool:
    return is_rowwise(call.norm, call.x.shape, has_params=call.has_params)


def _has_many_statistics(call: dispatch.Call) -> bool:
    count = math.prod(call.norm.statistic_shape(call.x.shape))
    return isinstance(count, int) and count >= 4096  # else symbolic, in an export


@contextlib.contextmanager
def _rules_of_kernels() -> Iterator[None]:
    """A context for the lowering of kernels, which count in int32.

    Whichever rules of promotion a user has chosen, they are for the user's own code.
    """
    with (
        jax.enable_x64(False),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        yield


def _launch(
    kernel: dispatch.Kernel, params: dict[str, Any], *flat: jax.Array
) -> list[jax.Array]:
    # `plan` gives no kernel a call with a mask.
    *operands, _, beside, shortcut = params["tree"].unflatten(flat)
    if params["norm"].over:
        halves = _backward_halves if "wanted" in params else _forward_halves
        return halves(kernel.launch, params, (*operands, beside, shortcut))
    name = "dh" if "wanted" in params else "residual"
    given = dispatch.present(**{name: beside, "shortcut": shortcut})
    results: list[jax.Array] = kernel.launch(*operands, **given)
    if params.get("carries") and beside is None:
        results.insert(1, operands[0])
    return results


def _lowered_once(
    kernel: dispatch.Kernel, call: dispatch.Call, platform: str
) -> dispatch.Kernel:
    """Returns the kernel with a launch that is lowered once for all calls alike.

    XLA asks about each norm of a model anew, and a kernel for a GPU takes a quarter of
    a second to lower: 24 LayerNorms on four H100s compiled in 9.0 s, now in 3.3 s, and
    flax's compile in 2.8 s.
    """

    def launch(*operands: Maybe, **by_name: jax.Array) -> list[jax.Array]:
        flat, tree = jax.tree.flatten((operands, by_name))
        avals = tuple(map(dispatch.describe, flat))
        device = dispatch.device_of(platform)
        exported = _exported(kernel, call, platform, device, tree, avals)
        results: list[jax.Array] = exported.call(*flat)
        return results

    return dataclasses.replace(kernel, launch=launch)


@functools.lru_cache(maxsize=1024)  # 40 KB each
def _exported(
    kernel: dispatch.Kernel,
    call: dispatch.Call,
    platform: str,
    device: Any,
    tree: Any,
    avals: tuple[jax.ShapeDtypeStruct, ...],
) -> jax.export.Exported:
    """Lowers a kernel for operands of these shapes and dtypes.

    `call` and `device` only tell kernels apart, whose launches do not compare.
    """

    def launch(*flat: jax.Array) -> list[jax.Array]:
        operands, by_name = tree.unflatten(flat)
        results: list[jax.Array] = kernel.launch(*operands, **by_name)
        return results

    # It stays in this process, so the call of a kernel need not be stable.
    check = jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")
    export = jax.export.export(
        jax.jit(launch), platforms=[platform], disabled_checks=[check]
    )
    with _rules_of_kernels():
        return export(*avals)


def _forward_halves(
    launch: Callable[..., Any], params: dict[str, Any], operands: tuple[Any, ...]
) -> list[jax.Array]:
    """Computes statistics of the local part by the kernel, of all devices by psums."""
    norm = params["norm"]
    x, scale, bias, residual, shortcut = operands
    beside = dispatch.present(residual=residual)
    *found, var = launch(x, None, None, **beside)
    mean = found.pop() if norm.center else None
    (h,) = found or [x]
    mean, var = reference.over_devices(norm, h, mean, var)
    y = reference.apply(norm, h, mean, var, scale, bias, shortcut)
    results = [y, h] if params["carries"] else [y]
    return results + [r for r in (mean, var) if params["statistics"] and r is not None]


def _backward_halves(
    launch: Callable[..., Any], params: dict[str, Any], operands: tuple[Any, ...]
) -> list[jax.Array]:
    """Computes c1 and c2 of the local part by the kernel, of all devices by psums.

    If each channel has its own mean, n times these equals scale * dscale and scale *
    dbias. The psums of dscale and dbias then serve both purposes, because XLA merges
    identical psums. This does not hold if each device may have its own scale.
    """
    norm = params["norm"]
    dy, x, scale, bias, mean, var, dh, shortcut = operands
    wants_dx, wants_dscale, wants_dbias, wants_dshortcut = params["wanted"]
    given = (dy, x, scale, bias, mean, var)
    behind = dispatch.present(shortcut=shortcut)
    results: list[jax.Array] = launch(*given, **behind)
    dz = reference.before_activation(norm, *given, shortcut)
    if wants_dx:
        products = 1 + norm.center
        inner, outer = results[:products], results[products:]
        channelwise = _mean_per_feature(params, x, scale)
        if channelwise and scale is not None and wants_dscale and wants_dbias:
            count = float(x.size // var.size * lax.axis_size(norm.over))
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
    """Returns whether elements that share a scale, and only these, share a mean, on all
    devices that combine statistics."""
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
) -> tuple[dispatch.Call, dispatch.Kernel | dispatch.Fallback, parts.Spread]:
    """Chooses the implementation of one bound norm_p or gradient_p.

    Returns:
      call: the work; one device's share if the types of the operands tell its part.
      answer: the answer of `plan` to this call.
      spread: the parts over which the types spread the work, or `parts.BY_XLA` where
        XLA is to say; None if no types tell and there is one device, or if XLA splits
        the formula as it likes.
    """
    call = call_of(primitive, avals, params)
    types_tell = any(map(parts.is_explicit, avals))
    if len(params["norm"].feature_axes) > 1 or types_tell:
        # XLA may have split a feature axis that `parts` leaves whole, and would then
        # gather x. About types it does not ask.
        target = dataclasses.replace(target, asks=False)
    spread: parts.Spread = None
    if types_tell:
        operands = params["tree"].unflatten(avals)
        shapes = shapes_of(primitive, avals, params)
        spread = parts.of_types(params["norm"], call.x, shapes, operands)
    if isinstance(spread, parts.Parts):
        left = target.partitioned // parts.explicit_devices(spread.mesh)
        target = dataclasses.replace(target, partitioned=left, asks=False)
        mine = [
            None if follows is None else spread.part(aval, follows)
            for aval, follows in zip(operands, shapes.operands, strict=True)
        ]
        call = call_of(
            primitive, jax.tree.leaves(mine), {**params, "norm": spread.norm}
        )
    answer = dispatch.plan(call, target, backend)
    if target.asks and _gains_from_parts(call, target, answer, backend):
        spread = parts.BY_XLA
    return call, answer, spread


def shapes_of(
    primitive: Primitive, avals: Sequence[Any], params: dict[str, Any]
) -> parts.Shapes:
    """Returns how the axes of a norm_p's or gradient_p's arrays follow those of x."""
    operands, norm = params["tree"].unflatten(avals), params["norm"]
    if primitive is norm_p:
        given = params["carries"], params["statistics"]
        return parts.forward_shapes(norm, operands, *given)
    given = params["wanted"], params["own_params"]
    return parts.backward_shapes(norm, operands, *given)


def call_of(
    primitive: Primitive, avals: Sequence[Any], params: dict[str, Any]
) -> dispatch.Call:
    """Returns what `plan` must know about one bound norm_p or gradient_p."""
    operands = [dispatch.describe(aval) for aval in params["tree"].unflatten(avals)]
    if primitive is norm_p:
        x, scale, bias, mask, residual, shortcut = operands
        return dispatch.Call(
            op="forward",
            norm=params["norm"],
            x=x,
            scale=scale,
            bias=bias,
            addend=residual,
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
        addend=dh,
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
            h_dot = parts.resharded_like(jax.typeof(h), functools.reduce(jnp.add, dots))
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
    dh = others[0] if carries and wanted[0] else None  # cotangent of the carried x_dot
    dh = None if isinstance(dh, ad.Zero) else dh
    if isinstance(dy, ad.Zero):
        found: list[Any] = [ad.Zero(aval) for aval in avals]
        if dh is not None:
            found[0] = dh
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
