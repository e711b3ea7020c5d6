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
from fusednorm.kernels.activation import activate, times_slope
from fusednorm.kernels.dispatch import Call, Fallback, Kernel, present
from fusednorm.kernels.gpu import memory, strips
from fusednorm.kernels.gpu.strips import KB, MAX_CHUNKS, Columns, Config, Part
from fusednorm.reference import Norm

# References to the operands and results of a kernel, by name. Their shapes:
#   x, dy, dh, shortcut, y, dx, dz, dshortcut   (samples, pixels, channels)
#   scale, bias                                 (channels,), or (n, channels) if each of
#                                               n serves an equal number of consecutive
#                                               samples
#   mean, var, c1, c2                           (samples, groups)
#   dscale, dbias                               (samples, channels)
#   partials                                    (samples, blocks, values, channels)
Refs = dict[str, Any]

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
        squares = [memory.square(v) for v in values]  # lanes add those of a single line
        return count, None, strips.add(map(part.zero_repeats, lines, squares))
    mean = strips.add(map(part.zero_repeats, lines, values)) / _at_least_1(count)
    squares = [(v - mean) * (v - mean) for v in values]
    return count, mean, strips.add(map(part.zero_repeats, lines, squares))


def _warpgroup_moments(part: Part, center: bool, x: Any, *, keep: bool) -> Moments:
    """Returns the moments of all lines of a warpgroup, for each place in a line.

    Reads x once.
    """

    def load_moments(lines: Sequence[Any]) -> Moments:
        loaded = [part.load(x, line) for line in lines]
        if keep:
            for line, value in zip(lines, loaded, strict=True):
                part.keep("x", line, value)
        return _lane_moments(part, center, lines, [value.float32() for value in loaded])

    def merge(lines: Sequence[Any], before: Moments) -> Moments:
        _, mean, m2 = before
        # All lines before these are whole: a lane has counted each of them once.
        return _merge((_float(lines[0]), mean, m2), load_moments(lines))

    def step(lines: Sequence[Any], before: Moments) -> Moments:
        _, mean, m2 = merge(lines, before)
        return None, mean, m2  # the loop need not carry the count

    start = (None, part.zeros() if center else None, part.zeros())
    count, mean, m2 = part.over_lines(step, start, last=merge)
    return float(part.config.lines) if count is None else count, mean, m2


def _merge(a: Moments, b: Moments) -> Moments:
    """Merges the moments of two sets of pixels (Chan et al. 1983, eq. 2.1).

    A count may be 0, so delta is multiplied by counts before it is squared: the square
    of a mean of 2e19 would be infinite, and infinity times 0 is NaN.
    """
    (n_a, mean_a, m2_a), (n_b, mean_b, m2_b) = a, b
    n = n_a + n_b
    if mean_a is None:
        return n, None, m2_a + m2_b
    share = n_b / _at_least_1(n)
    delta = mean_b - mean_a
    return n, mean_a + delta * share, m2_a + m2_b + delta * (delta * (n_a * share))


def _block_moments(
    part: Part, pixels: Any, lane_moments: Moments, to: Part | None = None
) -> list[Columns]:
    """Returns [mean, m2] or [m2] of the block's pixels, channel by channel.

    Args:
      part: part that saw the pixels.
      pixels: number of pixels of the block.
      lane_moments: moments that the part's lanes saw.
      to: part whose lines are combined with the results, if not `part`.
    """
    to = to or part
    count, mean, m2 = lane_moments
    if mean is None:
        return [to.total(sums) for sums in part.sum_pixels(m2)]
    (x_sums,) = part.sum_pixels(mean * count)
    block_mean = part.total(x_sums) / pixels
    delta = mean - block_mean
    (m2_sums,) = part.sum_pixels(m2 + delta * (delta * count))
    if to is not part:
        block_mean = to.total(x_sums) / pixels
    return [block_mean, to.total(m2_sums)]


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

    def load_moments(line: int) -> Moments:
        pixels = part.index(line).map(lambda block: _float(config.count(block)))
        *mean, m2 = (
            part.load(partials, line, i).float32() for i in range(partials.shape[2])
        )
        count, m2 = part.zero_repeats(line, pixels), part.zero_repeats(line, m2)
        return count, mean[0] if mean else None, m2

    lane_moments = functools.reduce(_merge, map(load_moments, range(part.config.lines)))
    return _block_moments(part, float(config.pixels), lane_moments, to)


def _group_statistics(
    norm: Norm, config: Config, ref: Refs
) -> Callable[..., list[Any]]:
    """Returns the formula that turns moments of channels into mean and rstd of groups.

    The formula also writes mean and var to the references of these names, if any.
    """
    pixels, channels = config.pixels, config.group

    def formula(groups: Any, *channel_moments: Any) -> list[Any]:
        *mean, m2 = channel_moments
        if norm.center:
            (channel_mean,) = mean
            mean = [groups.sum(channel_mean) / channels]
            delta = channel_mean - mean[0]
            m2 = m2 + delta * delta * pixels
        var = groups.sum(m2) / (pixels * channels)
        for name, value in zip(("var", "mean"), (var, *mean), strict=False):
            if name in ref:
                groups.store(ref[name], value)
        return [*mean, _rstd(var, norm.epsilon)]

    return formula


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


# --- what both directions read --------------------------------------------------------


def _centre(x: Columns, mean: Sequence[Columns]) -> Columns:
    """Returns x - mean, or x if the norm has no mean."""
    return x - mean[0] if mean else x


def _scale(norm: Norm, part: Part, ref: Refs) -> Columns | float:
    """Returns the scale of the strip's channels, or 1 if there is none."""
    return norm.weight(_of_sample(part, ref["scale"])) if "scale" in ref else 1.0


def _bias(part: Part, ref: Refs) -> Columns | float:
    """Returns the bias of the strip's channels, or 0 if there is none."""
    return _of_sample(part, ref["bias"]) if "bias" in ref else 0.0


def _of_sample(part: Part, ref: Any) -> Columns:
    """Loads scale or bias of the part's sample, for the strip's channels."""
    if len(ref.shape) == 1:
        return part.load_channels(ref)
    return part.load_channels(ref, lax.div(part.sample, part.samples // ref.shape[0]))


def _load_lines(
    part: Part, ref: Refs, name: str, lines: Sequence[Any]
) -> Sequence[Columns | None]:
    """Loads all lines before the first is used; None for each without a reference."""
    return [part.load(ref[name], line) if name in ref else None for line in lines]


# --- forward --------------------------------------------------------------------------


def _forward_kernel(norm: Norm, ref: Refs, part: Part) -> None:
    """Keeps x in shared memory while its moments are taken, then stores y.

    Moments are values of each place in a line, then of each channel of the strip; mean
    and rstd are those of the channel's group.
    """
    config = part.config
    lane_moments = _warpgroup_moments(part, norm.center, ref["x"], keep=True)
    channel_moments = _block_moments(part, _float(part.pixels), lane_moments)
    if config.clustered:
        blocks = part.exchange(channel_moments, ref["partials"])
        channel_moments = _merged_moments(blocks, config, ref["partials"], to=part)
    statistics = _group_statistics(norm, config, ref)
    *mean, rstd = part.by_group(
        statistics, *channel_moments, results=len(channel_moments)
    )

    scale, bias = _scale(norm, part, ref), _bias(part, ref)
    factor = rstd * scale
    act = functools.partial(activate, norm.activation)

    def store_y(lines: Sequence[Any], _: None) -> None:
        shortcuts = _load_lines(part, ref, "shortcut", lines)
        for line, shortcut in zip(lines, shortcuts, strict=True):
            z = _centre(part.kept("x", line), mean) * factor + bias
            if shortcut is not None:
                z = z + shortcut.float32()
            part.store(ref["y"], line, z.map(act))

    part.over_lines(store_y, None)


def _moments_kernel(norm: Norm, ref: Refs, part: Part) -> None:
    """Stores the moments of each block's pixels to partials."""
    lane_moments = _warpgroup_moments(part, norm.center, ref["x"], keep=False)
    channel_moments = _block_moments(part, _float(part.pixels), lane_moments)
    for i, value in enumerate(channel_moments):
        part.store_channels(ref["partials"], value, part.sample, part.block, i)


def _combine_moments_kernel(norm: Norm, config: Config, ref: Refs, part: Part) -> None:
    """Merges the moments of the blocks that `config` makes into mean and var."""
    channel_moments = _merged_moments(part, config, ref["partials"])
    statistics = _group_statistics(norm, config, ref)
    part.by_group(statistics, *channel_moments, results=len(channel_moments))


def forward(
    config: Config,
    call: Call,
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
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
    outputs = {"y": _like_x(call, norm.dtype)}
    if call.statistics:
        outputs |= _per_group(call, _statistic_names(norm))
    if config.clustered:
        outputs["partials"] = _partials(call, config, 1 + norm.center)
    results = _launch(
        "fusednorm_channelwise_forward",
        functools.partial(_forward_kernel, norm),
        config,
        inputs=_inputs(call, x=x, shortcut=shortcut, scale=scale, bias=bias),
        outputs=outputs,
        kept=_kept(call),
    )
    shapes = {"y": x.shape}
    shapes |= dict.fromkeys(("mean", "var"), norm.statistic_shape(x.shape))
    return [results[n].reshape(shape) for n, shape in shapes.items() if n in results]


def forward_in_two_reads(
    config: Config,
    combine_config: Config,
    call: Call,
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    shortcut: jax.Array | None = None,
) -> list[jax.Array]:
    """Computes y in two reads of x.

    If `call.statistics`, it also returns mean (if centred) and var.

    Bytes: x once for the moments; x once more, the shortcut and y in XLA's code.
    """
    *mean, var = moments(config, combine_config, call, x)
    mean_or_none = mean[0] if mean else None
    y = reference.apply(call.norm, x, mean_or_none, var, scale, bias, shortcut)
    return [y, *mean, var] if call.statistics else [y]


def moments(
    config: Config, combine_config: Config, call: Call, x: jax.Array, *params: None
) -> list[jax.Array]:
    """Computes mean (if centred) and var in one read of x, in the statistics' shape.

    Bytes: x; 4 bytes per statistic; 8 per channel and block, written and read.
    """
    norm, names = call.norm, _statistic_names(call.norm)
    partials = _launch(
        "fusednorm_channelwise_moments",
        functools.partial(_moments_kernel, norm),
        config,
        inputs=_inputs(call, x=x),
        outputs={"partials": _partials(call, config, 1 + norm.center)},
    )
    results = _launch(
        "fusednorm_channelwise_combine_moments",
        functools.partial(_combine_moments_kernel, norm, config),
        combine_config,
        inputs=partials,
        outputs=_per_group(call, names),
    )
    shape = norm.statistic_shape(x.shape)
    return [results[name].reshape(shape) for name in names]


# --- backward -------------------------------------------------------------------------


def _backward_kernel(call: Call, ref: Refs, part: Part) -> None:
    """Keeps x and dy in shared memory while their sums are taken, then stores dx.

    If there is a shortcut, dz is kept in the place of dy, because finding dz again
    would read the shortcut again. If the forward kept the slopes of ReLU, one bit each,
    the backward could spare the first read of the shortcut too, which is one of the
    five tensors moved. But Pallas has no operation that packs bits.
    """
    norm, config = call.norm, part.config
    # Statistics, c1 and c2 are those of each channel's group.
    *mean, rstd = part.by_group(_load_statistics(norm, ref), results=1 + norm.center)
    dz_of = _before_activation(norm, part, ref, rstd)
    lane_sums = _warpgroup_sums(call, part, ref, mean, dz_of, keep=True)
    channel_sums = [part.total(sums) for sums in part.sum_pixels(*lane_sums)]
    if config.clustered:
        blocks = part.exchange(channel_sums, ref["partials"])
        channel_sums = _sums_of_blocks(blocks, ref["partials"], to=part)
    w_sums = _store_gradients(call, part, ref, rstd, channel_sums)
    c1, *c2 = part.by_group(_inner_products(config, ref), *w_sums, results=len(w_sums))

    # dx = rstd * (w - c2 - x_hat * c1), with each channel's factors multiplied out.
    dz_factor = rstd * _scale(norm, part, ref)
    centred_factor = rstd * rstd * c1
    constant = rstd * c2[0] if c2 else None

    def store_dx(lines: Sequence[Any], _: None) -> None:
        dhs = _load_lines(part, ref, "dh", lines)
        for line, dh in zip(lines, dhs, strict=True):
            centred = _centre(part.kept("x", line), mean)
            dz = part.kept("dy", line)
            if "shortcut" not in ref:
                dz = dz_of(dz, centred)
            shift = centred * centred_factor
            if constant is not None:
                shift = shift + constant
            dx = dz * dz_factor - shift
            if dh is not None:
                dx = dx + dh.float32()
            part.store(ref["dx"], line, dx)

    part.over_lines(store_dx, None)


def _sums_kernel(call: Call, ref: Refs, part: Part) -> None:
    """Stores the sums of each block to partials, and dz if it has a reference.

    Strips may cut through groups, so mean and var are (samples, channels) here.
    """
    mean, rstd = [], None
    if "mean" in ref:
        mean = [part.load_channels(ref["mean"], part.sample)]
    if "var" in ref:
        rstd = _rstd(part.load_channels(ref["var"], part.sample), call.norm.epsilon)
    dz_of = _before_activation(call.norm, part, ref, rstd)
    lane_sums = _warpgroup_sums(call, part, ref, mean, dz_of, keep=False)
    for i, sums in enumerate(part.sum_pixels(*lane_sums)):
        value = part.total(sums)
        part.store_channels(ref["partials"], value, part.sample, part.block, i)


def _combine_sums_kernel(call: Call, config: Config, ref: Refs, part: Part) -> None:
    """Reduces the partials of the blocks that `config` makes to the sums wanted."""
    statistics = _load_statistics(call.norm, ref)
    *_, rstd = part.by_group(statistics, results=1 + call.norm.center)
    channel_sums = _sums_of_blocks(part, ref["partials"])
    w_sums = _store_gradients(call, part, ref, rstd, channel_sums)
    if call.wants["dx"]:
        products = _inner_products(config, ref)
        part.by_group(products, *w_sums, results=len(w_sums))


def _load_statistics(norm: Norm, ref: Refs) -> Callable[..., list[Any]]:
    """Returns the formula that loads the forward's mean (if centred) and rstd."""

    def formula(groups: Any) -> list[Any]:
        mean = [groups.load(ref["mean"])] if norm.center else []
        return [*mean, _rstd(groups.load(ref["var"]), norm.epsilon)]

    return formula


def _before_activation(
    norm: Norm, part: Part, ref: Refs, rstd: Any
) -> Callable[..., Columns]:
    """Returns the function that computes dz = dy * act'(z) for a line.

    It takes the line's dy and x - mean, and its shortcut if there is one.
    """
    if norm.activation is None:
        return lambda dy, centred: dy
    factor = rstd * _scale(norm, part, ref)
    bias = _bias(part, ref)
    act_slope = functools.partial(times_slope, norm.activation)

    def dz_of(dy: Columns, centred: Columns, *shortcut: Columns) -> Columns:
        z = strips.add([centred * factor + bias, *shortcut])
        return z.map(act_slope, dy)

    return dz_of


def _warpgroup_sums(
    call: Call,
    part: Part,
    ref: Refs,
    mean: Sequence[Columns],
    dz_of: Callable[..., Columns],
    *,
    keep: bool,
) -> list[Columns]:
    """Returns each lane's part of `_sums_taken(call)`, for each place in a line.

    dscale still lacks the factor rstd. `dz_of` is the function from
    `_before_activation`. If there is a shortcut, dz goes to the reference dshortcut or
    dz, if there is one. If `keep`, it is also kept in the place of dy.
    """
    names = _sums_taken(call)
    streamed = [name for name in ("dy", "x", "shortcut") if name in ref]

    def terms(line: Any, loaded: Sequence[Columns]) -> list[Columns]:
        dy, x, *shortcut = (array.float32() for array in loaded)
        centred = _centre(x, mean)
        dz = dz_of(dy, centred, *shortcut)
        for name in ("dshortcut", "dz"):
            if name in ref:
                part.store(ref[name], line, dz)
        if keep and shortcut:
            part.keep("dy", line, dz)
        term_of = {"dscale": dz * centred, "dbias": dz}
        return [part.zero_repeats(line, term_of[name]) for name in names]

    def step(lines: Sequence[Any], sums: list[Columns]) -> list[Columns]:
        loaded = [[part.load(ref[name], line) for name in streamed] for line in lines]
        if keep:
            for line, (dy, x, *shortcut) in zip(lines, loaded, strict=True):
                if not shortcut:
                    part.keep("dy", line, dy)
                part.keep("x", line, x)
        # Add pairs of lines, then the pairs: short sums have less rounding error than
        # one long sum.
        each = itertools.starmap(terms, zip(lines, loaded, strict=True))
        pairs = itertools.batched(each, 2)
        pair_sums = (functools.reduce(_plus, pair) for pair in pairs)
        return _plus(sums, functools.reduce(_plus, pair_sums))

    return part.over_lines(step, [part.zeros() for _ in names])


def _plus(a: Sequence[Columns], b: Sequence[Columns]) -> list[Columns]:
    return [x + y for x, y in zip(a, b, strict=True)]


def _sums_of_blocks(part: Part, partials: Any, to: Part | None = None) -> list[Columns]:
    """Sums the results of a strip's blocks. Takes `_merged_moments`' arguments."""
    lane_sums = [
        strips.add(
            part.zero_repeats(line, part.load(partials, line, i).float32())
            for line in range(part.config.lines)
        )
        for i in range(partials.shape[2])
    ]
    return [(to or part).total(sums) for sums in part.sum_pixels(*lane_sums)]


def _store_gradients(
    call: Call, part: Part, ref: Refs, rstd: Columns, channel_sums: Sequence[Columns]
) -> list[Columns]:
    """Stores dscale and dbias of the sample if they are wanted.

    Returns:
      sum(w * x_hat) and sum(w) (if dbias is summed), channel by channel.
    """
    scale = _scale(call.norm, part, ref)
    centred_sum, *dbias = channel_sums
    gradients = [centred_sum * rstd, *dbias]
    for name, value in zip(_sums_taken(call), gradients, strict=True):
        if name in ref:
            store = functools.partial(
                part.store_channels, ref[name], value, part.sample
            )
            part.one_block(store)
    return [value * scale for value in gradients]


def _inner_products(config: Config, ref: Refs) -> Callable[..., list[Any]]:
    """Returns the formula of c1 = mean(w * x_hat) and c2 = mean(w), w = dz * scale.

    The formula also writes them to the references of these names, if any.
    """
    count = config.pixels * config.group

    def formula(groups: Any, *w_sums: Columns) -> list[Any]:
        means = [groups.sum(term) / count for term in w_sums]
        for name, value in zip(("c1", "c2"), means, strict=False):
            if name in ref:
                groups.store(ref[name], value)
        return means

    return formula


def backward(
    config: Config,
    call: Call,
    dy: jax.Array,
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    mean: jax.Array | None,
    var: jax.Array,
    dh: jax.Array | None = None,
    shortcut: jax.Array | None = None,
) -> list[jax.Array]:
    """Computes the gradients in one read of x and dy, with the strips resident.

    `call.wanted` says which of dx, dscale, dbias and dshortcut it returns.

    Bytes: x, dy and dx, once each, and dh, the shortcut and its gradient; 4 bytes per
    statistic; for dscale and dbias each 4 per channel of each sample, which XLA sums
    over the samples. A cluster of b blocks of w warpgroups adds 8 * (b + w * b * b)
    bytes per channel of each sample, almost all of them from the L2 cache.
    """
    tensors = {"dy": dy, "x": x, "dh": dh, "shortcut": shortcut}
    values = {"scale": scale, "bias": bias, "mean": mean, "var": var}
    inputs = _inputs(call, **tensors, **values)
    outputs = _per_channel(call) | {"dx": _like_x(call, x.dtype)}
    if shortcut is not None and call.wants["dshortcut"]:
        outputs["dshortcut"] = _like_x(call, shortcut.dtype)
    if config.clustered:
        outputs["partials"] = _partials(call, config, len(_sums_taken(call)))
    results = _launch(
        "fusednorm_channelwise_backward",
        functools.partial(_backward_kernel, call),
        config,
        inputs=inputs,
        outputs=outputs,
        kept=_kept(call),
    )
    return _wanted(call, results)


def backward_in_two_reads(
    config: Config,
    combine_config: Config,
    call: Call,
    dy: jax.Array,
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    mean: jax.Array | None,
    var: jax.Array,
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
    norm, wants = call.norm, call.wants
    operands = (dy, x, scale, bias, mean, var)
    results = gradient_sums(config, combine_config, call, *operands, shortcut)
    dz: Any = results.pop("dz", None)
    if dz is None and (wants["dx"] or wants["dshortcut"]):
        dz = reference.before_activation(norm, *operands, shortcut)
    if wants["dshortcut"]:
        assert shortcut is not None
        results["dshortcut"] = dz.reshape(x.shape).astype(shortcut.dtype)
    if wants["dx"]:
        dz, c1, c2 = dz.reshape(x.shape), results["c1"], results.get("c2")
        results["dx"] = reference.input_gradient(
            norm, dz, x, scale, mean, var, c1, c2, dh=dh
        )
    return _wanted(call, results)


def sums(
    config: Config,
    combine_config: Config,
    call: Call,
    dy: jax.Array,
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    mean: jax.Array | None,
    var: jax.Array,
    shortcut: jax.Array | None = None,
) -> list[jax.Array]:
    """Computes the sums of the backward in one read of x and dy: see `gradient_sums`.

    Returns:
      c1 and c2 (if centred) if dx is wanted, in the statistics' shape; then dscale and
      dbias, each if wanted.
    """
    operands = (dy, x, scale, bias, mean, var)
    results = gradient_sums(config, combine_config, call, *operands, shortcut)
    inner_products = [results[name] for name in ("c1", "c2") if name in results]
    return [*inner_products, *memory.sum_partials(call, results).values()]


def gradient_sums(
    config: Config,
    combine_config: Config,
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
    norm, group = call.norm, call.view.k
    tensors = {"dy": dy, "x": x, "shortcut": shortcut}
    values = {"scale": scale, "bias": bias, "mean": mean, "var": var}
    inputs = _inputs(call, **tensors, **values)
    read = ["dy", "x", "shortcut", "mean"]
    read += ["var", "scale", "bias"] if call.slopes else []
    operands = {name: inputs[name] for name in read if name in inputs}
    for name in ("mean", "var"):
        if name in operands and group > 1:  # strips may cut through groups
            operands[name] = jnp.repeat(operands[name], group, axis=1)
    outputs = {"partials": _partials(call, config, len(_sums_taken(call)))}
    if call.wants["dshortcut"] and call.dy_kept == dy.dtype:
        outputs["dz"] = _like_x(call, dy.dtype)
    results = _launch(
        "fusednorm_channelwise_sums",
        functools.partial(_sums_kernel, call),
        config,
        inputs=operands,
        outputs=outputs,
    )

    read = ["scale", "mean", "var"]
    operands = {"partials": results.pop("partials")}
    operands |= {name: inputs[name] for name in read if name in inputs}
    outputs = _per_channel(call)
    if call.wants["dx"]:
        outputs |= _per_group(call, ("c1", "c2")[: 1 + norm.center])
    results |= _launch(
        "fusednorm_channelwise_combine_sums",
        functools.partial(_combine_sums_kernel, call, config),
        combine_config,
        inputs=operands,
        outputs=outputs,
    )
    shape = norm.statistic_shape(x.shape)
    for name in ("c1", "c2"):
        if name in results:
            results[name] = results[name].reshape(shape)
    return results


def _sums_taken(call: Call) -> tuple[str, ...]:
    """Returns the sums that the backward takes: for dx both, uncentred only dscale."""
    both = call.wants["dbias"] or (call.wants["dx"] and call.norm.center)
    return ("dscale", "dbias") if both else ("dscale",)


def _wanted(call: Call, results: dict[str, jax.Array]) -> list[jax.Array]:
    """Returns the wanted gradients in order, dx and dshortcut in x's shape."""
    gradients = {
        name: results[name].reshape(call.x.shape)
        for name in ("dx", "dshortcut")
        if call.wants[name]
    }
    gradients |= memory.sum_partials(call, results)
    return [gradients[name] for name, wanted in call.wants.items() if wanted]


# --- launches -------------------------------------------------------------------------


def _shape(call: Call) -> tuple[int, int, int]:
    """Returns the shape of x as the kernels see it: samples, pixels, channels."""
    return call.view.n, call.view.s, call.view.features


def _inputs(call: Call, **operands: jax.Array | None) -> dict[str, jax.Array]:
    """Returns the operands that are given, in the shapes that `Refs` lists.

    Callers name the arrays of x's size first.
    """
    view = call.view
    inputs = present(**operands)
    for name, array in inputs.items():
        if name in ("mean", "var"):
            inputs[name] = array.reshape(view.n, view.g)
        elif name not in ("scale", "bias"):
            inputs[name] = array.reshape(_shape(call))
        elif array.ndim > 1:
            inputs[name] = array.reshape(-1, view.features)
    return inputs


def _kept(call: Call) -> dict[str, Any]:
    """Returns the dtypes of the arrays that stay in shared memory, by name."""
    return {"x": call.x.dtype} | ({} if call.dy is None else {"dy": call.dy_kept})


def _like_x(call: Call, dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(_shape(call), dtype)


def _per_group(call: Call, names: Sequence[str]) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of statistics, or of c1 and c2, by name."""
    view = call.view
    return dict.fromkeys(names, jax.ShapeDtypeStruct((view.n, view.g), jnp.float32))


def _statistic_names(norm: Norm) -> tuple[str, ...]:
    return ("mean", "var") if norm.center else ("var",)


def _per_channel(call: Call) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of dscale and dbias of each sample, each if wanted."""
    samples, _, channels = _shape(call)
    shape = jax.ShapeDtypeStruct((samples, channels), jnp.float32)
    return dict.fromkeys(call.summed, shape)


def _partials(call: Call, config: Config, values: int) -> jax.ShapeDtypeStruct:
    """Returns the shape of what each block computes: `values` values per channel."""
    samples, _, channels = _shape(call)
    shape = (samples, config.blocks, values, channels)
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _launch(
    name: str,
    kernel: Callable[[Refs, Part], None],
    config: Config,
    *,
    inputs: dict[str, jax.Array],
    outputs: dict[str, jax.ShapeDtypeStruct],
    kept: dict[str, Any] | None = None,
) -> dict[str, jax.Array]:
    """Runs kernel(references by name, part) in every warpgroup of every block.

    Args:
      inputs: operands by name. The first axis of the first one is the samples.
      kept: dtypes of the arrays that stay in shared memory, by name.
    """
    samples = next(iter(inputs.values())).shape[0]
    blocks = 1 if config.resident else config.blocks  # programs per strip
    programs = samples * config.strips * blocks
    mesh: dict[str, Any] = {}
    if config.warpgroups > 1:
        mesh |= {"num_threads": config.warpgroups, "thread_name": "warpgroup"}
    if config.clustered:
        mesh |= {"cluster": (config.blocks,), "cluster_names": ("cluster",)}

    def body(*refs: Any, **scratch: Any) -> None:
        program = lax.axis_index("program")
        block: Any = 0
        if config.clustered:
            block = lax.axis_index("cluster")
        elif not config.resident:  # from the end: see the module's docstring
            program = programs - 1 - program
        sample, strip = lax.div(program, config.strips), lax.rem(program, config.strips)
        if not config.resident:
            sample, block = lax.div(sample, blocks), lax.rem(sample, blocks)
        warpgroup: Any = 0
        if config.warpgroups > 1:
            warpgroup = lax.axis_index("warpgroup")
        part = Part(config, sample, strip, block, warpgroup, scratch, samples)
        kernel(dict(zip([*inputs, *outputs], refs, strict=True)), part)

    body.__name__ = name
    run = plgpu.kernel(
        body,
        out_type=list(outputs.values()),
        scratch_types=strips.scratch_types(config, kept or {}),
        grid=(programs,),
        grid_names=("program",),
        compiler_params=plgpu.CompilerParams(
            # Sums over warps go through a buffer of our own (`Part.sum_pixels`): Mosaic
            # would share its scratch between the warpgroups of a block. Without any, a
            # reduction that needs it does not compile.
            reduction_scratch_bytes=0,
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
    return dict(zip(outputs, run(*inputs.values()), strict=True))


# --- which calls they take ------------------------------------------------------------


def plan(call: Call, shared: int) -> Kernel | Fallback:
    """Chooses the kernels for one channelwise call.

    Args:
      call: call of geometry x[N, S, G, K], S > 1.
      shared: bytes of shared memory that a block may have.
    """
    if call.view.features == 1:
        return Fallback("one channel")
    one_sample = 0 in call.norm.reduction_axes
    cluster = strips.MAX_CLUSTER
    if call.op == "backward" and not one_sample:
        cluster = 2  # larger clusters gain nothing over two reads
    if not call.sums_only:
        kernel = _in_one_read(call, shared, cluster=cluster, one_sample=one_sample)
        if kernel is not None:
            return kernel
    # Either the pixels do not fit, or the kernels make neither y nor dx, so that one
    # read is enough for them.
    return _in_two_reads(call, shared, cluster)


def _in_one_read(
    call: Call, shared: int, *, cluster: int, one_sample: bool
) -> Kernel | None:
    """Plans a kernel with the pixels in shared memory, or None if they do not fit."""
    view, kept = call.view, [dtype.itemsize for dtype in _kept(call).values()]
    arrays = [a for a in (call.x, call.dy, call.addend, call.shortcut) if a is not None]
    dtypes = [array.dtype for array in arrays]
    if call.op == "forward":
        dtypes.append(call.norm.dtype)
    widest = max(dtype.itemsize for dtype in dtypes)
    cut = functools.partial(strips.resident, view, widest, kept, shared)
    loads = _loads(call, widest)
    configs = (cut(cluster=cluster, one_sample=one_sample, load=n) for n in loads)
    config = next(filter(None, configs), None)
    if config is None:
        return None
    size = f"{config.width * view.s * sum(kept) / KB:.0f} KB"
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
    view = call.view
    arrays = [call.x, call.dy, None if call.dy is None else call.shortcut]
    sizes = [array.dtype.itemsize for array in arrays if array is not None]
    load, *_ = _loads(call, max(sizes))
    configs = strips.in_two_reads(
        view, max(sizes), shared, arrays=len(sizes), load=load
    )
    if configs is None:
        return Fallback(
            f"{view.features} channels in groups of {view.k}: no strip of "
            f"{strips.SECTOR} bytes or more and {MAX_CHUNKS} loads or fewer divides "
            f"them, or a group takes more than {MAX_CHUNKS} loads or {shared:,} bytes "
            "of shared memory"
        )
    config, combine_config = (_at_once(call, config) for config in configs)
    launch: Any
    if call.op == "forward":
        launch = moments if call.half else forward_in_two_reads
    else:
        launch = sums if call.half else backward_in_two_reads
    if not call.wants["dx"]:
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
    run = functools.partial(launch, config, combine_config, call)
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
    - Fewer in float32 where two warpgroups would need more than 128 registers, too. The
      compiler loads all lines at once if one step and a rest of one are all there is:
      with more than 80 elements there are two steps. 96 x 96 x 320 has 80 registers
      instead of 130, the backward of 24 x 24 x 640 has 98 instead of 147. And a slope
      with loads of 16 bytes has two lines: 124 registers instead of 138 in the backward
      of SiLU on 24 x 24 x 1280.
    """
    at_once = config.at_once
    columns = sum(chunk.vector for chunk in config.chunks)
    arrays = 1 if call.op == "forward" else 2
    if call.slopes:
        at_once //= 2
    elif call.op == "forward" and config.resident == (call.x.dtype.itemsize == 4):
        at_once *= 2
    overlaps = config.pixels % (config.workers * config.line) > 0
    if config.resident and config.warpgroups > 1:
        if overlaps:
            at_once //= 2
        elif call.x.dtype.itemsize == 4:
            if call.slopes and config.chunks[0].vector == 4:
                at_once = 12
            elif config.lines * columns * arrays > 80:
                at_once = min(at_once, config.lines // 2 * columns)
    return dataclasses.replace(config, at_once=at_once)


def _bytes_moved(call: Call, config: Config) -> int:
    """Returns the bytes read from and written to device memory.

    They are those of tensors, parameters, statistics and partial sums.
    """
    samples, _, channels = _shape(call)
    size, x_size = call.x.size, call.x.dtype.itemsize
    wants_dx, wants_dshortcut = call.wants["dx"], call.wants["dshortcut"]
    reads = 1 if config.resident or call.sums_only else 2
    statistics = 4 * samples * call.view.g * (1 + call.norm.center)
    params = [p for p in (call.scale, call.bias) if p is not None]
    moved = sum(param.size * param.dtype.itemsize for param in params)
    if call.dy is None:
        values = 1 + call.norm.center
        moved += size * reads * x_size
        moved += 0 if call.half else size * call.norm.dtype.itemsize
        moved += statistics * call.statistics
    else:
        values = len(_sums_taken(call))
        moved += size * reads * (x_size + call.dy.dtype.itemsize)
        moved += size * x_size * (wants_dx and not call.half)
        # For `call.half` the kernel writes c1 and c2, from which XLA makes dx.
        moved += statistics * (1 + (call.half and wants_dx))
        if call.addend is not None:
            moved += size * call.addend.dtype.itemsize
        examples = math.prod(call.x.shape[: call.own_params])
        rows = samples if samples == examples else 2 * samples + examples
        moved += 4 * channels * len(call.summed) * rows
    if call.shortcut is not None:
        # XLA computes dz again if the kernel did not write it.
        dz_again = call.dy is not None and not (
            wants_dshortcut and call.dy_kept == call.dy.dtype
        )
        moved += size * call.shortcut.dtype.itemsize * (reads if dz_again else 1)
        moved += size * call.shortcut.dtype.itemsize * wants_dshortcut
    if config.blocks > 1 or not config.resident:  # written and read
        moved += 2 * values * 4 * samples * channels * config.blocks
    return moved
