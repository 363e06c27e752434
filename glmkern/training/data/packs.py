"""From the micro-batches of one optimiser step to packs that are computed at once.

The official gradient is the mean over micro-batches of each one's mean over its labelled tokens.
A labelled token therefore weighs 1 / (labelled tokens of its micro-batch), and a row's dropout
masks follow its place in the step. Neither depends on the packing or on the number of ranks. Rank r
of N computes the micro-batches r, r + N, r + 2 N, ... of the step.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from glmkern.model.packing import IGNORE_INDEX, PackedBatch, Row, pack_rows
from glmkern.training.flags.arguments import AUTO

# Matrix products over this many tokens are bound by arithmetic, not by reading the weights; larger
# packs only take more memory.
AUTO_TOKENS = 2048


@dataclass(frozen=True)
class Pack:
    """Rows of one optimiser step that go through the model together."""

    batch: PackedBatch
    rows: list[int]  # indices into the training rows

    @property
    def tokens(self) -> int:
        return self.batch.input_ids.numel()


def token_budget(tokens_per_pack: str) -> int:
    """`--tokens_per_pack` as a number."""
    return AUTO_TOKENS if tokens_per_pack == AUTO else int(tokens_per_pack)


def labelled_tokens(row: Row) -> int:
    """Tokens of a row that are predicted; the first has nothing to be predicted from."""
    return sum(label != IGNORE_INDEX for label in row.labels[1:])


class _Member(NamedTuple):
    """A row of the step."""

    index: int  # into the training rows
    place: int  # in the step
    weight: float  # of its labelled tokens
    first: bool  # of its micro-batch


def pack_step(
    rows: Sequence[Row],
    micro_batches: Sequence[Sequence[int]],
    budget: int,
    rank: int = 0,
    ranks: int = 1,
) -> list[Pack]:
    """A rank's rows of the step in order, in packs of at most `budget` tokens; a longer row goes
    alone. There may be none.

    Args:
        micro_batches: of the whole step; indices into `rows`.
        budget: 0 makes each micro-batch one pack.
    """
    groups, tokens = [], 0
    for member in _members(rows, micro_batches, rank, ranks):
        length = len(rows[member.index].input_ids)
        full = tokens + length > budget if budget else member.first
        if full or not groups:
            groups.append([])
            tokens = 0
        groups[-1].append(member)
        tokens += length
    return [_pack(rows, group) for group in groups]


def _members(
    rows: Sequence[Row], micro_batches: Sequence[Sequence[int]], rank: int, ranks: int
) -> Iterator[_Member]:
    place = 0
    for number, micro_batch in enumerate(micro_batches):
        if number % ranks == rank:
            weight = 1.0 / sum(labelled_tokens(rows[index]) for index in micro_batch)
            for offset, index in enumerate(micro_batch):
                yield _Member(index, place + offset, weight, first=offset == 0)
        place += len(micro_batch)


def _pack(rows: Sequence[Row], members: list[_Member]) -> Pack:
    indices = [member.index for member in members]
    batch = pack_rows(
        [rows[index] for index in indices],
        sequence_ids=[member.place for member in members],
        token_weight_per_row=[member.weight for member in members],
    )
    return Pack(batch, indices)
