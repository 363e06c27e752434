"""From the micro-batches of one optimiser step to packs that are computed at once.

The official gradient is the mean over micro-batches of each one's mean over its labelled tokens.
A labelled token therefore weighs 1 / (labelled tokens of its micro-batch), whatever it is packed
with, and a row's dropout masks follow its place in the step: packing changes neither.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from glmkern.model.packing import IGNORE_INDEX, PackedBatch, Row, pack_rows

# Matrix products over this many tokens already read each weight seldom enough to be bound by
# arithmetic; larger packs only take more memory.
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
    return AUTO_TOKENS if tokens_per_pack == "auto" else int(tokens_per_pack)


def labelled_tokens(row: Row) -> int:
    """Tokens of a row that are predicted; the first has nothing to be predicted from."""
    return sum(label != IGNORE_INDEX for label in row.labels[1:])


def pack_step(rows: Sequence[Row], micro_batches: Sequence[Sequence[int]],
              budget: int) -> list[Pack]:
    """The step's rows in order, in packs of at most `budget` tokens; a longer row goes alone.

    Args:
        micro_batches: indices into `rows`.
        budget: 0 makes each micro-batch one pack.
    """
    members = []  # (index into rows, weight of its labelled tokens)
    breaks = set()  # places in `members` where a pack must begin
    for micro_batch in micro_batches:
        breaks.add(len(members))
        weight = 1.0 / sum(labelled_tokens(rows[index]) for index in micro_batch)
        members += [(index, weight) for index in micro_batch]

    groups, tokens = [], 0
    for place, (index, _) in enumerate(members):
        length = len(rows[index].input_ids)
        full = tokens + length > budget if budget else place in breaks
        if full or not groups:
            groups.append([])
            tokens = 0
        groups[-1].append(place)
        tokens += length
    return [_pack(rows, members, group) for group in groups]


def _pack(rows: Sequence[Row], members: list[tuple[int, float]], places: list[int]) -> Pack:
    indices = [members[place][0] for place in places]
    weights = [members[place][1] for place in places]
    batch = pack_rows([rows[index] for index in indices], sequence_ids=places,
                      token_weight_per_row=weights)
    return Pack(batch, indices)
