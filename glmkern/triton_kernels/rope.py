"""Rotary position embedding and its fused forms around query_key_value; the formulas are in
glmkern/ops/rope.py.

A program owns one token and BN of its heads, so that the token's angles are loaded once for all of
them. A block holds whole heads as they lie in memory; the two channels of a pair are next to each
other, in one thread, and are split and joined in its registers. BC is the number of channels,
rounded up to a power of 2.
"""

import triton
import triton.language as tl
from torch import Tensor

from glmkern.triton_kernels.launch import contiguous, launch

# At most 16 elements a thread of 4 warps: two 16-byte loads in half precision, four in fp32.
MAX_ELEMENTS = 2048


@triton.jit
def load_angles(cos_sin, positions, i_t, R: tl.constexpr, BC: tl.constexpr):
    """cos and sin of token i_t's angles, two [1, BC / 2] in fp32."""
    o_c = tl.arange(0, BC)
    p_row = cos_sin + tl.load(positions + i_t) * (2 * R)
    # [1, BC]
    b_angles = tl.load(p_row + o_c, mask=o_c < 2 * R, other=0.0).to(tl.float32)[None, :]
    return tl.split(tl.reshape(b_angles, [1, BC // 2, 2]))


@triton.jit
def rotate(
    b_x,
    b_cos,
    b_sin,
    m_n,
    R: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    INVERSE: tl.constexpr,
):
    """b_x [BN, BC] with the first 2R channels of the heads m_n [BN] rotated, the rest as it is."""
    # [BN, BC / 2]
    b_even, b_odd = tl.split(tl.reshape(b_x, [BN, BC // 2, 2]))
    m_pair = m_n[:, None] & (tl.arange(0, BC // 2) < R)[None, :]
    if INVERSE:
        b_sin = -b_sin
    b_first = tl.where(m_pair, b_even * b_cos - b_odd * b_sin, b_even)
    b_second = tl.where(m_pair, b_odd * b_cos + b_even * b_sin, b_odd)
    # [BN, BC]
    return tl.reshape(tl.join(b_first, b_second), [BN, BC])


@triton.jit
def head_offsets(o_n, stride, C: tl.constexpr, BC: tl.constexpr):
    """Offsets of the channels of heads o_n, `stride` elements apart, and which channels exist."""
    o_c = tl.arange(0, BC)
    # [BN, BC], [1, BC]
    return o_n[:, None] * stride + o_c[None, :], (o_c < C)[None, :]


@triton.jit
def part_of_heads(o_n, N: tl.constexpr, G: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Of heads o_n in a row of qkv: their parts, 0 (q), 1 (k), 2 (v) or 3 (none: past the row),
    and their places within these."""
    if INTERLEAVED:
        return tl.where(o_n < 3 * N, o_n % 3, 3), o_n // 3
    b_part = (o_n >= N).to(tl.int32) + (o_n >= N + G).to(tl.int32) + (o_n >= N + 2 * G).to(tl.int32)
    return b_part, tl.where(o_n < N, o_n, (o_n - N) % G)


@triton.jit
def rope_kernel(
    x,
    cos_sin,
    positions,
    y,
    s_xt,
    s_xn,
    N: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    INVERSE: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
):
    """y [T, N, C], contiguous, is x, of any strides of tokens and heads, rotated."""
    i_t = tl.program_id(0).to(tl.int64)
    # [BN]
    o_n = tl.program_id(1) * BN + tl.arange(0, BN)
    m_n = o_n < N
    b_cos, b_sin = load_angles(cos_sin, positions, i_t, R, BC)
    # [BN, BC]
    o_x, m_c = head_offsets(o_n.to(tl.int64), s_xn, C, BC)
    b_x = tl.load(x + i_t * s_xt + o_x, mask=m_n[:, None] & m_c, other=0.0).to(tl.float32)
    b_y = rotate(b_x, b_cos, b_sin, m_n, R, BN, BC, INVERSE)
    o_y, _ = head_offsets(o_n, C, C, BC)
    tl.store(y + i_t * (N * C) + o_y, b_y, mask=m_n[:, None] & m_c)


@triton.jit
def qkv_rope_fwd_kernel(
    qkv,
    bias,
    cos_sin,
    positions,
    q,
    k,
    v,
    slots,
    s_qkv,
    N: tl.constexpr,
    G: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    SK: tl.constexpr,
    SV: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
):
    """q [T, N, C] and the entries `slots` of k and v [entries, G, C], SK and SV elements apart, or
    all of them in order, of rows of qkv plus bias; q and k are rotated."""
    i_t = tl.program_id(0).to(tl.int64)
    i_s = i_t
    if slots is not None:
        i_s = tl.load(slots + i_t)
    # [BN]
    o_n = tl.program_id(1) * BN + tl.arange(0, BN)
    b_part, o_p = part_of_heads(o_n, N, G, INTERLEAVED)
    b_cos, b_sin = load_angles(cos_sin, positions, i_t, R, BC)
    # [BN, BC]
    o_x, m_c = head_offsets(o_n, C, C, BC)
    m_x = (b_part < 3)[:, None] & m_c
    b_x = tl.load(qkv + i_t * s_qkv + o_x, mask=m_x, other=0.0).to(tl.float32)
    if bias is not None:
        b_x += tl.load(bias + o_x, mask=m_x, other=0.0).to(tl.float32)
    b_y = rotate(b_x, b_cos, b_sin, b_part < 2, R, BN, BC, False)
    o_y, _ = head_offsets(o_p, C, C, BC)
    tl.store(q + i_t * (N * C) + o_y, b_y, mask=(b_part == 0)[:, None] & m_c)
    tl.store(k + i_s * SK + o_y, b_y, mask=(b_part == 1)[:, None] & m_c)
    tl.store(v + i_s * SV + o_y, b_y, mask=(b_part == 2)[:, None] & m_c)


@triton.jit
def load_part(base, i_t, o_p, m_p, s_t, s_n, C: tl.constexpr, BC: tl.constexpr):
    """Heads o_p of token i_t where m_p [BN]; zero elsewhere."""
    # [BN, BC]
    o_x, m_c = head_offsets(o_p.to(tl.int64), s_n, C, BC)
    return tl.load(base + i_t * s_t + o_x, mask=m_p[:, None] & m_c, other=0.0).to(tl.float32)


@triton.jit
def qkv_rope_bwd_kernel(
    dq,
    dk,
    dv,
    cos_sin,
    positions,
    dqkv,
    s_dqt,
    s_dqn,
    s_dkt,
    s_dkn,
    s_dvt,
    s_dvn,
    N: tl.constexpr,
    G: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
):
    """dqkv, contiguous, is dq and dk, rotated back, and dv, each of any strides of tokens and
    heads."""
    i_t = tl.program_id(0).to(tl.int64)
    # [BN]
    o_n = tl.program_id(1) * BN + tl.arange(0, BN)
    b_part, o_p = part_of_heads(o_n, N, G, INTERLEAVED)
    b_cos, b_sin = load_angles(cos_sin, positions, i_t, R, BC)
    # [BN, BC]
    b_dq = load_part(dq, i_t, o_p, b_part == 0, s_dqt, s_dqn, C, BC)
    b_dk = load_part(dk, i_t, o_p, b_part == 1, s_dkt, s_dkn, C, BC)
    b_dv = load_part(dv, i_t, o_p, b_part == 2, s_dvt, s_dvn, C, BC)
    b_dy = tl.where((b_part == 0)[:, None], b_dq, tl.where((b_part == 1)[:, None], b_dk, b_dv))
    b_dx = rotate(b_dy, b_cos, b_sin, b_part < 2, R, BN, BC, True)
    o_x, m_c = head_offsets(o_n, C, C, BC)
    m_x = (b_part < 3)[:, None] & m_c
    tl.store(dqkv + i_t * ((N + 2 * G) * C) + o_x, b_dx, mask=m_x)


def rope_fwd(x: Tensor, cos_sin: Tensor, positions: Tensor) -> Tensor:
    return _rotated(x, cos_sin, positions, inverse=False)


def rope_bwd(dy: Tensor, cos_sin: Tensor, positions: Tensor) -> Tensor:
    return _rotated(dy, cos_sin, positions, inverse=True)


def _rotated(x: Tensor, cos_sin: Tensor, positions: Tensor, inverse: bool) -> Tensor:
    x, cos_sin, positions = _contiguous_channels(x), *_angles(cos_sin, positions)
    T, N, C = x.shape
    y = x.new_empty(T, N, C)
    _launch(
        rope_kernel,
        (T, N, C),
        x,
        cos_sin,
        positions,
        y,
        *x.stride()[:2],
        N=N,
        C=C,
        R=cos_sin.shape[1],
        INVERSE=inverse,
    )
    return y


def qkv_rope_fwd(
    qkv: Tensor,
    bias: Tensor | None,
    cos_sin: Tensor,
    positions: Tensor,
    heads: int,
    groups: int,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    C = qkv.shape[1] // (heads + 2 * groups)
    q, k, v = (qkv.new_empty(len(qkv), n, C) for n in (heads, groups, groups))
    _rotate_qkv(qkv, bias, cos_sin, positions, interleaved, q, k, v, None)
    return q, k, v


def qkv_rope_cache_fwd(
    qkv: Tensor,
    bias: Tensor | None,
    cos_sin: Tensor,
    positions: Tensor,
    heads: int,
    groups: int,
    interleaved: bool,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
) -> Tensor:
    if not keys[:1].is_contiguous() or not values[:1].is_contiguous():
        rotation = (bias, cos_sin, positions, heads, groups, interleaved)
        q, k, v = qkv_rope_fwd(qkv, *rotation)
        keys.index_copy_(0, slots, k)
        values.index_copy_(0, slots, v)
        return q
    q = qkv.new_empty(len(qkv), heads, qkv.shape[1] // (heads + 2 * groups))
    _rotate_qkv(qkv, bias, cos_sin, positions, interleaved, q, keys, values, slots.contiguous())
    return q


def _rotate_qkv(
    qkv: Tensor,
    bias: Tensor | None,
    cos_sin: Tensor,
    positions: Tensor,
    interleaved: bool,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Tensor | None,
) -> None:
    """Writes q [T, N, C], and k and v [entries, G, C] at `slots`, or all of them."""
    qkv, cos_sin, positions = _contiguous_channels(qkv), *_angles(cos_sin, positions)
    (bias,) = contiguous(bias)
    (T, N, C), G = q.shape, k.shape[1]
    _launch(
        qkv_rope_fwd_kernel,
        (T, N + 2 * G, C),
        qkv,
        bias,
        cos_sin,
        positions,
        q,
        k,
        v,
        slots,
        qkv.stride(0),
        N=N,
        G=G,
        C=C,
        R=cos_sin.shape[1],
        SK=k.stride(0),
        SV=v.stride(0),
        INTERLEAVED=interleaved,
    )


def qkv_rope_bwd(
    dq: Tensor, dk: Tensor, dv: Tensor, cos_sin: Tensor, positions: Tensor, interleaved: bool
) -> Tensor:
    parts = [_contiguous_channels(x) for x in (dq, dk, dv)]
    cos_sin, positions = _angles(cos_sin, positions)
    (T, N, C), G = dq.shape, dk.shape[1]
    dqkv = dq.new_empty(T, (N + 2 * G) * C)
    strides = [stride for x in parts for stride in x.stride()[:2]]
    _launch(
        qkv_rope_bwd_kernel,
        (T, N + 2 * G, C),
        *parts,
        cos_sin,
        positions,
        dqkv,
        *strides,
        N=N,
        G=G,
        C=C,
        R=cos_sin.shape[1],
        INTERLEAVED=interleaved,
    )
    return dqkv


def _contiguous_channels(x: Tensor) -> Tensor:
    """x itself where its channels are contiguous, else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _angles(cos_sin: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    return contiguous(cos_sin, positions)


def _launch(kernel: triton.JITFunction, shape: tuple[int, int, int], *args, **constants) -> None:
    """Starts a program for each token and block of heads of [T, heads, C]."""
    T, heads, C = shape
    BC = max(triton.next_power_of_2(C), 2)
    BN = min(triton.next_power_of_2(max(heads, 1)), max(MAX_ELEMENTS // BC, 1))
    launch(kernel, (T, triton.cdiv(heads, BN)), *args, **constants, BN=BN, BC=BC, num_warps=4)
