"""What a run has done so far, in the words and files of transformers 4.30.2."""

import datetime
import json
import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from glmkern.training.flags.arguments import TrainingArguments


@dataclass(frozen=True)
class Plan:
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
    def of(cls, num_examples: int, args: TrainingArguments) -> "Plan":
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


@dataclass
class TrainerState:
    """trainer_state.json, key by key."""

    epoch: float = 0
    global_step: int = 0
    max_steps: int = 0
    num_train_epochs: int = 0
    total_flos: float = 0
    log_history: list[dict[str, float]] = field(default_factory=list)
    best_metric: float | None = None
    best_model_checkpoint: str | None = None
    is_local_process_zero: bool = True
    is_world_process_zero: bool = True
    is_hyper_param_search: bool = False
    trial_name: str | None = None
    trial_params: dict[str, Any] | None = None

    def log(self, logs: dict[str, float]) -> dict[str, float]:
        """Append to log_history, with the step; returns `logs` with the epoch, as it is printed."""
        logs = {**logs, "epoch": round(self.epoch, 2)}
        self.log_history.append({**logs, "step": self.global_step})
        return logs

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainerState":
        """From trainer_state.json; keys that other releases of transformers add are left out."""
        known = {each.name for each in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})


def speed_metrics(plan: Plan, steps: int, runtime: float) -> dict[str, float]:
    """train_runtime in seconds, and samples and steps per second, of `steps` steps of the plan."""
    samples = plan.train_samples * steps / plan.max_steps
    return {
        "train_runtime": round(runtime, 4),
        "train_samples_per_second": round(samples / runtime, 3),
        "train_steps_per_second": round(steps / runtime, 3),
    }


def metrics_table(metrics: dict[str, float], split: str = "train") -> list[str]:
    """The lines printed after a split is done: names to the left, values to the right."""
    shown = {name: _formatted(name, value) for name, value in sorted(metrics.items())}
    name_width = max(map(len, shown))
    value_width = max(map(len, shown.values()))
    lines = [f"  {name:<{name_width}} = {value:>{value_width}}" for name, value in shown.items()]
    return [f"***** {split} metrics *****", *lines]


def _formatted(name: str, value: float) -> str:
    if name.endswith("_runtime"):
        hundredths = int((value - int(value)) * 100)
        return f"{datetime.timedelta(seconds=int(value))}.{hundredths:02d}"
    return str(round(value, 4))
