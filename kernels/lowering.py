"""What a norm runs, decided when its primitive is lowered.

Only then are the platform and the partitioning known. norm_p and gradient_p of
kernels/norm.py are lowered to one of these:

    a kernel         if `dispatch.plan` has one for the call (`_launch`)
    the reference    in the form that is fastest on the platform (`_tuned_for`)
    parts            on several devices: each binds the primitive again, to its own part
                     of the operands (`parts.py`, `_run_on_part`)

If statistics cross devices, a kernel does half of the work: it computes those of the
local part. psums combine them, and the rest is elementwise, which XLA fuses.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import mlir

from fusednorm import reference
from fusednorm.kernels import dispatch, parts
from fusednorm.kernels.geometry import is_rowwise


def lower(
    primitive: Primitive,
    formula: Callable[..., list[jax.Array]],
    ctx: mlir.LoweringRuleContext,
    *flat: Any,
    backend: str,
    **params: Any,
) -> Any:
    """Lowers norm_p or gradient_p, as bound to `flat` with `backend` and `params`."""
    target, avals = _target_of(ctx), ctx.avals_in
    call, answer, partitioning = choose(avals, params, target, backend)
    run_formula = functools.partial(formula, **params)
    if tuned_for := _tuned_for(call, target):
        run_formula = functools.partial(run_formula, tuned_for=tuned_for)
    # It outlives the lowering, and ctx must not.
    run_on_part = functools.partial(_run_on_part, primitive, avals, params, backend)
    run: Callable[..., Any] = run_formula
    rules: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if isinstance(partitioning, parts.Parts):
        run = parts.mapped(partitioning, run_on_part, ctx.avals_out)
    elif partitioning is parts.BY_XLA:
        (platform,) = target.platforms
        ctx = parts.numbered(ctx)
        run = parts.by_xla(
            params["norm"],
            alignment_of(avals, params),
            call.x,
            run_formula,
            functools.partial(run_on_part, asked_on=platform),
            f"{primitive} {params} {backend}",
            evenly=backend != "auto",  # a named kernel takes no mask
        )
    elif isinstance(answer, dispatch.Kernel):
        run, rules = functools.partial(_launch, answer, params), _rules_of_kernels()
    with rules:
        return mlir.lower_fun(run, multiple_results=True)(ctx, *flat)


# --- the choice -----------------------------------------------------------------------


def choose(
    avals: Sequence[Any],
    params: dict[str, Any],
    target: dispatch.Target,
    backend: str,
) -> tuple[
    dispatch.Call, dispatch.Kernel | dispatch.Fallback, parts.Partitioning | None
]:
    """Chooses the implementation of one bound norm_p or gradient_p.

    Returns:
      call: the work; one device's share if the types of the operands tell its part.
      answer: the answer of `plan` to this call.
      partitioning: the parts over which the types spread the work, or `parts.BY_XLA`
        where XLA is to say; None if no types tell and there is one device, or if XLA
        splits the formula as it likes.
    """
    call = call_of(avals, params)
    types_tell = any(map(parts.is_explicit, avals))
    if len(params["norm"].feature_axes) > 1 or types_tell:
        # XLA may have split a feature axis that `parts` leaves whole, and would then
        # gather x. About types it does not ask.
        target = dataclasses.replace(target, asks=False)
    partitioning: parts.Partitioning | None = None
    if types_tell:
        operands = params["tree"].unflatten(avals)
        alignment = alignment_of(avals, params)
        partitioning = parts.of_types(params["norm"], call.x, alignment, operands)
    if isinstance(partitioning, parts.Parts):
        devices = target.partitioned // parts.explicit_devices(partitioning.mesh)
        target = dataclasses.replace(target, partitioned=devices, asks=False)
        local = [
            None if follows is None else partitioning.part(aval, follows)
            for aval, follows in zip(operands, alignment.operands, strict=True)
        ]
        call = call_of(jax.tree.leaves(local), {**params, "norm": partitioning.norm})
    answer = dispatch.plan(call, target, backend)
    if target.asks and _gains_from_parts(call, target, answer, backend):
        partitioning = parts.BY_XLA
    return call, answer, partitioning


def _is_gradient(params: dict[str, Any]) -> bool:
    """Tells gradient_p from norm_p by its parameters."""
    return "wanted" in params


def call_of(avals: Sequence[Any], params: dict[str, Any]) -> dispatch.Call:
    """Returns what `plan` must know about one bound norm_p or gradient_p."""
    operands = map(_described, params["tree"].unflatten(avals))
    own: dict[str, Any]
    if _is_gradient(params):
        dy, x, scale, bias, _, _, mask, addend, shortcut = operands
        own = {name: params[name] for name in ("wanted", "own_params")}
        own |= {"op": "backward", "dy": dy}
    else:
        x, scale, bias, mask, addend, shortcut = operands
        own = {"op": "forward", "statistics": params["statistics"]}
    return dispatch.Call(
        norm=params["norm"],
        x=x,
        scale=scale,
        bias=bias,
        addend=addend,
        shortcut=shortcut,
        mask=mask is not None,
        **own,
    )


def alignment_of(avals: Sequence[Any], params: dict[str, Any]) -> parts.Alignment:
    """Returns how the axes of a norm_p's or gradient_p's arrays follow those of x."""
    operands, norm = params["tree"].unflatten(avals), params["norm"]
    if _is_gradient(params):
        wanted, own_params = params["wanted"], params["own_params"]
        return parts.backward_alignment(norm, operands, wanted, own_params)
    carries, statistics = params["carries"], params["statistics"]
    return parts.forward_alignment(norm, operands, carries, statistics)


def _described(operand: Any) -> Any:
    """Returns shape and dtype alone, of an array or an abstract value."""
    if operand is None:
        return None
    return jax.ShapeDtypeStruct(operand.shape, jnp.dtype(operand.dtype))


def _target_of(ctx: mlir.LoweringRuleContext) -> dispatch.Target:
    """Returns the target of a lowering in progress."""
    module = ctx.module_context
    axes = module.axis_context
    platforms = tuple(ctx.platforms or module.platforms)
    if isinstance(axes, mlir.SPMDAxisContext):
        manual = frozenset(axes.manual_axes)
        left = [size for name, size in axes.mesh.shape.items() if name not in manual]
        return dispatch.Target(platforms, math.prod(left))
    devices = getattr(axes, "num_devices", None) or 1
    # XLA asks through a pointer in the program, which must not be exported.
    exported = module.lowering_parameters.for_export
    asks = not exported and dispatch.asks(platforms, devices)
    return dispatch.Target(platforms, devices, asks)


# --- parts ----------------------------------------------------------------------------


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


def _run_on_part(
    primitive: Primitive,
    avals: Sequence[Any],
    params: dict[str, Any],
    backend: str,
    *flat: Any,
    norm: reference.Norm,
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
    of_part = {**params, "norm": norm}
    operands: Sequence[Any] = flat
    if inside:
        masked = _only_inside(params, flat, alignment_of(avals, params), inside)
        operands, of_part["tree"] = jax.tree.flatten(masked)
    elif asked_on is not None:
        target = dispatch.Target((asked_on,))
        call, answer, _ = choose([*map(jax.typeof, flat)], of_part, target, backend)
        if isinstance(answer, dispatch.Kernel):
            return _launch(_lowered_once(answer, call, asked_on), of_part, *flat)
    return primitive.bind(*operands, **of_part, backend=backend)


def _only_inside(
    params: dict[str, Any],
    flat: Sequence[Any],
    alignment: parts.Alignment,
    inside: dict[int, jax.Array],
) -> tuple[jax.Array | None, ...]:
    """Keeps what lies outside of x out of all sums, on a device that has less of x than
    others (`Parts.inside`).

    That is garbage. It becomes 0 in dy, 1 in all other operands, and False in the mask,
    which there is then.
    """
    operands = params["tree"].unflatten(flat)
    # Behind the mask lie a residual or dh, and a shortcut; the first has x's rank.
    mask_at, x_ndim = len(operands) - 3, operands[0].ndim
    results: list[jax.Array | None] = []
    for at, (operand, axes) in enumerate(
        zip(operands, alignment.operands, strict=True)
    ):
        if at == mask_at:
            masks = [_along(axis, x_ndim, in_x) for axis, in_x in inside.items()]
            masks = masks if operand is None else [operand, *masks]
            results.append(functools.reduce(jnp.logical_and, masks))
            continue
        is_dy = _is_gradient(params) and at == 0
        for along, axis in enumerate(axes or ()):
            if axis in inside:
                in_x = _along(along, operand.ndim, inside[axis])
                operand = jnp.where(in_x, operand, 0 if is_dy else 1)
        results.append(operand)
    return tuple(results)


def _along(axis: int, ndim: int, values: jax.Array) -> jax.Array:
    """Shapes values along one axis to broadcast against an array of `ndim` axes."""
    return jnp.expand_dims(values, [a for a in range(ndim) if a != axis])


# --- kernels --------------------------------------------------------------------------


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
    *operands, _, addend, shortcut = params["tree"].unflatten(flat)
    if params["norm"].axis_names:
        halves = _backward_halves if _is_gradient(params) else _forward_halves
        return halves(kernel.launch, params, (*operands, addend, shortcut))
    name = "dh" if _is_gradient(params) else "residual"
    by_name = dispatch.present(**{name: addend, "shortcut": shortcut})
    results: list[jax.Array] = kernel.launch(*operands, **by_name)
    if params.get("carries") and addend is None:
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

    def launch(*operands: jax.Array | None, **by_name: jax.Array) -> list[jax.Array]:
        flat, tree = jax.tree.flatten((operands, by_name))
        avals = tuple(map(_described, flat))
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
    *rest, var = launch(x, None, None, **dispatch.present(residual=residual))
    mean = rest.pop() if norm.center else None
    (h,) = rest or [x]
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
    of_kernel = (dy, x, scale, bias, mean, var)
    results: list[jax.Array] = launch(*of_kernel, **dispatch.present(shortcut=shortcut))
    dz = reference.before_activation(norm, *of_kernel, shortcut)
    if wants_dx:
        number = 1 + norm.center
        local_means, dparams = results[:number], results[number:]
        per_feature = _mean_per_feature(params, x, scale)
        if per_feature and scale is not None and wants_dscale and wants_dbias:
            count = float(x.size // var.size * lax.axis_size(norm.axis_names))
            weight = norm.weight(scale.astype(var.dtype))
            totals = lax.psum(dparams[:number], norm.axis_names)
            means = [(weight * total / count).reshape(var.shape) for total in totals]
        else:
            means = lax.pmean(local_means, norm.axis_names)
        c1, c2 = means if norm.center else (*means, None)
        dx = reference.input_gradient(norm, dz, x, scale, mean, var, c1, c2, dh=dh)
        results = [dx, *dparams]
    if wants_dshortcut:
        results.append(dz.astype(dy.dtype if shortcut is None else shortcut.dtype))
    return results


def _mean_per_feature(
    params: dict[str, Any], x: jax.Array, scale: jax.Array | None
) -> bool:
    """Returns whether elements that share a scale, and only these, share a mean, on all
    devices that combine statistics."""
    norm = params["norm"]
    every = sorted((*norm.reduction_axes, *norm.feature_axes))
    own = max(params["own_params"], 0 if scale is None else scale.ndim - 1)
    shared = norm.one_scale and own == 0
    return shared and norm.num_groups is None and every == [*range(x.ndim)]


# --- the reference's form -------------------------------------------------------------


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
