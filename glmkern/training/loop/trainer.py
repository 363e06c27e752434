"""The training loop of transformers 4.30.2 for a prefix, over packed rows."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import BatchSampler, Sampler

from glmkern.checkpoint import read_prefix
from glmkern.errors import Interrupted, TrainingError
from glmkern.model.packing import Row
from glmkern.training.data.order import create_sampler
from glmkern.training.data.packs import labelled_tokens
from glmkern.training.flags.arguments import TrainingArguments
from glmkern.training.loop.checkpoint import (
    Position,
    TrainingState,
    fingerprint,
    read_training_state,
    write_training_state,
)
from glmkern.training.loop.distributed import PeerFailure, World
from glmkern.training.loop.failures import StepFailure
from glmkern.training.loop.gradient import StepGradient
from glmkern.training.loop.hooks import Hooks
from glmkern.training.loop.loss_scale import LossScale
from glmkern.training.loop.optimizer import create_optimizer, create_scheduler
from glmkern.training.loop.resume import find_checkpoint, locate_best_checkpoint
from glmkern.training.loop.schedule import Schedule
from glmkern.training.loop.seeding import set_seed
from glmkern.training.loop.signals import StopRequest
from glmkern.training.loop.steps import StepPlan, speed_metrics
from glmkern.training.output.progress import Progress
from glmkern.training.output.run_folder import LOG, RunFolder
from glmkern.training.output.trainer_state import TrainerState

LAST_GOOD = "last good checkpoint"


class Trainer:
    """Trains the prefix encoder of a model; a run is one instance and one call of `train`.

    Args:
        model: has `loss(batch, dropout_offset, seed)`, a scalar that differentiates into
            `prefix_encoder`, its only trainable part; `dtype`, `device` and `config.num_layers`.
        rows: what to train on, each with at least one token that is predicted.
        args: how; see `flags.arguments.TrainingArguments`.
        sampler: the order of the rows in each epoch; None shuffles as the official run does.
        folder: where checkpoints and logs go; None writes nothing.
        row_names: what an error message calls the rows; None: their indices.
        world: the ranks of the run; None: this process alone. Only the first prints, writes,
            evaluates and calls the hooks.
        hooks: what is done beside the steps; None: nothing.
        flags: every flag of the run, as glmkern.json keeps them; None: those of `args`.

    Attributes:
        state: TrainerState, as trainer_state.json holds it.
        position: what else a resumed run needs.
        optimizer, scheduler: torch's, as optimizer.pt and scheduler.pt hold them.
        last_checkpoint: the newest one of this run, or the one it resumed from.
    """

    def __init__(
        self,
        model: nn.Module,
        rows: Sequence[Row],
        args: TrainingArguments,
        *,
        sampler: Sampler[int] | None = None,
        folder: RunFolder | None = None,
        row_names: Sequence[object] | None = None,
        world: World | None = None,
        hooks: Hooks | None = None,
        flags: Mapping[str, Any] | None = None,
    ):
        for index, row in enumerate(rows):
            if not labelled_tokens(row):
                raise ValueError(f"row {index} has no token to predict; leave it out")
        self.model, self.rows, self.args = model, rows, args
        self.world = world or World()
        self.folder, self.hooks = folder, hooks or Hooks()
        self.row_names = row_names or range(len(rows))
        self.flags = flags or asdict(args)
        if args.evaluation_strategy != "no" and self.hooks.evaluate is None:
            raise ValueError(
                f"--evaluation_strategy {args.evaluation_strategy} needs something to "
                "evaluate; pass no"
            )
        self.plan = StepPlan.of(len(rows), args)
        # Seeded again after the model is made, as in the official Trainer: the order of rows does
        # not depend on how many random numbers that took.
        set_seed(args.seed)
        self.sampler = sampler or create_sampler(rows, args)
        self.gradient = StepGradient(model, rows, args, self.world)
        self.optimizer = create_optimizer(model, args)
        self.scheduler = create_scheduler(self.optimizer, args, self.plan.max_steps)
        self.schedule = Schedule(args, self.plan.max_steps)
        self.state = TrainerState(
            max_steps=self.plan.max_steps, num_train_epochs=self.plan.num_train_epochs
        )
        self.position = Position()
        self.last_checkpoint: Path | None = None
        self._non_embedding_parameters = _count_non_embedding(model)

    @property
    def loss_scale(self) -> LossScale | None:
        """Of a float16 model; None for the others, which need none."""
        return self.gradient.loss_scale

    @property
    def _writes(self) -> bool:
        return self.folder is not None and self.world.is_first

    @cached_property
    def fingerprint(self) -> str:
        """Of the rows; see checkpoint.fingerprint."""
        return fingerprint(self.rows)

    def train(self, resume_from: Path | None = None) -> dict[str, float]:
        """Run all steps; returns the metrics that train_results.json holds.

        Args:
            resume_from: a checkpoint; the run ends with the bits of one that was never stopped.

        Whether `resume_from` has the same flags, resume.check_same_run tells.

        Raises:
            TrainingError: the loss or the gradient is not finite; names step and rows.
            Interrupted: SIGINT or SIGTERM asked to stop; everything is saved.
            InputError: `resume_from` is damaged, or of other rows, another prefix or precision; or
                the best checkpoint, which is to be loaded at the end, is not there.
        """
        args, plan = self.args, self.plan
        if resume_from is not None:
            self._resume(resume_from)
        state, first_step = self.state, self.state.global_step
        self.model.train()
        self.optimizer.zero_grad()
        if self._writes:
            self.folder.make()
            self.folder.remove_temporary_files()
            if resume_from is not None:
                self.folder.shorten_log(self.position.log_lines)
                if resume_from == find_checkpoint("auto", self.folder.path):
                    self.folder.delete_older(resume_from, self._best())
        self._print_header(resume_from)
        self.progress = Progress(
            plan.max_steps,
            self.model.device,
            show_bar=not args.disable_tqdm and self.world.is_first,
            log_file=self.folder.path / LOG if self._writes else None,
            steps=first_step,
            tokens=self.position.tokens,
            lines=self.position.log_lines,
        )
        start = time.monotonic()
        try:
            with StopRequest() as self._stop_request:
                self._train_epochs()
            self._load_best()
            metrics = speed_metrics(plan, state.global_step - first_step, time.monotonic() - start)
            total_loss = self.position.total_loss + self.position.window_loss
            metrics["train_loss"] = total_loss / state.global_step
            metrics = state.log({**metrics, "total_flos": state.total_flos})
            del metrics["total_flos"]  # officially in trainer_state.json only
            self._print(str(metrics))
        except StepFailure as failure:
            if failure.everywhere and not self.world.is_first:
                raise SystemExit(1) from failure
            raise TrainingError(self._describe(failure)) from failure
        except PeerFailure as failure:
            if LAST_GOOD in str(failure):
                raise
            raise PeerFailure(f"{failure}; {self._last_good()}") from failure
        finally:
            self.progress.close()
        return metrics

    def _training_state(self) -> TrainingState:
        return TrainingState(
            self.model.prefix_encoder,
            self.optimizer,
            self.scheduler,
            self.loss_scale,
            self.state,
            self.position,
            rows=self.fingerprint,
            dtype=self.model.dtype,
        )

    def _resume(self, checkpoint: Path) -> None:
        saved = self._training_state()
        read_training_state(checkpoint, saved)
        self.state, self.position = saved.trainer_state, saved.position
        forgotten = locate_best_checkpoint(checkpoint, self.state, self.flags)
        if forgotten is not None and self.world.is_first:
            print(forgotten)
        self.last_checkpoint = checkpoint

    def _train_epochs(self) -> None:
        """All epochs from the first; skips the micro-batches that `position` counts as done."""
        plan, state, done = self.plan, self.state, self.position.micro_batches
        batches = BatchSampler(self.sampler, plan.batch_size, self.args.dataloader_drop_last)
        window: list[list[int]] = []
        seen = 0  # micro-batches, over all epochs
        for epoch in range(plan.num_train_epochs):
            for batch_of_epoch, micro_batch in enumerate(batches, 1):
                seen += 1
                if seen > done:
                    window.append(micro_batch)
                    if plan.ends_step(seen, batch_of_epoch):
                        state.epoch = epoch + batch_of_epoch / plan.batches_per_epoch
                        self.position.micro_batches = seen
                        self._take_step(window)
                        window = []
                if seen >= done and state.global_step >= plan.max_steps:
                    break
            if epoch >= self.position.epochs_ended:
                self.position.epochs_ended = epoch + 1
                self._log_evaluate_save(*self.schedule.after_epoch(state))
            if seen >= done and state.global_step >= plan.max_steps:
                break

    def _take_step(self, window: list[list[int]]) -> None:
        """One optimiser step on the micro-batches of `window`, and what is due after it."""
        state, position = self.state, self.position
        result = self.gradient.compute(
            window, state.global_step, lambda: self._stop_request.signal, self._print
        )
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        state.global_step += 1
        state.total_flos += 6.0 * result.tokens * self._non_embedding_parameters
        position.window_loss += result.loss
        position.tokens += result.tokens
        self.progress.step(result.loss, self.scheduler.get_last_lr()[0], result.tokens)
        if self.world.is_first:
            self.hooks.on_step(state.global_step)
        self._log_evaluate_save(*self.schedule.after_step(state))
        # Several ranks stop together or not at all, as they agreed with the gradient.
        stop = result.stop if self.world.size > 1 else self._stop_request.signal
        if stop:
            self._interrupt(stop)

    def _log_evaluate_save(self, log: bool, evaluate: bool, save: bool) -> None:
        if log:
            self._log()
        metrics = self._evaluate() if evaluate else None
        if save:
            self._save(metrics)

    def _log(self) -> None:
        """Log the mean loss of the steps since the last log, and the next learning rate."""
        position = self.position
        steps = self.state.global_step - position.window_start
        if steps == 0:
            return
        logs = self.state.log(
            {
                "loss": round(position.window_loss / steps, 4),
                "learning_rate": self.scheduler.get_last_lr()[0],
            }
        )
        position.total_loss += position.window_loss
        position.window_loss = 0.0
        position.window_start = self.state.global_step
        self._write_log(logs)

    def _evaluate(self) -> dict[str, float] | None:
        if not self.world.is_first:
            return None
        metrics = self.hooks.evaluate()
        self.model.train()
        self._write_log(self.state.log(metrics))
        return metrics

    def _save(self, metrics: dict[str, float] | None = None) -> None:
        """Write a checkpoint, the best one so far if `metrics` say so."""
        if self.folder is None:
            return
        path, state = self.folder.checkpoint(self.state.global_step), self.state
        if metrics is not None and self.schedule.is_better(metrics, state.best_metric):
            state.best_metric = metrics[self.schedule.best_metric]
            state.best_model_checkpoint = str(path.absolute())
        if self._writes:
            self._print("Saving PrefixEncoder")
            self.folder.write_checkpoint(state.global_step, self._fill_checkpoint, self._best())
        self.last_checkpoint = path
        if self._writes:
            self.hooks.on_save(path, state.global_step)

    def _fill_checkpoint(self, folder: Path) -> None:
        write_training_state(folder, self._training_state())
        self.hooks.write_companions(folder)

    def _best(self) -> Path | None:
        best = self.state.best_model_checkpoint
        return None if best is None else Path(best)

    def _load_best(self) -> None:
        """--load_best_model_at_end."""
        if not self.args.load_best_model_at_end or not self._writes:
            return
        best = self._best()
        if best is None:
            self._print("there is no best checkpoint to load: none was saved after an evaluation")
            return
        self._print(f"Loading best model from {best} (score: {self.state.best_metric}).")
        self.model.prefix_encoder.load_state_dict(read_prefix(best))

    def _interrupt(self, signal: int) -> None:
        step = self.state.global_step
        if self.folder is not None and self.last_checkpoint != self.folder.checkpoint(step):
            self._save()
        self.world.wait_for_all()
        if not self.world.is_first:
            raise SystemExit(128 + signal)
        saved = "nothing is saved" if self.folder is None else f"saved in {self.last_checkpoint}"
        raise Interrupted(f"stopped after step {step}; {saved}", signal)

    def _print_header(self, resume_from: Path | None) -> None:
        if not self.world.is_first:
            return
        for line in self.plan.header(sum(p.numel() for p in self.gradient.parameters)):
            print(line)
        if self.world.size > 1:
            print(f"  Number of processes = {self.world.size}, which share the steps above")
        if self.world.size > self.plan.accumulation:
            print(
                f"  {self.world.size - self.plan.accumulation} of them are idle: a step has only "
                f"{self.plan.accumulation} micro-batches (--gradient_accumulation_steps)"
            )
        if resume_from is not None:
            print(f"  Continuing after step {self.state.global_step}, from {resume_from}")

    def _print(self, line: str) -> None:
        if self.world.is_first:
            self.progress.write(line)

    def _write_log(self, logs: dict[str, float]) -> None:
        if self.world.is_first:
            self.progress.log(logs, self.state)
            self.position.log_lines = self.progress.lines

    def _describe(self, failure: StepFailure) -> str:
        names = ", ".join(str(self.row_names[index]) for index in failure.rows[:16])
        more = f" and {len(failure.rows) - 16} more" if len(failure.rows) > 16 else ""
        parts = (
            f"step {self.state.global_step + 1}: {failure.what} (rows {names}{more})",
            failure.where,
            self._last_good(),
            failure.cure,
        )
        return "; ".join(part for part in parts if part)

    def _last_good(self) -> str:
        return f"{LAST_GOOD}: {self.last_checkpoint or 'none yet'}"


def _count_non_embedding(model: nn.Module) -> int:
    """Parameters outside embeddings, which the official estimate of operations counts."""
    embeddings = {id(each.weight) for each in model.modules() if isinstance(each, nn.Embedding)}
    return sum(p.numel() for p in model.parameters() if id(p) not in embeddings)
