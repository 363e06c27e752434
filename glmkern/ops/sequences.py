"""A batch is sequences laid end to end: what `cu_seqlens` and `sequence_ids` must look like.

`cu_seqlens` int32 [B+1] holds 0, then the end of each sequence; the last entry is T, the number of
tokens. `sequence_ids` int64 [B] names the sequences for dropout; the default is 0 .. B-1.
"""

import os

import torch
from torch import Tensor

from glmkern.ops.checks import check, check_device


def complete_sequences(
    op: str, x: Tensor, cu_seqlens: Tensor | None, sequence_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The checked (cu_seqlens, sequence_ids) of tokens x [T, ...]; one sequence by default."""
    if cu_seqlens is None:
        cu_seqlens = torch.tensor([0, x.shape[0]], dtype=torch.int32, device=x.device)
    check(
        cu_seqlens.dim() == 1 and len(cu_seqlens) >= 2 and cu_seqlens.dtype == torch.int32,
        lambda: (
            f"{op}: cu_seqlens must be an int32 tensor [B+1] with B >= 1, not "
            f"{cu_seqlens.dtype} {list(cu_seqlens.shape)}"
        ),
    )
    check_device(op, "cu_seqlens", cu_seqlens, "the input", x)
    batch = len(cu_seqlens) - 1
    if sequence_ids is None:
        sequence_ids = torch.arange(batch, device=x.device)
    check(
        sequence_ids.shape == (batch,) and sequence_ids.dtype == torch.int64,
        lambda: (
            f"{op}: sequence_ids must be an int64 tensor [{batch}], one id a sequence, not "
            f"{sequence_ids.dtype} {list(sequence_ids.shape)}"
        ),
    )
    check_device(op, "sequence_ids", sequence_ids, "the input", x)
    return cu_seqlens, sequence_ids


def spans(op: str, cu_seqlens: Tensor, tokens: int) -> list[tuple[int, int]]:
    """(start, end) of every sequence; ValueError for an empty one or a wrong total.

    Reads the values back from the device: for reference implementations.
    """
    ends = cu_seqlens.tolist()
    check(
        ends[0] == 0 and ends[-1] == tokens,
        lambda: (
            f"{op}: cu_seqlens must run from 0 to the "
            f"number of tokens, {tokens}, not from {ends[0]} to {ends[-1]}"
        ),
    )
    result = list(zip(ends[:-1], ends[1:], strict=True))
    for b, (start, end) in enumerate(result):
        check(
            start < end,
            lambda b=b, start=start, end=end: (
                f"{op}: sequence {b} is empty "
                f"(cu_seqlens goes from {start} to {end}); leave it out of the batch"
            ),
        )
    return result


def values_are_checked(x: Tensor) -> bool:
    """Values are checked where reading them is free, or everywhere under GLMKERN_CHECK=1."""
    return x.device.type == "cpu" or os.environ.get("GLMKERN_CHECK") == "1"
