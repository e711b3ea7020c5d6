"""Tests of the byte counter, on kernels whose bytes are known. No kernel is run."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

from bench.aot.traffic import Operand, Traffic, Uncountable, kernels
from bench.aot.walk import volume

ROWS, FEATURES = 64, 256
X = jax.ShapeDtypeStruct((ROWS, FEATURES), jnp.bfloat16)
ROW = FEATURES * 2  # bytes


def on_gpu(
    kernel: Callable[..., None],
    *,
    out: Any = X,
    args: tuple[Any, ...] = (X,),
    grid: tuple[int, ...] = (4,),
    scratch: Any = (),
    **options: Any,
) -> Traffic:
    """Returns the traffic of one Mosaic GPU kernel."""

    def launch(*operands: Any) -> Any:
        return plgpu.kernel(
            kernel,
            out_type=out,
            grid=grid,
            grid_names=("block", "column")[: len(grid)],
            scratch_types=scratch,
            **options,
        )(*operands)

    (found,) = kernels(launch, *args)
    return found


def load(ref: Any, *shape: int) -> jax.Array:
    """Does a plain load from device memory, of 4 rows by default."""
    shape = shape or (4, FEATURES)
    layout = plgpu.Layout.WG_STRIDED(shape, math.prod(shape) // 128)
    return plgpu.load(ref, layout=layout, optimized=False)


def moved(operand: Operand) -> tuple[int, int, int, int]:
    return (
        operand.loaded,
        operand.distinct_loaded,
        operand.stored,
        operand.distinct_stored,
    )


# --- Mosaic GPU -----------------------------------------------------------------------


def test_each_block_loads_and_stores_its_rows() -> None:
    def kernel(x: Any, y: Any) -> None:
        rows = pl.ds(lax.axis_index("block") * 4, 4)
        y[rows] = load(x.at[rows])

    found = on_gpu(kernel)
    x, y = found.operands
    assert (found.name, found.blocks, found.threads) == ("kernel", 4, 128)
    assert (x.name, y.name) == ("in 0", "out 0")
    assert moved(x) == (16 * ROW, 16 * ROW, 0, 0)
    assert moved(y) == (0, 0, 16 * ROW, 16 * ROW)
    assert (found.loaded, found.stored, found.distinct) == (
        16 * ROW,
        16 * ROW,
        32 * ROW,
    )
    assert x.nbytes == ROWS * ROW


def test_what_every_block_reads_counts_each_time_and_is_distinct_once() -> None:
    def kernel(x: Any, scale: Any, y: Any) -> None:
        del x
        y[lax.axis_index("block")] = load(scale, FEATURES)

    scale = jax.ShapeDtypeStruct((FEATURES,), X.dtype)
    _, scale, y = on_gpu(kernel, args=(X, scale)).operands
    assert moved(scale) == (4 * ROW, ROW, 0, 0)
    assert moved(y) == (0, 0, 4 * ROW, 4 * ROW)


def test_overlapping_chunks_are_distinct_once() -> None:
    def kernel(x: Any, y: Any) -> None:
        rows = pl.ds(lax.axis_index("block") * 4, 4)
        for start in (0, 72):  # 128 columns each: 200 in all, 56 twice
            columns = pl.ds(start, 128)
            y[rows, columns] = load(x.at[rows, columns], 4, 128)

    for operand in on_gpu(kernel).operands:
        loaded, distinct_loaded, stored, distinct_stored = moved(operand)
        assert loaded + stored == 4 * 4 * 256 * 2
        assert distinct_loaded + distinct_stored == 4 * 4 * 200 * 2


def test_one_element() -> None:
    def kernel(x: Any, y: Any) -> None:
        y[0, lax.axis_index("block")] = x[lax.axis_index("block"), 3]

    x, y = on_gpu(kernel).operands
    assert moved(x) == (8, 8, 0, 0)
    assert moved(y) == (0, 0, 8, 8)


@pytest.mark.parametrize("static", [True, False])
def test_loops_multiply(static: bool) -> None:
    def kernel(x: Any, y: Any) -> None:
        block = lax.axis_index("block")

        def body(i: Any, carry: Any) -> Any:
            rows = pl.ds((block + 4 * i) * 4, 4)
            y[rows] = load(x.at[rows])
            return carry

        # 3 tiles per block, or the block's share of 13: 4, 3, 3, 3.
        lax.fori_loop(0, 3 if static else (13 - block + 3) // 4, body, None)

    tiles = 12 if static else 13
    x, y = on_gpu(kernel).operands
    assert moved(x) == (tiles * 4 * ROW, tiles * 4 * ROW, 0, 0)
    assert moved(y) == (0, 0, tiles * 4 * ROW, tiles * 4 * ROW)


def test_what_a_loop_carries_differs_by_block() -> None:
    def kernel(x: Any, y: Any) -> None:
        block = lax.axis_index("block")

        def going(row: Any) -> Any:
            return row < 16

        def body(row: Any) -> Any:
            y[row, :] = load(x.at[row], FEATURES)
            return row + 1 + block

        last = lax.while_loop(going, body, block)  # 0.. by 1, 1.. by 2, 2.. by 3, ...
        y[last + 32, :] = load(x.at[last], FEATURES)

    # The rows that each block's loop visits, and where it stops.
    steps = [list(range(b, 16, b + 1)) for b in range(4)]
    ends = [s[-1] + b + 1 for b, s in enumerate(steps)]
    x, y = on_gpu(kernel).operands
    total = sum(len(s) for s in steps) + 4
    rows = set(ends).union(*steps)
    assert moved(x)[:2] == (total * ROW, len(rows) * ROW)
    assert moved(y)[3] == (16 + len(set(ends))) * ROW


def test_conditions_count_where_they_hold() -> None:
    def kernel(x: Any, y: Any) -> None:
        block = lax.axis_index("block")

        @pl.when(block == 3)
        def _() -> None:
            y[pl.ds(0, 4)] = load(x.at[pl.ds(0, 4)])

        @pl.when((block < 2) & (block * 2 != 0))
        def _() -> None:
            y[pl.ds(8, 4)] = load(x.at[pl.ds(8, 4)])

    x, y = on_gpu(kernel).operands
    assert moved(x) == (8 * ROW, 8 * ROW, 0, 0)
    assert moved(y) == (0, 0, 8 * ROW, 8 * ROW)


def test_what_a_condition_returns_differs_by_block() -> None:
    def kernel(x: Any, y: Any) -> None:
        block = lax.axis_index("block")
        row = lax.cond(block > 1, lambda: block * 2, lambda: jnp.int32(40))
        row = jnp.where(block == 0, jnp.minimum(row, 7), row) - lax.rem(block, 2)
        y[pl.ds(row, 4)] = load(x.at[pl.ds(row, 4)])

    # Blocks begin at rows 7, 39, 4 and 5 and load three more each.
    x, _ = on_gpu(kernel).operands
    rows = {first + i for first in (7, 39, 4, 5) for i in range(4)}
    assert moved(x) == (16 * ROW, len(rows) * ROW, 0, 0)


def test_grid_cluster_and_threads() -> None:
    def kernel(x: Any, y: Any) -> None:
        block, column = lax.axis_index("block"), lax.axis_index("column")
        rank, thread = lax.axis_index("rank"), lax.axis_index("thread")
        row = ((block * 2 + rank) * 3 + thread) * 2
        at = pl.ds(row, 2), pl.ds(column * 128, 128)
        y[at] = load(x.at[at], 2, 128)

    found = on_gpu(
        kernel,
        grid=(4, 2),
        cluster=(2,),
        cluster_names=("rank",),
        num_threads=3,
        thread_name="thread",
    )
    assert (found.blocks, found.threads) == (16, 384)
    assert [moved(o)[0] + moved(o)[2] for o in found.operands] == [48 * ROW, 48 * ROW]
    assert found.distinct == 96 * ROW


def test_shared_memory_is_no_traffic() -> None:
    def kernel(x: Any, y: Any, smem: Any, barrier: Any) -> None:
        rows = pl.ds(lax.axis_index("block") * 4, 4)
        plgpu.copy_gmem_to_smem(x.at[rows], smem, barrier)
        plgpu.barrier_wait(barrier)
        smem[...] = smem[...] + smem[...]
        plgpu.commit_smem()

        def scoped(other: Any) -> None:
            other[:, :FEATURES] = smem[...].astype(jnp.float32)

        pl.run_scoped(scoped, plgpu.SMEM((4, FEATURES), jnp.float32))

        @pl.when(lax.axis_index("block") == 0)
        def _() -> None:
            pl.run_scoped(scoped, plgpu.SMEM((4, 4 * FEATURES), jnp.float32))

        plgpu.copy_smem_to_gmem(smem, y.at[rows])
        plgpu.wait_smem_to_gmem(0)

    found = on_gpu(
        kernel, scratch=[plgpu.SMEM((4, FEATURES), X.dtype), plgpu.Barrier()]
    )
    x, y = found.operands
    assert moved(x) == (16 * ROW, 16 * ROW, 0, 0)
    assert moved(y) == (0, 0, 16 * ROW, 16 * ROW)
    # The two float32 buffers are never alive together. A barrier takes 8 bytes.
    assert found.scratch == 4 * ROW + 4 * 4 * FEATURES * 4 + 8


def test_reductions_take_shared_memory() -> None:
    def kernel(x: Any, y: Any) -> None:
        y[0, 0] = jnp.sum(load(x.at[pl.ds(0, 4)]).astype(jnp.float32)).astype(X.dtype)

    params = plgpu.CompilerParams(reduction_scratch_bytes=3000)
    assert on_gpu(kernel, compiler_params=params).scratch == 3 * 1024


def test_copies_may_be_predicated() -> None:
    def kernel(x: Any, y: Any, smem: Any) -> None:
        del x
        block = lax.axis_index("block")
        half, rows = smem.at[pl.ds(block, 4)], pl.ds(block * 4, 4)
        plgpu.copy_smem_to_gmem(half, y.at[rows], predicate=block > 1)

    _, y = on_gpu(kernel, scratch=[plgpu.SMEM((8, FEATURES), X.dtype)]).operands
    assert moved(y) == (0, 0, 8 * ROW, 8 * ROW)


@pytest.mark.skipif(not hasattr(plgpu, "store"), reason="jax 0.11 has no plgpu.store")
def test_store() -> None:
    def kernel(x: Any, y: Any) -> None:
        rows = pl.ds(lax.axis_index("block") * 4, 4)
        plgpu.store(y.at[rows], load(x.at[rows]), optimized=False)

    _, y = on_gpu(kernel).operands
    assert moved(y) == (0, 0, 16 * ROW, 16 * ROW)


def test_refs_of_refs() -> None:
    def kernel(x: Any, y: Any) -> None:
        tile = x.at[pl.ds(8, 16)].at[pl.ds(lax.axis_index("block") * 4, 4)]
        half = y.at[lax.axis_index("block")].at[pl.ds(128, 128)]
        half[...] = load(tile.at[2, pl.ds(0, 128)], 128)
        half[...] = load(x.at[22, pl.ds(0, 128)], 128)  # block 3 has just read this

    x, y = on_gpu(kernel).operands
    assert moved(x) == (8 * 256, 4 * 256, 0, 0)
    assert moved(y) == (0, 0, 8 * 256, 4 * 256)


def test_reshaped_refs() -> None:
    def kernel(x: Any, y: Any) -> None:
        row = lax.axis_index("block")
        whole = x.at[row, pl.ds(0, 128)].reshape(2, 64)
        y.at[row, pl.ds(128, 128)].reshape(2, 64)[...] = load(whole, 2, 64)

    x, y = on_gpu(kernel).operands
    assert moved(x) == (4 * 256, 4 * 256, 0, 0)
    assert moved(y) == (0, 0, 4 * 256, 4 * 256)

    def part(x: Any, y: Any) -> None:
        y[0, pl.ds(0, 64)] = load(x.at[0].reshape(4, 64).at[1], 64)

    with pytest.raises(Uncountable, match="part of reshaped"):
        on_gpu(part)


def test_access_outside_is_refused() -> None:
    def kernel(x: Any, y: Any) -> None:
        rows = pl.ds(lax.axis_index("block") * 20, 8)  # the last block: 60 to 68 of 64
        y[pl.ds(0, 8)] = load(x.at[rows], 8, FEATURES)

    with pytest.raises(Uncountable, match=r"in 0.* to \(68, 256\)"):
        on_gpu(kernel)

    def before(x: Any, y: Any) -> None:
        rows = pl.ds(lax.axis_index("block") * 4 - 2, 4)
        y[pl.ds(0, 4)] = load(x.at[rows])

    with pytest.raises(Uncountable, match=r"in 0.* from \(-2, 0\)"):
        on_gpu(before)


def test_rows_that_are_not_adjacent_are_refused() -> None:
    def kernel(x: Any, y: Any) -> None:
        y[pl.ds(0, 4)] = load(x.at[pl.ds(0, 4, stride=2)])

    with pytest.raises(Uncountable, match="stride"):
        on_gpu(kernel)


def test_integers_are_divided_toward_0() -> None:
    def kernel(x: Any, y: Any) -> None:
        block = lax.axis_index("block")
        row = lax.div(block - 3, 2) + lax.rem(block - 3, 2) + 2  # 0, 1, 1, 2
        y[block] = load(x.at[row], FEATURES)

    x, _ = on_gpu(kernel).operands
    assert moved(x) == (4 * ROW, 3 * ROW, 0, 0)


def test_a_copy_to_several_blocks_is_refused() -> None:
    def kernel(x: Any, y: Any, smem: Any, barrier: Any) -> None:
        del y
        plgpu.copy_gmem_to_smem(
            x.at[pl.ds(0, 8)], smem, barrier, collective_axes="cluster"
        )

    scratch = [plgpu.SMEM((8, FEATURES), X.dtype), plgpu.Barrier()]
    with pytest.raises(Uncountable, match="several blocks of a cluster"):
        on_gpu(kernel, scratch=scratch, cluster=(2,), cluster_names=("cluster",))


def test_offsets_from_data_are_refused() -> None:
    def kernel(x: Any, index: Any, y: Any) -> None:
        y[pl.ds(0, 4)] = load(x.at[pl.ds(index[0], 4)])

    with pytest.raises(Uncountable, match="depends on data"):
        on_gpu(kernel, args=(X, jax.ShapeDtypeStruct((1,), jnp.int32)))


def test_kernels_are_found_below_jit_and_by_name() -> None:
    def one(x: Any, y: Any) -> None:
        y[pl.ds(0, 4)] = load(x.at[pl.ds(0, 4)])

    def two(x: Any, y: Any) -> None:
        one(x, y)

    @jax.jit
    def twice(x: Any) -> Any:
        for kernel in (one, two):
            x = plgpu.kernel(kernel, out_type=X, grid=(1,), grid_names=("block",))(x)
        return x * 2

    assert [found.name for found in kernels(twice, X)] == ["one", "two"]


# --- Mosaic TPU -----------------------------------------------------------------------


def on_tpu(kernel: Callable[..., None], *args: Any, **options: Any) -> Traffic:
    """Returns the traffic of one Mosaic TPU kernel."""
    (found,) = kernels(pl.pallas_call(kernel, name="tpu", **options), *args)
    return found


def nothing(*refs: Any) -> None:
    for ref in refs[-1:]:
        ref[...] = jnp.zeros(ref.shape, ref.dtype)


def test_blocks_past_the_end_count_what_lies_inside() -> None:
    rows = pl.BlockSpec((48, FEATURES), lambda i: (i, 0))
    scale = pl.BlockSpec((1, FEATURES), lambda i: (0, 0))
    found = on_tpu(
        nothing,
        X,
        jax.ShapeDtypeStruct((1, FEATURES), jnp.float32),
        out_shape=X,
        grid=(2,),
        in_specs=[rows, scale],
        out_specs=rows,
    )
    x, s, y = found.operands
    assert (found.name, found.blocks, found.threads) == ("tpu", 2, 0)
    assert moved(x) == (ROWS * ROW, ROWS * ROW, 0, 0)
    assert moved(s) == (FEATURES * 4, FEATURES * 4, 0, 0)  # once: its block stays
    assert moved(y) == (0, 0, ROWS * ROW, ROWS * ROW)
    # Two buffers per block. The scale's block is padded to 8 rows.
    assert found.scratch == 2 * (48 * ROW + 8 * FEATURES * 4 + 48 * ROW)


def test_blocks_move_when_the_index_map_changes() -> None:
    # The last axis of the grid varies fastest.
    slow = pl.BlockSpec((16, FEATURES), lambda i, j: (i, 0))
    fast = pl.BlockSpec((16, FEATURES), lambda i, j: (j, 0))
    found = on_tpu(
        nothing,
        X,
        X,
        out_shape=jax.ShapeDtypeStruct((2, FEATURES), jnp.float32),
        grid=(2, 4),
        in_specs=[slow, fast],
        out_specs=pl.BlockSpec((None, FEATURES), lambda i, j: (i, 0)),
    )
    a, b, y = found.operands
    assert moved(a) == (2 * 16 * ROW, 2 * 16 * ROW, 0, 0)
    assert moved(b) == (8 * 16 * ROW, 4 * 16 * ROW, 0, 0)
    assert moved(y) == (0, 0, 2 * FEATURES * 4, 2 * FEATURES * 4)


def test_blocks_that_start_at_an_element() -> None:
    """The index map gives their first row, and they may overlap."""
    block = pl.BlockSpec((pl.Element(16), FEATURES), lambda i: (8 * i, 0))
    grid = dict(grid=(4,), in_specs=[block], out_specs=block)
    x, _ = on_tpu(nothing, X, out_shape=X, **grid).operands
    assert moved(x) == (4 * 16 * ROW, 40 * ROW, 0, 0)


@pytest.mark.parametrize(
    ("semantics", "parts"),
    [(None, 1), (("arbitrary", "arbitrary"), 1), (("parallel", "arbitrary"), 2)],
)
def test_parts_that_cores_may_share(semantics: Any, parts: int) -> None:
    block = pl.BlockSpec((8, FEATURES), lambda i, j: (4 * i + j, 0))
    params = pltpu.CompilerParams(dimension_semantics=semantics)
    grid = dict(grid=(2, 4), in_specs=[block], out_specs=block)
    found = on_tpu(nothing, X, out_shape=X, compiler_params=params, **grid)
    assert (found.blocks, found.parts) == (8, parts)


def test_copies_that_the_kernel_makes() -> None:
    def kernel(x: Any, y: Any, buffer: Any, semaphore: Any) -> None:
        rows = pl.ds(pl.program_id(0) * 8, 8)
        copy = pltpu.make_async_copy(x.at[rows], buffer, semaphore)
        copy.start()
        copy.wait()
        y[...] = buffer[...]

    found = on_tpu(
        kernel,
        X,
        out_shape=X,
        grid=(4,),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
        out_specs=pl.BlockSpec((8, FEATURES), lambda i: (i, 0)),
        scratch_shapes=[pltpu.VMEM((8, FEATURES), X.dtype), pltpu.SemaphoreType.DMA],
    )
    x, y = found.operands
    assert moved(x) == (32 * ROW, 32 * ROW, 0, 0)
    assert moved(y) == (0, 0, 32 * ROW, 32 * ROW)
    assert found.scratch == 3 * 16 * ROW  # 16 rows: a tile of bfloat16


# --- the union of boxes ---------------------------------------------------------------


def test_volume_is_that_of_a_bitmap() -> None:
    rng = np.random.default_rng(0)
    for axes in (1, 2, 3):
        first = rng.integers(0, 9, (20, axes))
        last = first + rng.integers(1, 4, (20, axes))
        bitmap = np.zeros((12,) * axes, bool)
        for low, high in zip(first, last, strict=True):
            bitmap[tuple(slice(*span) for span in zip(low, high, strict=True))] = True
        assert volume(np.stack([first, last], axis=-1)) == bitmap.sum()


# --- bytes in flight ------------------------------------------------------------------


def test_loads_fly_together_until_a_barrier() -> None:
    def kernel(x: Any, scale: Any, y: Any, barrier: Any) -> None:
        total = load(x.at[pl.ds(0, 4)]) + load(x.at[pl.ds(4, 4)])
        total += load(scale, 4, FEATURES)  # small: from a cache
        plgpu.barrier_wait(barrier)
        total += load(x.at[pl.ds(8, 4)])
        y[pl.ds(0, 4)] = total

    found = on_gpu(
        kernel,
        args=(X, jax.ShapeDtypeStruct((4, FEATURES), jnp.bfloat16)),
        scratch=[plgpu.Barrier()],
    )
    assert found.in_flight == 8 * ROW


def test_a_turn_of_a_loop_waits_for_the_one_before() -> None:
    def kernel(x: Any, y: Any) -> None:
        def turn(i: Any, total: jax.Array) -> jax.Array:
            return total + load(x.at[pl.ds(4 * i, 4)])

        total = lax.fori_loop(0, 4, turn, load(x.at[pl.ds(0, 4)]))
        total += load(x.at[pl.ds(16, 4)])
        y[pl.ds(0, 4)] = total

    assert on_gpu(kernel).in_flight == 4 * ROW


def test_copies_fly_too_and_each_thread_has_its_own() -> None:
    def kernel(x: Any, y: Any, smem: Any, barrier: Any) -> None:
        plgpu.copy_gmem_to_smem(x.at[pl.ds(0, 4)], smem, barrier)
        total = load(x.at[pl.ds(4, 4)])
        plgpu.barrier_wait(barrier)
        y[pl.ds(0, 4)] = total

    found = on_gpu(
        kernel,
        scratch=[plgpu.SMEM((4, FEATURES), X.dtype), plgpu.Barrier()],
        num_threads=2,
        thread_name="warpgroup",
    )
    assert found.in_flight == 2 * 8 * ROW


def test_the_branch_that_loads_most_counts() -> None:
    def kernel(x: Any, y: Any) -> None:
        def both() -> jax.Array:
            return load(x.at[pl.ds(0, 4)]) + load(x.at[pl.ds(4, 4)])

        total = lax.cond(
            lax.axis_index("block") == 0, both, lambda: load(x.at[pl.ds(0, 4)])
        )
        y[pl.ds(0, 4)] = total

    assert on_gpu(kernel).in_flight == 8 * ROW
