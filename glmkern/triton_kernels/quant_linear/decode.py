"""Codes of 4 and 8 bits in a kernel; their format is in glmkern/ops/quant_linear.py."""

import triton
import triton.language as tl

# Triton's interpreter has no PTX; it runs the same formulas in Triton's own words.
HAS_PTX = tl.constexpr(not triton.knobs.runtime.interpret)


@triton.jit
def mask_and_flip(b_words, MASK: tl.constexpr, FLIPPED: tl.constexpr):
    """(b_words & MASK) ^ FLIPPED for integers of 32 bits, in one instruction: the compiler takes
    two where both are constants."""
    if HAS_PTX:
        return tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, $3, 0x6A;",
            "=r,r,r,r",
            [b_words, MASK, FLIPPED],
            tl.int32,
            True,
            1,
        )
    else:
        return (b_words & MASK) ^ FLIPPED


@triton.jit
def decode_field(b_words, SHIFT: tl.constexpr, BITS: tl.constexpr):
    """What BITS bits of 32-bit integers, from bit SHIFT on, stand for in two's complement, in fp32.

    A field n and the code q that it stands for have n ^ 2^(BITS-1) = q + 2^(BITS-1). In the
    mantissa of 2^23 that is the float 2^23 + 2^SHIFT (q + 2^(BITS-1)), of which one exact fma makes
    q. So a code takes two or three instructions at the full rate. Extracting and converting it
    takes as many, but on sm_80 to 89 a conversion has at most a quarter of the rate, which would
    set the time.
    """
    # such a field would reach into the exponent
    HIGH: tl.constexpr = SHIFT + BITS > 23
    LOW: tl.constexpr = SHIFT - 16 if HIGH else SHIFT
    MASK: tl.constexpr = (2**BITS - 1) * 2**LOW
    MAGIC: tl.constexpr = 0x4B000000 + 2 ** (LOW + BITS - 1)
    b_low = b_words >> 16 if HIGH else b_words
    b_float = mask_and_flip(b_low, MASK, MAGIC).to(tl.float32, bitcast=True)
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


def decode_ptx(kind: str, magic: str, one: str, minus_bias: str, joined: bool) -> tl.constexpr:
    """PTX that decodes the eight codes of the four bytes $4 to `kind`, two numbers a register:
    the even columns of the four bytes to $0 and $1, the odd ones to $2 and $3.

    The codes go to the low four bits of a register's halves; there a lop3 makes numbers of them as
    in `decode`, and an fma subtracts the bias: 9 logic instructions and 4 fma, half of what Triton
    makes of `decode`. `joined` is for columns that are put side by side again afterwards: they
    are decoded in that order, and ptxas sees that both exchanges together change nothing.
    """
    picks = (
        [("h, $4", i, 4 + i) for i in range(4)]
        if joined
        else [(f"{source}, {source}", i, i + 1) for source in ("h", "$4") for i in (0, 2)]
    )
    lines = [
        ".reg .b32 h, one, minus_bias, w<4>;",
        ".reg .b16 e<4>, o<4>;",
        "shr.u32 h, $4, 4;",
        f"mov.b32 one, {one};",
        f"mov.b32 minus_bias, {minus_bias};",
    ]
    for i, (sources, low, high) in enumerate(picks):
        lines += [
            f"prmt.b32 w{i}, {sources}, 0x0{high}0{low};",
            f"lop3.b32 w{i}, w{i}, 0x000F000F, {magic}, 0x6A;",  # (a & b) ^ c
            f"fma.rn.{kind}x2 w{i}, w{i}, one, minus_bias;",
        ]
    results = [f"w{i}" for i in range(4)]
    if joined:
        lines += [f"mov.b32 {{e{i}, o{i}}}, w{i};" for i in range(4)]
        results = ["{e0, e1}", "{e2, e3}", "{o0, o1}", "{o2, o3}"]
    lines += [f"mov.b32 ${i}, {result};" for i, result in enumerate(results)]
    return tl.constexpr("{" + " ".join(lines) + "}")


# 2^10 + 8 in either half, 1, and -(2^10 + 8); bfloat16's 2^7.
F16 = ("f16", "0x64086408", "0x3C003C00", "0xE408E408")
BF16 = ("bf16", "0x43084308", "0x3F803F80", "0xC308C308")
SPLIT_F16, JOINED_F16 = (decode_ptx(*F16, joined) for joined in (False, True))
SPLIT_BF16, JOINED_BF16 = (decode_ptx(*BF16, joined) for joined in (False, True))


@triton.jit
def decode_pair(b_packed, dtype: tl.constexpr, JOINED: tl.constexpr = False):
    """The codes of the even and of the odd columns that bytes hold; JOINED says that tl.join puts
    them side by side."""
    if not HAS_PTX or dtype == tl.float32:
        return decode(b_packed >> 4, dtype), decode(b_packed, dtype)
    elif dtype == tl.float16:
        return tl.inline_asm_elementwise(
            JOINED_F16 if JOINED else SPLIT_F16,
            "=&r,=&r,=&r,=&r,r",
            [b_packed],
            (tl.float16, tl.float16),
            True,
            4,
        )
    else:
        return tl.inline_asm_elementwise(
            JOINED_BF16 if JOINED else SPLIT_BF16,
            "=&r,=&r,=&r,=&r,r",
            [b_packed],
            (tl.bfloat16, tl.bfloat16),
            True,
            4,
        )


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
