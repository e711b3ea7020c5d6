"""Finds out which implementation each normalization in a jaxpr gets."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType

from fusednorm.kernels import dispatch, lowering, norm, parts
from fusednorm.kernels.dispatch import Fallback, Kernel, Target

PLATFORMS = ("cpu", "cuda", "gpu", "rocm", "tpu")


@dataclasses.dataclass(frozen=True)
class Choice:
    """Implementation that one normalization gets.

    Attributes:
      op: "forward" or "backward".
      x: the input, as dtype[shape].
      view: sizes N, S, G, K that a kernel works on; "" if there is no view of x.
      plan: the kernel, or the fallback with its reason.
      activation: activation that the kernel or the reference applies; "" for none.
      scale_offset: number that is added to the scale.
      residual: whether it adds a residual to x, or dx to the cotangent of the sum.
      own: shape of a scale or bias that varies between samples or rows; "" if none
        does.
      shortcut: whether it adds a residual, or a bias of x's shape, after the norm.
      devices: number of devices over which XLA splits the call, of which `x`, `view`
        and `plan` show the whole.
    """

    op: str
    x: str
    view: str
    plan: Kernel | Fallback
    activation: str = ""
    scale_offset: float = 0.0
    residual: bool = False
    own: str = ""
    shortcut: bool = False
    devices: int = 1

    @property
    def backend(self) -> str:
        """ "mosaic_gpu", "mosaic_tpu" or "reference"."""
        return self.plan.backend if isinstance(self.plan, Kernel) else "reference"

    def __str__(self) -> str:
        added = "residual" if self.op == "forward" else "dh"
        extras = f"  {added}" if self.residual else ""
        extras += f"  {self.scale_offset:g} + scale" if self.scale_offset else ""
        extras += f"  scale or bias {self.own}" if self.own else ""
        extras += "  shortcut" if self.shortcut else ""
        extras += f"  {self.activation}" if self.activation else ""
        head = f"{self.op:<8}  {self.x}  {self.view}".rstrip() + extras
        if isinstance(self.plan, Fallback):
            return f"{head}\n  reference: {self.plan.reason}"
        kernel = self.plan
        lines = [
            f"{head}\n  {kernel.backend}: {kernel.name}, {kernel.block} per block, "
            f"{kernel.bytes_moved:,} bytes moved"
        ]
        lines += [kernel.why] if kernel.why else []
        if self.devices > 1:
            lines.append(f"of the whole, which XLA splits over {self.devices} devices")
        return "\n  ".join(lines)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Explanation:
    """Implementations that the normalizations in a call get, in program order.

    Printing it, or reading `choices`, raises NotImplementedError if a named backend
    cannot run one of them on this platform, as the call itself does.

    Attributes:
      jaxpr: the traced code.
      target: platforms and devices that the choices hold for.
    """

    jaxpr: Any
    target: Target

    @functools.cached_property
    def choices(self) -> tuple[Choice, ...]:
        """One entry per normalization in the code; one inside a scan counts once."""
        return tuple(_choices(self.jaxpr, self.target))

    def __repr__(self) -> str:
        return f"Explanation(choices={self.choices!r})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Explanation):
            return NotImplemented
        return (self.choices, self.target) == (other.choices, other.target)

    def __hash__(self) -> int:
        return hash((self.choices, self.target))

    def __str__(self) -> str:
        if not self.choices:
            return "no fusednorm calls (fuse a model to replace flax's layers)"
        counts = {choice: self.choices.count(choice) for choice in self.choices}
        return "\n".join(
            f"{f'{count} x ' if count > 1 else ''}{choice}"
            for choice, count in counts.items()
        )

    def on(self, platform: str) -> "Explanation":
        """Returns the explanation for another platform, which needs no device here.

        Args:
          platform: "cuda" or "gpu" (both NVIDIA's), "tpu", "cpu" or "rocm". Without a
            device here, "cuda" means an H100, and "tpu" a v4, the TPU with the least
            VMEM.

        Raises:
          ValueError: there is no such platform.
        """
        if platform not in PLATFORMS:
            raise ValueError(
                f"No platform {platform!r}; the platforms are {', '.join(PLATFORMS)}."
            )
        platforms = ("cuda" if platform == "gpu" else platform,)
        target = _target(platforms, self.target.partitioned)
        return dataclasses.replace(self, target=target)


def explain_jaxpr(jaxpr: Any, arguments: Any) -> Explanation:
    """Explains what each normalization in a jaxpr gets on the default platform.

    The devices are as many as the largest number over which one of the arguments, or
    its `jax.ShapeDtypeStruct`, is sharded.
    """
    leaves = jax.tree.leaves(arguments)
    shardings = [
        leaf.sharding
        for leaf in leaves
        if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct)
        and not isinstance(leaf, jax.core.Tracer)
        and leaf.sharding is not None
    ]
    devices = max((len(sharding.device_set) for sharding in shardings), default=1)
    return Explanation(jaxpr, _target(Target.default().platforms, devices))


def _choices(jaxpr: Any, target: Target) -> Iterator[Choice]:
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        avals = [var.aval for var in eqn.invars]
        if eqn.primitive in (norm.norm_p, norm.gradient_p):
            backend = eqn.params["backend"]
            call, answer, partitioning = lowering.choose(
                avals, eqn.params, target, backend
            )
            devices = target.partitioned if partitioning is parts.BY_XLA else 1
            yield _choice(call, answer, devices)
        elif (reason := _never_a_kernel(eqn)) is not None:
            yield _choice_of_formula(eqn, reason)
        else:
            inner = target
            if eqn.primitive.name == "shard_map":
                inner = Target(target.platforms, _left_to_xla(eqn.params))
            for sub in jaxprs_in_params(eqn.params):
                yield from _choices(sub, inner)


def _choice(
    call: dispatch.Call, answer: dispatch.Kernel | Fallback, devices: int
) -> Choice:
    view = call.geometry
    params = [param for param in (call.scale, call.bias) if param is not None]
    return Choice(
        op=call.op,
        x=_described(call.x),
        view="" if view is None else f"N={view.n} S={view.s} G={view.g} K={view.k}",
        plan=answer,
        activation=call.norm.activation or "",
        scale_offset=call.norm.scale_offset,
        residual=call.addend is not None,
        own=next((str(p.shape) for p in params if len(p.shape) > 1), ""),
        shortcut=call.shortcut is not None,
        devices=devices,
    )


def _choice_of_formula(eqn: Any, reason: str) -> Choice:
    """Describes a call of a jitted formula that is no primitive, or of its derivative.

    The formula takes x as its first operand and returns y as its first result.
    """
    operands, results = ([var.aval for var in v] for v in (eqn.invars, eqn.outvars))
    op, x, y = "forward", operands[0], results[0]
    # In `jax.checkpoint` the name does not tell, and the first operand is a scale.
    is_other = x.ndim == y.ndim and x.shape != y.shape
    transposed = re.search(r"\btranspose\(", str(eqn.source_info.name_stack))
    if transposed or is_other:
        op, x = "backward", max(results + operands, key=lambda aval: aval.size)
    return Choice(op, _described(x), "", Fallback(reason))


def _described(x: Any) -> str:
    return f"{x.dtype.name}{list(x.shape)}"


def _never_a_kernel(eqn: Any) -> str | None:
    """Returns why a jitted function of kernels/norm.py is no primitive.

    None for any other equation.
    """
    name = eqn.params.get("name")
    if name == "fusednorm_inference":
        return (
            "BatchNorm with running statistics is elementwise: XLA fuses it into its "
            "neighbours"
        )
    if name == "fusednorm_computed_epsilon":
        return norm.COMPUTED_EPSILON
    if name == "fusednorm_plain":
        if any(
            jnp.issubdtype(var.aval.dtype, jnp.complexfloating)
            for var in (*eqn.invars, *eqn.outvars)
        ):
            return norm.COMPLEX
        return norm.CROSSES_VMAP
    return None


def _left_to_xla(params: dict[str, Any]) -> int:
    """Counts the devices over which XLA still partitions inside a shard_map."""
    mesh, manual = params["mesh"], params["newly_manual_axes"]
    return math.prod(
        mesh.shape[name]
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if name not in manual and kind is not AxisType.Manual
    )


def _target(platforms: tuple[str, ...], devices: int) -> Target:
    return Target(platforms, devices, dispatch.asks(platforms, devices))
