"""The reference of prefix_attention, in plain PyTorch, a sequence at a time; the formulas are in
prefix_attention.py.

The kernels never form the softmax weights. The reference forms them in both directions, so its
backward needs neither out nor lse.
"""

import torch
from torch import Tensor

from glmkern.ops.checks import accumulate_dtype
from glmkern.ops.philox import keep_mask
from glmkern.ops.sequences import spans


def _by_group(x: Tensor, groups: int) -> Tensor:
    """[S, heads, C] -> [G, S * heads / G, C], rows ordered by token, then by head of the group."""
    tokens, _, channels = x.shape
    return x.reshape(tokens, groups, -1, channels).transpose(0, 1).reshape(groups, -1, channels)


def _by_token(x: Tensor, tokens: int) -> Tensor:
    """The inverse of _by_group: [G, S * heads / G, C] -> [S, heads, C]."""
    groups, _, channels = x.shape
    return x.view(groups, tokens, -1, channels).transpose(0, 1).reshape(tokens, -1, channels)


def _causal_scores(queries: Tensor, keys: Tensor, tokens: int) -> Tensor:
    """queries [G, S * heads, C] of S = `tokens`, keys [G, L, C], the last S of them those tokens':
    scores [G, S * heads, L], -inf where a key comes later than its query."""
    scores = queries @ keys.mT
    later = torch.ones(tokens, tokens, dtype=torch.bool, device=keys.device).triu(1).unsqueeze(1)
    by_token = scores.view(len(keys), tokens, -1, keys.shape[1])  # [G, S, heads, L]
    by_token[..., -tokens:].masked_fill_(later, float("-inf"))
    return scores


class _Prefix:
    """The prefix as one sequence sees it: rounded to q's dtype, masked and scaled by dropout."""

    def __init__(
        self, q: Tensor, prefix_k: Tensor, prefix_v: Tensor, seed: Tensor | None, p: float
    ) -> None:
        acc = accumulate_dtype(q)
        self.keys, self.values = (  # [G, P, C]
            x.to(q.dtype).to(acc).transpose(0, 1) for x in (prefix_k, prefix_v)
        )
        self.seed, self.p, self.shape, self.dtype = seed, p, prefix_k.shape, q.dtype

    def of(self, sequence_id: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """keys, values [G, P, C] and the factor [2, G, P, C] they were multiplied by, if any."""
        if self.p == 0:
            return self.keys, self.values, None
        assert self.seed is not None and sequence_id is not None
        prefix, groups, channels = self.shape
        keep = keep_mask(self.seed, sequence_id, 2 * prefix * groups * channels, self.p)
        factor = keep.view(2, prefix, groups, channels).transpose(1, 2).to(self.keys) / (1 - self.p)
        keys, values = (
            (x * f).to(self.dtype).to(x.dtype)
            for x, f in zip((self.keys, self.values), factor, strict=True)
        )
        return keys, values, factor


class _Sequence:
    """One sequence with its prefix. From q [S, N, C] and k, v [L, G, C], of which the last S are
    the queries' own tokens, it computes

        queries         [G, S * heads, C], scaled
        keys, values    [G, P + L, C]
        scores, weights [G, S * heads, P + L], before and after the softmax
        factor          [2, G, P, C], what dropout multiplied the prefix by, or None
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        prefix: _Prefix | None,
        sequence_id: Tensor | None = None,
    ) -> None:
        acc, groups = accumulate_dtype(q), k.shape[1]
        queries, self.keys, self.values = (_by_group(x.to(acc), groups) for x in (q, k, v))
        self.queries = queries * scale
        self.factor: Tensor | None = None
        self.prefix_length = 0
        if prefix is not None:
            keys, values, self.factor = prefix.of(sequence_id)
            self.prefix_length = keys.shape[1]
            self.keys = torch.cat([keys, self.keys], 1)
            self.values = torch.cat([values, self.values], 1)
        self.scores = _causal_scores(self.queries, self.keys, len(q))
        self.weights = self.scores.softmax(-1)


def _prefix_of(
    q: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    seed: Tensor | None = None,
    p: float = 0.0,
) -> _Prefix | None:
    if prefix_k is None or prefix_v is None:
        return None
    return _Prefix(q, prefix_k, prefix_v, seed, p)


def prefix_attention_fwd_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    cu_seqlens: Tensor,
    sequence_ids: Tensor,
    seed: Tensor | None,
    scale: float,
    p: float,
) -> tuple[Tensor, Tensor]:
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=accumulate_dtype(q))
    prefix = _prefix_of(q, prefix_k, prefix_v, seed, p)
    for b, (start, end) in enumerate(spans(cu_seqlens)):
        sequence = _Sequence(
            q[start:end], k[start:end], v[start:end], scale, prefix, sequence_ids[b : b + 1]
        )
        out[start:end] = _by_token(sequence.weights @ sequence.values, end - start)
        # The largest weight is exp(largest score - lse).
        row_lse = sequence.scores.amax(-1) - sequence.weights.amax(-1).log()
        lse[start:end] = _by_token(row_lse.unsqueeze(-1), end - start).squeeze(-1)
    return out, lse


def prefix_attention_bwd_reference(
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
    acc = accumulate_dtype(q)
    dq, dk, dv = (x.new_empty(x.shape if token_grad else 0) for x in (q, k, v))
    prefix = _prefix_of(q, prefix_k, prefix_v, seed, p)
    dprefix: list[Tensor] = []  # of keys and values, [G, P, C]
    if prefix_grad and prefix is not None:
        dprefix = [torch.zeros_like(x) for x in (prefix.keys, prefix.values)]
    for b, (start, end) in enumerate(spans(cu_seqlens)):
        sequence = _Sequence(
            q[start:end], k[start:end], v[start:end], scale, prefix, sequence_ids[b : b + 1]
        )
        dos = _by_group(dout[start:end].to(acc), k.shape[1])
        dweights = dos @ sequence.values.mT
        dscores = torch.ops.aten._softmax_backward_data(dweights, sequence.weights, -1, acc)
        dkeys, dvalues = dscores.mT @ sequence.queries, sequence.weights.mT @ dos  # [G, P + S, C]
        for i, (dx, grad) in enumerate(zip(dprefix, (dkeys, dvalues), strict=False)):
            grad = grad[:, : sequence.prefix_length]
            dx += grad if sequence.factor is None else grad * sequence.factor[i]
        if token_grad:
            dq[start:end] = _by_token(dscores @ sequence.keys * scale, end - start)
            dk[start:end] = dkeys[:, sequence.prefix_length :].transpose(0, 1)
            dv[start:end] = dvalues[:, sequence.prefix_length :].transpose(0, 1)
    if prefix_k is None or not dprefix:
        return dq, dk, dv, q.new_empty(0), q.new_empty(0)
    return dq, dk, dv, *(x.transpose(0, 1).to(prefix_k.dtype).contiguous() for x in dprefix)


def prefix_attention_decode_reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_lens: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    q_lens: Tensor,
    scale: float,
) -> Tensor:
    out = torch.zeros_like(q)
    prefix = _prefix_of(q, prefix_k, prefix_v)
    for b, (new, length) in enumerate(zip(q_lens.tolist(), cache_lens.tolist(), strict=True)):
        sequence = _Sequence(q[b, :new], k_cache[b, :length], v_cache[b, :length], scale, prefix)
        out[b, :new] = _by_token(sequence.weights @ sequence.values, new).to(q.dtype)
    return out
