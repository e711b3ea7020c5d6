"""One norm over several devices: a kernel on each one's part, and sums across them.

XLA cannot split a kernel: it would gather the kernel's input (NVIDIA) or refuse (TPU).
So the primitives are split here, along the axes of x that are sharded. In explicit mode
they are split where no kernel runs, too: the reference has forms for one device.

    not reduced    Each device normalizes its own part. Its dscale and dbias are partial
                   sums, which a psum reduces over the devices.
    reduced        `Norm.axis_names` names the mesh axes, so the statistics cross them
                   too.

How x is sharded is known from:

    explicit mode  The types of the operands. The primitive becomes a `jax.shard_map` of
                   itself on the parts (`of_types`, `mapped`).
    auto mode      XLA, when it partitions the program, long after the lowering. XLA
                   calls back through `custom_partitioning` (`by_xla`), which JAX has
                   everywhere but on TPUs. A `shard_map` around the layer would not do:
                   the arrays' shardings are not known where it would be traced. XLA
                   numbers the program's devices and tells which numbers have which
                   part, so that nobody need know a mesh (`_on_a_mesh`).
    shard_map      The caller. The primitives already work on the parts.
"""

import collections
import dataclasses
import functools
import hashlib
import itertools
import math
import pathlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from fusednorm import reference
from fusednorm.reference import Norm

Names = tuple[str, ...]  # the mesh axes that split one axis of an array
# For each axis of an array: the axis of x that it follows, `GROUPS`, or None.
Follows = tuple[int | None, ...]
GROUPS = -1  # the groups into which x's last axis is split


@dataclasses.dataclass(frozen=True)
class Alignment:
    """The axes of x that the axes of each operand and result follow.

    Attributes:
      operands: one entry per operand, in the order of the primitive's formula; None if
        the operand is absent.
      results: one entry per result.
      partial_sums: for each result, whether it is a dscale or dbias, of which a device
        has the sum over its own part of x.
    """

    operands: tuple[Follows | None, ...]
    results: tuple[Follows, ...]
    partial_sums: tuple[bool, ...]


def forward_alignment(
    norm: Norm, operands: Sequence[Any], carries: bool, statistics: bool
) -> Alignment:
    """Returns the `Alignment` of `norm_p`."""
    x, scale, bias, mask, *_ = operands
    every = tuple(range(x.ndim))
    follows = every, _param(norm, scale), _param(norm, bias), _mask(mask), every, every
    results: list[Follows] = [every, every] if carries else [every]
    if statistics:
        results += [_statistic(norm, x)] * (2 if norm.center else 1)
    partial_sums = (False,) * len(results)
    return Alignment(_of_present(operands, follows), tuple(results), partial_sums)


def backward_alignment(
    norm: Norm, operands: Sequence[Any], wanted: Sequence[bool], own_params: int
) -> Alignment:
    """Returns the `Alignment` of `gradient_p`."""
    _, x, scale, bias, _, _, mask, *_ = operands
    every, statistic = tuple(range(x.ndim)), _statistic(norm, x)
    params = _param(norm, scale), _param(norm, bias)
    follows = every, every, *params, statistic, statistic, _mask(mask), every, every
    own = (*range(own_params), norm.feature_axes[0])
    each = scale is not None and reference.is_per_element(scale, x)
    results = every, every if each else own, own, every
    partial_sums = False, not each, True, False
    return Alignment(
        _of_present(operands, follows),
        tuple(itertools.compress(results, wanted)),
        tuple(itertools.compress(partial_sums, wanted)),
    )


def _of_present(operands: Sequence[Any], follows: Sequence[Any]) -> tuple[Any, ...]:
    """Returns what each operand's axes follow; None for an operand that is absent."""
    pairs = zip(operands, follows, strict=True)
    return tuple(None if operand is None else axes for operand, axes in pairs)


def _param(norm: Norm, param: Any) -> Follows:
    if param is None:
        return ()
    return (*range(param.ndim - 1), norm.feature_axes[0])


def _statistic(norm: Norm, x: Any) -> Follows:
    kept = tuple(None if a in norm.reduction_axes else a for a in range(x.ndim))
    return kept if norm.num_groups is None else (*kept[:-1], GROUPS)


def _mask(mask: Any) -> Follows:
    if mask is None:
        return ()
    return tuple(axis if size > 1 else None for axis, size in enumerate(mask.shape))


@dataclasses.dataclass(frozen=True)
class Parts:
    """The layout of one primitive's arrays on a mesh.

    Attributes:
      mesh: the mesh.
      axes: for each axis of x, the mesh axes that split it.
      groups: the mesh axes, among those of the last axis, that split the groups of
        channels.
      norm: the normalization that one device runs on its part.
      alignment: the axes of x that each array's axes follow.
      shape: shape of the whole x.
    """

    mesh: Any
    axes: tuple[Names, ...]
    groups: Names
    norm: Norm
    alignment: Alignment
    shape: tuple[int, ...]

    @property
    def names(self) -> Names:
        """The mesh axes that split x."""
        return tuple(name for names in self.axes for name in names)

    def split(self, axis: int | None) -> Names:
        """Returns the mesh axes that split an axis that follows `axis` of x."""
        if axis is None:
            return ()
        return self.groups if axis == GROUPS else self.axes[axis]

    def spec(self, follows: Follows) -> PartitionSpec:
        """Returns the spec of an operand or a result."""
        return PartitionSpec(*[self.split(axis) or None for axis in follows])

    def specs(self) -> tuple[list[PartitionSpec], list[PartitionSpec]]:
        """Returns the specs of the operands that are present, and of the results."""
        operands = [f for f in self.alignment.operands if f is not None]
        return [*map(self.spec, operands)], [*map(self.spec, self.alignment.results)]

    def part(self, aval: Any, follows: Follows) -> jax.ShapeDtypeStruct:
        """Returns shape and dtype of one device's part of an array."""
        shape = [
            size // _size(self.mesh, self.split(axis))
            for size, axis in zip(aval.shape, follows, strict=True)
        ]
        return jax.ShapeDtypeStruct(tuple(shape), aval.dtype)

    def inside(self) -> dict[int, jax.Array]:
        """Returns which places of this device's part lie in x, for each axis of x that
        is not split evenly: bool, one per place."""
        inside = {}
        for axis, (size, names) in enumerate(zip(self.shape, self.axes, strict=True)):
            if size % (devices := _size(self.mesh, names)):
                part = math.ceil(size / devices)
                first = jax.lax.axis_index(names) * part
                inside[axis] = first + jnp.arange(part) < size
        return inside

    def run(self, bind: Callable[..., list[jax.Array]], *flat: Any) -> list[jax.Array]:
        """Runs `bind(*flat, norm=..., inside=...)` on one device, and adds up the
        partial sums of all devices."""
        results = bind(*flat, norm=self.norm, inside=self.inside())
        follows, partial_sums = self.alignment.results, self.alignment.partial_sums
        sums = []
        for result, axes, adds_up in zip(results, follows, partial_sums, strict=True):
            kept = {name for axis in axes for name in self.split(axis)}
            others = tuple(name for name in self.names if name not in kept)
            sums.append(jax.lax.psum(result, others) if adds_up and others else result)
        return sums


BY_XLA: Literal["by XLA"] = "by XLA"  # it says how, when it partitions the program
Partitioning = Parts | Literal["by XLA"]


def _size(mesh: Any, names: Names) -> int:
    return math.prod(mesh.shape[name] for name in names)


def _split(
    mesh: Any,
    norm: Norm,
    shape: Sequence[int],
    alignment: Alignment,
    specs: Sequence[tuple[Follows, Any]],
    *,
    evenly: bool = True,
) -> Parts:
    """Derives how x is split from the arrays' specs, x's own before the parameters'.

    These axes are not split:

    - an axis that does not divide evenly, if it is a feature axis or `evenly` says so;
    - the last axis, if a device would hold only part of a group beside channels of
      another;
    - all feature axes but the first: a scale or bias has one axis for all of them,
      which follows the first.

    How the statistics of groups are sharded says nothing about x.
    """
    must_be_even = range(len(shape)) if evenly else norm.feature_axes
    axes: list[Names] = [()] * len(shape)
    groups: Names = ()
    within: Names = ()
    for follows, spec in sorted(specs, key=lambda pair: -len(pair[0])):
        for axis, entry in zip(follows, (*spec, *[None] * len(follows)), strict=False):
            names = _names_of(mesh, entry)
            if axis in (None, GROUPS) or not names or axes[axis]:
                continue
            if axis in norm.feature_axes[1:]:
                continue
            taken = {name for others in axes for name in others}
            if taken & set(names):
                continue
            if axis in must_be_even and shape[axis] % _size(mesh, names):
                continue
            if norm.num_groups is not None and axis == len(shape) - 1:
                finer = _split_groups(mesh, names, norm.num_groups)
                if finer is None:
                    continue
                mesh, groups, within = finer
                names = groups + within
            axes[axis] = names
    reduced = [name for axis in norm.reduction_axes for name in axes[axis]]
    if norm.num_groups is not None:
        local_groups = norm.num_groups // _size(mesh, groups)
        norm = dataclasses.replace(norm, num_groups=local_groups)
    norm = dataclasses.replace(
        norm,
        axis_names=(*norm.axis_names, *reduced, *within),
        one_scale=norm.one_scale if norm.axis_names else bool(reduced),
    )
    return Parts(mesh, tuple(axes), groups, norm, alignment, tuple(shape))


def _split_groups(
    mesh: Any, names: Names, num_groups: int
) -> tuple[Any, Names, Names] | None:
    """Divides the channels' mesh axes into axes across groups and axes within a group.

    If there are more devices than groups, a mesh axis may have to become two: an axis
    of 64 becomes one of 32 groups and one of 2 parts per group. The mesh then has the
    same devices and one more axis.

    Returns:
      The mesh, the axes across groups and the axes within a group; or None if a device
      would hold only part of a group beside channels of another.
    """
    across: Names = ()
    within: Names = ()
    for name in names:
        size = mesh.shape[name]
        groups = num_groups // _size(mesh, across)
        if groups % size == 0:
            across += (name,)
        elif groups == 1:
            within += (name,)
        elif size % groups == 0:
            mesh, inner = _refined(mesh, name, groups)
            across, within = (*across, name), (inner,)
        else:
            return None
    return mesh, across, within


def _refined(mesh: Any, name: str, size: int) -> tuple[Any, str]:
    """Splits a mesh axis into one of `size` and, after it, one of the other factor.

    Returns the mesh, which has the same devices, and the name of the added axis.
    """
    inner = f"{name} within a group"
    at = mesh.axis_names.index(name)
    sizes, names = [*mesh.axis_sizes], [*mesh.axis_names]
    sizes[at : at + 1] = [size, sizes[at] // size]
    kinds = [*mesh.axis_types]
    names.insert(at + 1, inner)
    kinds.insert(at + 1, kinds[at])
    return AbstractMesh(tuple(sizes), tuple(names), axis_types=tuple(kinds)), inner


def _names_of(mesh: Any, entry: Any) -> Names:
    """Returns the mesh axes that an entry of a spec names, and that split anything."""
    if entry is None or entry is PartitionSpec.UNCONSTRAINED:
        return ()
    names = entry if isinstance(entry, tuple) else (entry,)
    return tuple(name for name in names if mesh.shape[name] > 1)


# --- explicit mode --------------------------------------------------------------------


def of_types(
    norm: Norm, x: Any, alignment: Alignment, operands: Sequence[Any]
) -> Parts | None:
    """Returns the `Parts` that explicit types tell; None if a kernel would need more of
    x than a device has.

    A mesh of one device has parts too: in a part, no types stand in the way of reshapes
    and slices.
    """
    present = [
        (follows, a)
        for follows, a in zip(alignment.operands, operands, strict=True)
        if follows is not None and not a.sharding.mesh.empty
    ]
    mesh = present[0][1].sharding.mesh
    specs = [(follows, a.sharding.spec) for follows, a in present]
    if any(getattr(spec, "unreduced", None) for _, spec in specs):
        return None
    parts = _split(mesh, norm, x.shape, alignment, specs)
    names = {n for _, spec in specs for entry in spec for n in _names_of(mesh, entry)}
    return parts if names == set(parts.names) else None


def _explicit(mesh: Any) -> set[str]:
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {name for name, kind in kinds if kind is AxisType.Explicit}


def is_explicit(aval: Any) -> bool:
    """Returns whether the type of an array tells how it is sharded."""
    return bool(_explicit(aval.sharding.mesh))


def explicit_devices(mesh: Any) -> int:
    """Returns the number of devices of a mesh along its explicit axes."""
    return _size(mesh, tuple(_explicit(mesh)))


def resharded_like(like: Any, array: jax.Array) -> jax.Array:
    """Returns the array, sharded as the type of `like` says."""
    spec, sharding = like.sharding.spec, jax.typeof(array).sharding
    if spec == sharding.spec or sharding.mesh.empty:
        return array
    return jax.sharding.reshard(array, sharding.update(spec=spec))


def mapped(
    parts: Parts, bind: Callable[..., list[jax.Array]], results: Sequence[Any]
) -> Callable[..., list[jax.Array]]:
    """Makes the primitive a `jax.shard_map` of itself, for results of these types."""
    operand_specs, result_specs = parts.specs()

    def whole(*flat: jax.Array) -> list[jax.Array]:
        placed = [
            jax.sharding.reshard(a, NamedSharding(parts.mesh, spec))
            for a, spec in zip(flat, operand_specs, strict=True)
        ]
        unplaced = jax.shard_map(
            functools.partial(parts.run, bind),
            mesh=parts.mesh,
            in_specs=tuple(operand_specs),
            out_specs=list(result_specs),
            axis_names=_explicit(parts.mesh),
            check_vma=False,
        )(*placed)
        return [
            jax.sharding.reshard(result, aval.sharding)
            for result, aval in zip(unplaced, results, strict=True)
        ]

    return whole


# --- auto mode ------------------------------------------------------------------------


def by_xla(
    norm: Norm,
    alignment: Alignment,
    x: Any,
    formula: Callable[..., list[jax.Array]],
    bind: Callable[..., list[jax.Array]],
    params: str,
    *,
    evenly: bool,
) -> Callable[..., list[jax.Array]]:
    """Returns the primitive as a call that XLA asks about when it partitions a program.

    Args:
      norm: the normalization.
      alignment: the axes of x that each array's axes follow.
      x: shape and dtype of x.
      formula: the formula of the primitive.
      bind: binds the primitive to the parts.
      params: the primitive and all its parameters, as text.
      evenly: whether to leave whole what does not split evenly.
    """
    operands = [_informative(f, norm, x) for f in alignment.operands if f is not None]
    # jax_remove_custom_partitioning_ptr_from_cache_key takes the call's pointer out of
    # the key of XLA's persistent cache, which then tells calls apart by their operands
    # alone. So a hash of everything else that the call depends on is an operand too;
    # otherwise a call with another epsilon would get the code of this one.
    mark = np.frombuffer(
        hashlib.sha256(f"{_sources()} {params}".encode()).digest()[:8], "uint32"
    )

    @custom_partitioning
    def whole(mark: Any, *flat: Any) -> Any:
        return formula(*flat)

    def partition(_: Any, arguments: Any, results: Any) -> Any:
        shardings, ranks = [a.sharding for a in arguments[1:]], map(len, operands)
        mesh, specs = _on_a_mesh(shardings, ranks)
        pairs = [*zip(operands, specs, strict=True)]
        parts = _split(mesh, norm, x.shape, alignment, pairs, evenly=evenly)
        operand_specs, result_specs = parts.specs()
        place = functools.partial(NamedSharding, parts.mesh)
        return (
            parts.mesh,
            lambda mark, *flat: parts.run(bind, *flat),
            [*map(place, result_specs)],
            (place(PartitionSpec()), *map(place, operand_specs)),
        )

    _warn_of_cache()
    # JAX must not decode the shardings: it knows no mesh.
    rule = _rule(operands, alignment.results, norm, x)
    whole.def_partition(partition, decode_shardings=False, **rule)
    return lambda *flat: whole(jnp.asarray(mark), *flat)


def _warn_of_cache() -> None:
    """Warns if the persistent cache will not find the program in the next process: the
    program has a pointer to the call."""
    has_cache = jax.config.jax_enable_compilation_cache
    has_cache = has_cache and jax.config.jax_compilation_cache_dir
    option = "jax_remove_custom_partitioning_ptr_from_cache_key"
    if has_cache and not getattr(jax.config, option):
        warnings.warn(
            "JAX's persistent compilation cache will miss programs with fusednorm's "
            f"norms on several GPUs in each new process. With jax.config.update("
            f"{option!r}, True) it hits; see fusednorm's docs/sharded.md.",
            stacklevel=2,
        )


def numbered(ctx: Any) -> Any:
    """Returns a lowering context whose devices are numbers, 0 and up.

    `custom_partitioning` asks for devices to describe shardings by. Which ones they
    are does not matter, and a lowering does not know.
    """
    axes = ctx.module_context.axis_context
    axes = dataclasses.replace(
        axes, device_assignment=tuple(range(axes.num_devices)), abstract_mesh=None
    )
    return ctx.replace(module_context=ctx.module_context.replace(axis_context=axes))


def _on_a_mesh(
    shardings: Sequence[Any], ranks: Iterable[int]
) -> tuple[AbstractMesh, list[PartitionSpec]]:
    """Returns a mesh, and a spec on it for each sharding of numbered devices.

    The mesh has an axis for each prime factor of the number of devices, in the order
    that can express most of the shardings. An axis of an array that is split in a way
    that the mesh cannot express counts as whole.
    """
    # Where each device's part begins, if each axis had an element for each device.
    begins = []
    for sharding, rank in zip(shardings, ranks, strict=True):
        devices = sharding.num_devices
        slices = sharding.devices_indices_map((devices,) * rank)
        starts = [[cut.start or 0 for cut in slices[d]] for d in range(devices)]
        begins.append(np.reshape(starts, (devices, rank)).T)
    tried: list[tuple[int, AbstractMesh, list[PartitionSpec]]] = []
    for sizes in _orders(collections.Counter(_prime_factors(devices))):
        axes = tuple(f"d{i}" for i in range(len(sizes)))
        mesh = AbstractMesh(sizes, axes, axis_types=(AxisType.Auto,) * len(axes))
        split = [[_names_that_split(mesh, of_axis) for of_axis in a] for a in begins]
        specs = [PartitionSpec(*[names or None for names in a]) for a in split]
        missed = sum(names is None for a in split for names in a)
        tried.append((missed, mesh, specs))
        if not missed:
            break
    _, mesh, specs = min(tried, key=lambda one: one[0])
    return mesh, specs


def _names_that_split(mesh: AbstractMesh, begins: np.ndarray) -> Names | None:
    """Returns the axes of the mesh that split an axis of an array.

    Args:
      mesh: a mesh of numbered devices.
      begins: where each device's part of the axis begins, if it had as many elements as
        there are devices.

    Returns:
      The names, or None if the mesh cannot express where the parts begin.
    """
    begins = begins.reshape(mesh.axis_sizes)
    places = dict(zip(mesh.axis_names, np.indices(mesh.axis_sizes), strict=True))
    # Where the last part along each axis of the mesh begins: 0 if the axis splits none.
    step = {name: begins.flat[np.argmax(place)] for name, place in places.items()}
    names = tuple(sorted(filter(step.get, step), key=lambda name: -step[name]))
    expected, stride = np.zeros_like(begins), mesh.size // _size(mesh, names)
    for name in reversed(names):
        expected += places[name] * stride
        stride *= mesh.shape[name]
    return names if (begins == expected).all() else None


def _prime_factors(number: int) -> Iterator[int]:
    """Returns the prime factors of a number, from the least on."""
    factor = 2
    while number > 1:
        if number % factor:
            factor += 1
        else:
            yield factor
            number //= factor


def _orders(left: collections.Counter[int]) -> Iterator[tuple[int, ...]]:
    """Returns each different order of numbers that occur so many times."""
    if not left.total():
        yield ()
    for number in [n for n, count in left.items() if count]:
        for rest in _orders(left - collections.Counter([number])):
            yield number, *rest


def _informative(follows: Follows, norm: Norm, x: Any) -> Follows:
    """Returns the axes of x of which an operand's sharding tells how they are split.

    How a parameter's features are sharded tells nothing: with FSDP they lie on the mesh
    axis of the data.
    """
    if len(follows) == x.ndim:
        return follows
    return tuple(None if axis in norm.feature_axes else axis for axis in follows)


def _rule(
    operands: Sequence[Follows], results: Sequence[Follows], norm: Norm, x: Any
) -> dict[str, Any]:
    """Tells Shardy which axes share a sharding: "m, a b c, u -> a b c, a b v".

    If there are statistics of groups, "m, a b (g k) -> a b (g k), a u g", where a group
    has k channels.
    """
    last, groups = x.ndim - 1, norm.num_groups or 1
    names: dict[int | None, str] = {axis: f"x{axis}" for axis in range(x.ndim)}
    sizes = {}
    if groups == x.shape[last]:
        names[GROUPS] = names[last]
    elif groups > 1 and any(GROUPS in follows for follows in (*operands, *results)):
        names |= {last: "(g k)", GROUPS: "g"}
        sizes = {"k": x.shape[last] // groups}
    unshared = (f"u{i}" for i in itertools.count())

    def factors(follows: Follows) -> str:
        return " ".join(names.get(axis) or next(unshared) for axis in follows)

    before, after = ["m", *map(factors, operands)], map(factors, results)
    return {"sharding_rule": f"{', '.join(before)} -> {', '.join(after)}", **sizes}


@functools.cache
def _sources() -> str:
    """Returns a hash of the kernels' sources: another release makes other code."""
    return hashlib.sha256(b"".join(_texts())).hexdigest()


def _texts() -> Iterator[bytes]:
    for module in (__file__, reference.__file__):
        for path in sorted(pathlib.Path(module).parent.rglob("*.py")):
            yield path.read_bytes()
