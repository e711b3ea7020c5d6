"""The choice of the implementation that runs a normalization, and its reason.

`plan` is called when a primitive is lowered for a device (kernels/lowering.py): only
then are the platform and the partitioning known. Either a kernel or the reference takes
the call, and `fusednorm.explain` shows the reason.
"""

import contextlib
import dataclasses
import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from fusednorm.kernels.geometry import Geometry, geometry
from fusednorm.reference import Norm, is_per_element

BACKENDS = ("auto", "reference", "mosaic_gpu", "mosaic_tpu")

# The kernels of each platform: (backend, module). The module is imported when it is
# first needed, so that the package imports wherever jax does. Its entry point is
# plan(call, device) -> Kernel | Fallback.
KERNELS: dict[str, tuple[str, str]] = {
    "cuda": ("mosaic_gpu", "fusednorm.kernels.gpu"),
    "tpu": ("mosaic_tpu", "fusednorm.kernels.tpu"),
}


# --- what is asked --------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Call:
    """The facts about one primitive's work by which an implementation is chosen.

    Attributes:
      op: "forward", or "backward" (dx, dscale, dbias, dshortcut).
      norm: axes, groups, epsilon, dtype of y.
      x, scale, bias, dy: shape and dtype of each, or None if absent.
      addend: shape and dtype of the residual that a forward adds to x, or of dh, to
        which a backward adds dx; None if absent.
      shortcut: shape and dtype of the array that is added to z before the activation;
        None if absent.
      mask: whether a mask is given.
      statistics: whether the forward returns mean and variance too.
      wanted: which of dx, dscale, dbias and dshortcut the backward returns.
      own_params: how many leading axes of x dscale and dbias keep, rather than being
        summed over them.
    """

    op: Literal["forward", "backward"]
    norm: Norm
    x: jax.ShapeDtypeStruct
    scale: jax.ShapeDtypeStruct | None = None
    bias: jax.ShapeDtypeStruct | None = None
    dy: jax.ShapeDtypeStruct | None = None
    addend: jax.ShapeDtypeStruct | None = None
    shortcut: jax.ShapeDtypeStruct | None = None
    mask: bool = False
    statistics: bool = False
    wanted: tuple[bool, bool, bool, bool] = (True, True, True, False)
    own_params: int = 0

    @property
    def half(self) -> bool:
        """Whether statistics cross devices. A kernel then computes only mean and var,
        or c1 and c2, of the local part; the elementwise rest is left to XLA."""
        return bool(self.norm.axis_names)

    @property
    def sums_only(self) -> bool:
        """Whether a kernel makes neither y nor dx."""
        return self.half or (self.op == "backward" and not self.wants["dx"])

    @property
    def view(self) -> Geometry:
        """The geometry of a call that has one: `plan` has checked it."""
        assert self.geometry is not None
        return self.geometry

    @property
    def half_name(self) -> str:
        """Suffix of a kernel's name if the kernel does half of the call; else ""."""
        if not self.half:
            return ""
        return ", moments" if self.op == "forward" else ", sums"

    @property
    def geometry(self) -> Geometry | None:
        """The view x[N, S, G, K], or None if it would need a transpose."""
        return geometry(self.norm, self.x.shape, has_params=self.has_params)

    @property
    def sum_dtype(self) -> jnp.dtype:
        """Dtype of h = x + residual."""
        dtypes = [a.dtype for a in (self.x, self.addend) if a is not None]
        return jnp.result_type(*dtypes)

    @property
    def slopes(self) -> bool:
        """Whether the call is a backward that needs the slope of an activation."""
        return self.op == "backward" and self.norm.activation is not None

    @property
    def dy_kept(self) -> jnp.dtype:
        """Dtype in which a backward keeps dy, or dz if there is a shortcut. It rounds
        nothing: dy's dtype might round a dz, except that ReLU's is dy or 0."""
        assert self.dy is not None
        if self.shortcut is None or self.norm.activation == "relu":
            return self.dy.dtype
        return jnp.dtype(jnp.float32)

    @property
    def kept_bytes(self) -> int:
        """Bytes per element that are kept on chip: x, and in a backward dy or dz."""
        return self.x.dtype.itemsize + (0 if self.dy is None else self.dy_kept.itemsize)

    @property
    def has_params(self) -> bool:
        """Whether there is a scale or a bias, or a gradient for one is wanted."""
        given = self.scale is not None or self.bias is not None
        return given or (self.op == "backward" and any(self.wanted[1:3]))

    @property
    def wants(self) -> dict[str, bool]:
        """`wanted` by name, in the order in which a backward returns the gradients."""
        names = ("dx", "dscale", "dbias", "dshortcut")
        return dict(zip(names, self.wanted, strict=True))

    @property
    def scales_each(self) -> bool:
        """Whether each element of x has its own scale."""
        return self.scale is not None and is_per_element(self.scale, self.x)

    @property
    def summed(self) -> tuple[str, ...]:
        """The wanted ones of dscale and dbias that a backward accumulates: not dscale
        if each element has its own scale."""
        names = ("dbias",) if self.scales_each else ("dscale", "dbias")
        return tuple(name for name in names if self.wants[name])

    @property
    def row_groups(self) -> int:
        """Groups per row of channels in a rowwise view, where each group is reduced by
        itself and has its own scale and bias; 1 if there are none."""
        view = self.geometry
        if view is None or view.family != "rowwise" or not self.has_params:
            return 1
        return view.g

    @property
    def param_axes(self) -> int:
        """Number of leading axes of x along which scale, bias or their summed gradients
        vary."""
        params = [self.bias, None if self.scales_each else self.scale]
        leads = [len(p.shape) - 1 for p in params if p is not None]
        return max(self.own_params, *leads, 0)


@dataclasses.dataclass(frozen=True)
class Target:
    """The platform and devices that a call is lowered for.

    Attributes:
      platforms: platforms that the code is lowered for; several only under
        `jax.export`.
      partitioned: number of devices over which XLA partitions the code by itself; 1 on
        one device, or where all mesh axes are manual axes of a `shard_map`.
      asks: whether XLA asks what each device should do with its part.
    """

    platforms: tuple[str, ...]
    partitioned: int = 1
    asks: bool = False

    @classmethod
    def default(cls) -> "Target":
        """Returns one device of jax's default platform."""
        platform = jax.default_backend()
        if platform == "gpu":  # a lowering names the vendor
            version = jax.devices()[0].client.platform_version
            platform = "rocm" if "rocm" in version.lower() else "cuda"
        return cls((platform,))


ONE_CPU = Target(("cpu",))


# --- what is answered -----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Kernel:
    """The answer that a kernel takes the call.

    Attributes:
      backend: "mosaic_gpu" or "mosaic_tpu".
      name: the kernel, e.g. "rowwise forward".
      launch: the function that launches the kernel. It takes the operands of
        `reference.forward`, (x, scale, bias), or of `reference.backward`, (dy, x,
        scale, bias, mean, var), each an array or None. A residual or dh, and a
        shortcut, are passed by name if there are any. The result is a list:
        forward: y; h if there is a residual; with `statistics` mean (if centred) and
          var. If `Call.half`: h if there is a residual, mean (if centred) and var.
        backward: the `wanted` ones of dx, dscale, dbias and dshortcut. If `Call.half`:
          c1 and c2 (if centred), the means of w * x_hat and of w, in the place of dx;
          then dscale and dbias.
      block: the work of one block, in words.
      why: the reason for this variant, in words.
      bytes_moved: bytes read from and written to device memory.
      unless_named: why the reference is expected to be faster, in words; "" if it is
        not. "auto" then takes the reference, and the kernel runs only if its backend is
        named.
    """

    backend: str
    name: str
    launch: Callable[..., Any] = dataclasses.field(compare=False)
    block: str = ""
    why: str = ""
    bytes_moved: int = 0
    unless_named: str = ""


@dataclasses.dataclass(frozen=True)
class Fallback:
    """The answer that the reference takes the call, for a `reason` that a person can
    act on."""

    reason: str


# --- the choice of the user -----------------------------------------------------------

# Part of the key of every jit cache, so that a function that was traced under one
# backend is traced again under another.
_chosen = jax.make_user_context(default_value=None)


@contextlib.contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Chooses the implementation of every fusednorm call that this thread traces in
    this context.

    Args:
      backend: "auto" lets `plan` choose what it expects to be fastest, and falls back
        silently; "reference" is plain jax.numpy; "mosaic_gpu" and "mosaic_tpu" are the
        kernels, which raise where they cannot run. A gradient uses the backend of its
        forward.

    Raises:
      ValueError: no such backend.
      NotImplementedError: at lowering, when a kernel that was named cannot run there.
        If it cannot run the part that XLA gives to one of several GPUs, compilation
        fails with XLA's error, which has the reason.

    The environment variable FUSEDNORM_BACKEND, read at the first call, sets the backend
    outside of these contexts.
    """
    with _chosen(_check_backend(backend, "use_backend")):
        yield


def current_backend() -> str:
    """Returns the backend that calls traced here are bound to."""
    chosen = _chosen.value
    return _environment_backend() if chosen is None else chosen


_environment: str | None = None


def _environment_backend() -> str:
    global _environment
    if _environment is None:
        name = os.environ.get("FUSEDNORM_BACKEND", "") or "auto"
        _environment = _check_backend(name, "FUSEDNORM_BACKEND")
    return _environment


def _check_backend(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(
            f"{source}: no backend {name!r}; the backends are {', '.join(BACKENDS)}."
        )
    return name


# The device to compile for if this process has none of the platform: a lowering does
# not name it.
_elsewhere = jax.make_user_context(default_value=None)


def compiling_for(device: Any) -> contextlib.AbstractContextManager[None]:
    """Plans calls that are lowered in this context for `device`.

    The device comes from `jax.experimental.topologies`. `plan` uses it if this process
    has no device of the platform; outside of this context it then knows no device.
    """
    context: contextlib.AbstractContextManager[None] = _elsewhere(device)
    return context


# --- the choice -----------------------------------------------------------------------

_KERNEL_DTYPES = ("float32", "bfloat16", "float16")


def plan(call: Call, target: Target, backend: str = "auto") -> Kernel | Fallback:
    """Chooses the implementation of one call.

    The choice follows from shapes, dtypes and the target alone. It depends neither on
    values nor on what ran before.

    Raises:
      NotImplementedError: `backend` names kernels, and they cannot take this call.
    """
    if backend == "reference":
        return Fallback("the backend 'reference' was chosen")
    answer = _plan(call, target)
    if backend == "auto":
        if isinstance(answer, Kernel) and answer.unless_named:
            return Fallback(answer.unless_named)
        return answer
    if isinstance(answer, Kernel) and answer.backend == backend:
        return answer
    why = (
        answer.reason
        if isinstance(answer, Fallback)
        else f"this platform's kernels are {answer.backend}"
    )
    raise cannot_run(backend, call.op, why)


def cannot_run(backend: str, op: str, why: str) -> NotImplementedError:
    """Returns the error of a backend that was named and cannot take a call."""
    return NotImplementedError(
        f"The backend {backend!r} was named but cannot run this {op}: {why}. Name "
        "'auto' to fall back to the reference."
    )


def _plan(call: Call, target: Target) -> Kernel | Fallback:
    if len(target.platforms) > 1:
        return Fallback(f"lowered for several platforms: {', '.join(target.platforms)}")
    (platform,) = target.platforms
    if platform == "cpu" and platform not in KERNELS:
        return Fallback("CPU: the kernels are for NVIDIA GPUs and TPUs")
    if platform not in KERNELS:
        return Fallback(f"no kernels for the platform {platform!r} yet")
    if target.partitioned > 1 and not target.asks:
        return Fallback(
            f"XLA partitions this call over {target.partitioned} devices; a kernel "
            "would gather its input (with explicit sharding, and in jax.shard_map, "
            "kernels run on each device's part)"
        )
    reason = _why_no_kernel(call)
    if reason is not None:
        return Fallback(reason)
    if call.half:
        call = _first_half(call)
    _, module = KERNELS[platform]
    return importlib.import_module(module).plan(call, device_of(platform))


def device_of(platform: str) -> Any:
    """Returns the device of this process, or of `compiling_for`, or None."""
    try:
        return jax.devices(platform)[0]
    except RuntimeError:  # this process has none
        return _elsewhere.value


def _first_half(call: Call) -> Call:
    """Returns the part of a call that a kernel does before statistics cross devices."""
    if call.op == "forward":
        return dataclasses.replace(
            call, scale=None, bias=None, shortcut=None, statistics=True
        )
    return dataclasses.replace(call, addend=None, wanted=(*call.wanted[:3], False))


def _why_no_kernel(call: Call) -> str | None:
    """Returns why no kernel of any platform takes the call, or None."""
    if call.mask:
        return "mask given"
    if call.op == "backward" and not any(call.wanted[:3]):
        return "the shortcut's gradient alone is wanted: elementwise, and XLA's"
    for name in ("x", "scale", "bias", "dy", "addend", "shortcut"):
        operand = getattr(call, name)
        if operand is not None and operand.dtype.name not in _KERNEL_DTYPES:
            if name == "addend":
                name = "residual" if call.op == "forward" else "dh"
            return (
                f"{operand.dtype.name} {name}; kernels take {_either(_KERNEL_DTYPES)}"
            )
    if call.norm.dtype.name not in _KERNEL_DTYPES:
        return f"{call.norm.dtype.name} output; kernels give {_either(_KERNEL_DTYPES)}"
    if not all(isinstance(size, int) for size in call.x.shape):
        return f"symbolic shape {call.x.shape}"
    for name in ("scale", "bias"):
        param = getattr(call, name)
        if param is None or len(param.shape) == 1:
            continue
        lead = param.shape[:-1]
        reduced = [axis for axis in call.norm.reduction_axes if call.x.shape[axis] > 1]
        if lead != call.x.shape[: len(lead)] or any(a < len(lead) for a in reduced):
            return (
                f"{name} varies along other axes than the first ones, or along reduced "
                f"ones: its shape is {param.shape}, that of x {call.x.shape}"
            )
    if 0 in call.x.shape:
        return "x is empty"
    if call.half and call.scales_each:
        return "statistics cross devices, and each element has its own scale"
    if call.row_groups > 1 and (call.param_axes or call.scales_each):
        return (
            "scale or bias varies both along the groups of a row and from row to row: "
            f"x has shape {call.x.shape}, {call.row_groups} groups"
        )
    if call.geometry is None:
        return (
            f"reduction axes {call.norm.reduction_axes} and feature axes "
            f"{call.norm.feature_axes} of shape {call.x.shape} need a transpose; put "
            "the channels last (axis=-1), and reduced axes just before them"
        )
    view = call.geometry
    rows = view.n * (view.g if view.family == "rowwise" else view.s)
    if max(rows, view.s * view.k, view.features) >= 2**30:
        return (
            f"2^30 rows, pixels or channels, or a mean of as many elements, in x of "
            f"shape {call.x.shape}: kernels count in int32, which their last block may "
            "exceed"
        )
    return None


def _either(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


def asks(platforms: Sequence[str], devices: int) -> bool:
    """Returns whether XLA asks what each device should do (`custom_partitioning`).

    JAX offers it everywhere but on a TPU. Only Shardy, XLA's default partitioner, knows
    our rules.
    """
    shardy = getattr(jax.config, "jax_use_shardy_partitioner", True)
    return devices > 1 and "tpu" not in platforms and shardy


def present(**arrays: jax.Array | None) -> dict[str, jax.Array]:
    """Returns the arrays that are not None."""
    return {name: array for name, array in arrays.items() if array is not None}
