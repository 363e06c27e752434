"""A batch is sequences laid end to end: padding does not exist inside the model.

`unpad` turns a padded batch into a PackedBatch, `pack_rows` builds one from rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor

IGNORE_INDEX = -100
ALIGNMENT = 16  # bytes: kernels load up to so many at once from where a tensor begins


class Row(Protocol):
    """One sequence: input_ids and, not shifted, as many labels; -100 where there is no loss."""

    input_ids: Sequence[int]
    labels: Sequence[int]


@dataclass(frozen=True)
class PackedBatch:
    """B sequences of T tokens in all.

    input_ids: int64 [T]; positions: int64 [T], for the rotary embedding.
    cu_seqlens: int32 [B+1], 0 and then the end of each sequence.
    labels: int64 [T], already shifted: labels[t] is the token to predict at t, -100 for none.
    token_weight: float32 [T], each row's weight in the loss; None: the mean over labelled tokens.
    sequence_ids: int64 [B], the sequences' names for dropout masks.
    """

    input_ids: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    labels: Tensor
    token_weight: Tensor | None
    sequence_ids: Tensor

    def to(self, device: torch.device | str) -> "PackedBatch":
        """The same batch on `device`."""
        moved: dict[str, Any] = move_together(vars(self), torch.device(device))
        return PackedBatch(**moved)


def move_together(
    tensors: Mapping[str, Tensor | None], device: torch.device
) -> dict[str, Tensor | None]:
    """The same tensors on `device`. Those of the host reach a GPU in one copy, for which the host
    does not wait."""
    on_host = {
        k: x for k, x in tensors.items() if x is not None and x.is_cpu and device.type != "cpu"
    }
    moved = {k: x if x is None or k in on_host else x.to(device) for k, x in tensors.items()}
    if on_host:
        # only from pinned memory does the copy not wait
        buffer = joined(list(on_host.values()), pin_memory=device.type == "cuda")
        there = buffer.to(device, non_blocking=True)
        moved |= zip(on_host, split_again(there, list(on_host.values())), strict=True)
    return moved


def joined(tensors: Sequence[Tensor], pin_memory: bool = False) -> Tensor:
    """The tensors' bytes in one buffer, uint8; split_again is the inverse."""
    starts = _starts(tensors)
    buffer = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=pin_memory)
    for x, start in zip(tensors, starts, strict=False):
        buffer[start : start + x.nbytes].view(x.dtype).copy_(x.flatten())
    return buffer


def split_again(buffer: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Views of a `joined` buffer with the dtypes and shapes of `like`."""
    return [
        buffer[start : start + x.nbytes].view(x.dtype).view(x.shape)
        for x, start in zip(like, _starts(like), strict=False)
    ]


def _starts(tensors: Sequence[Tensor]) -> list[int]:
    """Where each tensor's bytes start, and where the last one's end, each at an ALIGNMENT."""
    sizes = (-(-x.nbytes // ALIGNMENT) * ALIGNMENT for x in tensors)
    return list(accumulate(sizes, initial=0))


def pack_rows(
    rows: Sequence[Row],
    sequence_ids: Sequence[int] | None = None,
    token_weight_per_row: Sequence[float] | None = None,
) -> PackedBatch:
    """Lays rows end to end, each with positions from 0.

    Args:
        rows: at least one; none may be empty.
        sequence_ids: their names for dropout; None: 0 .. B-1.
        token_weight_per_row: the loss weight of every labelled token of a row; None: the mean over
            all labelled tokens.

    Raises:
        ValueError: no rows, an empty one, or values that are not one a token or row.
    """
    lengths = [len(row.input_ids) for row in rows]
    if not lengths or 0 in lengths:
        raise ValueError(
            f"a batch needs at least one row and no empty rows, but the lengths are {lengths}"
        )
    if lengths != (labels := [len(row.labels) for row in rows]):
        raise ValueError(
            "every row needs a label for each token, but the rows have "
            f"{lengths} tokens and {labels} labels"
        )
    for name, values in (
        ("sequence_ids", sequence_ids),
        ("token_weight_per_row", token_weight_per_row),
    ):
        if values is not None and len(values) != len(rows):
            raise ValueError(f"{name} must have one value a row, {len(rows)}, not {len(values)}")
    # Shifted: the last token of a row has nothing to predict.
    labels = [label for row in rows for label in (*row.labels[1:], IGNORE_INDEX)]
    token_weight = None
    if token_weight_per_row is not None:
        weights = torch.tensor(token_weight_per_row, dtype=torch.float32)
        token_weight = weights.repeat_interleave(torch.tensor(lengths))
    return PackedBatch(
        input_ids=torch.tensor([i for row in rows for i in row.input_ids]),
        positions=torch.cat([torch.arange(n) for n in lengths]),
        cu_seqlens=_cumulative(torch.tensor(lengths)),
        labels=torch.tensor(labels),
        token_weight=token_weight,
        sequence_ids=torch.arange(len(rows))
        if sequence_ids is None
        else torch.tensor(sequence_ids),
    )


def unpad(
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    labels: Tensor | None = None,
) -> tuple[PackedBatch, Tensor]:
    """Drops the masked tokens of a padded batch, whichever side they are on.

    A label whose predecessor is padding is dropped with it: there is no context to predict it from.

    Args:
        input_ids: int64 [B, S].
        attention_mask: [B, S], zero where there is padding; None: no padding.
        position_ids: int64 [B, S]; None: 0 .. S-1 in every row, as officially, padded or not.
        labels: int64 [B, S], not shifted; None: no labels.

    Returns:
        The packed batch, and int64 [T], the place of every kept token in the flattened [B * S].

    Raises:
        ValueError: shapes differ, or a row is all padding.
    """
    if input_ids.dim() != 2 or input_ids.numel() == 0:
        raise ValueError(f"input_ids must be [B, S] and not empty, not {list(input_ids.shape)}")
    for name, x in (
        ("attention_mask", attention_mask),
        ("position_ids", position_ids),
        ("labels", labels),
    ):
        if x is not None and x.shape != input_ids.shape:
            raise ValueError(
                f"{name} must have input_ids' shape {list(input_ids.shape)}, not {list(x.shape)}"
            )
    device = input_ids.device
    keep = torch.ones_like(input_ids, dtype=torch.bool)
    if attention_mask is not None:
        keep = attention_mask.to(device).bool()
    lengths = keep.sum(1)
    if not bool((lengths > 0).all()):
        raise ValueError(
            f"row {int((lengths == 0).nonzero()[0])} of attention_mask is all zero; "
            "leave empty rows out of the batch"
        )
    places = keep.flatten().nonzero().squeeze(1)
    shifted = torch.full_like(input_ids, IGNORE_INDEX, dtype=torch.int64)
    if labels is not None:
        shifted[:, :-1] = labels[:, 1:]
    if position_ids is None:
        position_ids = torch.arange(input_ids.shape[1], device=device).expand_as(input_ids)
    batch = PackedBatch(
        input_ids=input_ids.flatten()[places],
        positions=position_ids.flatten()[places],
        cu_seqlens=_cumulative(lengths),
        labels=shifted.flatten()[places],
        token_weight=None,
        sequence_ids=torch.arange(len(lengths), device=device),
    )
    return batch, places


def _cumulative(lengths: Tensor) -> Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
