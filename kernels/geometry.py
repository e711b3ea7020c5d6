"""The one view that every kernel works on: x[N, S, G, K].

Mean and variance are taken over (S, K), one pair per (n, g). Scale and bias have one
entry per (g, k).

| layer                        | N       | S          | G        | K        |
|------------------------------|---------|------------|----------|----------|
| LayerNorm or RMSNorm, last   | rows    | 1          | 1        | features |
| LayerNorm, trailing axes     | leading | other axes | 1        | features |
| GroupNorm                    | batch   | pixels     | groups   | C/groups |
| InstanceNorm                 | batch   | pixels     | channels | 1        |
| BatchNorm                    | 1       | all pixels | channels | 1        |

A norm with S = 1 is rowwise: the elements that it reduces are contiguous. A norm with
S > 1 is channelwise.
"""

import dataclasses
from collections.abc import Sequence

from fusednorm.reference import Norm

# Most features that a GPU's rowwise kernels take: what the registers of the backward
# hold on a cluster of 8 blocks. For longer rows a view with pixels is preferred, if
# there is one.
LONGEST_ROW = 65536

# Position in (N, S, G, K) of an axis, by (whether it is reduced, whether scale and bias
# vary along it).
_ROLE = {(False, False): 0, (True, False): 1, (False, True): 2, (True, True): 3}


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Sizes of the view x[N, S, G, K]; see the module's table."""

    n: int
    s: int
    g: int
    k: int

    @property
    def family(self) -> str:
        """The kernel family: "rowwise" where S = 1, else "channelwise"."""
        return "rowwise" if self.s == 1 else "channelwise"

    @property
    def features(self) -> int:
        """Length of scale and bias."""
        return self.g * self.k


def geometry(norm: Norm, shape: Sequence[int], *, has_params: bool) -> Geometry | None:
    """Returns the view of an array under `norm`, or None if a reshape cannot make it.

    The axes must come in the order N, S, G, K; axes of size 1 may be anywhere.

    Args:
      norm: the normalization.
      shape: shape of x.
      has_params: whether there is a scale or a bias. Without them no axis has to be a
        feature axis, so more views qualify. A rowwise view of up to `LONGEST_ROW`
        features is then preferred.
    """
    sizes = list(shape)
    reduced = set(norm.reduction_axes)
    features = set(norm.feature_axes)
    if norm.num_groups is not None:
        sizes[-1:] = [norm.num_groups, shape[-1] // norm.num_groups]
        reduced.add(len(shape))
        features.add(len(shape))
    choices = [features]
    if not has_params:
        choices += [reduced, set(range(len(sizes))) - reduced]

    views = [_view(sizes, reduced, choice) for choice in choices]
    possible = [view for view in views if view is not None]

    def is_worse(view: Geometry) -> bool:
        too_long = isinstance(view.k, int) and view.k > LONGEST_ROW
        return view.family != "rowwise" or too_long

    return min(possible, key=is_worse, default=None)


def is_rowwise(norm: Norm, shape: Sequence[int], *, has_params: bool) -> bool:
    """Returns whether `geometry` finds a view of an array, and it has S = 1."""
    view = geometry(norm, shape, has_params=has_params)
    return view is not None and view.family == "rowwise"


def power_of_two(most: int) -> int:
    """Returns the largest power of two that is at most `most`."""
    return 1 << (most.bit_length() - 1)


def _view(sizes: list[int], reduced: set[int], features: set[int]) -> Geometry | None:
    view = [1, 1, 1, 1]
    role = 0
    for axis, size in enumerate(sizes):
        if isinstance(size, int) and size == 1:
            continue
        before, role = role, _ROLE[axis in reduced, axis in features]
        if role < before:
            return None
        view[role] *= size
    return Geometry(*view)
