"""Label smoothing beside the fused cross entropy, whose kernels need not know of it.

The smoothed loss of a token is (1 - e) * nll + e * mean_v(-log p_v). With log p_v = z_v -
logsumexp(z) and z = W h it is nll + e * h . (W[label] - mean of W's rows): a term linear in h.
"""

import torch
from torch import Tensor

from glmkern.model.packing import IGNORE_INDEX


def smoothing_term(hidden: Tensor, weight: Tensor, labels: Tensor,
                   token_weight: Tensor | None) -> Tensor:
    """What a smoothing of 1 adds to linear_cross_entropy of the same arguments.

    Args:
        hidden: [T, H]; the term is differentiable in it.
        weight: [V, H], frozen.
        labels: int64 [T], -100 for none.
        token_weight: float32 [T]; None: the mean over labelled tokens.

    Returns:
        A scalar, float32 (float64 for float64).
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    labelled = (labels != IGNORE_INDEX).nonzero().squeeze(1)  # [L]
    towards = weight[labels[labelled]].to(dtype) - weight.mean(0, dtype=dtype)  # [L, H]
    terms = (hidden[labelled].to(dtype) * towards).sum(1)
    return terms.mean() if token_weight is None else (token_weight[labelled] * terms).sum()
