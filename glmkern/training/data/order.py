"""The order in which an epoch takes the rows: at random, or grouped by length."""

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import RandomSampler, Sampler

from glmkern.model.packing import Row
from glmkern.training.flags.arguments import TrainingArguments

MIN_MEGABATCHES = 4
BATCHES_PER_MEGABATCH = 50


def create_sampler(rows: Sequence[Row], args: TrainingArguments) -> Sampler[int]:
    """The order of transformers 4.30.2; without --data_seed one draw of torch's generator, which
    the caller has seeded, decides it. Iterated n times it gives the same n epochs."""
    seed = args.data_seed
    if seed is None:
        seed = int(torch.empty((), dtype=torch.int64).random_().item())
    generator = torch.Generator().manual_seed(seed)
    if args.group_by_length:
        return LengthGroupedSampler(
            [len(row.input_ids) for row in rows],
            args.per_device_train_batch_size * args.gradient_accumulation_steps,
            generator,
        )
    return RandomSampler(rows, generator=generator)


class LengthGroupedSampler(Sampler[int]):
    """`--group_by_length`: a random order, cut into megabatches of 50 steps, or of fewer where that
    would give less than four. Each megabatch is sorted, the longest row first. The longest row of
    all changes places with the very first, so that a lack of memory shows at once.

    Args:
        lengths: of the rows, in tokens.
        rows_per_step: batch size times accumulation.
    """

    def __init__(self, lengths: Sequence[int], rows_per_step: int, generator: torch.Generator):
        self.lengths, self.generator = lengths, generator
        steps = len(lengths) // (rows_per_step * MIN_MEGABATCHES)
        self.rows_per_megabatch = max(1, min(steps, BATCHES_PER_MEGABATCH)) * rows_per_step

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(len(self), generator=self.generator).tolist()
        megabatches = [
            sorted(
                order[start : start + self.rows_per_megabatch],
                key=self.lengths.__getitem__,
                reverse=True,
            )
            for start in range(0, len(order), self.rows_per_megabatch)
        ]
        longest = max(megabatches, key=lambda megabatch: self.lengths[megabatch[0]])
        megabatches[0][0], longest[0] = longest[0], megabatches[0][0]
        return iter([index for megabatch in megabatches for index in megabatch])
