"""Float64 NumPy normalizations, error bounds, and an assert_close that can fail."""

import dataclasses
import math
from collections.abc import Collection, Iterable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fusednorm

EPS32 = float(np.finfo(np.float32).eps)

# Allowed error of a float32 mean, in units of EPS32 * |mean|: half for the number
# itself, the rest for the sum. The worst seen is 5.4, for 768 times -3.7 summed by XLA
# on a CPU.
MEAN_ROUNDINGS = 8


def slow_but(quick: Collection[Any], values: Iterable[Any]) -> list[Any]:
    """Marks the parameters of a test that are not in `quick` as slow.

    `make test` runs the quick ones, and `make test-slow` the others.
    """
    return [
        value if value in quick else pytest.param(value, marks=pytest.mark.slow)
        for value in values
    ]


# --- the truth: float64 NumPy, written apart from reference/ --------------------------


@dataclasses.dataclass(frozen=True)
class Truth:
    """A normalization and its gradients in float64, with error bounds for float32.

    Attributes:
      y, dx: arrays of x's shape.
      dscale, dbias: arrays of shape (features,), or of the shape of a scale or bias of
        x's rank.
      dshortcut: array of x's shape.
      mean, var: arrays of x's rank, of size 1 along reduced axes (with groups, one
        element per group on the last axis).
      bounds: errors allowed before the result is rounded to its dtype, by name.
    """

    y: np.ndarray
    mean: np.ndarray
    var: np.ndarray
    dx: np.ndarray
    dscale: np.ndarray
    dbias: np.ndarray
    dshortcut: np.ndarray
    bounds: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Case:
    """One normalization of one shape.

    Attributes:
      kind: layer_norm, rms_norm, group_norm, instance_norm or batch_norm.
      shape: x's shape.
      options: keyword arguments of the function.
      params: whether there are scale and bias.
    """

    kind: str
    shape: tuple[int, ...]
    options: tuple[tuple[str, Any], ...] = ()
    params: bool = True

    def __str__(self) -> str:
        words = [self.kind, "x".join(map(str, self.shape))]
        words += [f"{name}={value}".replace(" ", "") for name, value in self.options]
        return "-".join(words if self.params else [*words, "bare"])

    @property
    def epsilon(self) -> float:
        return dict(self.options).get("epsilon", 1e-5 if "batch" in self.kind else 1e-6)

    @property
    def num_groups(self) -> int | None:
        return dict(self.options).get("num_groups")

    @property
    def feature_axes(self) -> tuple[int, ...]:
        name = "axis" if self.kind == "batch_norm" else "feature_axes"
        return self._axes(name, -1)

    @property
    def reduction_axes(self) -> tuple[int, ...]:
        ndim = len(self.shape)
        if self.kind in ("layer_norm", "rms_norm"):
            return self._axes("reduction_axes", -1)
        if self.kind == "group_norm":
            return self._axes("reduction_axes", tuple(range(1, ndim)) or (0,))
        first = 1 if self.kind == "instance_norm" else 0
        return tuple(a for a in range(first, ndim) if a not in self.feature_axes)

    @property
    def activation(self) -> str | None:
        return dict(self.options).get("activation")

    @property
    def features(self) -> int:
        return math.prod(self.shape[axis] for axis in self.feature_axes)

    @property
    def has_bias(self) -> bool:
        return self.params and self.kind != "rms_norm"

    def _axes(self, name: str, default: Any) -> tuple[int, ...]:
        axes = dict(self.options).get(name, default)
        axes = (axes,) if isinstance(axes, int) else axes
        return tuple(sorted(axis % len(self.shape) for axis in axes))

    def run(self, x: Any, scale: Any = None, bias: Any = None, **options: Any) -> Any:
        """Returns fusednorm's y."""
        options = {**dict(self.options), **options}
        params = [scale] if self.kind == "rms_norm" else [scale, bias]
        if self.kind == "rms_norm" and bias is not None:
            options["bias"] = bias
        result = getattr(fusednorm, self.kind)(x, *params, **options)
        return result[0] if self.kind == "batch_norm" else result

    def data(self, seed: int, x_dtype: str, param_dtype: str) -> tuple[Any, ...]:
        """Returns x, scale and bias, rounded to their dtypes, and dy.

        x has mean 0.7 and standard deviation 3.
        """
        rng = np.random.default_rng(seed)
        x = rng.normal(0.7, 3, self.shape).astype(x_dtype)
        scale, bias = (rng.normal(1, 0.5, self.features) for _ in range(2))
        scale = scale.astype(param_dtype) if self.params else None
        bias = bias.astype(param_dtype) if self.has_bias else None
        dy = rng.normal(0, 1, self.shape)
        # Where z is 0 up to rounding, rounding decides relu's slope, so dy is 0 there.
        if self.activation == "relu":
            options = tuple(o for o in self.options if o[0] != "activation")
            linear = dataclasses.replace(self, options=options)
            dy = dy * (np.abs(linear.truth(x, scale, bias, dy).y) > 1e-4)
        return x, scale, bias, dy

    def truth(
        self,
        x: Any,
        scale: Any,
        bias: Any,
        dy: Any,
        mask: Any = None,
        shortcut: Any = None,
    ) -> Truth:
        """Computes the result in float64 from the definition.

        scale and bias may have x's rank, and then broadcast to x. The shortcut is added
        before the activation.
        """
        given_scale, given_bias = scale, bias
        shape, reduced = list(self.shape), list(self.reduction_axes)
        features = list(self.feature_axes)
        if self.num_groups is not None:
            last = len(shape) - 1
            shape[-1:] = [self.num_groups, shape[-1] // self.num_groups]
            reduced = [axis for axis in reduced if axis != last] + [last + 1]
            features = [last, last + 1]
        spread = [n if axis in features else 1 for axis, n in enumerate(shape)]

        def view(array: Any) -> np.ndarray:
            return np.asarray(array, np.float64).reshape(shape)

        def shape_of(param: Any) -> list[int]:
            """Returns a parameter's shape in the view."""
            if param is None or param.size == self.features:
                return spread
            assert features == list(range(features[0], len(shape)))
            lead = list(param.shape[: features[0]])
            assert len(lead) == len(param.shape[:-1])
            return lead + shape[features[0] :]

        def param(value: Any, default: float) -> np.ndarray:
            into = shape_of(value)
            value = np.full(self.features, default) if value is None else value
            return np.asarray(value, np.float64).reshape(into)

        axes = tuple(reduced)
        x, dy = view(x), view(dy)
        m = np.ones(shape)
        if mask is not None:
            m = view(np.broadcast_to(mask, self.shape))
        n = m.sum(axes, keepdims=True)
        safe = np.maximum(n, 1)
        g, b = param(scale, 1.0), param(bias, 0.0)

        def average(value: np.ndarray) -> np.ndarray:
            return value.sum(axes, keepdims=True) / safe

        center = self.kind != "rms_norm"
        mean = average(m * x) if center else np.zeros_like(n)
        var = np.where(n > 0, average(m * (x - mean) ** 2), 1.0)
        rstd = 1 / np.sqrt(var + self.epsilon)
        x_hat = (x - mean) * rstd
        beside = 0.0 if shortcut is None else view(shortcut)
        z = x_hat * g + b + beside
        y, slope = activated(self.activation, z)
        given, dy = dy, dy * slope
        wdy = dy * g
        c1, c2 = average(wdy * x_hat), average(wdy) * center
        dx = rstd * (wdy - m * (c2 + x_hat * c1))
        pixels = tuple(a for a in axes if a not in features)  # share mean and scale

        def for_param(value: np.ndarray, param: Any) -> np.ndarray:
            """Sums over all elements of x that share one element of a scale or bias."""
            into = shape_of(param)
            shared = tuple(a for a, n in enumerate(into) if n == 1)
            value = value.sum(shared, keepdims=True)
            shape = (self.features,) if into is spread else param.shape
            return value.reshape(shape)

        def for_scale(value: np.ndarray) -> np.ndarray:
            return for_param(value, given_scale)

        def for_bias(value: np.ndarray) -> np.ndarray:
            return for_param(value, given_bias)

        of_pixels = dy  # its sum multiplies the error of the mean in dscale
        if shape_of(given_scale) is spread or not pixels:
            of_pixels = dy.sum(pixels, keepdims=True)

        # Error allowed to float32 arithmetic: 16 roundings of each term, and the shift
        # of x_hat by the error of the mean (a float32 number is off by eps * |mean|).
        off = MEAN_ROUNDINGS * EPS32 * np.abs(mean) * rstd
        loss: Any = 16 * EPS32
        size = np.abs(wdy) + average(np.abs(wdy)) * center
        size = size + np.abs(x_hat) * average(np.abs(wdy * x_hat))
        moved = off * (np.abs(c1) + np.abs(x_hat) * average(np.abs(wdy)))
        # The square of the shift adds to the variance of a constant row.
        loss = loss + off**2
        of_z = loss * (np.abs(x_hat * g) + np.abs(b) + np.abs(beside))
        of_z = of_z + off * np.abs(g)
        bounds = {
            "y": of_z,
            "mean": loss * (np.abs(mean) + np.sqrt(var)),
            "var": loss * var + (MEAN_ROUNDINGS * EPS32 * np.abs(mean)) ** 2,
            "dx": rstd * (loss * size + moved),
            "dscale": for_scale(loss * np.abs(dy * x_hat))
            + for_scale(off * np.abs(of_pixels)),
            "dbias": 16 * EPS32 * for_bias(np.abs(dy)),
            "dshortcut": 0 * dy,
        }
        if self.activation is not None:
            # No slope exceeds 1.13, and none changes by more than 1 for a step of 1,
            # except relu's, for which dy must be 0 near z = 0. act and act' may be off
            # by 24 roundings.
            bounds["y"] = 1.13 * of_z + 24 * EPS32 * np.abs(y)
            lost = np.abs(given) * (of_z * (self.activation != "relu") + 24 * EPS32)
            w = lost * np.abs(g)
            through = average(w) * center + np.abs(x_hat) * average(w * np.abs(x_hat))
            bounds["dx"] = bounds["dx"] + rstd * (w + through)
            bounds["dscale"] = bounds["dscale"] + for_scale(lost * np.abs(x_hat))
            bounds["dbias"] = bounds["dbias"] + for_bias(lost)
            bounds["dshortcut"] = lost
        dscale, dbias = for_scale(dy * x_hat), for_bias(dy)
        statistic = mean.shape if self.num_groups is None else mean.shape[:-1]
        shapes = {
            "y": self.shape,
            "dx": self.shape,
            "dshortcut": self.shape,
            "mean": statistic,
            "var": statistic,
            "dscale": dscale.shape,
            "dbias": dbias.shape,
        }
        values = dict(mean=mean, var=var, y=y, dx=dx, dscale=dscale, dbias=dbias)
        values["dshortcut"] = dy
        return Truth(
            **{name: value.reshape(shapes[name]) for name, value in values.items()},
            bounds={
                name: np.broadcast_to(bound, values[name].shape).reshape(shapes[name])
                for name, bound in bounds.items()
            },
        )


def activated(name: str | None, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns act(z) and act'(z) in float64."""
    if name is None:
        return z, np.ones_like(z)
    if name == "relu":
        return np.maximum(z, 0), (z > 0).astype(np.float64)
    if name == "silu":
        s = 1 / (1 + np.exp(-z))
        return z * s, s + z * s * (1 - s)
    if name == "gelu":
        cdf = np.vectorize(math.erfc, otypes=[np.float64])(-z / math.sqrt(2)) / 2
        return z * cdf, cdf + z * np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    assert name == "gelu_tanh"
    root = math.sqrt(2 / math.pi)
    t = np.tanh(root * (z + 0.044715 * z**3))
    inner = root * (1 + 3 * 0.044715 * z**2)
    return z * (1 + t) / 2, (1 + t) / 2 + z * (1 - t**2) * inner / 2


def ulp(value: np.ndarray, dtype: Any) -> np.ndarray:
    """Returns the distance between adjacent numbers of `dtype` around each value."""
    info = ml_dtypes.finfo(dtype)
    magnitude = np.maximum(np.abs(value), float(info.smallest_normal))
    return 2.0 ** np.floor(np.log2(magnitude)) * float(info.eps)


def assert_close(actual: Any, expected: np.ndarray, bound: np.ndarray) -> None:
    """Asserts |actual - expected| <= bound + half an ulp of actual's dtype, everywhere.

    It refuses a comparison that would prove nothing, because zeros or an expectation
    2 % too large would pass as well. An expectation that is zero everywhere is exempt.

    Args:
      actual: array of any float dtype.
      expected: the truth in float64, of the same shape.
      bound: error allowed to float32 arithmetic, element by element.
    """
    assert actual.shape == expected.shape, f"{actual.shape} is not {expected.shape}"
    expected = np.asarray(expected, np.float64)
    allowed = bound + 0.5 * ulp(expected, actual.dtype)
    if expected.size and np.any(expected):
        for name, wrong in (
            ("zeros", 0 * expected),
            ("a gain of 2 %", 1.02 * expected),
        ):
            if np.all(np.abs(wrong - expected) <= allowed):
                raise AssertionError(f"this comparison would let {name} pass")
    error = np.abs(np.asarray(actual, np.float64) - expected)
    bad = ~(error <= allowed)  # NaN is bad
    if np.any(bad):
        worst = np.unravel_index(
            np.argmax(np.where(bad, error / allowed, 0)), bad.shape
        )
        raise AssertionError(
            f"{bad.sum()} of {bad.size} elements are off; the worst, at {worst}, is "
            f"{np.asarray(actual)[worst]} and should be {expected[worst]}: "
            f"{error[worst] / allowed[worst]:.3g} times the bound"
        )
