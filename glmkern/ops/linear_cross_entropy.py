"""Output layer and cross entropy in one op: logits only of labelled rows, a chunk at a time.

    loss = sum_t token_weight[t] * (logsumexp_v z[t, v] - sum_v q[t, v] z[t, v]),
    z = hidden @ weight.T,   q[t] = (1 - s) onehot(label[t]) + s / V,   s = label_smoothing

Its gradient is d hidden[t] = token_weight[t] * (softmax(z[t]) - q[t]) @ weight. The forward forms
it from each chunk's logits, so that these are computed once. The weight is frozen.
"""

from typing import Any

import torch
from torch import Tensor

from glmkern.dispatch import define_op
from glmkern.ops.checks import (
    accumulate_dtype,
    check,
    check_device,
    check_floating,
    supports_of_kernels,
)
from glmkern.ops.quant_linear import QuantizedWeight, dense_weight, stored

# Logits of one chunk: few beside the weight's elements, but enough rows to read the weight seldom.
CHUNK_ELEMENTS = 1 << 22
LEAST_CHUNK_ROWS = 256


def linear_cross_entropy(
    hidden: Tensor,
    weight: QuantizedWeight | Tensor,
    labels: Tensor,
    *,
    token_weight: Tensor | None = None,
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Weighted sum of the labelled rows' negative log-likelihoods.

    Args:
        hidden: [T, H], float32, float16, bfloat16 or float64.
        weight: [V, H], hidden's dtype, or float16 or bfloat16 beside a float32 hidden, or
            quantised; frozen.
        labels: int64 [T], already shifted: labels[t] is the class of row t. Rows with
            ignore_index are left out. At least one row must be labelled, and every label must be
            below V: ValueError on the CPU, a precondition on a GPU (checked under
            GLMKERN_CHECK=1).
        token_weight: float32 [T], the weight of each row's loss; None: 1 / labelled rows, the mean.
        ignore_index: the label of rows without loss. None: every row is labelled; a GPU then need
            not tell the host how many are.
        label_smoothing: s above, in [0, 1], as torch.nn.functional.cross_entropy has it.

    Returns:
        The loss, a float32 scalar (float64 for float64). Differentiable in hidden.

    Raises:
        ValueError: shapes, dtypes, devices or labels do not fit.
    """
    op = "linear_cross_entropy"
    check_floating(op, "hidden", hidden)
    stored_weight = stored(op, weight, "hidden", hidden)
    check(
        hidden.dim() == 2 and hidden.shape[1] == weight.shape[1],
        lambda: (
            f"{op}: hidden must be [T, H] and weight [V, H], not {tuple(hidden.shape)} and "
            f"{tuple(weight.shape)}"
        ),
    )
    check(
        0 <= label_smoothing <= 1,
        lambda: f"{op}: label_smoothing must be in [0, 1], not {label_smoothing}",
    )
    check(
        labels.shape == hidden.shape[:1] and labels.dtype == torch.int64,
        lambda: (
            f"{op}: labels "
            f"must be int64 [{hidden.shape[0]}], not {labels.dtype} {list(labels.shape)}"
        ),
    )
    check_device(op, "labels", labels, "hidden", hidden)
    if token_weight is not None:
        if token_weight.shape != labels.shape or token_weight.dtype != torch.float32:
            raise ValueError(
                f"{op}: token_weight must be float32 [{hidden.shape[0]}], not "
                f"{token_weight.dtype} {list(token_weight.shape)}"
            )
        check_device(op, "token_weight", token_weight, "hidden", hidden)
        token_weight = token_weight.contiguous()
    hidden_grad = hidden.requires_grad and torch.is_grad_enabled()
    return torch.ops.glmkern.linear_cross_entropy_fwd(
        hidden.contiguous(),
        *stored_weight,
        labels.contiguous(),
        token_weight,
        ignore_index,
        label_smoothing,
        hidden_grad,
    )[0]


def linear_cross_entropy_fwd_reference(
    hidden: Tensor,
    packed: Tensor,
    scale: Tensor | None,
    bits: int,
    labels: Tensor,
    token_weight: Tensor | None,
    ignore_index: int | None,
    label_smoothing: float,
    hidden_grad: bool,
) -> tuple[Tensor, Tensor]:
    acc, weight = accumulate_dtype(hidden), dense_weight(packed, scale, bits, hidden.dtype)
    if ignore_index is None:
        labelled = torch.arange(len(labels), device=labels.device)
    else:
        labelled = (labels != ignore_index).nonzero().squeeze(1)  # [L]
    if token_weight is None:
        row_weight = torch.full(
            (len(labelled),), 1 / max(len(labelled), 1), dtype=acc, device=hidden.device
        )
    else:
        row_weight = token_weight[labelled].to(acc)
    loss = torch.zeros((), dtype=torch.float64, device=hidden.device)
    dhidden = hidden.new_zeros(hidden.shape if hidden_grad else 0, dtype=acc)
    chunk = max(CHUNK_ELEMENTS // weight.shape[0], LEAST_CHUNK_ROWS)
    for rows, w in zip(torch.split(labelled, chunk), torch.split(row_weight, chunk), strict=True):
        log_softmax = (hidden[rows] @ weight.T).to(acc).log_softmax(1)  # [chunk, V]
        picked = labels[rows].unsqueeze(1)
        nll = -log_softmax.gather(1, picked).squeeze(1)
        if label_smoothing:
            nll = (1 - label_smoothing) * nll - label_smoothing * log_softmax.mean(1)
        loss += (w * nll).sum(dtype=torch.float64)
        if hidden_grad:
            softmax = log_softmax.exp_()
            softmax -= label_smoothing / softmax.shape[1]
            softmax.scatter_add_(1, picked, softmax.new_full(picked.shape, label_smoothing - 1))
            # The row's weight comes after the product: a small one would underflow in half.
            dhidden[rows] = (softmax.to(weight.dtype) @ weight).to(acc) * w.unsqueeze(1)
    return loss.to(acc), dhidden


def linear_cross_entropy_bwd_reference(
    dloss: Tensor, dhidden: Tensor, dtype: torch.dtype
) -> Tensor:
    return (dhidden * dloss).to(dtype)


def _check_values(
    hidden: Tensor,
    packed: Tensor,
    scale: Tensor | None,
    bits: int,
    labels: Tensor,
    token_weight: Tensor | None,
    ignore_index: int | None,
    *_: object,
) -> None:
    """Raises ValueError for labels of no class, or none at all; reads them from the device."""
    classes = packed.shape[0]
    if ignore_index is not None:
        labels = labels[labels != ignore_index]
    check(
        len(labels) > 0,
        lambda: (
            "linear_cross_entropy: no row carries a label"
            + (f" (all are {ignore_index})" if ignore_index is not None else "")
            + ", so there is no loss; leave such rows out"
        ),
    )
    low, high = int(labels.min()), int(labels.max())
    check(
        0 <= low and high < classes,
        lambda: (
            f"linear_cross_entropy: labels run from {low} to "
            f"{high}, but the classes are 0 to {classes - 1}"
        ),
    )


def _fwd_fake(
    hidden: Tensor,
    packed: Tensor,
    scale: Tensor | None,
    bits: int,
    labels: Tensor,
    token_weight: Tensor | None,
    ignore_index: int | None,
    label_smoothing: float,
    hidden_grad: bool,
) -> tuple[Tensor, Tensor]:
    acc = accumulate_dtype(hidden)
    return hidden.new_empty((), dtype=acc), hidden.new_empty(
        hidden.shape if hidden_grad else 0, dtype=acc
    )


def _bwd_fake(dloss: Tensor, dhidden: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(dhidden, dtype=dtype)


define_op(
    "linear_cross_entropy_bwd",
    "(Tensor dloss, Tensor dhidden, ScalarType dtype) -> Tensor",
    module="linear_cross_entropy",
    reference=linear_cross_entropy_bwd_reference,
    fake=_bwd_fake,
    supports=supports_of_kernels(),
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.dtype = inputs[0].dtype
    _, dhidden = output
    ctx.mark_non_differentiable(dhidden)
    ctx.save_for_backward(dhidden)


def _backward(ctx: Any, dloss: Tensor, _ddhidden: Tensor) -> tuple[Tensor | None, ...]:
    dhidden = torch.ops.glmkern.linear_cross_entropy_bwd(dloss, *ctx.saved_tensors, ctx.dtype)
    return dhidden, *[None] * 8


# dhidden is the gradient of the loss, empty unless hidden_grad. It stays in float32 until the
# backward multiplies it by the incoming gradient: a loss scale acts before the rounding to half.
define_op(
    "linear_cross_entropy_fwd",
    "(Tensor hidden, Tensor packed, Tensor? scale, int bits,"
    " Tensor labels, Tensor? token_weight, int? ignore_index, float label_smoothing,"
    " bool hidden_grad) -> (Tensor loss, Tensor dhidden)",
    module="linear_cross_entropy",
    reference=linear_cross_entropy_fwd_reference,
    fake=_fwd_fake,
    supports=supports_of_kernels(),
    check_values=_check_values,
    waits_on_gpu=True,  # how many rows are labelled
    setup_context=_setup_context,
    backward=_backward,
)
