"""The audit reads machine code as it is: instructions, loops, jumps that are taken, what a multiprocessor holds."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks" / "ops"))
ptx, sass, walk = (importlib.import_module(name) for name in ("ptx_walk", "sass", "sass_walk"))

# Two loops: the outer one counts in steps of 4 to an argument, the inner one runs as often as the outer one has run.
NESTED = """
        /*0000*/                   LDC R1, c[0x0][0x218] ;     /* 0x00 */
        /*0010*/                   MOV R2, RZ ;                /* 0x00 */
        /*0020*/                   S2R R3, SR_TID.X ;
        /*0030*/                   MOV R4, RZ ;
        /*0040*/                   LDG.E.128 R8, desc[UR4][R6.64] ;
        /*0050*/                   VIADD R4, R4, 0x4 ;
        /*0060*/                   ISETP.GT.AND P1, PT, R4, R2, PT ;
        /*0070*/              @!P1 BRA 0x40 ;
        /*0080*/                   IMAD.IADD R2, R2, 0x1, R5 ;
        /*0090*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*00a0*/                   IADD3 R2, R4, -0x4, RZ ;
        /*00b0*/                   VIADD R2, R2, 0x4 ;
        /*00c0*/                   ISETP.GE.AND P0, PT, R2.reuse, R1, PT ;
        /*00d0*/              @!P0 BRA 0x30 ;
        /*00e0*/               @P2 BRA 0x100 ;
        /*00f0*/                   CALL.REL.NOINC 0x120 ;
        /*0100*/                   STG.E.64 desc[UR4][R6.64], R8 ;
        /*0110*/                   EXIT ;
        /*0120*/                   FADD R9, R9, R8 ;
        /*0130*/                   RET.REL.NODEC R10 0x0 ;
        /*0140*/                   BRA 0x140;
"""


def counts(text, numbers, types=("*bf16", "i32")):
    program = sass.Program(sass.parse(text), 32, 0, 0)
    issued = walk.path(program, walk.argument_bank(90, types, numbers), 0, 0)
    return program, issued


def test_listing_is_read():
    program, _ = counts(NESTED, (None, 4))
    assert len(program.code) == 21
    load, compare, jump = program.code[4], program.code[12], program.code[13]
    assert (load.kind, load.width, load.operands) == ("LDG", 16, ("R8", "desc[UR4][R6.64]"))
    assert compare.operands == ("P0", "PT", "R2", "R1", "PT")
    assert (jump.predicate, jump.negated, jump.target) == ("P0", True, 0x30)
    assert sass.loops(program.code) == [(3, 13), (4, 7)]


@pytest.mark.parametrize(("last", "rounds"), [(4, 1), (12, 3), (13, 4)])
def test_loops_are_run_as_often_as_the_arguments_say(last, rounds):
    program, issued = counts(NESTED, (None, last))
    by_kind = {kind: sum(n for i, n in issued.items() if program.code[i].kind == kind) for kind in ("BAR", "LDG")}
    # The inner loop runs until its counter exceeds 0, 4, 8, ...
    assert by_kind == {"BAR": rounds, "LDG": rounds * (rounds + 1) // 2}
    # Around the call, for subnormal numbers.
    assert all(program.code[i].kind not in ("CALL", "RET") for i in issued)


def test_a_loop_that_depends_on_data_is_no_guess():
    text = NESTED.replace("LDC R1, c[0x0][0x218]", "LDG.E R1, desc[UR4][R6.64]")
    with pytest.raises(RuntimeError, match=r"depends on data at 0xd0, or on: 0xc0 ISETP.* <- 0x0 LDG\.E R1"):
        counts(text, (None, 4))


def test_a_loop_that_data_skips_is_no_guess():
    text = NESTED.replace("MOV R4, RZ", "@P5 BRA 0xe0")
    with pytest.raises(RuntimeError, match="a loop depends on data at 0x30"):
        counts(text, (None, 4))


@pytest.mark.parametrize(("number", "divisor"), [(7, 3), (1000, 37), (37887, 37), (5, 5), (4, 5)])
def test_integer_division_is_followed(number, divisor):
    """Of `divisor`, as compiled: a reciprocal in float32, and a correction."""
    text = f"""
        /*0000*/ MOV R7, {divisor:#x} ;
        /*0010*/ MOV R0, {number:#x} ;
        /*0020*/ I2F.RP R4, R7 ;
        /*0030*/ MUFU.RCP R4, R4 ;
        /*0040*/ IADD3 R2, R4, 0xffffffe, RZ ;
        /*0050*/ F2I.FTZ.U32.TRUNC.NTZ R3, R2 ;
        /*0060*/ IMAD.MOV R5, RZ, RZ, -R3 ;
        /*0070*/ IMAD R5, R5, R7, RZ ;
        /*0080*/ HFMA2.MMA R2, -RZ, RZ, 0, 0 ;
        /*0090*/ IMAD.HI.U32 R3, R3, R5, R2 ;
        /*00a0*/ IMAD.HI.U32 R3, R3, R0, RZ ;
        /*00b0*/ IMAD.MOV R5, RZ, RZ, -R3 ;
        /*00c0*/ IMAD R0, R7, R5, R0 ;
        /*00d0*/ ISETP.GT.U32.AND P1, PT, R7, R0, PT ;
        /*00e0*/ @!P1 IMAD.IADD R0, R0, 0x1, -R7 ;
        /*00f0*/ @!P1 IADD3 R3, R3, 0x1, RZ ;
        /*0100*/ MOV R6, RZ ;
        /*0110*/ VIADD R6, R6, 0x1 ;
        /*0120*/ ISETP.GT.U32.AND P0, PT, R6, R3, PT ;
        /*0130*/ @!P0 BRA 0x110 ;
        /*0140*/ EXIT ;
    """
    _, issued = counts(text, (None, 0))
    assert issued[17] == number // divisor + 1


@pytest.mark.parametrize("last", [3, 2**32 + 2])
def test_counters_of_64_bits_are_followed(last):
    text = f"""
        /*0000*/ CS2R R2, SRZ ;
        /*0010*/ MOV R2, {(last - 3) % 2**32:#x} ;
        /*0020*/ MOV R3, {(last - 3) >> 32:#x} ;
        /*0030*/ LDC R4, c[0x0][0x218] ;
        /*0040*/ IADD3 R2, P0, R2, 0x2, RZ ;
        /*0048*/ IMAD.X R3, RZ, RZ, R3, P0 ;
        /*0050*/ IADD3 R2, P0, R2, -0x1, RZ ;
        /*0058*/ IMAD.X R3, RZ, RZ, R3, P0 ;
        /*005c*/ IADD3 R3, R3, -0x1, RZ ;
        /*0060*/ ISETP.NE.U32.AND P0, PT, R2, R4, PT ;
        /*0070*/ ISETP.NE.AND.EX P0, PT, R3, {last >> 32:#x}, PT, P0 ;
        /*0080*/ @P0 BRA 0x40 ;
        /*0090*/ EXIT ;
    """
    _, issued = counts(text, (None, last % 2**32))
    assert issued[4] == 3


PTX = """
.visible .entry kernel(
    .param .u64 kernel_param_0, .param .u32 kernel_param_1 )
    ld.param.b32 \t%r1, [kernel_param_1];
    mov.u32 %r5, %ctaid.x;
    rem.s32 %r6, %r5, 3;
    mov.b32 %r2, 0;
$L__BB0_1:
    @%p3 ld.global.v4.b32 { %r8, %r9, %r10, %r11 }, [ %rd1 + 0 ];
    add.s32 %r2, %r2, 4;
    setp.lt.s32 %p1, %r2, %r1;
    @%p1 bra $L__BB0_1;
    setp.eq.s32 %p2, %r6, 2;
    @%p2 bra $L__BB0_2;
    st.global.b16 [ %rd2 + 0 ], { %rs1 };
$L__BB0_2:
    ret;
"""


@pytest.mark.parametrize(("last", "index", "rounds", "stores"), [(4, 0, 1, 1), (9, 4, 3, 1), (9, 5, 3, 0)])
def test_ptx_is_followed(last, index, rounds, stores):
    program = ptx.Program(PTX)
    issued = ptx.path(program, ("*bf16", "i32", "i32:1"), (None, last, 1), index, 0)
    done = {access: issued[place] for place, access in enumerate(program.accesses()) if access[0]}
    assert done == {("load", 16): rounds, ("store", 2): stores}
    assert issued.total() == 7 + 4 * rounds + stores
    with pytest.raises(RuntimeError, match="a loop depends on data"):
        ptx.path(program, ("*bf16", "*i32", "i32:1"), (None, None, 1), index, 0)


def test_arguments_lie_as_a_compiler_lays_them():
    types = ("*fp32", "i32", "i32:1", "fp32", "i64", "i32:16")
    bank = walk.argument_bank(90, types, (None, 5, 1, 0.5, 2**40 + 3, -16))
    assert {place: bank[place] for place in (0x218, 0x21C, 0x220, 0x224, 0x228)} == {
        0x218: 5,
        0x21C: 0x3F000000,
        0x220: 3,
        0x224: 2**8,
        0x228: 2**32 - 16,
    }
    assert min(walk.argument_bank(80, types, (None, 5, 1, 0.5, 2, -16))) == 0x160


@pytest.mark.parametrize(
    ("architecture", "warps", "registers", "shared", "expected"),
    [
        (90, 4, 64, 0, (32, "registers")),
        (90, 8, 65, 0, (24, "registers")),
        (90, 1, 40, 0, (32, "programs")),
        (80, 8, 32, 0, (64, "registers")),
        (75, 4, 32, 0, (32, "warps")),
        (80, 4, 40, 40 * 1024, (16, "shared memory")),
    ],
)
def test_occupancy(architecture, warps, registers, shared, expected):
    """Figures of NVIDIA's occupancy calculator."""
    assert sass.resident(architecture, warps, registers, shared) == expected


@pytest.mark.slow
@pytest.mark.parametrize("op", ["gather_tokens", "masked_patch_loss"])
def test_kernels_pass_the_audit(op):
    # A process of its own: in the interpreter kernels are Python functions, which cannot be compiled.
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT / "kernels")}
    command = [sys.executable, str(ROOT / "benchmarks" / "ops" / "audit.py"), "--op", op]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert done.stdout.count(f"| `{op}` | forward |") >= 2
