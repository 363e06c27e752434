"""How many optimiser steps a run takes, as transformers 4.30.2 counts them."""

import math
from dataclasses import dataclass

from glmkern.training.flags.arguments import TrainingArguments


@dataclass(frozen=True)
class StepPlan:
    """How many steps a run takes, by the official floor rule.

    steps_per_epoch = max(ceil(rows / batch) // accumulation, 1), and max_steps = ceil(epochs *
    that); the micro-batches left over are carried into the next epoch's first step.
    """

    num_examples: int
    batch_size: int
    accumulation: int
    batches_per_epoch: int
    num_train_epochs: int
    max_steps: int
    train_samples: float  # examples a run counts as seen, for samples per second

    @classmethod
    def of(cls, num_examples: int, args: TrainingArguments) -> "StepPlan":
        """For a run over this many rows; ValueError where they do not fill a micro-batch."""
        batch, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
        whole_batches = num_examples // batch
        batches = whole_batches if args.dataloader_drop_last else math.ceil(num_examples / batch)
        if batches == 0:
            raise ValueError(
                f"{num_examples} rows do not fill a micro-batch of {batch}, and "
                "--dataloader_drop_last leaves out what does not; lower the batch size"
            )
        steps_per_epoch = max(batches // accumulation, 1)
        if args.max_steps > 0:
            max_steps = args.max_steps
            epochs = math.ceil(max_steps / steps_per_epoch)
            samples = max_steps * batch * accumulation
        else:
            max_steps = math.ceil(args.num_train_epochs * steps_per_epoch)
            epochs = math.ceil(args.num_train_epochs)
            samples = num_examples * args.num_train_epochs
        return cls(num_examples, batch, accumulation, batches, epochs, max_steps, samples)

    def ends_step(self, seen: int, batch_of_epoch: int) -> bool:
        """Whether an optimiser step follows the micro-batch `seen` (counted over all epochs), the
        epoch's `batch_of_epoch`-th (both from 1).

        An epoch no longer than one step's accumulation ends with a step of its own.
        """
        last_of_short_epoch = self.batches_per_epoch <= self.accumulation
        last_of_short_epoch &= batch_of_epoch == self.batches_per_epoch
        return seen % self.accumulation == 0 or last_of_short_epoch

    def header(self, trainable_parameters: int) -> list[str]:
        """The lines printed before training."""
        return [
            "***** Running training *****",
            f"  Num examples = {self.num_examples:,}",
            f"  Num Epochs = {self.num_train_epochs:,}",
            f"  Instantaneous batch size per device = {self.batch_size:,}",
            "  Total train batch size (w. parallel, distributed & accumulation) = "
            f"{self.batch_size * self.accumulation:,}",
            f"  Gradient Accumulation steps = {self.accumulation}",
            f"  Total optimization steps = {self.max_steps:,}",
            f"  Number of trainable parameters = {trainable_parameters:,}",
        ]


def speed_metrics(plan: StepPlan, steps: int, runtime: float) -> dict[str, float]:
    """train_runtime in seconds, and samples and steps per second, of `steps` steps of the plan."""
    samples = plan.train_samples * steps / plan.max_steps
    return {
        "train_runtime": round(runtime, 4),
        "train_samples_per_second": round(samples / runtime, 3),
        "train_steps_per_second": round(steps / runtime, 3),
    }
