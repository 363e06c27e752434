"""Plain PyTorch in the precision of its arguments, for the ops whose reference is more precise than
that: the reference of attention keeps scores and weights in float32."""

import math

import torch
from torch import Tensor

from bench.gpu.cases import Case
from glmkern.ops.philox import keep_mask
from tests.ops import attention


def formula_of(case: Case):
    """A function of the case's arguments, or None where the op's own reference will do."""
    if case.op == "prefix_attention_decode":
        return dense_decode
    if case.op.startswith("prefix_attention"):
        return lambda *args: dense(*args, lengths=case.lengths)
    return None


def dense(q, k, v, prefix_k, prefix_v, ends, ids, seed, scale, rate, *, lengths) -> Tensor:
    factor = None
    if rate:
        shape = (2, *prefix_k.shape)
        keep = [keep_mask(seed, ids[b : b + 1], math.prod(shape), rate) for b in range(len(ids))]
        factor = torch.stack([x.view(shape) for x in keep]) / (1 - rate)
    return attention.dense(q, k, v, prefix_k, prefix_v, lengths, factor)


def dense_decode(q, k_cache, v_cache, lens, prefix_k, prefix_v, queries, scale) -> Tensor:
    rows = []
    for b, length in enumerate(lens.tolist()):
        padded = q.new_zeros(length - q.shape[1], *q.shape[2:])  # queries of the older tokens
        tokens = (torch.cat([padded, q[b]]), k_cache[b, :length], v_cache[b, :length])
        rows.append(attention.dense(*tokens, prefix_k, prefix_v, [length])[-q.shape[1] :])
    return torch.stack(rows)
