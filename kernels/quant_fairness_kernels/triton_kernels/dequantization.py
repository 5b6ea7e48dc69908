"""Nibbles to 16-bit numbers inside a kernel: one 16-bit word holds the same row of four planes.

The fast branch (`ASM`) is inline PTX over pairs of words, because two 16-bit words arrive in one 32-bit register. It
builds each number from its bits: a nibble put into the low mantissa of a float with a known exponent *is* the number
`constant + nibble`, so that no integer-to-float conversion is needed. All steps are exact, so the result is the
very integer `q - z`:

* float16, exponent 0x6400 (1024): planes 0 and 2 give 1024 + q and lose 1024 + z in one subtraction; planes 1 and 3 are
  taken without a shift, give 1024 + 16 q, and one fused multiply-add (/16, minus 64 + z) turns them into q - z. One
  shift serves all four.
* bfloat16, exponent 0x4300 (128): only seven mantissa bits, so every plane is shifted to the bottom; 128 + q, minus
  128 + z by a fused multiply-add, the only packed bfloat16 arithmetic that sm_80 has.

The portable branch computes the same in float32. The interpreter needs it: it runs no inline PTX, and its own bfloat16
arithmetic is wrong (triton-lang/triton#11584).
"""

from __future__ import annotations

import triton
import triton.language as tl

FLOAT16_ASM = tl.constexpr("""
{
 .reg .b32 high, a0, a1, a2, a3, sixteenth;
 mov.b32 sixteenth, 0x2c002c00;
 shr.u32 high, $4, 8;
 lop3.b32 a0, $4,   0x000f000f, 0x64006400, 0xea;
 lop3.b32 a1, $4,   0x00f000f0, 0x64006400, 0xea;
 lop3.b32 a2, high, 0x000f000f, 0x64006400, 0xea;
 lop3.b32 a3, high, 0x00f000f0, 0x64006400, 0xea;
 sub.f16x2 $0, a0, $5;
 fma.rn.f16x2 $1, a1, sixteenth, $6;
 sub.f16x2 $2, a2, $7;
 fma.rn.f16x2 $3, a3, sixteenth, $8;
}
""")
BFLOAT16_ASM = tl.constexpr("""
{
 .reg .b32 s1, s2, s3, a0, a1, a2, a3, one;
 mov.b32 one, 0x3f803f80;
 shr.u32 s1, $4, 4;
 shr.u32 s2, $4, 8;
 shr.u32 s3, $4, 12;
 lop3.b32 a0, $4, 0x000f000f, 0x43004300, 0xea;
 lop3.b32 a1, s1, 0x000f000f, 0x43004300, 0xea;
 lop3.b32 a2, s2, 0x000f000f, 0x43004300, 0xea;
 lop3.b32 a3, s3, 0x000f000f, 0x43004300, 0xea;
 fma.rn.bf16x2 $0, a0, one, $5;
 fma.rn.bf16x2 $1, a1, one, $6;
 fma.rn.bf16x2 $2, a2, one, $7;
 fma.rn.bf16x2 $3, a3, one, $8;
}
""")


@triton.jit
def centred_planes(words, z0, z1, z2, z3, COMPUTE: tl.constexpr, ASM: tl.constexpr):
    """The four planes of `words` minus their zero points, as exact integers in the type `COMPUTE`.

    `words`: int16 tile. `z0`..`z3`: zero points in 16 bit, broadcastable to the tile, one per plane.
    """
    if not ASM:
        bits = words.to(tl.int32)
        w0 = ((bits & 0xF).to(tl.float32) - z0.to(tl.float32)).to(COMPUTE)
        w1 = (((bits >> 4) & 0xF).to(tl.float32) - z1.to(tl.float32)).to(COMPUTE)
        w2 = (((bits >> 8) & 0xF).to(tl.float32) - z2.to(tl.float32)).to(COMPUTE)
        w3 = (((bits >> 12) & 0xF).to(tl.float32) - z3.to(tl.float32)).to(COMPUTE)
    elif COMPUTE == tl.float16:
        w0, w1, w2, w3 = tl.inline_asm_elementwise(
            FLOAT16_ASM,
            "=r,=r,=r,=r,r,r,r,r,r",
            [words, z0 + 1024.0, -(z1 + 64.0), z2 + 1024.0, -(z3 + 64.0)],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    else:
        w0, w1, w2, w3 = tl.inline_asm_elementwise(
            BFLOAT16_ASM,
            "=r,=r,=r,=r,r,r,r,r,r",
            [words, -(z0 + 128.0), -(z1 + 128.0), -(z2 + 128.0), -(z3 + 128.0)],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
    return w0, w1, w2, w3
