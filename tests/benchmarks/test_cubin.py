"""Reading of SASS, on a kernel written down by hand."""

from __future__ import annotations

from benchmarks.cubin import in_loops, parse, read_code, read_resources, wide_share

# A loop from 0x0030 to 0x0080; its cold block lies behind the code that follows the loop, and jumps back into it.
SASS = """
	code for sm_90a
		Function : kernel
	.headerflags	@"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;            /* 0x00000a00ff017b82 */
                                                                     /* 0x000fe20000000800 */
        /*0010*/              @!P1 LDG.E.U16 R7, desc[UR4][R2.64] ;  /* 0x0000000402071981 */
        /*0020*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;     /* 0x0000000000007b1d */
        /*0030*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;  /* 0x0000000402047981 */
        /*0040*/                   LDG.E R8, desc[UR4][R2.64+0x4] ;  /* 0x0000000402087981 */
        /*0050*/              @P2  BRA 0xd0 ;                        /* 0x0000000000202947 */
        /*0060*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;     /* 0x0000000000007b1d */
        /*0070*/                   LDGSTS.E.BYPASS.128 [R9], desc[UR4][R2.64] ; /* 0x0000000402097fae */
        /*0080*/              @!UP0 BRA 0x30 ;                       /* 0xfffffff400480947 */
        /*0090*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;     /* 0x0000000000007b1d */
        /*00a0*/                   STG.E.64 desc[UR4][R2.64], R4 ;   /* 0x0000000402007986 */
        /*00b0*/                   RED.E.ADD.STRONG.GPU desc[UR4][R2.64], R4 ; /* 0x00000004020079a6 */
        /*00c0*/                   EXIT ;                            /* 0x000000000000794d */
        /*00d0*/                   STL [R1], R4 ;                    /* 0x0000000401007387 */
        /*00e0*/                   LDL R4, [R1] ;                    /* 0x0000000001047983 */
        /*00f0*/                   BRA 0x60 ;                        /* 0xfffffffc00fc7947 */
        /*0100*/                   BRA 0x100;                        /* 0xfffffffc00fc7947 */
"""


def test_counts_of_a_kernel() -> None:
    code = read_code(SASS)
    assert code.instructions == 17
    assert code.loads == {2: 1, 4: 1, 16: 2}
    assert code.stores == {8: 1}
    assert (code.spills, code.atomics) == (2, 1)


def test_barriers_in_loops_leave_out_those_around_them() -> None:
    code = read_code(SASS)
    assert (code.barriers, code.barriers_in_loop) == (3, 1)
    # Also the cold block is in the loop; what lies between the two, and the trap at the end, are not.
    assert in_loops(parse(SASS)) == {0x30, 0x40, 0x50, 0x60, 0x70, 0x80, 0xD0, 0xE0, 0xF0}


def test_share_of_16_byte_accesses() -> None:
    assert wide_share({2: 1, 4: 1, 16: 2}) == 0.84  # 32 / 38
    assert wide_share({}) == 1.0


def test_resources() -> None:
    usage = "Function kernel:\n  REG:59 STACK:8 SHARED:1024 LOCAL:0 CONSTANT[0]:608 TEXTURE:0"
    assert read_resources(usage) == {"REG": 59, "STACK": 8, "LOCAL": 0}
