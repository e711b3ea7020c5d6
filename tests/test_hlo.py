"""Tests of the parsers of compiled HLO and ptxas output, on texts of one thing each."""

import textwrap

import pytest
from flax import nnx

from bench.aot import hlo
from bench.aot.chips import A100, H100, RTX5090, Gpu
from bench.aot.compile import parse_ptxas
from bench.aot.measure import measure, measure_kernel, plan, workloads
from fusednorm.kernels.dispatch import Kernel

KB = 1024


def entry(*lines: str, before: str = "") -> str:
    """Returns a module whose entry computation has these lines."""
    body = "\n".join(f"  {line}" for line in lines)
    parts = (
        "HloModule jit_f, is_scheduled=true",
        textwrap.dedent(before),
        "ENTRY %main (a: f32[8]) -> f32[8] {",
        body,
        "}",
    )
    return "\n".join(parts)


def nbytes(*lines: str, before: str = "") -> list[int]:
    return [kernel.nbytes for kernel in hlo.kernels(entry(*lines, before=before))]


# --- arrays ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("type_", "expected"),
    [
        ("f32[8,16]{1,0}", 512),
        ("bf16[8,16]", 256),
        ("f8e4m3fn[16]{0}", 16),
        ("pred[3]{0}", 3),
        ("f32[]", 4),
        ("(f32[8]{0}, /*index=1*/bf16[8]{0})", 48),
        ("token[]", 0),
        # A TPU has whole tiles: 30011 rows of 760 take 30016 rows of 768.
        ("bf16[30011,760]{1,0:T(8,128)(2,1)}", 30016 * 768 * 2),
        ("f32[30011,1]{1,0:T(8,128)}", 30016 * 128 * 4),
        ("f32[30011,1]{0,1:T(1,128)}", 30080 * 4),
        ("f32[760]{0:T(1024)}", 1024 * 4),
        ("bf16[26,197,64]{2,0,1:T(8,128)}", 32 * 197 * 128 * 2),
        # Arrays on the chip take no HBM.
        ("f32[760]{0:T(1024)S(1)}", 0),
        ("(f32[8]{0}, f32[8]{0:S(1)}, u32[]{:S(2)})", 32),
    ],
)
def test_bytes_of_a_type(type_: str, expected: int) -> None:
    assert hlo.hbm_bytes(type_) == expected


@pytest.mark.parametrize(
    ("type_", "order"),
    [
        ("bf16[30,384,64]{1,2,0:T(8,128)(2,1)}", (0, 2, 1)),
        ("f32[8,16]{1,0}", (0, 1)),
        ("f32[8]{0:T(256)}", (0,)),
        ("f32[]", ()),
    ],
)
def test_order_of_axes(type_: str, order: tuple[int, ...]) -> None:
    found = hlo.order_of_axes(
        entry(f"%a = {type_} parameter(0)", f"ROOT %b = {type_} add(%a, %a)")
    )
    assert found == order


# --- instructions ---------------------------------------------------------------------


def test_a_fusion_reads_its_operands_and_writes_its_results() -> None:
    found = hlo.kernels(
        entry(
            "%a = f32[1024]{0} parameter(0), sharding={mesh[], [{}]}",
            "%b = bf16[1024]{0} parameter(1)",
            "%c = f32[] constant(2)",
            "%two = (f32[8]{0}, f32[8]{0}) fusion(%a, %b, /*index=2*/%c), kind=kLoop, "
            'calls=%inner, metadata={op_name="f(%a)"}',
            "%g = f32[8]{0} get-tuple-element(%two), index=1",
            "%h = f32[2,4]{1,0} bitcast(%g)",
            "ROOT %t = (f32[2,4]{1,0}) tuple(%h)",
            before="""
            %inner (p: f32[1024], q: bf16[1024], r: f32[]) -> (f32[8], f32[8]) {
              %q = bf16[1024]{0} parameter(1)
              %p = f32[1024]{0} parameter(0)
              %r = f32[] parameter(2)
              %s = f32[8]{0} reduce(%p, %q, %r), dimensions={0}
              ROOT %t = (f32[8]{0}, f32[8]{0}) tuple(%s, %s)
            }
            """,
        )
    )
    assert [(k.name, k.opcode, k.nbytes, k.ours) for k in found] == [
        ("two", "fusion", 4096 + 2048 + 4 + 64, False)
    ]


@pytest.mark.parametrize(
    ("other", "expected"),
    [("negate(%t)", 2 * 128), ("negate(%p)", 4096), ("slice(%p)", 3 * 128)],
    ids=["two slices", "a slice and all", "three slices"],
)
def test_a_fusion_of_slices_reads_only_these(other: str, expected: int) -> None:
    (found,) = nbytes(
        "%a = f32[] parameter(0)",
        "%b = f32[1024]{0} parameter(1)",
        "%f = f32[32]{0} fusion(%a, %b), kind=kLoop, calls=%inner",
        before=f"""
        %inner (q: f32[], p: f32[1024]) -> f32[32] {{
          %p = f32[1024]{{0}} parameter(1)
          %q = f32[] parameter(0)
          %s = f32[32]{{0}} slice(%p), slice={{[0:32]}}
          %t = f32[32]{{0}} dynamic-slice(%p, %q), dynamic_slice_sizes={{32}}
          %u = f32[32]{{0}} {other}
          ROOT %v = f32[32]{{0}} add(%s, %t)
        }}
        """,
    )
    assert found == 4 + expected + 128


def test_our_kernels_and_what_stands_around_them() -> None:
    text = entry(
        "%x = bf16[8,128]{1,0} parameter(0)",
        "%c = f32[8,128]{1,0} convert(%x)",
        "%k = f32[8,128]{1,0} custom-call(%c), custom_call_target="
        '"mosaic_gpu_v2", backend_config={module = "ML\\"{(%x"}',
        '%o = f32[8,128]{1,0} custom-call(%k), custom_call_target="another"',
        "ROOT %y = f32[8,128]{0,1} copy(%o)",
    )
    assert [k.ours for k in hlo.kernels(text)] == [False, True, False, False]
    around = [(k.opcode, k.nbytes) for k in hlo.surroundings(text)]
    assert around == [
        ("convert", 2048 + 4096),
        ("custom-call", 2 * 4096),
        ("copy", 2 * 4096),
    ]
    assert hlo.total(hlo.kernels(text)) == 6144 + 3 * 8192


def test_loops_and_calls_are_entered() -> None:
    text = entry(
        "%x = f32[256]{0} parameter(0)",
        "%l = (s32[], f32[256]{0}) while(%x), condition=%cond, body=%body, "
        'backend_config={"known_trip_count":{"n":"5"},"known_init_step":{}}',
        "ROOT %c = f32[256]{0} call(%x), to_apply=%once",
        before="""
        %once (p: f32[256]) -> f32[256] {
          %p = f32[256]{0} parameter(0)
          ROOT %q = f32[256]{0} negate(%p)
        }
        %body (t: (s32[], f32[256])) -> (s32[], f32[256]) {
          %t = (s32[], f32[256]{0}) parameter(0)
          %h = f32[256]{0} get-tuple-element(%t), index=1
          %k = f32[256]{0} custom-call(%h), custom_call_target="mosaic_gpu_v2"
        }
        """,
    )
    found = hlo.kernels(text)
    assert [(k.name, k.times, k.loop) for k in found] == [
        ("k", 5, True),
        ("q", 1, False),
    ]
    assert hlo.total(found) == 6 * 2 * KB


def test_a_loop_in_a_loop_runs_as_often_as_both() -> None:
    trips = 'backend_config={"known_trip_count":{"n":"%s"}}'
    (found,) = hlo.kernels(
        entry(
            "%x = f32[256]{0} parameter(0)",
            f"%l = f32[256]{{0}} while(%x), condition=%c, body=%outer, {trips % 5}",
            before=f"""
            %inner (p: f32[256]) -> f32[256] {{
              %p = f32[256]{{0}} parameter(0)
              ROOT %k = f32[256]{{0}} negate(%p)
            }}
            %outer (q: f32[256]) -> f32[256] {{
              %q = f32[256]{{0}} parameter(0)
              %m = f32[256]{{0}} while(%q), condition=%c, body=%inner, {trips % 3}
            }}
            """,
        )
    )
    assert (found.name, found.times) == ("k", 15)


def test_a_custom_call_on_slices_is_seen_in_its_fusion() -> None:
    (found,) = hlo.kernels(
        entry(
            "%x = f32[4,256]{1,0} parameter(0)",
            "%f = f32[256]{0} fusion(%x), kind=kCustom, calls=%wrapped",
            before="""
            %wrapped (p: f32[4,256]) -> f32[256] {
              %p = f32[4,256]{1,0} parameter(0)
              %s = f32[256]{0} slice(%p), slice={[2:3], [0:256]}
              ROOT %k = f32[256]{0} custom-call(%s), custom_call_target="mosaic_gpu_v2"
            }
            """,
        )
    )
    assert found.ours
    assert found.nbytes == 2 * KB


@pytest.mark.parametrize(
    "names",
    [
        "branch_computations={%twice, %once}",
        "true_computation=%twice, false_computation=%once",
    ],
)
def test_of_branches_the_one_that_moves_least_counts(names: str) -> None:
    (found,) = hlo.kernels(
        entry(
            "%x = f32[256]{0} parameter(0)",
            "%p = pred[] parameter(1)",
            f"%c = f32[256]{{0}} conditional(%p, %x, %x), {names}",
            before="""
            %twice (p: f32[256]) -> f32[256] {
              %p = f32[256]{0} parameter(0)
              %m = f32[256]{0} negate(%p)
              ROOT %n = f32[256]{0} sine(%m)
            }
            %once (q: f32[256]) -> f32[256] {
              %q = f32[256]{0} parameter(0)
              ROOT %r = f32[256]{0} cosine(%q)
            }
            """,
        )
    )
    assert (found.opcode, found.nbytes) == ("cosine", 2 * KB)


def test_arrays_on_the_chip_are_arrays_too() -> None:
    """A kernel's `arrays` include an operand and a result that stay on the chip."""
    (found,) = hlo.kernels(
        entry(
            "%x = f32[256]{0:T(256)S(1)} parameter(0)",
            "%y = bf16[256]{0:T(256)} parameter(1)",
            "%k = (f32[256]{0:T(256)S(1)}, f32[128]{0:T(256)}) custom-call(%x, %y), "
            'custom_call_target="tpu_custom_call"',
        )
    )
    assert found.nbytes == 512 + KB
    assert found.arrays == KB + 512 + KB + 512


def test_what_touches_part_of_its_operands() -> None:
    assert nbytes(
        "%x = f32[4,256]{1,0} parameter(0)",
        "%u = f32[1,256]{1,0} slice(%x), slice={[0:1], [0:256]}",
        "%i = s32[] parameter(1)",
        "%d = f32[4,256]{1,0} dynamic-update-slice(%x, %u, %i, %i)",
        "%g = (f32[256]{0}, s8[4194304]{0}) custom-call(%u), "
        'custom_call_target="__cublas$gemm"',
    ) == [2 * KB, 2 * KB, 2 * KB]


def test_asynchronous_operations_count_once() -> None:
    found = hlo.kernels(
        entry(
            "%x = f32[256]{0:T(256)} parameter(0)",
            "%s = (f32[256]{0:T(256)S(1)}, f32[256]{0:T(256)}, u32[]{:S(2)}) "
            "copy-start(%x)",
            "%d = f32[256]{0:T(256)S(1)} copy-done(%s)",
            "%p = ((f32[256]{0:T(256)}), f32[64]{0:T(64)S(1)}, s32[]{:S(2)}) "
            "slice-start(%x), slice={[0:64]}",
            "%f = ((f32[256]{0}, s32[]), f32[256]{0}, u32[]) fusion-start(%x)",
            "%e = f32[256]{0} fusion-done(%f)",
            "%c = (f32[256]{0}, f32[256]{0}, u32[]) copy-start(%x)",
        )
    )
    assert [(k.name, k.nbytes, k.prefetch) for k in found] == [
        ("s", KB, True),
        ("p", 256, True),
        ("f", 2 * KB, False),
        ("c", 2 * KB, False),
    ]


def test_what_crosses_devices_counts_once_and_whole() -> None:
    """The type of an asynchronous start may or may not list the operands too."""
    found = hlo.collectives(
        entry(
            "%x = f32[4,64]{1,0} parameter(0)",
            "%y = bf16[64]{0} parameter(1)",
            "%a = f32[4,64]{1,0} all-reduce(%x), to_apply=%sum",
            "%b = f32[4,64]{1,0} all-reduce-start(%x), to_apply=%sum",
            "%c = f32[4,64]{1,0} all-reduce-done(%b)",
            "%d = ((f32[4,64]{1,0}), f32[4,64]{1,0}) all-reduce-start(%x), "
            "to_apply=%sum, output_to_operand_aliasing={{1}: (0, {})}",
            "%e = (f32[4,64]{1,0}, bf16[64]{0}) all-reduce-start(%x, %y)",
            "%f = (bf16[64]{0}, bf16[512]{0}) all-gather-start(%y), dimensions={0}",
            "%g = ((bf16[64]{0}, f32[4,64]{1,0}), (bf16[512]{0}, f32[32,64]{1,0})) "
            "all-gather-start(%y, %x), dimensions={0}",
            "%h = f32[1,64]{1,0} reduce-scatter(%x), dimensions={0}, to_apply=%sum",
            "%i = ((f32[4,64]{1,0}, bf16[64]{0}), (f32[1,64]{1,0}, bf16[16]{0})) "
            "reduce-scatter-start(%x, %y), dimensions={0}, to_apply=%sum",
            "%j = (f32[4,64]{1,0}, f32[4,64]{1,0}, u32[], u32[]) "
            "collective-permute-start(%x), source_target_pairs={{0,1}}",
        )
    )
    assert found == [
        ("all-reduce", KB),
        ("all-reduce", KB),
        ("all-reduce", KB),
        ("all-reduce", KB + 128),
        ("all-gather", KB),
        ("all-gather", 9 * KB),
        ("reduce-scatter", KB),
        ("reduce-scatter", KB + 128),
        ("collective-permute", KB),
    ]


# --- ptxas and the chips --------------------------------------------------------------

PTXAS = """
.visible .entry rows_mosaic_gpu_kernel(
	ld.shared.b32 	%r2, [%r1];
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'rows_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for rows_mosaic_gpu_kernel
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 2 barriers
ptxas info    : Compile time = 20.537 ms
.visible .entry other_mosaic_gpu_kernel(
	ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r2}, [%rd1];
	@%p1 stmatrix.sync.aligned.m8n8.x1.shared.b16 [%rd1], {%r2};
	fence.acq_rel.gpu; bar.warp.sync 0xffffffff;
	fence.acq_rel.cta; bar.warp.sync 0xffffffff;
	fence.acq_rel.gpu;
	shfl.sync.bfly.b32 	%r277|%p2, %r274, 8, 31, -1;
	fma.rn.f32 	%r291, %r277, 0f41C80000, %r257;
	fma.rn.f32 	%r292, %r257, 0f41C80000, %r277;
	mov.b64 	%rd2, {%r257, %r257};
	mov.b64 	%rd3, {%r257, %r277};
	fma.rn.f32x2 	%rd4, %rd3, %rd2, %rd2;
	fma.rn.f32x2 	%rd5, %rd2, %rd2, %rd3;
ptxas info    : Compiling entry function 'other_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for other_mosaic_gpu_kernel
    136 bytes stack frame, 128 bytes spill stores, 64 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 136 bytes cumulative stack size
"""


def test_ptxas_reports() -> None:
    rows, other = parse_ptxas(PTXAS)
    assert (rows.kernel, rows.arch) == ("rows", "sm_90a")
    assert (rows.registers, rows.spilled, rows.stack) == (40, 0, 0)
    assert (other.kernel, other.registers) == ("other", 255)
    assert (other.spilled, other.stack) == (192, 136)
    assert (rows.matrices, other.matrices) == (0, 2)
    assert (rows.uneven, other.uneven) == (0, 2)
    assert (rows.fences, other.fences) == (0, 1)


@pytest.mark.parametrize(
    ("chip", "registers", "threads", "shared", "expected"),
    [
        (H100, 32, 128, 0, 16),  # threads
        (RTX5090, 32, 128, 0, 12),
        (H100, 32, 32, 0, 32),  # blocks
        (H100, 64, 128, 0, 8),  # registers
        (H100, 33, 128, 0, 12),  # allocated in units of 8
        (H100, 255, 512, 0, 0),
        (H100, 32, 128, 75 * KB, 3),  # shared memory: 76 KB with the driver's part
        (H100, 32, 128, 75 * KB + 512, 2),
        (RTX5090, 32, 128, 99 * KB, 1),
    ],
)
def test_resident_blocks(
    chip: Gpu, registers: int, threads: int, shared: int, expected: int
) -> None:
    assert chip.resident_blocks(registers, threads, shared) == expected


def test_bytes_in_flight_that_saturate_the_bandwidth() -> None:
    """3.35 TB/s for 375 ns, on each of 132 multiprocessors."""
    assert H100.bytes_to_fly == pytest.approx(3352.32e9 * 375e-9 / 132, rel=1e-12)


def test_ampere_is_refused() -> None:
    """Compiling a kernel for it would terminate this process."""
    (work,) = workloads("rows", nnx.LayerNorm, (37, 64), "float32", ops=["forward"])
    with pytest.raises(LookupError, match=r"compute capability 8\.0"):
        measure(A100, work)
    taken = plan(H100, work.call)
    assert isinstance(taken, Kernel)
    with pytest.raises(ValueError, match=r"A100 has compute capability 8\.0"):
        measure_kernel(A100, work, taken)
