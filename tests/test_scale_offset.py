"""scale_offset: a number added to the scale in float32, as if before the call."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fusednorm
from tests import interpreters
from tests.helpers import Case, slow_but
from tests.layer_helpers import FEATURES, assert_agrees, build, data

pytestmark = pytest.mark.usefixtures("quickly_compiled")

CASES = [
    Case("layer_norm", (9, 40)),
    Case("rms_norm", (9, 40), (("activation", "silu"),)),
    Case("layer_norm", (3, 5, 24), (("reduction_axes", (1, 2)),)),
    Case("group_norm", (2, 4, 6, 24), (("num_groups", 3), ("activation", "gelu_tanh"))),
    Case("instance_norm", (2, 4, 6, 24)),
    Case("batch_norm", (2, 4, 6, 24)),
]


kernels = interpreters.kernels_of_each_chip


def results(
    case: Case, x: Any, scale: Any, bias: Any, dy: Any, **options: Any
) -> list[np.ndarray]:
    """Returns y and all gradients."""
    params = [p for p in (scale, bias) if p is not None]
    y, vjp = jax.vjp(
        lambda x, *params: case.run(x, *params, dtype=x.dtype, **options), x, *params
    )
    return [np.asarray(a) for a in (y, *vjp(dy))]


def check(case: Case, dtype: str) -> None:
    """Compares y and all gradients bitwise with those of a shifted scale."""
    x, scale, bias, dy = case.data(3, jnp.dtype(dtype), jnp.dtype("bfloat16"))
    x, scale, dy = jnp.asarray(x), jnp.asarray(scale) / 8, jnp.asarray(dy, dtype)
    bias = None if bias is None else jnp.asarray(bias)
    given = results(case, x, scale, bias, dy, scale_offset=1.0)
    # Do not add in bfloat16, where 1 + scale would lose half of its digits.
    added = results(case, x, scale.astype("float32") + 1, bias, dy)
    added[2] = added[2].astype("bfloat16")  # dscale, in the dtype of its parameter
    for a, b in zip(given, added, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda n: str(CASES[n]))
def test_as_if_added_before(number: int) -> None:
    check(CASES[number], "bfloat16" if number % 2 else "float32")


@pytest.mark.parametrize(
    "number", slow_but([0, 3], range(len(CASES))), ids=lambda n: str(CASES[n])
)
def test_kernels_as_if_added_before(kernels: str, number: int) -> None:
    check(CASES[number], "bfloat16" if number % 2 else "float32")


def test_kernels_add_it_to_the_scale_of_each_row(kernels: str) -> None:
    """Kernels read this scale like x. The case also has an activation."""
    case = CASES[1]
    x, scale, bias, dy = case.data(3, "float32", "float32")
    each = np.linspace(-0.2, 0.2, len(x))[:, None] * scale
    x, each, dy = (jnp.asarray(a, "float32") for a in (x, each, dy))
    found = results(case, x, each, bias, dy, scale_offset=1.0)
    with fusednorm.use_backend("reference"):
        expected = results(case, x, each + 1, bias, dy)
    for a, b in zip(found, expected, strict=True):
        assert_agrees(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gpu_as_if_added_before(case: Case) -> None:
    with fusednorm.use_backend("mosaic_gpu"):
        check(case, "bfloat16")


def test_derivatives_of_every_order() -> None:
    x, v = data((3, 12)), data((3, 12), seed=4)
    scale = jnp.linspace(-0.2, 0.3, 12)

    def loss(x: Any, scale: Any, offset: float = 1.0) -> Any:
        y = fusednorm.rms_norm(x, scale, scale_offset=offset, activation="silu")
        return jnp.sum(y**3)

    for derivative in (
        lambda f: jax.grad(f, (0, 1))(x, scale),
        lambda f: jax.jvp(jax.grad(f, (0, 1)), (x, scale), (v, v[0])),
        lambda f: jax.vmap(jax.grad(f, (0, 1)), (0, None))(x, scale),
    ):
        ours = derivative(loss)
        theirs = derivative(lambda x, scale: loss(x, 1 + scale, 0.0))
        for a, b in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
            assert_agrees(a, b, roundings=512)


@pytest.mark.parametrize(
    "name", ["LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm", "BatchNorm"]
)
def test_layers(name: str) -> None:
    zeros = nnx.initializers.zeros_init()
    layer = build(fusednorm, name, use_scale=True, scale_init=zeros)
    plain = build(nnx, name, use_scale=True)
    x = data()
    assert_agrees(layer(x, scale_offset=1.0), plain(x))
    if name != "BatchNorm":
        assert (np.asarray(layer(x)) == 0).all()
    explained = fusednorm.explain(lambda layer, x: layer(x, scale_offset=1), layer, x)
    assert "1 + scale" in str(explained)
    if name == "BatchNorm":
        layer.eval(), plain.eval()
        assert_agrees(layer(x, scale_offset=1.0), plain(x))


def test_without_a_scale_there_is_nothing_to_add_to() -> None:
    with pytest.raises(ValueError, match=r"scale_offset=1.0 .* pass a scale"):
        fusednorm.layer_norm(data(), bias=jnp.ones(FEATURES), scale_offset=1.0)
