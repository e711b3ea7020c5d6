"""GroupNorm, InstanceNorm and BatchNorm, channels last, on Pallas Mosaic GPU.

The kernels work on the view x[N, S, G, K] (samples, pixels, groups, channels of a
group). Means run over the pixels and channels of one group of one sample:

    forward   y = act(z),  z = (x - mean) * rstd * scale + bias
    backward  dx = rstd * (w - mean(w) - x_hat * mean(w * x_hat)),  w = dz * scale
              dscale = sum(dz * x_hat),  dbias = sum(dz)         over pixels and samples
              dz = dy * act'(z)

A shortcut has x's shape and is added to z; its gradient is dz. Samples may have a scale
and bias of their own.

A sample is cut into *strips* of channels, and a strip's pixels into blocks, so that all
multiprocessors have work for any N and G. Sums run down the pixels, channel by channel,
and are reduced over the channels of a group last. There are two variants:

    resident   The blocks of a strip form a cluster and keep its pixels in shared memory
               from the first sum to the last store, so x (and dy) is read once. Several
               blocks share a multiprocessor, so that one loads while another one waits
               for its cluster or stores.
    two reads  `moments` reads x, and `combine` merges the blocks' results into one mean
               and variance per group. The normalization is left to XLA: it is
               elementwise, XLA fuses it with the code that follows, and a kernel could
               only tie. The backward works the same way. Blocks take the tensor from
               its end, so that the L2 cache still holds its beginning, which XLA reads
               first.

The strips, the blocks and the order of every sum follow from S, G, K and the dtypes
alone, never from N. Results are therefore bitwise the same in any batch. Counts, means
and centred squares of parts are merged by Chan's formula, in a fixed order, without
atomics.

When statistics cross devices (`Call.half`), there are two reads, and the kernels do the
first one.

Sources: group normalization, Wu and He 2018 (arXiv:1803.08494); instance normalization,
Ulyanov et al. 2016 (arXiv:1607.08022); batch normalization, Ioffe and Szegedy 2015
(arXiv:1502.03167); merging of moments, Chan, Golub and LeVeque 1983, equation 2.1.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from fusednorm import reference
from fusednorm.kernels.activation import activate, slope
from fusednorm.kernels.dispatch import Call, Fallback, Kernel, present
from fusednorm.kernels.geometry import Geometry
from fusednorm.kernels.gpu import memory, strips
from fusednorm.kernels.gpu.memory import WARPS
from fusednorm.kernels.gpu.strips import KB, MAX_CHUNKS, PLACES, Columns, Config, Part
from fusednorm.reference import Norm

# --- moments --------------------------------------------------------------------------

# Count and mean of some pixels, and the sum of squares about the mean. Without
# centring, the mean is None and the squares are about 0.
Moments = tuple[Any, Any, Any]


def _lane_moments(
    part: Part, center: bool, lines: Sequence[Any], values: Sequence[Columns]
) -> Moments:
    """Returns the moments that each lane saw in these lines, for each place in one."""
    count = strips.add(part.counted(line) for line in lines)
    if not center:
        squares = [v * v for v in values]
        return count, None, strips.add(map(part.zero_repeats, lines, squares))
    mean = strips.add(map(part.zero_repeats, lines, values)) / _at_least_1(count)
    squares = [(v - mean) * (v - mean) for v in values]
    return count, mean, strips.add(map(part.zero_repeats, lines, squares))


def _warpgroup_moments(part: Part, center: bool, x: Any, *, keep: bool) -> Moments:
    """Returns the moments of all lines of a warpgroup, for each place in a line.

    Reads x once.
    """

    def tile(lines: Sequence[Any]) -> Moments:
        xs = [part.load(x, line) for line in lines]
        if keep:
            for line, loaded in zip(lines, xs, strict=True):
                part.keep("x", line, loaded)
        return _lane_moments(part, center, lines, [loaded.float32() for loaded in xs])

    def step(lines: Sequence[Any], seen: Moments) -> Moments:
        before = _float(lines[0])  # all earlier lines are whole: each counts once
        return None, *_merge((before, *seen[1:]), tile(lines))[1:]

    def last(lines: Sequence[int], seen: Moments) -> Moments:
        before = float(lines[0]) if seen[0] is None else seen[0]
        return _merge((before, *seen[1:]), tile(lines))

    start = (None, part.zeros() if center else None, part.zeros())
    count, mean, m2 = part.over_lines(step, start, last)
    return float(part.config.lines) if count is None else count, mean, m2


def _merge(a: Moments, b: Moments) -> Moments:
    """Merges the moments of two sets of pixels (Chan et al. 1983, eq. 2.1).

    A count may be 0.
    """
    (n_a, mean_a, m2_a), (n_b, mean_b, m2_b) = a, b
    n = n_a + n_b
    if mean_a is None:
        return n, None, m2_a + m2_b
    share = n_b / _at_least_1(n)
    apart = mean_b - mean_a
    return n, mean_a + apart * share, m2_a + m2_b + apart * apart * (n_a * share)


def _block_moments(
    part: Part, pixels: Any, seen: Moments, to: Part | None = None
) -> list[Columns]:
    """Returns [mean, m2] or [m2] of the block's pixels, channel by channel.

    Args:
      part: part that saw the pixels.
      pixels: number of pixels of the block.
      seen: moments that the part's lanes saw.
      to: part whose lines are combined with the results, if not `part`.
    """
    to = to or part
    count, mean, m2 = seen
    if mean is None:
        return [to.total(sums) for sums in part.add_up(m2)]
    (total,) = part.add_up(mean * count)
    apart = mean - part.total(total) / pixels
    (squares,) = part.add_up(m2 + apart * apart * count)
    return [to.total(total) / pixels, to.total(squares)]


def _merged_moments(
    part: Part, config: Config, partials: Any, to: Part | None = None
) -> list[Columns]:
    """Returns [mean, m2] or [m2] of the pixels of all blocks, channel by channel.

    Args:
      part: part that has the blocks as its pixels.
      config: how the pixels are cut into blocks.
      partials: (samples, blocks, 2 or 1, channels), results of `_block_moments` on each
        block.
      to: the same as for `_block_moments`.
    """

    def line_of(line: int) -> Moments:
        pixels = part.index(line).map(lambda block: _float(config.count(block)))
        *mean, m2 = (
            part.load(partials, line, i).float32() for i in range(partials.shape[2])
        )
        count, m2 = part.zero_repeats(line, pixels), part.zero_repeats(line, m2)
        return count, mean[0] if mean else None, m2

    seen = functools.reduce(_merge, map(line_of, range(part.config.lines)))
    return _block_moments(part, float(config.pixels), seen, to)


def _at_least_1(n: Any) -> Any:
    if isinstance(n, Columns):
        return n.map(lambda array: jnp.maximum(array, 1.0))
    return max(n, 1.0) if isinstance(n, float) else jnp.maximum(n, 1.0)


def _rstd(var: Any, epsilon: float) -> Any:
    if isinstance(var, Columns):
        return var.map(lambda array: lax.rsqrt(array + epsilon))
    return lax.rsqrt(var + epsilon)


def _float(n: Any) -> Any:
    return float(n) if isinstance(n, int) else n.astype(jnp.float32)


def _group_statistics(
    norm: Norm, config: Config, ref: dict[str, Any]
) -> Callable[..., list[Any]]:
    """Returns the formula that turns moments of channels into mean and rstd of groups.

    The formula also writes mean and var to the references of these names, if any.
    """
    pixels, channels = config.pixels, config.group

    def formula(groups: Any, *of_channels: Any) -> list[Any]:
        *mean, m2 = of_channels
        if norm.center:
            mean = [groups.sum(mean[0]) / channels]
            apart = of_channels[0] - mean[0]
            m2 = m2 + apart * apart * pixels
        var = groups.sum(m2) / (pixels * channels)
        for name, value in zip(("var", "mean"), (var, *mean), strict=False):
            if name in ref:
                groups.store(ref[name], value)
        return [*mean, _rstd(var, norm.epsilon)]

    return formula


# --- forward --------------------------------------------------------------------------


def forward(
    config: Config,
    call: Call,
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    mask: None = None,
    shortcut: jax.Array | None = None,
) -> list[jax.Array]:
    """Computes y in one read of x, with the strips resident on the chip.

    If `call.statistics`, it also returns mean (if centred) and var.

    Bytes: x and y, once each, and the shortcut; scale and bias once per warpgroup, from
    the caches; 4 bytes per statistic. A cluster of b blocks of w warpgroups adds
    8 * (b + w * b * b) bytes per channel of each sample (half of that without
    centring). Almost all of these are reads that hit the L2 cache.
    """
    norm = call.norm
    inputs = _inputs(call, x=x, shortcut=shortcut, scale=scale, bias=bias)
    outputs = {"y": jax.ShapeDtypeStruct(_shape(call), norm.dtype)}
    if call.statistics:
        outputs |= _moments(call)

    def body(ref: dict[str, Any], part: Part) -> None:
        seen = _warpgroup_moments(part, norm.center, ref["x"], keep=True)
        found = _block_moments(part, _float(part.pixels), seen)
        if config.blocks > 1:
            blocks = part.exchange(found)
            found = _merged_moments(blocks, config, ref["partials"], to=part)
        *mean, rstd = part.by_group(_group_statistics(norm, config, ref), *found)

        scale = _weight(norm, part, ref)
        bias = _of_sample(part, ref["bias"]) if "bias" in ref else 0.0
        factor = rstd * scale
        act = functools.partial(activate, norm.activation)

        def normalize(lines: Sequence[Any], _: None) -> None:
            beside = [part.load(ref["shortcut"], i) for i in lines if "shortcut" in ref]
            for number, line in enumerate(lines):
                y = part.kept("x", line)
                if norm.center:
                    y = y - mean[0]
                z = y * factor + bias
                if beside:
                    z = z + beside[number].float32()
                part.store(ref["y"], line, z.map(act))

        part.over_lines(normalize, None)

    results = _launch(
        "fusednorm_channelwise_forward",
        body,
        config,
        inputs=inputs,
        outputs=outputs,
        exchanged=1 + norm.center,
        kept={"x": x.dtype},
    )
    return _as_call(call, results)


def forward_in_two_reads(
    config: Config,
    last: Config,
    call: Call,
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    mask: None = None,
    shortcut: jax.Array | None = None,
) -> list[jax.Array]:
    """Computes y in two reads of x.

    If `call.statistics`, it also returns mean (if centred) and var.

    Bytes: x once for the moments; x once more, the shortcut and y in XLA's code.
    """
    *mean, var = moments(config, last, call, x)
    mean_or_none = mean[0] if mean else None
    y = reference.apply(call.norm, x, mean_or_none, var, scale, bias, shortcut)
    return [y, *mean, var] if call.statistics else [y]


def moments(
    config: Config, last: Config, call: Call, x: jax.Array, *others: None
) -> list[jax.Array]:
    """Computes mean (if centred) and var in one read of x, in the statistics' shape.

    Bytes: x; 4 bytes per statistic; 8 per channel and block, written and read.
    """
    norm = call.norm
    samples, _, channels = _shape(call)
    names = ("mean", "m2") if norm.center else ("m2",)
    partials = jax.ShapeDtypeStruct(
        (samples, config.blocks, len(names), channels), jnp.float32
    )

    def body(ref: dict[str, Any], part: Part) -> None:
        seen = _warpgroup_moments(part, norm.center, ref["x"], keep=False)
        for i, value in enumerate(_block_moments(part, _float(part.pixels), seen)):
            part.store_channels(ref["partials"], value, part.sample, part.block, i)

    found = _launch(
        "fusednorm_channelwise_moments",
        body,
        config,
        inputs={"x": x.reshape(_shape(call))},
        outputs={"partials": partials},
    )

    def combine(ref: dict[str, Any], part: Part) -> None:
        values = _merged_moments(part, config, ref["partials"])
        part.by_group(_group_statistics(norm, config, ref), *values)

    found = _launch(
        "fusednorm_channelwise_combine",
        combine,
        last,
        inputs=found,
        outputs=_moments(call),
    )
    shape = norm.statistic_shape(x.shape)
    return [found[name].reshape(shape) for name in _moments(call)]


# --- backward -------------------------------------------------------------------------


def backward(
    config: Config,
    call: Call,
    dy: jax.Array,
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    mean: jax.Array | None,
    var: jax.Array,
    mask: None = None,
    dh: jax.Array | None = None,
    shortcut: jax.Array | None = None,
) -> list[jax.Array]:
    """Computes the gradients in one read of x and dy, with the strips resident.

    `call.wanted` says which of dx, dscale, dbias and dshortcut it returns.

    If there is a shortcut, dz is kept in the place of dy, because finding dz again
    would read the shortcut again. If the forward kept the slopes of ReLU, one bit each,
    the backward could spare the first read of the shortcut too, which is one of the
    five tensors moved. But Pallas has no operation that packs bits.

    Bytes: x, dy and dx, once each, and dh, the shortcut and its gradient; 4 bytes per
    statistic; for dscale and dbias each 4 per channel of each sample, which XLA sums
    over the samples. A cluster of b blocks of w warpgroups adds 8 * (b + w * b * b)
    bytes per channel of each sample, almost all of them from the L2 cache.
    """
    norm = call.norm
    inputs = _inputs(
        call,
        **{"dy": dy, "x": x, "dh": dh, "shortcut": shortcut},
        **{"scale": scale, "bias": bias, "mean": mean, "var": var},
    )
    names = _summed(call)
    outputs: dict[str, Any] = {
        name: _of_each_sample(call) for name in names if call.wants[name]
    }
    outputs["dx"] = jax.ShapeDtypeStruct(inputs["x"].shape, x.dtype)
    if shortcut is not None and call.wants["dshortcut"]:
        outputs["dshortcut"] = jax.ShapeDtypeStruct(outputs["dx"].shape, shortcut.dtype)

    def body(ref: dict[str, Any], part: Part) -> None:
        *mean, rstd = part.by_group(_given_statistics(call, ref))
        dz = _before_activation(norm, part, ref, rstd)
        seen = _gradient_terms(part, names, ref, mean, dz, keep=True)
        found = [part.total(sums) for sums in part.add_up(*seen)]
        if config.blocks > 1:
            blocks = part.exchange(found)
            found = _sums_of_blocks(blocks, ref["partials"], to=part)
        terms = _store_gradients(norm, part, names, ref, rstd, found)
        c1, *c2 = part.by_group(_inner_products(config, ref), *terms)
        # dx = rstd * (w - c2 - x_hat * c1), with each channel's factors multiplied out.
        factor = rstd * _weight(norm, part, ref)
        of_centred = rstd * rstd * c1
        constant = [rstd * each for each in c2]

        def store_dx(lines: Sequence[Any], _: None) -> None:
            dhs = [part.load(ref["dh"], line) for line in lines if "dh" in ref]
            for i, line in enumerate(lines):
                centred = part.kept("x", line)
                if norm.center:
                    centred = centred - mean[0]
                kept = part.kept("dy", line)  # dz, if there is a shortcut
                kept = kept if "shortcut" in ref else dz(kept, centred)
                dx = kept * factor - centred * of_centred
                if norm.center:
                    dx = dx - constant[0]
                if dhs:
                    dx = dx + dhs[i].float32()
                part.store(ref["dx"], line, dx)

        part.over_lines(store_dx, None)

    results = _launch(
        "fusednorm_channelwise_backward",
        body,
        config,
        inputs=inputs,
        outputs=outputs,
        exchanged=len(names),
        kept={"x": x.dtype, "dy": call.dy_kept},
    )
    return _wanted(call, results)


def backward_in_two_reads(
    config: Config,
    last: Config,
    call: Call,
    dy: jax.Array,
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    mean: jax.Array | None,
    var: jax.Array,
    mask: None = None,
    dh: jax.Array | None = None,
    shortcut: jax.Array | None = None,
) -> list[jax.Array]:
    """Computes the gradients in two reads of x and dy.

    `call.wanted` says which of dx, dscale, dbias and dshortcut it returns.

    Bytes: x and dy for the sums; 8 per channel and block, written and read; for dx both
    once more, dh and dx, in XLA's code. A shortcut adds its own bytes and those of its
    gradient dz. For dx, XLA then reads dz in the place of dy, if rounding dz loses
    nothing.
    """
    operands = (dy, x, scale, bias, mean, var)
    results = gradient_sums(config, last, call, *operands, shortcut)
    dz: Any = results.pop("dz", None)
    if dz is None and (call.wanted[0] or call.wanted[3]):
        dz = reference.before_activation(call.norm, *operands, shortcut)
    if call.wanted[3]:
        assert shortcut is not None
        results["dshortcut"] = dz.reshape(x.shape).astype(shortcut.dtype)
    if call.wanted[0]:
        dz = dz.reshape(x.shape)
        c1, c2 = (results.get(name) for name in ("c1", "c2"))
        assert c1 is not None
        results["dx"] = reference.input_gradient(
            call.norm,
            dz,
            x,
            scale,
            mean,
            var,
            c1,
            c2,
            dh=dh,
        )
    return _wanted(call, results)


def sums(
    config: Config,
    last: Config,
    call: Call,
    dy: jax.Array,
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    mean: jax.Array | None,
    var: jax.Array,
    mask: None = None,
    shortcut: jax.Array | None = None,
) -> list[jax.Array]:
    """Computes the sums of the backward in one read of x and dy: see `gradient_sums`.

    Returns:
      c1 and c2 (if centred) if dx is wanted, in the statistics' shape; then dscale and
      dbias, each if wanted.
    """
    operands = (dy, x, scale, bias, mean, var)
    results = gradient_sums(config, last, call, *operands, shortcut)
    inner_products = [results[name] for name in ("c1", "c2") if name in results]
    return [*inner_products, *_over_samples(call, results)]


def gradient_sums(
    config: Config,
    last: Config,
    call: Call,
    dy: jax.Array,
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    mean: jax.Array | None,
    var: jax.Array,
    shortcut: jax.Array | None = None,
) -> dict[str, jax.Array]:
    """Computes the sums of the backward, and dz, in one read of x and dy.

    Bytes: x and dy, the shortcut and dz; 8 per channel and block, written and read.

    Returns:
      dscale, dbias: if wanted; sums of each sample, (samples, channels).
      c1, c2: mean(w * x_hat) and mean(w) (if centred), if dx is wanted; in the
        statistics' shape.
      dz: if dshortcut is wanted and dz is exact in dy's dtype; (samples, pixels,
        channels).
    """
    norm, view = call.norm, _view(call)
    samples, _, channels = _shape(call)
    inputs = _inputs(
        call,
        **{"dy": dy, "x": x, "shortcut": shortcut},
        **{"scale": scale, "bias": bias, "mean": mean, "var": var},
    )
    names = _summed(call)
    partials = (samples, config.blocks, len(names), channels)
    outputs = {"partials": jax.ShapeDtypeStruct(partials, jnp.float32)}
    if call.wants["dshortcut"] and call.dy_kept == dy.dtype:
        outputs["dz"] = jax.ShapeDtypeStruct(_shape(call), dy.dtype)

    def body(ref: dict[str, Any], part: Part) -> None:
        mean, rstd = [], None
        if "mean" in ref:
            mean = [part.load_channels(ref["mean"], part.sample)]
        if "var" in ref:
            rstd = _rstd(part.load_channels(ref["var"], part.sample), norm.epsilon)
        dz = _before_activation(norm, part, ref, rstd)
        seen = _gradient_terms(part, names, ref, mean, dz, keep=False)
        for i, sums in enumerate(part.add_up(*seen)):
            at = (part.sample, part.block, i)
            part.store_channels(ref["partials"], part.total(sums), *at)

    taken = ["dy", "x", "shortcut", "mean"]
    taken += ["var", "scale", "bias"] if call.slopes else []

    def of_channels(name: str) -> jax.Array:
        if name in ("mean", "var") and view.k > 1:  # strips may cut through groups
            return jnp.repeat(inputs[name], view.k, axis=1)
        return inputs[name]

    found = _launch(
        "fusednorm_channelwise_sums",
        body,
        config,
        inputs={name: of_channels(name) for name in taken if name in inputs},
        outputs=outputs,
    )
    exact = {name: found.pop(name) for name in ("dz",) if name in found}

    outputs = {name: _of_each_sample(call) for name in names if call.wants[name]}
    if call.wanted[0]:
        outputs |= _statistics(call, *(("c1", "c2") if norm.center else ("c1",)))

    def combine(ref: dict[str, Any], part: Part) -> None:
        *_, rstd = part.by_group(_given_statistics(call, ref))
        found = _sums_of_blocks(part, ref["partials"])
        terms = _store_gradients(norm, part, names, ref, rstd, found)
        if call.wanted[0]:
            part.by_group(_inner_products(config, ref), *terms)

    needed = ("scale", "mean", "var")
    results = _launch(
        "fusednorm_channelwise_combine",
        combine,
        last,
        inputs=found | {name: inputs[name] for name in needed if name in inputs},
        outputs=outputs,
    )
    shape = norm.statistic_shape(x.shape)
    for name in ("c1", "c2"):
        if name in results:
            results[name] = results[name].reshape(shape)
    return results | exact


def _summed(call: Call) -> tuple[str, ...]:
    """Returns the sums that the backward takes: for dx both, uncentred only dscale."""
    both = call.wanted[2] or (call.wanted[0] and call.norm.center)
    return ("dscale", "dbias") if both else ("dscale",)


def _inputs(call: Call, **operands: jax.Array | None) -> dict[str, jax.Array]:
    """Returns the operands that are given, in the shapes that the kernels see.

    - Arrays of x's size are (samples, pixels, channels). Callers name them first.
    - Statistics are (samples, groups).
    - Scale and bias are (channels,), or (n, channels) if each of n serves an equal
      number of consecutive samples.
    """
    view = _view(call)

    def seen(name: str, array: jax.Array) -> jax.Array:
        if name in ("mean", "var"):
            return array.reshape(view.n, view.g)
        if name in ("scale", "bias"):
            return array if array.ndim == 1 else array.reshape(-1, view.features)
        return array.reshape(_shape(call))

    return {name: seen(name, array) for name, array in present(**operands).items()}


def _of_sample(part: Part, ref: Any) -> Columns:
    """Loads scale or bias of the part's sample, for the strip's channels."""
    if len(ref.shape) == 1:
        return part.load_channels(ref)
    return part.load_channels(ref, lax.div(part.sample, part.samples // ref.shape[0]))


def _given_statistics(call: Call, ref: dict[str, Any]) -> Callable[..., list[Any]]:
    """Returns the formula that loads the forward's mean (if centred) and rstd."""

    def formula(groups: Any) -> list[Any]:
        mean = [groups.load(ref["mean"])] if call.norm.center else []
        return [*mean, _rstd(groups.load(ref["var"]), call.norm.epsilon)]

    return formula


def _weight(norm: Norm, part: Part, ref: dict[str, Any]) -> Columns | float:
    """Returns the scale of the strip's channels, or 1 if there is none."""
    return norm.weight(_of_sample(part, ref["scale"])) if "scale" in ref else 1.0


def _before_activation(
    norm: Norm, part: Part, ref: dict[str, Any], rstd: Any
) -> Callable[..., Columns]:
    """Returns the function that computes dz = dy * act'(z) for a line.

    It takes the line's dy and x - mean, and its shortcut if there is one.
    """
    if norm.activation is None:
        return lambda dy, centred: dy
    factor = rstd * _weight(norm, part, ref)
    bias = _of_sample(part, ref["bias"]) if "bias" in ref else 0.0
    of_z = functools.partial(slope, norm.activation)

    def dz(dy: Columns, centred: Columns, *shortcut: Columns) -> Columns:
        return dy * strips.add([centred * factor + bias, *shortcut]).map(of_z)

    return dz


def _gradient_terms(
    part: Part,
    names: Sequence[str],
    ref: dict[str, Any],
    mean: Sequence[Columns],
    dz: Callable[..., Columns],
    *,
    keep: bool,
) -> list[Columns]:
    """Returns each lane's partial sums of `names`, for each place in a line.

    dscale still lacks the factor rstd. `dz` is the function from `_before_activation`.
    If there is a shortcut, its values go to the reference dshortcut or dz, if there is
    one. If `keep`, they are also kept in the place of dy.
    """
    streamed = [name for name in ("dy", "x", "shortcut") if name in ref]

    def terms(line: Any, dy: Columns, x: Columns, *shortcut: Columns) -> list[Columns]:
        centred = x - mean[0] if mean else x
        dy = dz(dy, centred, *shortcut)
        for name in ("dshortcut", "dz"):
            if name in ref:
                part.store(ref[name], line, dy)
        if keep and shortcut:
            part.keep("dy", line, dy)
        both = {"dscale": dy * centred, "dbias": dy}
        return [part.zero_repeats(line, both[name]) for name in names]

    def step(lines: Sequence[Any], seen: list[Columns]) -> list[Columns]:
        loaded = [[part.load(ref[name], line) for name in streamed] for line in lines]
        if keep:
            for line, (dy, x, *shortcut) in zip(lines, loaded, strict=True):
                if not shortcut:
                    part.keep("dy", line, dy)
                part.keep("x", line, x)
        # Add pairs of lines, then the pairs: short sums have less rounding error than
        # one long sum.
        pairs = (
            [terms(line, *(a.float32() for a in arrays)) for line, arrays in two]
            for two in itertools.batched(zip(lines, loaded, strict=True), 2)
        )
        sums = (functools.reduce(_plus, pair) for pair in pairs)
        return _plus(seen, functools.reduce(_plus, sums))

    return part.over_lines(step, [part.zeros() for _ in names])


def _plus(a: Sequence[Columns], b: Sequence[Columns]) -> list[Columns]:
    return [x + y for x, y in zip(a, b, strict=True)]


def _sums_of_blocks(part: Part, partials: Any, to: Part | None = None) -> list[Columns]:
    """Sums the results of a strip's blocks. Takes `_merged_moments`' arguments."""
    sums = [
        strips.add(
            part.zero_repeats(line, part.load(partials, line, i).float32())
            for line in range(part.config.lines)
        )
        for i in range(partials.shape[2])
    ]
    return [(to or part).total(place) for place in part.add_up(*sums)]


def _store_gradients(
    norm: Norm,
    part: Part,
    names: Sequence[str],
    ref: dict[str, Any],
    rstd: Columns,
    found: Sequence[Columns],
) -> list[Columns]:
    """Stores dscale and dbias of the sample if they are wanted.

    Returns:
      The terms of dx's inner products: both sums times scale.
    """
    scale = _weight(norm, part, ref)
    found = [found[0] * rstd, *found[1:]]
    for name, value in zip(names, found, strict=True):
        if name in ref:
            store = functools.partial(
                part.store_channels, ref[name], value, part.sample
            )
            part.one_block(store)
    return [value * scale for value in found]


def _inner_products(config: Config, ref: dict[str, Any]) -> Callable[..., list[Any]]:
    """Returns the formula of c1 = mean(w * x_hat) and c2 = mean(w), w = dz * scale.

    The formula also writes them to the references of these names, if any.
    """
    count = config.pixels * config.group

    def formula(groups: Any, *terms: Columns) -> list[Any]:
        found = [groups.sum(term) / count for term in terms]
        for name, value in zip(("c1", "c2"), found, strict=False):
            if name in ref:
                groups.store(ref[name], value)
        return found

    return formula


def _wanted(call: Call, results: dict[str, jax.Array]) -> list[jax.Array]:
    """Returns the wanted gradients in order, dx and dshortcut in x's shape."""
    of_x = [
        results[name].reshape(call.x.shape)
        for name in ("dx", "dshortcut")
        if call.wants[name]
    ]
    first = int(call.wanted[0])
    return of_x[:first] + _over_samples(call, results) + of_x[first:]


def _over_samples(call: Call, results: dict[str, jax.Array]) -> list[jax.Array]:
    """Sums dscale and dbias over the samples of each example, each if wanted."""
    names = [name for name in ("dscale", "dbias") if call.wants[name]]
    samples, _, channels = _shape(call)
    lead = call.x.shape[: call.own_params]
    examples = math.prod(lead)
    each = [results[n].reshape(examples, samples // examples, channels) for n in names]
    if samples > examples:
        each = list(memory.sum_over_blocks(*each)) if each else []
    return [total.reshape(*lead, channels) for total in each]


# --- launches -------------------------------------------------------------------------


def _view(call: Call) -> Geometry:
    """Returns the sizes of the view x[N, S, G, K]."""
    view = call.geometry
    assert view is not None
    return view


def _shape(call: Call) -> tuple[int, int, int]:
    """Returns the shape of x as the kernels see it: samples, pixels, channels."""
    view = _view(call)
    return view.n, view.s, view.features


def _statistics(call: Call, *names: str) -> dict[str, jax.ShapeDtypeStruct]:
    view = _view(call)
    shape = jax.ShapeDtypeStruct((view.n, view.g), jnp.float32)
    return dict.fromkeys(names, shape)


def _moments(call: Call) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of mean (if centred) and var, by name."""
    return _statistics(call, *(("mean", "var") if call.norm.center else ("var",)))


def _of_each_sample(call: Call) -> jax.ShapeDtypeStruct:
    """Returns the shape of one value per channel of each sample."""
    samples, _, channels = _shape(call)
    return jax.ShapeDtypeStruct((samples, channels), jnp.float32)


def _as_call(call: Call, results: dict[str, jax.Array]) -> list[jax.Array]:
    shapes = {"y": call.x.shape}
    statistic = call.norm.statistic_shape(call.x.shape)
    return [r.reshape(shapes.get(name, statistic)) for name, r in results.items()]


def _launch(
    name: str,
    body: Callable[[dict[str, Any], Part], None],
    config: Config,
    *,
    inputs: dict[str, jax.Array],
    outputs: dict[str, jax.ShapeDtypeStruct],
    exchanged: int = 0,
    kept: dict[str, Any] | None = None,
) -> dict[str, jax.Array]:
    """Runs body(references by name, part) on every part of every block.

    Args:
      exchanged: values per channel that the blocks of a cluster exchange.
      kept: dtypes of the arrays that stay in shared memory, by name.
    """
    scratch: dict[str, Any] = {
        "sums": plgpu.SMEM(
            (PLACES, config.warpgroups * WARPS, config.pitch), jnp.float32
        ),
        "in_block": plgpu.Barrier(num_arrivals=config.warpgroups),
    }
    for array, dtype in (kept or {}).items():
        for i, chunk in enumerate(config.chunks):
            columns = config.lanes * chunk.vector
            shape = (config.warpgroups, config.lines, *config.line_shape, columns)
            scratch[f"{array}_{i}"] = plgpu.SMEM(shape, dtype)
    mesh: dict[str, Any] = {}
    outputs = dict(outputs)
    first = next(iter(inputs.values()))  # an array with all samples and channels
    samples, channels = first.shape[0], first.shape[-1]
    if config.group > 1:
        scratch["groups"] = plgpu.SMEM((PLACES, config.width), jnp.float32)
    if config.warpgroups > 1:
        mesh |= {"num_threads": config.warpgroups, "thread_name": "warpgroup"}
    programs = samples * config.strips
    if config.resident and config.blocks > 1:
        mesh |= {"cluster": (config.blocks,), "cluster_names": ("cluster",)}
        scratch["in_cluster"] = plgpu.ClusterBarrier(
            collective_axes=("cluster",), num_arrivals=config.warpgroups
        )
        partials = (samples, config.blocks, exchanged, channels)
        outputs["partials"] = jax.ShapeDtypeStruct(partials, jnp.float32)
    elif not config.resident:
        programs *= config.blocks

    def kernel(*refs: Any, **scratch: Any) -> None:
        ref = dict(zip([*inputs, *outputs], refs, strict=True))
        program = lax.axis_index("program")
        block: Any = 0
        if "in_cluster" in scratch:
            block = lax.axis_index("cluster")
            scratch["partials"] = ref["partials"]
        elif not config.resident:  # from the end: see the module's docstring
            program = programs - 1 - program
        rest, strip = lax.div(program, config.strips), lax.rem(program, config.strips)
        if not config.resident:
            rest, block = lax.div(rest, config.blocks), lax.rem(rest, config.blocks)
        warpgroup: Any = 0
        if config.warpgroups > 1:
            warpgroup = lax.axis_index("warpgroup")
        body(ref, Part(config, rest, strip, block, warpgroup, scratch, samples))

    kernel.__name__ = name
    run = plgpu.kernel(
        kernel,
        out_type=list(outputs.values()),
        scratch_types=scratch,
        grid=(programs,),
        grid_names=("program",),
        compiler_params=plgpu.CompilerParams(
            # Values that other lanes wrote are read after a barrier. Anything else that
            # a lane reads, it wrote itself.
            unsafe_no_auto_barriers=True,
            # Each load states its layout, so none has to be inferred. The other
            # semantics search for layouts, in time that grows with the square of the
            # number of loads: lowering the backward of a GroupNorm of 32 x 32 x 640
            # takes 6.8 s with them and 1.4 s with these. The PTX is the same except for
            # the order of some instructions.
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
        **memory.cost([*inputs.values(), *outputs.values()]),
        **mesh,
    )
    results = dict(zip(outputs, run(*inputs.values()), strict=True))
    if config.resident:
        results.pop("partials", None)
    return results


# --- which calls they take ------------------------------------------------------------


def plan(call: Call, shared: int) -> Kernel | Fallback:
    """Chooses the kernels for one channelwise call.

    Args:
      call: call of geometry x[N, S, G, K], S > 1.
      shared: bytes of shared memory that a block may have.
    """
    if _view(call).features == 1:
        return Fallback("one channel")
    alone = 0 in call.norm.reduction_axes
    cluster = strips.MAX_CLUSTER
    if call.op == "backward" and not alone:
        cluster = 2  # larger clusters gain nothing over two reads
    if call.wanted[0] and not call.half:
        kernel = _in_one_read(call, shared, cluster=cluster, alone=alone)
        if kernel is not None:
            return kernel
    # Either the pixels do not fit, or the kernels make neither y nor dx, so that one
    # read is enough for them.
    return _in_two_reads(call, shared, cluster)


def _in_one_read(
    call: Call, shared: int, *, cluster: int, alone: bool
) -> Kernel | None:
    """Plans a kernel with the pixels in shared memory, or None if they do not fit."""
    view = _view(call)
    kept = call.kept_bytes
    arrays = [a for a in (call.x, call.dy, call.addend, call.shortcut) if a is not None]
    dtypes = [array.dtype for array in arrays]
    if call.op == "forward":
        dtypes.append(call.norm.dtype)
    widest = max(dtype.itemsize for dtype in dtypes)
    cut = functools.partial(strips.resident, view, widest, kept, shared)
    configs = (cut(cluster=cluster, alone=alone, load=n) for n in _loads(call, widest))
    config = next(filter(None, configs), None)
    if config is None:
        return None
    size = f"{config.width * view.s * kept / KB:.0f} KB"
    where = "the block" if config.blocks == 1 else f"{config.blocks} blocks"
    why = f"{where} keep{'s' * (config.blocks == 1)} {size} on the chip: one read"
    config = _at_once(call, config)
    launch = forward if call.op == "forward" else backward
    return _kernel(call, config, functools.partial(launch, config, call), "", why)


def _loads(call: Call, itemsize: int) -> tuple[int, ...]:
    """Returns the most bytes that a lane may load at once, in order of preference.

    The first of them with which the pixels fit is used. A load has at most 16 bytes. In
    a backward, each column of a lane has two sums and up to six values of its channel.
    They take registers that an SM's second block needs. The table lists registers per
    thread, blocks per SM and loads in flight per block, first with loads of 16 bytes,
    then of 8. Compiled for an H100, not measured on a chip.

        16 x 16 x 1280, bfloat16              130, 1 of 30 KB     106, 2 of 15 KB
        32 x 32 x 640, bfloat16, and SiLU     160, 1 of 10 KB     127, 2 of 15 KB
        32 x 32 x 640, float32, and SiLU      134, 1 of 30 KB     109, 2 of 30 KB
        32 x 32 x 640, float32                127, 2 of 60 KB     128, 2 of 60 KB
        256 x 256 x 256, bfloat16              80, 3 of 32 KB      64, 4 of 32 KB
        256 x 256 x 256, bfloat16, and GELU   128, 2 of 16 KB      89, 2 of 16 KB

    Narrow loads may fill the end of a strip less well: 24 x 24 x 1280 in float32 fits
    only with loads of 16 bytes.
    """
    if call.op == "backward" and (itemsize == 2 or call.slopes):
        return 8, 16
    return (16,)


def _in_two_reads(call: Call, shared: int, cluster: int) -> Kernel | Fallback:
    """Plans kernels that do the first of two reads, or the only one."""
    view = _view(call)
    arrays = [call.x, call.dy, None if call.dy is None else call.shortcut]
    loaded = [array.dtype.itemsize for array in arrays if array is not None]
    widest = max(loaded)
    load, *_ = _loads(call, widest)
    configs = strips.in_two_reads(view, widest, shared, arrays=len(loaded), load=load)
    if configs is None:
        return Fallback(
            f"{view.features} channels in groups of {view.k}: no strip of "
            f"{strips.SECTOR} bytes or more and {MAX_CHUNKS} loads or fewer divides "
            f"them, or a group takes more than {MAX_CHUNKS} loads or {shared:,} bytes "
            "of shared memory"
        )
    config, last = (_at_once(call, config) for config in configs)
    forwards = call.op == "forward"
    launch: Any = forward_in_two_reads if forwards else backward_in_two_reads
    if call.half:
        launch = moments if forwards else sums
    if not call.wanted[0]:
        variant, why = ", sums", "only sums are wanted: one read"
    elif call.half:
        variant = call.half_name
        why = "statistics cross devices: XLA normalizes in a second read"
    else:
        variant = ", two reads"
        why = (
            f"a group's {view.s} pixels do not fit the shared memory of {cluster} "
            "blocks at two blocks per multiprocessor: two reads, the second by XLA, "
            "which fuses the normalization with what follows"
        )
    run = functools.partial(launch, config, last, call)
    return _kernel(call, config, run, variant, why)


def _kernel(
    call: Call,
    config: Config,
    launch: Callable[..., list[jax.Array]],
    variant: str,
    why: str,
) -> Kernel:
    return Kernel(
        backend="mosaic_gpu",
        name=f"channelwise {call.op}{variant}",
        launch=launch,
        block=str(config),
        why=why,
        bytes_moved=_bytes_moved(call, config),
    )


def _at_once(call: Call, config: Config) -> Config:
    """Sets how many elements a lane loads at once, by the registers that they take.

    - Twice as many where registers have room for them. On an H200, for 160 MB:
      64 x 64 x 320 in float32 takes 114 us with twice as many and 121 without, moments
      in bfloat16 38 to 46 and 42 to 49. But 8 x 8 x 1280 in bfloat16 takes 155 with
      twice as many and 131 without.
    - Half as many where a backward takes an activation's slope: the backward of SiLU on
      64 x 64 x 320 in bfloat16 has 123 registers instead of 136.
    - Half of that again where two warpgroups mask overlapping lines: with more than 128
      registers, an SM has room for one block only. 47 x 47 x 320 in float32 has 80
      registers instead of 160 (compiled for an H100), and the backward of 23 x 48 x 80
      in bfloat16 has 119 instead of 137.
    """
    at_once = config.at_once
    if call.slopes:
        at_once //= 2
    elif call.op == "forward" and config.resident == (call.x.dtype.itemsize == 4):
        at_once *= 2
    overlaps = config.pixels % (config.workers * config.line) > 0
    if config.resident and config.warpgroups > 1 and overlaps:
        at_once //= 2
    return dataclasses.replace(config, at_once=at_once)


def _bytes_moved(call: Call, config: Config) -> int:
    """Returns the bytes read from and written to device memory.

    They are those of tensors, parameters, statistics and partial sums.
    """
    samples, _, channels = _shape(call)
    size, x_size = call.x.size, call.x.dtype.itemsize
    reads = 1 if config.resident or call.half or not call.wanted[0] else 2
    statistics = 4 * samples * _view(call).g * (1 + call.norm.center)
    params = [p for p in (call.scale, call.bias) if p is not None]
    moved = sum(param.size * param.dtype.itemsize for param in params)
    if call.dy is None:
        values = 1 + call.norm.center
        moved += size * reads * x_size
        moved += 0 if call.half else size * call.norm.dtype.itemsize
        moved += statistics * call.statistics
    else:
        values = len(_summed(call))
        moved += size * reads * (x_size + call.dy.dtype.itemsize)
        moved += size * x_size * (call.wanted[0] and not call.half)
        # For `call.half` the kernel writes c1 and c2, from which XLA makes dx.
        moved += statistics * (1 + (call.half and call.wanted[0]))
        if call.addend is not None:
            moved += size * call.addend.dtype.itemsize
        examples = math.prod(call.x.shape[: call.own_params])
        rows = samples if samples == examples else 2 * samples + examples
        moved += 4 * channels * len(call.summed) * rows
    if call.shortcut is not None:
        # XLA computes dz again if the kernel did not write it.
        again = call.dy is not None and not (
            call.wanted[3] and call.dy_kept == call.dy.dtype
        )
        moved += size * call.shortcut.dtype.itemsize * (reads if again else 1)
        moved += size * call.shortcut.dtype.itemsize * call.wanted[3]
    if config.blocks > 1 or not config.resident:  # written and read
        moved += 2 * values * 4 * samples * channels * config.blocks
    return moved
