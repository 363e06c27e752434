"""Causal attention of packed sequences over a shared prefix, with grouped heads.

Every token sees the whole prefix and the tokens of its own sequence up to itself. The prefix is one
more segment of keys and values, stored once and shared by the whole batch. Kernels never
concatenate or expand it; the reference does, a sequence at a time.
With P = exp(scale * q k^T - lse) over both segments and D = rowsum(dO * O), each segment has

    dS = P * (dO v^T - D),   dq += scale * dS k,   dk = scale * dS^T q,   dv = P^T dO

summed over the query heads of a group, and for the prefix also over the batch.
"""

from typing import Any

import torch
from torch import Tensor

from glmkern.dispatch import capability, define_op
from glmkern.ops.checks import (
    accumulate_dtype,
    check,
    check_device,
    check_floating,
    check_same,
    supports_of_kernels,
)
from glmkern.ops.philox import check_dropout
from glmkern.ops.prefix_attention_reference import (
    prefix_attention_bwd_reference,
    prefix_attention_decode_reference,
    prefix_attention_fwd_reference,
)
from glmkern.ops.sequences import check_spans, complete_sequences


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor | None = None,
    prefix_v: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    prefix_dropout: float = 0.0,
    seed: Tensor | None = None,
    sequence_ids: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over prefix and tokens, causal within each sequence.

    Args:
        q: [T, N, C], float32, float16, bfloat16 or float64.
        k, v: [T, G, C], q's dtype; N is a multiple of G, query head n reads group n // (N / G).
        prefix_k, prefix_v: [P, G, C] or None. May be float32 beside half q, k, v: rounded to q's
            dtype on load; the gradient has the prefix's own dtype, accumulated in float32.
        cu_seqlens: int32 [B+1], where the sequences end; None: one sequence.
        scale: factor of q k^T; None: 1 / sqrt(C).
        prefix_dropout: probability of dropping an element of the prefix, in [0, 1), each sequence
            with its own mask; element ((kv * P + p) * G + g) * C + c, kv 0 for keys (philox.py).
        seed: int64 [2] = (seed, offset) where prefix_dropout > 0.
        sequence_ids: int64 [B], the sequences' names for dropout; None: 0 .. B-1.
        return_lse: also return the log-sum-exp of the scaled scores, natural log.

    Returns:
        [T, N, C] in q's dtype (and lse [T, N], float32; float64 for float64). Differentiable in q,
        k, v, prefix_k and prefix_v; lse is not differentiable.

    Raises:
        ValueError: shapes, dtypes, devices, dropout or sequences do not fit.
    """
    op = "prefix_attention"
    _check_heads(op, q, k, v, prefix_k, prefix_v)
    check(
        q.shape[0] == k.shape[0] and q.shape[0] > 0,
        lambda: (
            f"{op}: q has {q.shape[0]} tokens "
            f"and k {k.shape[0]}; both must have the same number, at least one"
        ),
    )
    check_dropout(op, q, prefix_dropout, seed)
    cu_seqlens, sequence_ids = complete_sequences(op, q, cu_seqlens, sequence_ids)
    if prefix_k is not None and prefix_v is not None:
        prefix_k, prefix_v = prefix_k.contiguous(), prefix_v.contiguous()
    out, lse = torch.ops.glmkern.prefix_attention_fwd(
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        prefix_k,
        prefix_v,
        cu_seqlens,
        sequence_ids,
        seed,
        _default_scale(q, scale),
        prefix_dropout,
    )
    return (out, lse) if return_lse else out


def prefix_attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_lens: Tensor,
    prefix_k: Tensor | None = None,
    prefix_v: Tensor | None = None,
    *,
    q_lens: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention of new tokens over a cache that already holds their keys and values.

    Bottom-right causal: the last query of a row sees its whole cache, the one before it all but the
    last entry, and so on; every query sees the prefix.

    Args:
        q: [B, S, N, C]; k_cache, v_cache: [B, L, G, C], q's dtype.
        cache_lens: int64 [B], valid entries of each row's cache, the new tokens included.
        prefix_k, prefix_v: [P, G, C] or None, as in prefix_attention.
        q_lens: int64 [B], valid queries of each row (the first ones); None: S. The output of the
            others is zero.
        scale: factor of q k^T; None: 1 / sqrt(C).

    Returns:
        [B, S, N, C] in q's dtype; not differentiable.

    Raises:
        ValueError: shapes, dtypes, devices or (on the CPU, or under GLMKERN_CHECK=1) lengths do
        not fit.
    """
    op = "prefix_attention_decode"
    check(
        q.dim() == 4
        and k_cache.dim() == 4
        and q.shape[0] == k_cache.shape[0] > 0
        and k_cache.shape == v_cache.shape,
        lambda: (
            f"{op}: q must be [B, S, N, C] and the "
            f"caches [B, L, G, C], not {tuple(q.shape)}, {tuple(k_cache.shape)} and "
            f"{tuple(v_cache.shape)}"
        ),
    )
    _check_heads(op, q[0], k_cache[0], v_cache[0], prefix_k, prefix_v)
    if q_lens is None:
        q_lens = torch.full_like(cache_lens, q.shape[1])
    for name, lens in (("cache_lens", cache_lens), ("q_lens", q_lens)):
        check_device(op, name, lens, "q", q)
        if lens.shape != q.shape[:1] or lens.dtype != torch.int64:
            raise ValueError(
                f"{op}: {name} must be int64 [{q.shape[0]}], one a row, not {lens.dtype} "
                f"{list(lens.shape)}"
            )
    return torch.ops.glmkern.prefix_attention_decode_fwd(
        q.contiguous(),
        k_cache,
        v_cache,
        cache_lens,
        prefix_k,
        prefix_v,
        q_lens,
        _default_scale(q, scale),
    )


def _default_scale(q: Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale


def _check_heads(
    op: str, q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor | None, prefix_v: Tensor | None
) -> None:
    check_floating(op, "q", q)
    check_same(op, "k", k, "q", q)
    check_same(op, "v", v, "q", q)
    check(
        q.dim() == 3 and k.dim() == 3 and k.shape == v.shape and k.shape[2] == q.shape[2],
        lambda: (
            f"{op}: q must be [T, N, C] and k, v [T, G, C], not {tuple(q.shape)}, "
            f"{tuple(k.shape)} and {tuple(v.shape)}"
        ),
    )
    check(
        k.shape[1] > 0 and q.shape[1] % k.shape[1] == 0,
        lambda: (
            f"{op}: the number of query "
            f"heads, {q.shape[1]}, must be a multiple of the number of groups, {k.shape[1]}"
        ),
    )
    if prefix_k is None and prefix_v is None:
        return
    if prefix_k is None or prefix_v is None:
        raise ValueError(f"{op}: give both prefix_k and prefix_v, or neither")
    check(
        prefix_k.dim() == 3
        and prefix_k.shape == prefix_v.shape
        and prefix_k.shape[1:] == k.shape[1:],
        lambda: (
            f"{op}: prefix_k and prefix_v must be "
            f"[P, {k.shape[1]}, {k.shape[2]}], not {tuple(prefix_k.shape)} and "
            f"{tuple(prefix_v.shape)}"
        ),
    )
    check_same(op, "prefix_v", prefix_v, "prefix_k", prefix_k)
    check_device(op, "prefix_k", prefix_k, "q", q)
    check(
        prefix_k.dtype in (q.dtype, torch.float32),
        lambda: f"{op}: the prefix must be float32 or q's {q.dtype}, not {prefix_k.dtype}",
    )


def _check_fwd_values(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    cu_seqlens: Tensor,
    *_: object,
) -> None:
    check_spans("prefix_attention", cu_seqlens, len(q))


def _check_bwd_values(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    *_: object,
) -> None:
    check_spans("prefix_attention", cu_seqlens, len(q))


def _check_decode_values(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_lens: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    q_lens: Tensor,
    scale: float,
) -> None:
    """Raises ValueError where a row's lengths do not fit its queries or its cache; reads the values
    back from the device."""
    queries, entries = q.shape[1], k_cache.shape[1]
    for b, (new, length) in enumerate(zip(q_lens.tolist(), cache_lens.tolist(), strict=True)):
        if not (0 < new <= min(length, queries) and length <= entries):
            raise ValueError(
                f"prefix_attention_decode: row {b} has {new} of {queries} queries and {length} of "
                f"{entries} cache entries; 1 <= queries <= entries must hold"
            )


def _fwd_fake(q: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=accumulate_dtype(q))


def _bwd_fake(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    sequence_ids: Tensor,
    seed: Tensor | None,
    scale: float,
    p: float,
    token_grad: bool,
    prefix_grad: bool,
) -> tuple[Tensor, ...]:
    tokens = [x.new_empty(x.shape if token_grad else 0) for x in (q, k, v)]
    if prefix_grad and prefix_k is not None and prefix_v is not None:
        return *tokens, prefix_k.new_empty(prefix_k.shape), prefix_v.new_empty(prefix_v.shape)
    return *tokens, q.new_empty(0), q.new_empty(0)


def _decode_fake(q: Tensor, *_: object) -> Tensor:
    return q.new_empty(q.shape)


def _cuda_first(q: Tensor, *_: object) -> bool:
    """On chips with mma.sync, the compiled code of CUDA C++ is predicted to take 0.6 to 0.97 times
    as long as Triton's (bench/results/cuda_attention.md)."""
    products = q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] <= 128
    return products and (8, 0) <= capability(q.device) < (9, 0)


# The token gradients are empty unless token_grad (the first layer needs none), the prefix's
# unless prefix_grad.
define_op(
    "prefix_attention_bwd",
    "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor? prefix_k,"
    " Tensor? prefix_v, Tensor out, Tensor lse, Tensor cu_seqlens, Tensor sequence_ids,"
    " Tensor? seed, float scale, float p, bool token_grad, bool prefix_grad)"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dprefix_k, Tensor dprefix_v)",
    module="prefix_attention",
    reference=prefix_attention_bwd_reference,
    fake=_bwd_fake,
    supports=supports_of_kernels(),
    check_values=_check_bwd_values,
    reference_reads_values=True,
    cuda_first=_cuda_first,
)
define_op(
    "prefix_attention_decode_fwd",
    "(Tensor q, Tensor k_cache, Tensor v_cache,"
    " Tensor cache_lens, Tensor? prefix_k, Tensor? prefix_v, Tensor q_lens, float scale)"
    " -> Tensor",
    module="prefix_attention",
    reference=prefix_attention_decode_reference,
    fake=_decode_fake,
    supports=supports_of_kernels(),
    check_values=_check_decode_values,
    reference_reads_values=True,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, prefix_k, prefix_v, cu_seqlens, sequence_ids, seed, ctx.scale, ctx.p = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, prefix_k, prefix_v, out, lse, cu_seqlens, sequence_ids, seed)


def _backward(ctx: Any, dout: Tensor, _dlse: Tensor) -> tuple[Tensor | None, ...]:
    token_grad, prefix_grad = any(ctx.needs_input_grad[:3]), any(ctx.needs_input_grad[3:5])
    grads = torch.ops.glmkern.prefix_attention_bwd(
        dout.contiguous(), *ctx.saved_tensors, ctx.scale, ctx.p, token_grad, prefix_grad
    )
    tokens = grads[:3] if token_grad else (None,) * 3
    prefix = grads[3:] if prefix_grad else (None,) * 2
    return *tokens, *prefix, None, None, None, None, None


# q, k, v (and dout) may be slices of one wider row: heads and channels are contiguous, tokens may
# be further apart.
define_op(
    "prefix_attention_fwd",
    "(Tensor q, Tensor k, Tensor v, Tensor? prefix_k,"
    " Tensor? prefix_v, Tensor cu_seqlens, Tensor sequence_ids, Tensor? seed, float scale,"
    " float p) -> (Tensor out, Tensor lse)",
    module="prefix_attention",
    reference=prefix_attention_fwd_reference,
    fake=_fwd_fake,
    supports=supports_of_kernels(),
    check_values=_check_fwd_values,
    reference_reads_values=True,
    cuda_first=_cuda_first,
    setup_context=_setup_context,
    backward=_backward,
)
