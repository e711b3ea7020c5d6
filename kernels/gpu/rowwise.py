"""LayerNorm and RMSNorm over contiguous rows, on Pallas Mosaic GPU.

    forward   y = act(z),  z = (x - mean) * rstd * scale + bias
    backward  dx = rstd * (w - mean(w) - x_hat * mean(w * x_hat)),  w = dz * scale
              dscale = sum(dz * x_hat),  dbias = sum(dz)            over rows
              dz = dy * act'(z)

Each direction is one kernel that reads x (and dy, and every other array of x's size)
once: a row stays in registers from its first sum to its last store. The number of
threads that share a row depends on its length; tiles.py has the details:

    short   2 to 32 lanes of a warp; sums are shuffles, without a barrier
    long    1 to 4 warpgroups of a block; the sums of their warps meet in shared memory
    longer  the blocks of a cluster; their sums meet in device memory

The variations of a call:

    residual  h = x + residual is normalized instead of x, and dx = (as above) + dh,
              where dh is the cotangent of h.
    shortcut  It is added to z; its gradient is dz.
    examples  Each *example*, a set of rows, has its own scale and bias. Its rows are
              consecutive; or, where each row consists of G groups that are normalized
              separately (the heads of a QK-norm, each with a scale of its own), an
              example is one group, whose rows are G apart.
    own scale Each row has its own scale. It is read like x, and its gradient
              dz * x_hat is written like dx.
    half      Each row lies on several devices (`Call.half`). The kernels compute the
              statistics, or the sums that dx needs, of the local part. The elementwise
              rest is left to XLA, which reads x a second time.

Results are bitwise the same in any batch: a row's lanes, chunks and the order of its
sums depend on the features, the dtypes, what is asked for and the GPU's shared memory,
never on the number of rows. The number of
blocks over which dscale and dbias are summed does depend on the number of rows, and of
examples.

Sources: layer normalization, Ba et al. 2016 (arXiv:1607.06450); RMS normalization,
Zhang and Sennrich 2019 (arXiv:1910.07467); the corrected two-pass variance, Chan, Golub
and LeVeque 1983.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from fusednorm.kernels.activation import activate, times_slope
from fusednorm.kernels.dispatch import Call, Fallback, Kernel, present
from fusednorm.kernels.geometry import LONGEST_ROW, power_of_two
from fusednorm.kernels.gpu import memory, tiles
from fusednorm.kernels.gpu.memory import WARPS
from fusednorm.kernels.gpu.tiles import (
    Config,
    Examples,
    Part,
    Row,
    Share,
    Totals,
    Values,
    across,
)
from fusednorm.reference import Norm

# References to the operands and results of a kernel, by name. Their shapes:
#   x, dy, dh, residual, shortcut, y, h, dx, dshortcut   (rows, features)
#   mean, var, c1, c2                                    (rows,)
#   scale, bias     (features,), or (n, features) if each of n serves an equal number of
#                   consecutive examples
#   dscale, dbias   (blocks, features): partial sums of each block
# A scale of each row, and its dscale, have x's shape. Groups that lie side by side are
# (rows of a group, groups * features), and their statistics (rows of a group, groups).
Refs = dict[str, Any]

# --- forward --------------------------------------------------------------------------


def _forward_kernel(
    call: Call, examples: Examples, blocks: int, ref: Refs, part: Part
) -> None:
    """Computes those of y, h, mean and var that have a reference, for a tile of rows.

    An example has `blocks` blocks. The last one also takes the ragged rows, in a tile
    that overlaps its own.
    """
    norm, rows, tile = call.norm, examples.rows, part.rows
    example, block = examples.of_program(blocks)

    def step(i: Any, _: None) -> None:
        row = examples.row(example, jnp.minimum((block + i) * tile, rows - tile))
        x = part.load(ref["x"], row).float32()
        # Needed last, loaded first: in flight while the sums are taken.
        streamed = {name: part.load(ref[name], row) for name in _streamed(call)}
        if "residual" in ref:
            h = x + part.load(ref["residual"], row).float32()
            h = h.astype(ref["h"].dtype)
            part.store(ref["h"], row, h)
            # Normalize the rounded sum, since that is what a backward will read.
            x = h.float32()
        centred, mean, var = _statistics(norm, part, row, x)
        rstd = lax.rsqrt(var + norm.epsilon)

        def param(name: str, number: int) -> jax.Array:
            if name in streamed:
                return streamed[name][number].astype(jnp.float32)
            chunk = part.config.chunks[number]
            return part.load_param(ref[name], chunk, example, examples.count)

        # Chunk by chunk, so that a chunk's registers are free once it is stored.
        chunks = part.config.chunks if "y" in ref else ()
        for number, chunk in enumerate(chunks):
            z = centred[number] * across(rstd, centred[number])  # x_hat
            if "scale" in ref:
                z = z * norm.weight(param("scale", number))
            for name in ("bias", "shortcut"):
                if name in ref:
                    z = z + param(name, number)
            part.store_chunk(ref["y"], row, chunk, activate(norm.activation, z))
        for name, statistic in (("mean", mean), ("var", var)):
            if name in ref and statistic is not None:
                part.store_statistic(ref[name], row, statistic)

    if rows % tile == 0:
        step(0, None)
    else:
        lax.fori_loop(0, jnp.where(block == blocks - 1, 2, 1), step, None)


def _statistics(
    norm: Norm, part: Part, row: Row, x: Values
) -> tuple[Values, jax.Array | None, jax.Array]:
    """Returns x - mean, the mean and var of each row; x, None and mean(x^2) uncentred.

    The mean is corrected by the mean of the centred row, which makes it right to the
    last bit but one: x_hat keeps its digits even at mean/std of 5000.
    """
    features = part.config.features
    if not norm.center:
        (m2,) = part.sums(part.squares(x), row=row, place=0)
        return x, None, m2 / features
    (total,) = part.sums(x, row=row, place=0)
    mean = total / features
    centred = x - mean
    squares = part.squares(centred)
    left, m2 = part.sums(centred, squares, row=row, place=1)
    left = left / features
    centred = centred - left
    mean = mean + left
    # Rounding can make var negative: a constant row of 1e18 leaves 1e11.
    var = jnp.maximum(m2 / features - left * left, 0.0)
    return centred, mean, var


def forward(
    config: Config,
    call: Call,
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    residual: jax.Array | None = None,
    shortcut: jax.Array | None = None,
) -> list[jax.Array]:
    """Computes y, and h if there is a residual, in one read of x.

    With `call.statistics` it also returns mean (if centred) and var. With `call.half`
    it returns everything but y.

    Bytes: x and y once each, and the residual, h, the shortcut and a scale of each row
    where there are any. Other scales and biases are read once per tile, from the
    caches. 4 bytes per statistic. A cluster also writes a sector of 32 bytes per row
    for each sum (LayerNorm has three, RMSNorm one), and its blocks read it from the L2
    cache.

    Each block works on one tile and is small, rather than persistent: the next tile's
    loads come from the next block, and an uneven tail of the grid costs one small
    block.

    A lane holds 17 to 160 columns (`tiles.columns_of_long`). By the registers of the
    compiled code, this leaves 36 KB (96 features, bfloat16) to 224 KB of loads in
    flight per multiprocessor, in at least two blocks up to 20480 features. Bandwidth
    times latency asks for 5 KB (H100: 3.35 TB/s / 2 * 375 ns / 132; half of the traffic
    is loads) to 7 KB (H200). But 375 ns is the latency of an idle H100 (Jarmusch et al.
    2025, arXiv:2507.10789), and a block spends at most half of its time loading. On an
    H200, relative to a copy: 2.2 times as long with 24 KB in one block per SM (12288
    features on 4 warpgroups), 1.14 times with 42 KB in three blocks (7168 features),
    and at most 1.07 times with 56 KB or more in five to nine blocks.
    """
    norm, features = call.norm, config.features
    examples = Examples.of(call, features)
    tile = min(config.rows, power_of_two(examples.rows))
    blocks = examples.rows // tile  # of an example

    operands: dict[str, Any] = {"x": x, "scale": scale, "bias": bias}
    operands |= {"residual": residual, "shortcut": shortcut}
    inputs = examples.by_rows(features, **operands)
    shape = inputs["x"].shape
    outputs = {
        name: jax.ShapeDtypeStruct(shape, dtype)
        for name, dtype in _written(call).items()
    }
    if call.statistics:
        statistic = jax.ShapeDtypeStruct(examples.statistic_shape, jnp.float32)
        outputs |= {"mean": statistic} if norm.center else {}
        outputs |= {"var": statistic}
    results = _launch(
        "fusednorm_rowwise_forward",
        functools.partial(_forward_kernel, call, examples, blocks),
        config,
        tile=tile,
        blocks=examples.count * blocks,
        inputs=inputs,
        outputs=outputs,
        places=3,
    )
    shapes = {"y": x.shape, "h": x.shape}
    statistic_shape = norm.statistic_shape(x.shape)
    return [r.reshape(shapes.get(name, statistic_shape)) for name, r in results.items()]


# --- backward -------------------------------------------------------------------------


def _backward_kernel(
    call: Call,
    examples: Examples,
    blocks: int,
    ref: Refs,
    part: Part,
    *,
    levels: dict[str, bool],
    keeps_scale: bool,
    ahead: bool,
) -> None:
    """Computes those of dx, dscale, dbias, dshortcut, c1 and c2 that have a reference,
    for every `blocks`-th tile of an example.

    `levels` says where `Totals` accumulates dscale and dbias, `keeps_scale` whether the
    example's scale is kept in shared memory, and `ahead` whether the next tile is
    loaded while one is computed.
    """
    norm, rows, tile = call.norm, examples.rows, part.rows
    whole_tiles = rows // tile
    example, block = examples.of_program(blocks)
    loaded_first = ("dy", "x", *_streamed(call))
    sums_over_rows = Totals(part, call.summed, **levels)

    def params(name: str) -> Values:
        return part.load_params(ref[name], example, examples.count)

    example_scale: Any = 1.0
    if "scale" in ref and not call.scales_each:
        example_scale = norm.weight(params("scale"))
    if keeps_scale:
        part.keep("scale", example_scale)

    def scale_of(loaded: dict[str, Any]) -> Any:
        if call.scales_each:
            return norm.weight(loaded["scale"].float32())
        return part.kept("scale") if keeps_scale else example_scale

    def first_row(i: Any) -> tuple[Any, Any]:
        """Returns the first row of the block's tile i, and the first row that no
        earlier tile has."""
        unseen = jnp.minimum(block + i * blocks, whole_tiles) * tile
        return jnp.minimum(unseen, rows - tile), unseen

    def load(i: Any) -> dict[str, Any]:
        row = examples.row(example, first_row(i)[0])
        return {name: part.load(ref[name], row) for name in loaded_first}

    def load_statistics(i: Any) -> dict[str, Any]:
        row = examples.row(example, first_row(i)[0])
        names = [name for name in ("mean", "var") if name in ref]
        return {name: part.load_statistic(ref[name], row) for name in names}

    def step(i: Any, totals: Any, loaded: dict[str, Any]) -> Any:
        """Works on the block's tile i."""
        first, unseen = first_row(i)
        row = examples.row(example, first)

        dz, x_hat = loaded["dy"].float32(), loaded["x"].float32()
        rstd = lax.rsqrt(loaded["var"] + norm.epsilon)
        if norm.center:
            x_hat = x_hat - loaded["mean"]
        x_hat = x_hat * rstd
        scale = scale_of(loaded)
        if norm.activation is not None:
            z = x_hat * scale
            if "bias" in ref:
                z = z + params("bias")
            if "shortcut" in ref:
                z = z + loaded["shortcut"].float32()
            dz = z.map(functools.partial(times_slope, norm.activation), dz)

        terms = {"dscale": dz * x_hat, "dbias": dz, "dshortcut": dz}
        for name in ("dscale", "dshortcut"):
            if name in ref and name not in call.summed:
                part.store(ref[name], row, terms[name])
        if rows % tile:  # the ragged tile has rows that were counted before
            # Only for sums: Mosaic finds no layout for an index that nobody reads.
            for name in call.summed:
                terms[name] = part.rows_from(unseen - first, terms[name])
        totals = sums_over_rows.add(totals, terms)
        if call.wants["dx"]:
            # Tiles alternate between two places for their sums, because a warp may
            # still be reading those of the tile before.
            place = 2 * lax.rem(i, 2)
            _store_dx(norm, ref, part, row, place, dz, scale, x_hat, rstd)
        return totals

    # This block has tiles block, block + blocks, ...; the ragged tile goes to the block
    # of the last whole tile, which it overlaps.
    count = lax.div(whole_tiles - block + blocks - 1, blocks)
    if rows % tile:
        count = count + (block == (whole_tiles - 1) % blocks)

    totals = sums_over_rows.over_tiles(count, load, load_statistics, step, ahead=ahead)
    line = example * blocks + block
    for name, total in totals.items():
        part.store_total(ref[name], line, total)


def _store_dx(
    norm: Norm,
    ref: Refs,
    part: Part,
    row: Row,
    place: Any,
    dz: Values,
    scale: Any,
    x_hat: Values,
    rstd: Any,
) -> None:
    """Stores dx of a tile, or c1 and c2 of its rows; its sums meet at `place`."""
    # In flight while the sums are taken.
    dh = part.load(ref["dh"], row) if "dh" in ref else None
    w = dz * scale
    terms = (w * x_hat, w) if norm.center else (w * x_hat,)
    sums = part.sums(*terms, row=row, place=place)
    products = [total / part.config.features for total in sums]
    c1, c2 = products[0], products[1] if norm.center else None
    for name, product in zip(("c1", "c2"), products, strict=False):
        if name in ref:
            part.store_statistic(ref[name], row, product)
    if "dx" not in ref:
        return
    # Chunk by chunk, so that a chunk's registers are free once it is stored.
    for number, chunk in enumerate(part.config.chunks):
        dx = w[number] - x_hat[number] * across(c1, w[number])
        if c2 is not None:
            dx = dx - across(c2, dx)
        dx = dx * across(rstd, dx)
        if dh is not None:
            dx = dx + dh[number].astype(jnp.float32)
        part.store_chunk(ref["dx"], row, chunk, dx)


def backward(
    config: Config,
    work: Share,
    call: Call,
    processors: int,
    dy: jax.Array,
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    mean: jax.Array | None,
    var: jax.Array,
    dh: jax.Array | None = None,
    shortcut: jax.Array | None = None,
) -> list[jax.Array]:
    """Computes the gradients that `call.wanted` names in one read of x and dy.

    Returns those of dx, dscale, dbias and dshortcut that are wanted, in this order.
    With `call.half`, c1 and c2 (if centred) take the place of dx.

    Bytes: x, dy and dx once each, and dh, the shortcut, a scale of each row and the
    gradients of the latter two where there are any. 4 bytes per statistic. For each of
    dscale and dbias that is summed over rows, 8 * features per block, with as many
    blocks as are resident (`tiles.grid`). A cluster also writes 32 bytes per row for
    each of two sums (RMSNorm: one).

    A block is persistent: it works on every `blocks`-th tile and accumulates the dscale
    and dbias of its rows in registers, 1 to 32 columns per lane, or in shared memory
    for long rows (`tiles.share`). After every `tiles.IN_A_ROW` tiles the accumulators
    move to a second level in shared memory. XLA sums over blocks in one more small
    kernel, in a fixed order. There are no atomics.

    Loads in flight are 10 KB (1128 features, bfloat16) to 128 KB per multiprocessor;
    bandwidth times latency asks for 6 KB (H100) to 9 KB (H200), as in `forward`.
    """
    norm, features = call.norm, config.features
    examples = Examples.of(call, features)
    tile, whole_tiles, blocks = tiles.grid(
        config, examples.rows, examples.count, processors, work.threads
    )
    wants, summed = call.wants, call.summed

    operands: dict[str, Any] = {"dy": dy, "x": x, "scale": scale, "bias": bias}
    operands |= {"dh": dh, "shortcut": shortcut}
    inputs = examples.by_rows(features, **operands)
    inputs |= {
        name: statistic.reshape(examples.statistic_shape)
        for name, statistic in present(mean=mean, var=var).items()
    }
    partials = jax.ShapeDtypeStruct((examples.count * blocks, features), jnp.float32)
    inner_products = ("c1", "c2")[: 1 + norm.center]
    if not (wants["dx"] and call.half):
        inner_products = ()
    statistic = jax.ShapeDtypeStruct(examples.statistic_shape, jnp.float32)
    outputs = dict.fromkeys(inner_products, statistic) | dict.fromkeys(summed, partials)
    for name, dtype in _written(call).items():
        outputs[name] = jax.ShapeDtypeStruct(inputs["x"].shape, dtype)
    # Accumulators in registers leave less room for the next tile.
    accumulators = 0 if work.smem else config.registers(tile, 4) * len(summed)
    sizes = [inputs[name].dtype.itemsize for name in ("dy", "x", *_streamed(call))]
    next_tile = sum(config.registers(tile, size) for size in sizes)
    levels = {
        "in_smem": work.smem > 0,
        "twice": tiles.sums_twice(whole_tiles, blocks),
    }
    kept = Totals.scratch_names(summed, **levels)
    if scale is not None and not call.scales_each:
        size = (len(kept) + 1) * config.kept_bytes(tile)
        kept = (*kept, "scale") if size <= work.smem else kept
    kernel = functools.partial(
        _backward_kernel,
        call,
        examples,
        blocks,
        levels=levels,
        keeps_scale="scale" in kept,
        ahead=accumulators + next_tile <= work.ahead,
    )
    results = _launch(
        "fusednorm_rowwise_backward",
        kernel,
        config,
        tile=tile,
        blocks=examples.count * blocks,
        inputs=inputs,
        outputs=outputs,
        places=4,
        kept=kept,
    )
    results |= memory.sum_partials(call, results)
    shapes = dict.fromkeys(("dx", "dscale", "dshortcut"), x.shape)
    shapes |= dict.fromkeys(inner_products, var.shape)
    shapes |= {name: results[name].shape for name in summed}
    order = (*inner_products, *(name for name in wants if name in results))
    return [results[name].reshape(shapes[name]) for name in order]


# --- both -----------------------------------------------------------------------------


def _streamed(call: Call) -> tuple[str, ...]:
    """Returns the operands of x's size, besides x, that z is computed from."""
    scale = ("scale",) if call.scales_each else ()
    return scale if call.shortcut is None else (*scale, "shortcut")


def _launch(
    name: str,
    kernel: Callable[[Refs, Part], None],
    config: Config,
    *,
    tile: int,
    blocks: int,
    inputs: dict[str, jax.Array],
    outputs: dict[str, jax.ShapeDtypeStruct],
    places: int,
    kept: Sequence[str] = (),
) -> dict[str, jax.Array]:
    """Runs kernel(references by name, part) on every part of every block.

    Args:
      name: name of the kernel.
      kernel: the code of one warpgroup.
      config: how rows are divided.
      tile: rows of a tile.
      blocks: blocks of the grid, or clusters.
      inputs, outputs: the operands and the shapes of the results, by name.
      places: slots in which the sums of a long row meet.
      kept: names of the buffers of a tile's size in shared memory.
    """
    scratch: dict[str, Any] = {
        f"{name}_{i}": plgpu.SMEM(
            (config.warpgroups, *config.shape(chunk, tile)), jnp.float32
        )
        for name in kept
        for i, chunk in enumerate(config.chunks)
    }
    mesh: dict[str, Any] = {}
    outputs = dict(outputs)
    if config.warpgroups > 1:
        mesh |= {"num_threads": config.warpgroups, "thread_name": "warpgroup"}
    if config.long:
        scratch["sums"] = plgpu.SMEM((places, config.warpgroups * WARPS), jnp.float32)
        scratch["in_block"] = plgpu.Barrier(num_arrivals=config.warpgroups)
    if config.cluster > 1:
        mesh |= {"cluster": (config.cluster,), "cluster_names": ("cluster",)}
        scratch["in_cluster"] = plgpu.ClusterBarrier(
            collective_axes=("cluster",), num_arrivals=config.warpgroups
        )
        # The blocks of a cluster exchange the sums between two fences (`Part.sums`),
        # which also empty the first-level cache: no block reads a stale line. That each
        # sum of each row has a 128-byte line of its own keeps clusters apart.
        rows = inputs["x"].size // config.features
        outputs["sums"] = jax.ShapeDtypeStruct((rows, places, 32), jnp.float32)

    def body(*refs: Any, **scratch: Any) -> None:
        ref = dict(zip([*inputs, *outputs], refs, strict=True))
        kernel(ref, Part(config, tile, scratch | {"of_blocks": ref.get("sums")}))

    body.__name__ = name
    run = plgpu.kernel(
        body,
        out_type=list(outputs.values()),
        scratch_types=scratch,
        grid=(blocks,),
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(
            # Sums over the warps of a warpgroup (dscale and dbias of short rows) go
            # through this scratch. Mosaic shares it between the warpgroups of a block,
            # so the sums of long rows use buffers of our own.
            reduction_scratch_bytes=0 if config.long else 2048,
            # `sums` are read behind a barrier. From everything else a lane reads only
            # what it wrote itself.
            unsafe_no_auto_barriers=True,
        ),
        **memory.cost([*inputs.values(), *outputs.values()]),
        **mesh,
    )
    results = dict(zip(outputs, run(*inputs.values()), strict=True))
    results.pop("sums", None)
    return results


# --- which calls they take ------------------------------------------------------------


def plan(call: Call, processors: int, smem: int) -> Kernel | Fallback:
    """Chooses the kernel for one rowwise call, or says why there is none.

    Args:
      call: a call of geometry x[N, 1, G, K].
      processors: multiprocessors of the GPU.
      smem: bytes of shared memory of a block.
    """
    features = call.view.k
    if features == 1:
        return Fallback("rows of one feature")
    if features > LONGEST_ROW:
        return Fallback(f"{features} features; kernels take at most {LONGEST_ROW}")
    read = _sizes_read(call)
    partials = 0
    if call.op == "forward":
        config = tiles.configure(
            features,
            # y's dtype counts even where XLA makes y: the statistics are the same.
            max(*read, *_sizes(_written(call)), call.norm.dtype.itemsize),
            per_lane=32,
            of_long=tiles.columns_of_long(
                features, len(read) - 1, len(_streamed(call))
            ),
            in_warp=2048,
            fill=True,
        )
        launch = functools.partial(forward, config, call)
    else:
        work, config = tiles.share_out(
            features,
            max(read),
            center=call.norm.center or call.wants["dbias"],
            slopes=call.slopes,
            beside=len(read) > 2,
            own=not call.scales_each and (call.param_axes > 0 or call.row_groups > 1),
            smem=smem,
        )
        launch = functools.partial(backward, config, work, call, processors)
        examples = Examples.of(call, features)
        *_, blocks = tiles.grid(
            config, examples.rows, examples.count, processors, work.threads
        )
        partials = examples.count * blocks
    return Kernel(
        backend="mosaic_gpu",
        name=f"rowwise {call.op}{call.half_name}",
        launch=launch,
        block=str(config),
        why=config.why,
        bytes_moved=_bytes_moved(call, features, partials),
    )


def _bytes_moved(call: Call, features: int, partials: int) -> int:
    """Returns the bytes read from and written to device memory.

    Args:
      call: the call.
      features: length of a row.
      partials: rows of partial sums that a backward writes for dscale, and for dbias.
    """
    moved = call.x.size * sum([*_sizes_read(call), *_sizes(_written(call))])
    statistics = 4 * (call.x.size // features) * (1 + call.norm.center)
    if call.op == "forward":
        moved += statistics * call.statistics
    else:
        writes_c1_c2 = call.half and call.wants["dx"]
        moved += statistics * (1 + writes_c1_c2)
        # Partial sums are written and read; their sum is written.
        totals = call.row_groups * math.prod(call.x.shape[: call.own_params])
        moved += 4 * features * len(call.summed) * (2 * partials + totals)
    params = [call.bias] if call.scales_each else [call.scale, call.bias]
    return moved + sum(p.size * p.dtype.itemsize for p in params if p is not None)


def _sizes_read(call: Call) -> list[int]:
    """Returns the bytes per element of each array of x's size that is read."""
    arrays = [call.x, call.dy, call.addend]
    arrays += [getattr(call, name) for name in _streamed(call)]
    return [array.dtype.itemsize for array in arrays if array is not None]


def _written(call: Call) -> dict[str, jnp.dtype]:
    """Returns the dtypes of the results of x's size that the kernel writes, by name."""
    if call.op == "forward":
        written = {} if call.half else {"y": call.norm.dtype}
        return written | ({} if call.addend is None else {"h": call.sum_dtype})
    elementwise = [name for name in call.wants if name not in call.summed]
    return {
        name: getattr(call, name.removeprefix("d")).dtype
        for name in elementwise
        if call.wants[name] and not (name == "dx" and call.half)
    }


def _sizes(dtypes: dict[str, jnp.dtype]) -> list[int]:
    return [dtype.itemsize for dtype in dtypes.values()]
