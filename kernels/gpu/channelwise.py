"""GroupNorm, InstanceNorm and BatchNorm, channels last, on Pallas Mosaic GPU.

On the view x[N, S, G, K] (samples, pixels, groups, channels of a group), with sums over
the pixels and channels of one group of one sample:

    forward   y = act(z),  z = (x - mean) * rstd * scale + bias
    backward  dx = rstd * (w - mean(w) - x_hat * mean(w * x_hat)),  w = dz * scale
              dscale = sum(dz * x_hat),  dbias = sum(dz)         over pixels and samples
              dz = dy * act'(z)

A shortcut, of x's shape, is added to z, and its gradient is dz. Scale and bias may be
those of a sample.

A sample is cut into *strips* of channels, and a strip's pixels into blocks, so that all
multiprocessors have work whatever N and G are. Sums run down the pixels, channel by
channel; the channels of a group come together last. There are two variants:

    resident   The blocks of a strip are a cluster, and keep its pixels in shared memory
               from the first sum to the last store: x (and dy) is read once. Several
               blocks share a multiprocessor, so that one loads while another one waits
               for its cluster or stores.
    two reads  `moments` reads x, and `combine` makes one mean and variance a group of
               what its blocks found. The normalization is left to XLA, which fuses it
               with what follows: it is elementwise, and a kernel could only tie. The
               backward does likewise. Blocks take the tensor from its end, so that its
               beginning, which XLA reads first, is what the L2 cache still holds.

What a sample's result is made of (strips, blocks, the order of every sum) follows from
S, G, K and the dtypes alone, never from N: results are bitwise the same in any batch.
Counts, means and centred squares of parts are merged by Chan's formula, in a fixed
order, without atomics.

Where statistics cross devices (`Call.half`) it is two reads, of which the kernels
do the first.

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

# Count, mean and sum of squares about it of some pixels; without centring the mean is
# None, and the squares are about 0.
Moments = tuple[Any, Any, Any]


def _seen(
    part: Part, center: bool, lines: Sequence[Any], values: Sequence[Columns]
) -> Moments:
    """Of some lines, place by place in them: what each lane has seen."""
    count = strips.add(part.counted(line) for line in lines)
    if not center:
        squares = [v * v for v in values]
        return count, None, strips.add(map(part.once, lines, squares))
    mean = strips.add(map(part.once, lines, values)) / _at_least_1(count)
    squares = [(v - mean) * (v - mean) for v in values]
    return count, mean, strips.add(map(part.once, lines, squares))


def _all_seen(part: Part, center: bool, x: Any, *, keep: bool) -> Moments:
    """Of all of a warpgroup's lines, place by place: one read of x."""

    def tile(lines: Sequence[Any]) -> Moments:
        xs = [part.load(x, line) for line in lines]
        if keep:
            for line, loaded in zip(lines, xs, strict=True):
                part.keep("x", line, loaded)
        return _seen(part, center, lines, [loaded.float32() for loaded in xs])

    def step(lines: Sequence[Any], seen: Moments) -> Moments:
        before = _float(lines[0])  # whole lines, each of which counts once
        return None, *_merge((before, *seen[1:]), tile(lines))[1:]

    def last(lines: Sequence[int], seen: Moments) -> Moments:
        before = float(lines[0]) if seen[0] is None else seen[0]
        return _merge((before, *seen[1:]), tile(lines))

    start = (None, part.zeros() if center else None, part.zeros())
    count, mean, m2 = part.over_lines(step, start, last)
    return float(part.config.lines) if count is None else count, mean, m2


def _merge(a: Moments, b: Moments) -> Moments:
    """Of both together (Chan et al. 1983, eq. 2.1); a count may be 0."""
    (n_a, mean_a, m2_a), (n_b, mean_b, m2_b) = a, b
    n = n_a + n_b
    if mean_a is None:
        return n, None, m2_a + m2_b
    share = n_b / _at_least_1(n)
    apart = mean_b - mean_a
    return n, mean_a + apart * share, m2_a + m2_b + apart * apart * (n_a * share)


def _of_block(
    part: Part, pixels: Any, seen: Moments, to: Part | None = None
) -> list[Columns]:
    """[mean, m2] or [m2] of the block's pixels, channel by channel.

    Args:
      part: which saw them.
      pixels: how many they are.
      seen: what its lanes saw.
      to: the part whose lines the results are to meet, if another one.
    """
    to = to or part
    count, mean, m2 = seen
    if mean is None:
        return [to.total(sums) for sums in part.add_up(m2)]
    (total,) = part.add_up(mean * count)
    apart = mean - part.total(total) / pixels
    (squares,) = part.add_up(m2 + apart * apart * count)
    return [to.total(total) / pixels, to.total(squares)]


def _of_blocks(
    part: Part, config: Config, partials: Any, to: Part | None = None
) -> list[Columns]:
    """[mean, m2] or [m2] of all blocks' pixels, channel by channel.

    Args:
      part: the blocks, which are its pixels.
      config: how the pixels are cut into blocks.
      partials: (samples, blocks, 2 or 1, channels), what `_of_block` returned on each.
      to: as for `_of_block`.
    """

    def line_of(line: int) -> Moments:
        pixels = part.index(line).map(lambda block: _float(config.count(block)))
        *mean, m2 = (
            part.load(partials, line, i).float32() for i in range(partials.shape[2])
        )
        count, m2 = part.once(line, pixels), part.once(line, m2)
        return count, mean[0] if mean else None, m2

    seen = functools.reduce(_merge, map(line_of, range(part.config.lines)))
    return _of_block(part, float(config.pixels), seen, to)


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
    """The formula by which the moments of channels become mean and rstd of groups.

    It writes mean and var to the references of these names, if there are such.
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
    """y, and with `call.statistics` mean (if centred) and var: resident, one read of x.

    Bytes: x and y, once each, and the shortcut; scale and bias once a warpgroup, from
    the caches; 4 bytes a statistic. For a cluster of b blocks of w warpgroups 8 * (b +
    w * b * b) bytes a channel of each sample more (without centring half of it), almost
    all of them reads that hit the L2 cache.
    """
    norm = call.norm
    inputs = _inputs(call, x=x, shortcut=shortcut, scale=scale, bias=bias)
    outputs = {"y": jax.ShapeDtypeStruct(_shape(call), norm.dtype)}
    if call.statistics:
        outputs |= _moments(call)

    def body(ref: dict[str, Any], part: Part) -> None:
        seen = _all_seen(part, norm.center, ref["x"], keep=True)
        found = _of_block(part, _float(part.pixels), seen)
        if config.blocks > 1:
            blocks = part.exchange(found)
            found = _of_blocks(blocks, config, ref["partials"], to=part)
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
    """y, and with `call.statistics` mean (if centred) and var: x is read twice.

    Bytes: x once for the moments; once more, and the shortcut and y, in XLA's code.
    """
    *mean, var = moments(config, last, call, x)
    mean_or_none = mean[0] if mean else None
    y = reference.apply(call.norm, x, mean_or_none, var, scale, bias, shortcut)
    return [y, *mean, var] if call.statistics else [y]


def moments(
    config: Config, last: Config, call: Call, x: jax.Array, *others: None
) -> list[jax.Array]:
    """mean (if centred) and var, in the statistics' shape: one read of x.

    Bytes: x; 4 bytes a statistic; 8 a channel for each block, written and read.
    """
    norm = call.norm
    samples, _, channels = _shape(call)
    names = ("mean", "m2") if norm.center else ("m2",)
    partials = jax.ShapeDtypeStruct(
        (samples, config.blocks, len(names), channels), jnp.float32
    )

    def body(ref: dict[str, Any], part: Part) -> None:
        seen = _all_seen(part, norm.center, ref["x"], keep=False)
        for i, value in enumerate(_of_block(part, _float(part.pixels), seen)):
            part.store_channels(ref["partials"], value, part.sample, part.block, i)

    found = _launch(
        "fusednorm_channelwise_moments",
        body,
        config,
        inputs={"x": x.reshape(_shape(call))},
        outputs={"partials": partials},
    )

    def combine(ref: dict[str, Any], part: Part) -> None:
        values = _of_blocks(part, config, ref["partials"])
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
    """Those of dx, dscale, dbias and dshortcut that `call.wanted` names: resident, one
    read of x and dy.

    With a shortcut dz is kept, in the place of dy: to find it again would take another
    read of the shortcut. Slopes of ReLU that the forward kept, a bit each, would spare
    the first read too, one of five; but Pallas has no operation that packs bits.

    Bytes: x, dy and dx, once each, and dh, the shortcut and its gradient; 4 bytes a
    statistic; for dscale and dbias each 4 a channel of each sample, which XLA adds up.
    For a cluster of b blocks of w warpgroups 8 * (b + w * b * b) bytes a channel of
    each sample more, almost all of them from the L2 cache.
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
        seen = _gradients_seen(part, names, ref, mean, dz, keep=True)
        found = [part.total(sums) for sums in part.add_up(*seen)]
        if config.blocks > 1:
            blocks = part.exchange(found)
            found = _sums_of_blocks(blocks, ref["partials"], to=part)
        terms = _store_gradients(norm, part, names, ref, rstd, found)
        c1, *c2 = part.by_group(_inner_products(config, ref), *terms)
        # dx = rstd * (w - c2 - x_hat * c1), of what each channel has multiplied out.
        factor = rstd * _weight(norm, part, ref)
        of_centred = rstd * rstd * c1
        constant = [rstd * each for each in c2]

        def store_dx(lines: Sequence[Any], _: None) -> None:
            dhs = [part.load(ref["dh"], line) for line in lines if "dh" in ref]
            for i, line in enumerate(lines):
                centred = part.kept("x", line)
                if norm.center:
                    centred = centred - mean[0]
                kept = part.kept("dy", line)  # dz, with a shortcut
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
    """Those of dx, dscale, dbias and dshortcut that `call.wanted` names: x and dy are
    read twice.

    Bytes: x and dy for their sums, 8 a channel for each block, written and read; for
    dx both once more, dh, and dx, in XLA's code. With a shortcut that and its gradient
    dz, which then serves for dx in the place of dy, if it loses nothing by rounding.
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
    """c1 and c2 (if centred) where dx is wanted, in the statistics' shape, and those of
    dscale and dbias that are wanted: one read of x and dy. See `gradient_sums`."""
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
    """One read of x and dy.

    Bytes: x and dy, the shortcut and dz; 8 a channel for each block, written and read.

    Returns:
      dscale, dbias: if wanted; of each sample, (samples, channels).
      c1, c2: mean(w * x_hat) and mean(w), if dx is wanted; in the statistics' shape.
      dz: if dshortcut is wanted, and dz is exact in dy's dtype; (samples, pixels,
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
        seen = _gradients_seen(part, names, ref, mean, dz, keep=False)
        for i, sums in enumerate(part.add_up(*seen)):
            at = (part.sample, part.block, i)
            part.store_channels(ref["partials"], part.total(sums), *at)

    taken = ["dy", "x", "shortcut", "mean"]
    taken += ["var", "scale", "bias"] if call.slopes else []

    def of_channels(name: str) -> jax.Array:
        if name in ("mean", "var") and view.k > 1:  # strips cut groups, too
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
    """The sums that the backward takes: for dx both, without centring the first."""
    both = call.wanted[2] or (call.wanted[0] and call.norm.center)
    return ("dscale", "dbias") if both else ("dscale",)


def _inputs(call: Call, **operands: jax.Array | None) -> dict[str, jax.Array]:
    """Those there are, as kernels see them: those of x's size, (samples, pixels,
    channels), first; statistics (samples, groups); scale and bias (channels,), or with
    one for so many samples behind another (n, channels)."""
    view = _view(call)

    def seen(name: str, array: jax.Array) -> jax.Array:
        if name in ("mean", "var"):
            return array.reshape(view.n, view.g)
        if name in ("scale", "bias"):
            return array if array.ndim == 1 else array.reshape(-1, view.features)
        return array.reshape(_shape(call))

    return {name: seen(name, array) for name, array in present(**operands).items()}


def _of_sample(part: Part, ref: Any) -> Columns:
    """Scale or bias of the part's sample, for the block's channels."""
    if len(ref.shape) == 1:
        return part.load_channels(ref)
    return part.load_channels(ref, lax.div(part.sample, part.samples // ref.shape[0]))


def _given_statistics(call: Call, ref: dict[str, Any]) -> Callable[..., list[Any]]:
    """The formula by which groups get mean (if centred) and rstd from the forward."""

    def formula(groups: Any) -> list[Any]:
        mean = [groups.load(ref["mean"])] if call.norm.center else []
        return [*mean, _rstd(groups.load(ref["var"]), call.norm.epsilon)]

    return formula


def _weight(norm: Norm, part: Part, ref: dict[str, Any]) -> Columns | float:
    """The scale of the block's channels, and 1 where there is none."""
    return norm.weight(_of_sample(part, ref["scale"])) if "scale" in ref else 1.0


def _before_activation(
    norm: Norm, part: Part, ref: dict[str, Any], rstd: Any
) -> Callable[..., Columns]:
    """The function of a line's dy and x - mean, and shortcut if there is one, that is
    dz = dy * act'(z)."""
    if norm.activation is None:
        return lambda dy, centred: dy
    factor = rstd * _weight(norm, part, ref)
    bias = _of_sample(part, ref["bias"]) if "bias" in ref else 0.0
    of_z = functools.partial(slope, norm.activation)

    def dz(dy: Columns, centred: Columns, *shortcut: Columns) -> Columns:
        return dy * strips.add([centred * factor + bias, *shortcut]).map(of_z)

    return dz


def _gradients_seen(
    part: Part,
    names: Sequence[str],
    ref: dict[str, Any],
    mean: Sequence[Columns],
    dz: Callable[..., Columns],
    *,
    keep: bool,
) -> list[Columns]:
    """What each lane adds to the sums of these names, place by place in its lines.

    dscale still lacks the factor rstd. `dz` is what `_before_activation` returned. With
    a shortcut it is stored as dshortcut, or dz, where there is such a reference, and
    kept in the place of dy.
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
        return [part.once(line, both[name]) for name in names]

    def step(lines: Sequence[Any], seen: list[Columns]) -> list[Columns]:
        loaded = [[part.load(ref[name], line) for name in streamed] for line in lines]
        if keep:
            for line, (dy, x, *shortcut) in zip(lines, loaded, strict=True):
                if not shortcut:
                    part.keep("dy", line, dy)
                part.keep("x", line, x)
        # Lines two by two, then these: sums of few round less than one of all.
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
    """Of what the blocks of a strip found; arguments as for `_of_blocks`."""
    sums = [
        strips.add(
            part.once(line, part.load(partials, line, i).float32())
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
    """Stores dscale and dbias of the sample where they are wanted.

    Returns:
      The terms of dx's inner products: both times scale.
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
    """The formula of c1 = mean(w * x_hat) and c2 = mean(w), w = dz * scale.

    It writes them to the references of these names, if there are such.
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
    """dx and dshortcut in x's shape, and the sums."""
    of_x = [
        results[name].reshape(call.x.shape)
        for name in ("dx", "dshortcut")
        if call.wants[name]
    ]
    first = int(call.wanted[0])
    return of_x[:first] + _over_samples(call, results) + of_x[first:]


def _over_samples(call: Call, results: dict[str, jax.Array]) -> list[jax.Array]:
    """Those of dscale and dbias that are wanted, over the samples of each example."""
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
    """x[N, S, G, K]."""
    view = call.geometry
    assert view is not None
    return view


def _shape(call: Call) -> tuple[int, int, int]:
    """Of x as the kernels see it: samples, pixels, channels."""
    view = _view(call)
    return view.n, view.s, view.features


def _statistics(call: Call, *names: str) -> dict[str, jax.ShapeDtypeStruct]:
    view = _view(call)
    shape = jax.ShapeDtypeStruct((view.n, view.g), jnp.float32)
    return dict.fromkeys(names, shape)


def _moments(call: Call) -> dict[str, jax.ShapeDtypeStruct]:
    """mean (if centred) and var."""
    return _statistics(call, *(("mean", "var") if call.norm.center else ("var",)))


def _of_each_sample(call: Call) -> jax.ShapeDtypeStruct:
    """Values of channels."""
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
      exchanged: values of a channel that the blocks of a cluster tell each other.
      kept: dtypes of what stays in shared memory, by name.
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
    first = next(iter(inputs.values()))  # an array of all samples and channels
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
        elif not config.resident:  # from the end: see the top
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
            # What other lanes wrote is read behind a barrier; of all else a lane reads
            # what it wrote itself.
            unsafe_no_auto_barriers=True,
            # Each load says how it lies on the lanes: nothing is to be inferred. The
            # other semantics search for it, in time that grows with the square of the
            # loads: the backward of a GroupNorm of 32 x 32 x 640 is lowered in 6.8 s
            # so, in 1.4 s by these, to the same PTX but for the order of some
            # instructions.
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
      call: one of geometry x[N, S, G, K], S > 1.
      shared: bytes of shared memory that a block may have.
    """
    if _view(call).features == 1:
        return Fallback("one channel")
    alone = 0 in call.norm.reduction_axes
    cluster = strips.MAX_CLUSTER
    if call.op == "backward" and not alone:
        cluster = 2  # larger ones gain nothing on two reads
    if call.wanted[0] and not call.half:
        kernel = _in_one_read(call, shared, cluster=cluster, alone=alone)
        if kernel is not None:
            return kernel
    # Or nothing of x's size is written, and there is no second read here.
    return _in_two_reads(call, shared, cluster)


def _in_one_read(
    call: Call, shared: int, *, cluster: int, alone: bool
) -> Kernel | None:
    """Whose pixels stay in shared memory; None where they do not fit."""
    view = _view(call)
    kept = call.kept_bytes
    arrays = [a for a in (call.x, call.dy, call.beside, call.shortcut) if a is not None]
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
    """Bytes of a lane's loads, at most: the first of these with which pixels fit.

    16 is the widest. In a backward each column of a lane has two sums and up to six
    values of its channel, and takes registers of which an SM's second block is short.
    Compiled for an H100: registers, blocks of an SM and their loads in flight, with 16
    and with 8 bytes. Not measured on a chip.

        16 x 16 x 1280, bfloat16              130, 1 of 30 KB     106, 2 of 15 KB
        32 x 32 x 640, bfloat16, and SiLU     160, 1 of 10 KB     127, 2 of 15 KB
        32 x 32 x 640, float32, and SiLU      134, 1 of 30 KB     109, 2 of 30 KB
        32 x 32 x 640, float32                127, 2 of 60 KB     128, 2 of 60 KB
        256 x 256 x 256, bfloat16              80, 3 of 32 KB      64, 4 of 32 KB
        256 x 256 x 256, bfloat16, and GELU   128, 2 of 16 KB      89, 2 of 16 KB

    Narrow loads may fill the end of a strip less well: 24 x 24 x 1280 in float32 fits
    with 16 bytes alone.
    """
    if call.op == "backward" and (itemsize == 2 or call.slopes):
        return 8, 16
    return (16,)


def _in_two_reads(call: Call, shared: int, cluster: int) -> Kernel | Fallback:
    """Of which the kernels do the first."""
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
        variant, why = ", sums", "sums alone are wanted: one read"
    elif call.half:
        variant = call.half_name
        why = "statistics cross devices: XLA normalizes, in a second read"
    else:
        variant = ", two reads"
        why = (
            f"a group's {view.s} pixels do not fit the shared memory of {cluster} "
            "blocks, two to a multiprocessor: two reads, the second one in XLA's code, "
            "which normalizes with what follows"
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
    """Twice as much at once where registers have room for it. On an H200, 160 MB: 64 x
    64 x 320 in float32 takes 114 us so, 121 otherwise, moments in bfloat16 38 to 46 and
    42 to 49; but 8 x 8 x 1280 in bfloat16 155 and 131. Half as much where a backward
    takes an activation's slope of it: silu's on 64 x 64 x 320 in bfloat16 would need
    136 registers, and has 123.

    Half of all that where two warpgroups mask what overlaps: more than 128 registers
    would be one block of an SM. 47 x 47 x 320 in float32 has 80, for 160 (compiled for
    an H100); backward of 23 x 48 x 80 in bfloat16 119, for 137."""
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
    """Of device memory: tensors, parameters, statistics and partial sums."""
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
        # Half of it writes c1 and c2, of which dx is made.
        moved += statistics * (1 + (call.half and call.wanted[0]))
        if call.beside is not None:
            moved += size * call.beside.dtype.itemsize
        examples = math.prod(call.x.shape[: call.own_params])
        rows = samples if samples == examples else 2 * samples + examples
        moved += 4 * channels * len(call.summed) * rows
    if call.shortcut is not None:
        # XLA finds dz again where the kernel did not write it.
        again = call.dy is not None and not (
            call.wanted[3] and call.dy_kept == call.dy.dtype
        )
        moved += size * call.shortcut.dtype.itemsize * (reads if again else 1)
        moved += size * call.shortcut.dtype.itemsize * call.wanted[3]
    if config.blocks > 1 or not config.resident:  # written and read
        moved += 2 * values * 4 * samples * channels * config.blocks
    return moved
