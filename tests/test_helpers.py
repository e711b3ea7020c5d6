"""Tests of tests/helpers.py: bounds reject wrong results, and the truth is right."""

import numpy as np
import pytest

from fusednorm import reference
from tests.helpers import Case, assert_close


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_assert_close_rejects_zeros_and_a_gain_of_two_percent(dtype: str) -> None:
    case = Case("layer_norm", (8, 96))
    x, scale, bias, dy = case.data(0, "float32", "float32")
    truth = case.truth(x, scale, bias, dy)
    for name in ("y", "dx", "dscale", "dbias"):
        expected, bound = getattr(truth, name), truth.bounds[name]
        assert_close(expected.astype(dtype), expected, bound)
        for wrong in (0 * expected, 1.02 * expected, np.where(expected, np.nan, 0)):
            with pytest.raises(AssertionError, match="elements are off"):
                assert_close(wrong.astype(dtype), expected, bound)


def test_assert_close_refuses_a_comparison_that_proves_nothing() -> None:
    expected = np.array([1.0, -2.0])
    with pytest.raises(AssertionError, match="would let zeros pass"):
        assert_close(expected.astype("float32"), expected, bound=np.array(3.0))
    with pytest.raises(AssertionError, match="would let a gain of 2 % pass"):
        assert_close(expected.astype("float32"), expected, bound=np.array(0.05))


def test_assert_close_takes_half_an_ulp_and_no_more() -> None:
    expected = np.array([1 + 2**-12, 3.0])  # between two float16 numbers
    assert_close(expected.astype("float16"), expected, bound=np.zeros(2))
    with pytest.raises(AssertionError, match="1 of 2 elements"):
        assert_close(
            np.array([1 + 2**-10, 3.0], "float16"), expected, bound=np.zeros(2)
        )


@pytest.mark.parametrize(
    "case",
    [
        Case("layer_norm", (3, 5)),
        Case("rms_norm", (3, 5)),
        Case("group_norm", (2, 3, 4), (("num_groups", 2),)),
        Case("batch_norm", (4, 3)),
        *(
            Case("layer_norm", (3, 5), (("activation", name),))
            for name in reference.ACTIVATIONS
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("masked", [False, True])
def test_the_truth_has_the_gradients_of_its_own_values(
    case: Case, masked: bool
) -> None:
    """In float64, dx, dscale and dbias match central differences of y."""
    x, scale, bias, dy = case.data(1, "float64", "float64")
    mask = np.random.default_rng(2).random(case.shape) < 0.8 if masked else None
    truth = case.truth(x, scale, bias, dy, mask)
    arguments = {"dx": x, "dscale": scale, "dbias": bias}
    for name, argument in arguments.items():
        if argument is None:
            continue
        slopes = np.zeros_like(argument)
        for index in np.ndindex(argument.shape):
            step = np.zeros_like(argument)
            step[index] = 1e-6
            ends = [
                case.truth(
                    *[a + s * step if a is argument else a for a in (x, scale, bias)],
                    dy,
                    mask,
                ).y
                for s in (1, -1)
            ]
            slopes[index] = np.vdot(dy, ends[0] - ends[1]) / 2e-6
        np.testing.assert_allclose(slopes, getattr(truth, name), rtol=1e-6, atol=1e-8)
