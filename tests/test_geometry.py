"""The kernels' view x[N, S, G, K]: its table, and that it leaves results unchanged."""

import hypothesis
import jax.numpy as jnp
import numpy as np
import pytest

from fusednorm import reference
from fusednorm.kernels.geometry import Geometry, geometry, is_rowwise
from fusednorm.reference import Norm
from tests.test_suite import cases, norm_of

LAST = Norm((2,), (2,))


@pytest.mark.parametrize(
    ("norm", "shape", "view"),
    [
        (LAST, (4, 5, 6), (20, 1, 1, 6)),
        (Norm((1, 2), (2,)), (4, 5, 6), (4, 5, 1, 6)),
        (Norm((1, 2), (1, 2)), (4, 5, 6), (4, 1, 1, 30)),
        (Norm((0, 1, 2), (2,)), (4, 5, 6), (1, 20, 1, 6)),
        (Norm((1,), (2,), num_groups=3), (4, 5, 6), (4, 5, 3, 2)),
        (Norm((), (1,), num_groups=3), (4, 6), (4, 1, 3, 2)),
        (Norm((1,), (2,)), (4, 5, 6), (4, 5, 6, 1)),
        (Norm((0, 1), (2,)), (4, 5, 6), (1, 20, 6, 1)),
        (Norm((0, 2), (1,)), (4, 5, 6), None),
        (Norm((0,), (2,)), (4, 5, 6), None),
        (Norm((0,), (2,)), (4, 1, 6), (1, 4, 6, 1)),
        (Norm((2,), (1,)), (4, 5, 6), None),
    ],
)
def test_the_table(norm: Norm, shape: tuple, view: tuple | None) -> None:
    expected = None if view is None else Geometry(*view)
    assert geometry(norm, shape, has_params=True) == expected
    rowwise = view is not None and view[1] == 1
    assert is_rowwise(norm, shape, has_params=True) == rowwise


def test_without_params_a_row_may_be_longer() -> None:
    over_two = Norm((1, 2), (2,))
    assert geometry(over_two, (4, 5, 6), has_params=False) == Geometry(4, 1, 1, 30)
    first = Norm((0,), (2,))
    assert geometry(first, (4, 5, 6), has_params=False) == Geometry(1, 4, 30, 1)


def test_a_row_that_no_kernel_takes_is_seen_as_pixels() -> None:
    norm = Norm((1, 2), (2,))
    for pixels, view in ((512, (4, 1, 1, 65536)), (513, (4, 513, 1, 128))):
        shape = (4, pixels, 128)
        assert geometry(norm, shape, has_params=False) == Geometry(*view)
    last = Norm((1,), (1,))
    assert geometry(last, (4, 65537), has_params=False) == Geometry(4, 1, 1, 65537)


def test_families() -> None:
    assert Geometry(20, 1, 3, 6).family == "rowwise"
    assert Geometry(20, 2, 3, 6).family == "channelwise"
    assert Geometry(20, 2, 3, 6).features == 18


@hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
@hypothesis.given(case=cases())
def test_the_view_means_the_same(case) -> None:
    """The reference over x[N, S, G, K], reduced over S and K, gives the same y."""
    x, scale, bias, _ = case.data(0, "float32", "float32")
    norm = norm_of(case)
    view = geometry(norm, case.shape, has_params=case.params)
    if view is None:
        return
    four = (view.n, view.s, view.g, view.k)
    flat = Norm((1, 3), (2, 3), center=norm.center, epsilon=norm.epsilon)
    y, _, _ = reference.forward(norm, jnp.asarray(x), scale, bias)
    z, _, _ = reference.forward(flat, jnp.asarray(x).reshape(four), scale, bias)
    np.testing.assert_allclose(
        z.reshape(x.shape), y, rtol=0, atol=2e-6 * np.abs(y).max()
    )
