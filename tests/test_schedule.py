"""Tests of the cycle counter for TPUs, on schedules small enough to count by hand."""

import pytest

from bench.aot.chips import CHIPS
from bench.aot.schedule import Unreadable, cores, count
from bench.aot.traffic import Traffic

# A grid of 8 steps. Each step runs the loop over chunks as often as its number says,
# at most 3 times, and branches past the loop if that is never. One bundle runs only in
# the last step.
GRID = """
= control target key start
LB: loop body
= control target key end

     0   :  { %s10_s0 = inlined_call_operand.hbm [shape: f32[8]] /* {1} */ }
   0x1   :  { %s11_s1 = smov 0 /* copy for cssa */ } /* Start region 7 */
   0x2 LB: > { %s12_s1 = sphi %s11_s1, %s20_s1  ;;  %s13_s2 = smov 0 }
   0x3   : > { %s14_s3 = smin.u32 3, %s12_s1  ;;  %p1_p0 = scmp.eq.s32 %s12_s1, 0 }
   0x4   : > { %1 = sst [smem:[#allocation9_spill]] %s14_s3  ;;  %s15_s3 = smov 99 }
   0x5   : > { %2 = sbr.rel (%p1_p0) target bundleno = 12 ;; %v1_v0 = vlaneseq.b32 }
   0x6   :  {}
   0x7 LB: >> { %s16_s2 = sphi %s13_s2, %s17_s2  ;;  %s17_s2 = sadd.s32 1, %s16_s2 }
   0x8   : >> { %s18_s4 = sld [smem:[#allocation9_spill]] ;; %v2_v1 = vlaneseq.b32 }
   0x9   : >> { %p2_p1 = scmp.ge.s32 %s17_s2, %s18_s4 }
   0xa   : >> { %3 = sbr.rel (!%p2_p1) target bundleno = 7 (0x7) }
   0xb   : >> { %4 = vst [vmem:[%s15_s3] sm:$0xff] /*vst_source=*/%v2_v1 /*
window_bounds: (1, 2) } */ }
   0xc PF: > { %s20_s1 = sadd.s32 1, %s12_s1  ;;  %p3_p2 = scmp.ne.s32 %s12_s1, 7 }
   0xd   : > { %5 = sbr.rel (%p3_p2) target bundleno = 16 (0x10) }
   0xe   :  {}
   0xf   : > { %6 = shalt.err (!%p9_p9) /* BoundsCheck */ }
  0x10 PF: > { %p4_p3 = scmp.ge.s32 %s20_s1, 8 }
  0x11   : > { %7 = sbr.rel (!%p4_p3) target bundleno = 2 (0x2) }
  0x12   :  {}
  0x13   :  { %8 = vsyncpa [#allocation1], 1 }
"""


def test_loops_branches_and_the_last_step_count_as_often_as_they_run() -> None:
    before, after = 2, 1
    # Per step: bundles 2 to 6, 0xc to 0xe and 0x10 to 0x12; in the last one also 0xf.
    # Per chunk: 7 to 0xb.
    steps = 8 * (5 + 3 + 3) + 1
    chunks = 5 * (0 + 1 + 2 + 3 * 5)
    assert count(GRID, delay_slots=1) == before + steps + chunks + after


def test_a_bundle_reads_before_it_writes() -> None:
    swapped = """
     0   :  { %s1_s1 = smov 1  ;;  %s2_s2 = smov 2 }
   0x1   :  { %s3_s1 = smov %s2_s2  ;;  %s4_s2 = smov %s1_s1 }
   0x2   :  { %p1_p0 = scmp.eq.s32 %s3_s1, 2 ;; %p2_p1 = scmp.le.u32 %s4_s2, 1 }
   0x3   :  { %p3_p2 = pnand %p1_p0, %p2_p1 }
   0x4   :  { %1 = sbr.rel (!%p3_p2) target bundleno = 7 (0x7) }
   0x5   :  {}
   0x6   :  {}
   0x7   :  {}
    """
    assert count(swapped, delay_slots=1) == 7


def test_numbers_are_of_32_bits_and_signed_where_the_instruction_is() -> None:
    template = """
     0   :  {{ %s1_s1 = sadd.s32 4294967295, 0 }}
   0x1   :  {{ %p1_p0 = scmp.lt.{kind} %s1_s1, 5 }}
   0x2   :  {{ %1 = sbr.rel (%p1_p0) target bundleno = 4 (0x4) }}
   0x3   :  {{}}
   0x4   :  {{}}
    """
    assert count(template.format(kind="s32"), delay_slots=0) == 4
    assert count(template.format(kind="u32"), delay_slots=0) == 5


@pytest.mark.parametrize(
    ("instructions", "value"),
    [
        (["%s9_s9 = sshra.s32 %s1_s1, 1"], 2**32 - 4),
        (["%s9_s9 = sshrl.u32 %s1_s1, 1"], 2**31 - 4),
        (["%7 = sdivrem.u32 17, 5 /* kDiv */", "%s9_s9 = spop.drf %7"], 3),
        (["%7 = sdivrem.u32 17, 5 /* kRem */", "%s9_s9 = spop.drf %7"], 2),
        (["%s9_s9 = smov (%p1_p1, %s1_s1), 3"], 3),
        (["%s9_s9 = smov (!%p1_p1, %s1_s1), 3"], 2**32 - 8),
    ],
    ids=["signed", "unsigned", "quotient", "remainder", "selected", "other"],
)
def test_what_scalar_instructions_compute(instructions: list[str], value: int) -> None:
    """-8 is in s1, and p1 holds. Only the right value branches past a bundle."""
    lines = [
        "%s1_s1 = smov 4294967288",
        "%p1_p1 = scmp.lt.s32 %s1_s1, 0",
        *instructions,
        f"%p2_p2 = scmp.eq.s32 %s9_s9, {value}",
        f"%1 = sbr.rel (%p2_p2) target bundleno = {len(instructions) + 5}",
        "",
    ]
    text = "\n".join(f"{i:#x} :  {{ {line} }}" for i, line in enumerate(lines))
    assert count(text, delay_slots=0) == len(lines) - 1


@pytest.mark.parametrize(
    "unknown",
    [
        "%p2_p2 = por %p1_p1, %p9_p9",
        "%p2_p2 = scmp.eq.s32 %s3_s3, 1",
        "%p2_p2 = scmp.eq.s32 %s4_s4, 1",
    ],
    ids=["either", "selected", "written"],
)
def test_what_depends_on_the_unknown_is_unknown(unknown: str) -> None:
    lines = [
        "%p9_p9 = scmp.eq.s32 %s8_s8, 0  ;;  %s4_s4 = smov 1  ;;  %s5_s5 = smov 2",
        "%p1_p1 = scmp.eq.s32 %s5_s5, 0  ;;  %s3_s3 = smov (%p9_p9, %s5_s5), 1",
        "%s4_s4 = sadd.s32 (%p9_p9), %s5_s5, 1",
        unknown,
        "%1 = sbr.rel (%p2_p2) target bundleno = 5",
    ]
    text = "\n".join(f"{i:#x} :  {{ {line} }}" for i, line in enumerate(lines))
    with pytest.raises(Unreadable, match="unknown p2"):
        count(text, delay_slots=0)


def test_a_branch_behind_a_branch_is_refused() -> None:
    text = """
     0   :  { %1 = sbr.rel target bundleno = 3 }
   0x1   :  { %2 = sbr.rel target bundleno = 3 }
   0x2   :  {}
   0x3   :  {}
    """
    with pytest.raises(Unreadable, match="behind a branch"):
        count(text, delay_slots=1)


@pytest.mark.parametrize(
    ("chip", "parts", "expected"),
    [("v5p", 2, 2), ("v5p", 1, 1), ("v5e", 2, 1), ("H100", 2, 1)],
)
def test_how_many_cores_share_a_grid(chip: str, parts: int, expected: int) -> None:
    kernel = Traffic("kernel", (), 8, parts, 0, 0, 0)
    assert cores(CHIPS[chip], kernel) == expected


@pytest.mark.parametrize(("addend", "bundles"), [(4294967295, 4), (4294967294, 5)])
def test_a_branch_on_the_carry_of_a_sum(addend: int, bundles: int) -> None:
    text = f"""
     0   :  {{ %s1_s1 = smov 1 }}
   0x1   :  {{ %p1_p0 = sc.u32 %s1_s1, {addend} }}
   0x2   :  {{ %1 = sbr.rel (%p1_p0) target bundleno = 4 (0x4) }}
   0x3   :  {{}}
   0x4   :  {{}}
    """
    assert count(text, delay_slots=0) == bundles


def test_the_first_of_two_cores_is_counted() -> None:
    megacore = """
     0   :  { %s1_s1 = sld [smem:[#allocation0]] /* megacore core id */ }
   0x1   :  { %p1_p0 = scmp.ne.s32 %s1_s1, 0 }
   0x2   :  { %1 = sbr.rel (%p1_p0) target bundleno = 5 (0x5) }
   0x3   :  {}
   0x4   :  {}
   0x5   :  {}
    """
    assert count(megacore, delay_slots=1) == 6


def test_a_branch_on_what_is_not_known_is_refused() -> None:
    unknown = """
     0   :  { %s1_s1 = sld [smem:%s9_s9] }
   0x1   :  { %p1_p0 = scmp.eq.s32 %s1_s1, 0 }
   0x2   :  { %1 = sbr.rel (%p1_p0) target bundleno = 4 (0x4) }
   0x3   :  {}
   0x4   :  {}
    """
    with pytest.raises(Unreadable, match="unknown p0"):
        count(unknown, delay_slots=1)
    with pytest.raises(Unreadable, match="scall"):
        count("     0   :  { %1 = scall.rel target bundleno = 4 }", delay_slots=1)
