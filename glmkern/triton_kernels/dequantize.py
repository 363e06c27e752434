"""Codes of 4 and 8 bits in a kernel; their format is in glmkern/ops/quant_linear.py."""

import triton
import triton.language as tl


@triton.jit
def decode_field(b_words, SHIFT: tl.constexpr, BITS: tl.constexpr):
    """What BITS bits of 32-bit integers, from bit SHIFT on, stand for in two's complement, in fp32.

    A field n and the code q that it stands for have n ^ 2^(BITS-1) = q + 2^(BITS-1). In the
    mantissa of 2^23 that is the float 2^23 + 2^SHIFT (q + 2^(BITS-1)), of which one exact fma makes
    q. So a code takes two or three instructions at the full rate; extracting and converting it
    takes as many, but a conversion has a quarter of the rate or less on sm_80 to 89, and would set
    the time there.
    """
    # such a field would reach into the exponent
    HIGH: tl.constexpr = SHIFT + BITS > 23
    LOW: tl.constexpr = SHIFT - 16 if HIGH else SHIFT
    MASK: tl.constexpr = (2**BITS - 1) * 2**LOW
    MAGIC: tl.constexpr = 0x4B000000 + 2 ** (LOW + BITS - 1)
    b_low = b_words >> 16 if HIGH else b_words
    b_float = ((b_low & MASK) ^ MAGIC).to(tl.float32, bitcast=True)
    return b_float * (1.0 / 2**LOW) - (2.0 ** (23 - LOW) + 2 ** (BITS - 1))


@triton.jit
def decode(b_bits, dtype: tl.constexpr):
    """What the low four bits of integers stand for; exact in every dtype. The half precisions have
    magic numbers of their own, so that one instruction subtracts them from two codes."""
    if dtype == tl.float16:
        b_biased = (b_bits.to(tl.int16) & 0xF) ^ 0x6408
        return b_biased.to(tl.float16, bitcast=True) - 1032.0
    elif dtype == tl.bfloat16:
        b_biased = (b_bits.to(tl.int16) & 0xF) ^ 0x4308
        return b_biased.to(tl.bfloat16, bitcast=True) - 136.0
    else:
        return decode_field(b_bits.to(tl.int32), 0, 4)


@triton.jit
def decode_pair(b_packed, dtype: tl.constexpr):
    """The codes of the even and of the odd columns that bytes hold."""
    return decode(b_packed >> 4, dtype), decode(b_packed, dtype)


@triton.jit(do_not_specialize=["N"])
def dequantize_kernel(
    packed,
    scale,
    w,
    N,
    STRIDE: tl.constexpr,
    C: tl.constexpr,
    BITS: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
):
    """w = code * scale, rounded once; N rows of C bytes, which lie STRIDE bytes apart."""
    # [BN]
    o_n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    o_c = tl.program_id(1) * BC + tl.arange(0, BC)
    # [BN, BC]
    m_nc = (o_n[:, None] < N) & (o_c[None, :] < C)
    b_packed = tl.load(packed + o_n[:, None] * STRIDE + o_c[None, :], mask=m_nc, other=0)
    # [BN, 1]
    b_scale = tl.load(scale + o_n, mask=o_n < N, other=0.0).to(tl.float32)[:, None]
    if BITS == 8:
        tl.store(w + o_n[:, None] * C + o_c[None, :], b_packed.to(tl.float32) * b_scale, mask=m_nc)
    else:
        b_even, b_odd = decode_pair(b_packed, tl.float32)
        # [BN, 2 BC]
        b_w = tl.join(b_even * b_scale, b_odd * b_scale).reshape(BN, 2 * BC)
        o_k = tl.program_id(1) * (2 * BC) + tl.arange(0, 2 * BC)
        m_nk = (o_n[:, None] < N) & (o_k[None, :] < 2 * C)
        tl.store(w + o_n[:, None] * (2 * C) + o_k[None, :], b_w, mask=m_nk)
