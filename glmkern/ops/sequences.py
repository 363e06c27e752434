"""A batch is sequences laid end to end: what `cu_seqlens` and `sequence_ids` must look like.

`cu_seqlens` int32 [B+1] holds 0, then the end of each sequence; the last entry is T, the number of
tokens. `sequence_ids` int64 [B] names the sequences for dropout; the default is 0 .. B-1.
"""

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


def check_spans(op: str, cu_seqlens: Tensor, tokens: int) -> None:
    """Raises ValueError for an empty sequence or a wrong total; reads the values back from the
    device."""
    sequences = spans(cu_seqlens)
    first, last = sequences[0][0], sequences[-1][1]
    check(
        first == 0 and last == tokens,
        lambda: (
            f"{op}: cu_seqlens must run from 0 to the "
            f"number of tokens, {tokens}, not from {first} to {last}"
        ),
    )
    for b, (start, end) in enumerate(sequences):
        if start >= end:
            raise ValueError(
                f"{op}: sequence {b} is empty "
                f"(cu_seqlens goes from {start} to {end}); leave it out of the batch"
            )


def spans(cu_seqlens: Tensor) -> list[tuple[int, int]]:
    """(start, end) of every sequence; reads the values back from the device."""
    ends = cu_seqlens.tolist()
    return list(zip(ends[:-1], ends[1:], strict=True))
