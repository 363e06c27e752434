"""When a run logs, evaluates and saves, and which checkpoint is the best: transformers 4.30.2."""

import math
from typing import NamedTuple

from glmkern.errors import InputError
from glmkern.training.flags.arguments import TrainingArguments
from glmkern.training.output.trainer_state import TrainerState


class Due(NamedTuple):
    """What is due now, in this order."""

    log: bool
    evaluate: bool
    save: bool


class Schedule:
    """The strategies and intervals of `args`, in a run of `max_steps` steps.

    Attributes:
        best_metric: the metric that decides which checkpoint is the best, such as "eval_loss"; or
            None where none was asked for.
    """

    def __init__(self, args: TrainingArguments, max_steps: int):
        self.args, self.max_steps = args, max_steps
        name = args.metric_for_best_model or ("loss" if args.load_best_model_at_end else None)
        self.best_metric = name and f"eval_{name.removeprefix('eval_')}"

    def after_step(self, state: TrainerState) -> Due:
        args, step = self.args, state.global_step
        first = step == 1 and args.logging_first_step
        log = args.logging_strategy == "steps" and self._is_multiple(step, args.logging_steps)
        evaluate = args.evaluation_strategy == "steps" and step >= args.eval_delay
        evaluate = evaluate and self._is_multiple(step, args.evaluation_interval)
        save = args.save_strategy == "steps" and self._is_multiple(step, args.save_steps)
        return Due(log or first, evaluate, save)

    def after_epoch(self, state: TrainerState) -> Due:
        args = self.args
        evaluate = args.evaluation_strategy == "epoch" and state.epoch >= args.eval_delay
        return Due(args.logging_strategy == "epoch", evaluate, args.save_strategy == "epoch")

    def is_better(self, metrics: dict[str, float], best: float | None) -> bool:
        """Whether `metrics` beat `best`, the best value so far. Raises InputError where they lack
        the metric that decides."""
        if self.best_metric is None:
            return False
        if self.best_metric not in metrics:
            raise InputError(
                f"--metric_for_best_model {self.best_metric} is none of the metrics "
                f"of an evaluation ({', '.join(sorted(metrics))}); name one of them"
            )
        if best is None:
            return True
        greater = self.args.greater_is_better
        if greater is None:
            greater = self.best_metric != "eval_loss"
        value = metrics[self.best_metric]
        return value > best if greater else value < best

    def _is_multiple(self, step: int, interval: float) -> bool:
        """`interval`: steps, or below 1 a share of all steps; zero or less is never."""
        if 0 < interval < 1:
            interval = math.ceil(self.max_steps * interval)
        return interval > 0 and step % interval == 0
