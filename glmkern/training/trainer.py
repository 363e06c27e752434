"""The training loop of transformers 4.30.2 for a prefix, over packed rows."""

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, RandomSampler, Sampler

from glmkern.checkpoint import write_prefix
from glmkern.checkpoint.atomic import write_text, write_torch
from glmkern.errors import TrainingError
from glmkern.model.packing import Row
from glmkern.training.arguments import TrainingArguments
from glmkern.training.batching import Pack, labelled_tokens, pack_step, token_budget
from glmkern.training.loss_scale import LossScale
from glmkern.training.optimizer import create_optimizer, create_scheduler
from glmkern.training.progress import Progress
from glmkern.training.run_folder import RunFolder
from glmkern.training.seeding import rng_state, set_seed
from glmkern.training.state import Plan, TrainerState, speed_metrics


class Trainer:
    """Trains the prefix encoder of a model; a run is one instance and one call of `train`.

    Args:
        model: has `loss(batch, dropout_offset, seed)`, a scalar that differentiates into
            `prefix_encoder`, its only trainable part; `dtype`, `device` and `config.num_layers`.
        rows: what to train on, each with at least one token that is predicted.
        args: how; see `arguments.TrainingArguments`.
        sampler: the order of the rows in each epoch; None shuffles as the official run does.
        folder: where checkpoints and logs go; None writes nothing.
        write_companions: writes what else belongs in a checkpoint folder (configuration,
            tokenizer) into the folder it is given.
        row_names: what an error message calls the rows; None: their indices.

    Attributes:
        state: TrainerState, as trainer_state.json holds it.
        optimizer, scheduler: torch's, as optimizer.pt and scheduler.pt hold them.
        loss_scale: of a float16 model; None for the others, which need none.
    """

    def __init__(self, model: nn.Module, rows: Sequence[Row], args: TrainingArguments, *,
                 sampler: Sampler[int] | None = None, folder: RunFolder | None = None,
                 write_companions: Callable[[Path], None] | None = None,
                 row_names: Sequence[object] | None = None):
        for index, row in enumerate(rows):
            if not labelled_tokens(row):
                raise ValueError(f"row {index} has no token to predict; leave it out")
        self.model, self.rows, self.args = model, rows, args
        self.folder, self.write_companions = folder, write_companions
        self.row_names = row_names or range(len(rows))
        self.plan = Plan.of(len(rows), args)
        if self.plan.batches_per_epoch == 0:
            raise ValueError(
                f"{len(rows)} rows do not fill a micro-batch of {args.per_device_train_batch_size},"
                " and --dataloader_drop_last leaves out what does not; lower the batch size")
        # As the official Trainer: seeded again once the model is there, so that the order of rows
        # does not depend on how many random numbers the model's construction took.
        set_seed(args.seed)
        self.sampler = sampler or self._random_sampler()
        self.budget = token_budget(args.tokens_per_pack)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = create_optimizer(model, args)
        self.scheduler = create_scheduler(self.optimizer, args, self.plan.max_steps)
        self.loss_scale = LossScale() if model.dtype == torch.float16 else None
        self.state = TrainerState(max_steps=self.plan.max_steps,
                                  num_train_epochs=self.plan.num_train_epochs)
        self._non_embedding_parameters = _count_non_embedding(model)
        self._window_loss = 0.0  # of the steps since the last log
        self._window_start = 0  # the last logged step
        self._total_loss = 0.0

    def train(self) -> dict[str, float]:
        """Run all steps; returns the metrics that train_results.json holds.

        Raises TrainingError, naming step and rows, where the loss or the gradient is not finite.
        """
        args, plan, state = self.args, self.plan, self.state
        self.model.train()
        self.optimizer.zero_grad()
        log_file = None
        if self.folder is not None:
            self.folder.make()
            log_file = self.folder.path / "trainer_log.jsonl"
        for line in plan.header(sum(p.numel() for p in self.parameters)):
            print(line)
        self.progress = Progress(plan.max_steps, self.model.device,
                                 show_bar=not args.disable_tqdm, log_file=log_file)
        start = time.monotonic()
        try:
            self._train_epochs()
            self._total_loss += self._window_loss
            metrics = speed_metrics(plan, time.monotonic() - start)
            metrics["train_loss"] = self._total_loss / state.global_step
            metrics = state.log({**metrics, "total_flos": state.total_flos})
            del metrics["total_flos"]  # officially in trainer_state.json only
            self.progress.write(str(metrics))
        finally:
            self.progress.close()
        return metrics

    def _train_epochs(self) -> None:
        args, plan, state = self.args, self.plan, self.state
        batches = BatchSampler(self.sampler, plan.batch_size, args.dataloader_drop_last)
        window: list[list[int]] = []
        seen = 0  # micro-batches, over all epochs
        for epoch in range(plan.num_train_epochs):
            for batch_of_epoch, micro_batch in enumerate(batches, 1):
                window.append(micro_batch)
                seen += 1
                if plan.ends_step(seen, batch_of_epoch):
                    self._take_step(window)
                    window = []
                    state.epoch = epoch + batch_of_epoch / plan.batches_per_epoch
                    self._log_and_save_after_step()
                if state.global_step >= plan.max_steps:
                    break
            if args.logging_strategy == "epoch":
                self._log()
            if args.save_strategy == "epoch":
                self._save()
            if state.global_step >= plan.max_steps:
                break

    def _take_step(self, window: list[list[int]]) -> None:
        """One optimiser step on the micro-batches of `window`."""
        state = self.state
        packs = pack_step(self.rows, window, self.budget)
        loss = self._backward(packs)
        while not self._clip_gradient():
            self._gradient_overflowed(window)
            loss = self._backward(packs)
        if self.loss_scale is not None:
            self.loss_scale.succeeded()
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        state.global_step += 1
        tokens = sum(pack.tokens for pack in packs)
        state.total_flos += 6.0 * tokens * self._non_embedding_parameters
        self._window_loss += loss
        self.progress.step(loss, self.scheduler.get_last_lr()[0], tokens)

    def _backward(self, packs: list[Pack]) -> float:
        """Accumulate the gradient of a step; returns its loss, the mean over its micro-batches."""
        scale = self.loss_scale.value if self.loss_scale is not None else 1.0
        offset = self.state.global_step * self.model.config.num_layers
        losses: list[Tensor] = []
        try:
            for pack in packs:
                loss = self.model.loss(pack.batch, dropout_offset=offset, seed=self.args.seed)
                loss = loss / self.plan.accumulation
                (loss * scale).backward()
                losses.append(loss.detach())
        except torch.OutOfMemoryError as error:
            raise self._failure(
                "ran out of GPU memory", pack.rows,
                f"lower --tokens_per_pack (a pack had {pack.tokens} tokens) or pass "
                "--recompute layer") from error
        values = torch.stack(losses).tolist()
        for pack, value in zip(packs, values, strict=True):
            if not math.isfinite(value):
                raise self._failure(f"the loss is {value}", pack.rows, self._cure())
        return sum(values)

    def _clip_gradient(self) -> bool:
        """Unscale the gradient and clip its norm; False where it is not finite."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if self.loss_scale is not None:
            torch._foreach_div_(gradients, self.loss_scale.value)
        norm = nn.utils.get_total_norm(gradients)
        if not torch.isfinite(norm):
            return False
        if self.args.max_grad_norm > 0:
            nn.utils.clip_grads_with_norm_(self.parameters, self.args.max_grad_norm, norm)
        return True

    def _gradient_overflowed(self, window: list[list[int]]) -> None:
        """Halve the loss scale for another try of the same micro-batches, or give up."""
        rows = [index for micro_batch in window for index in micro_batch]
        if self.loss_scale is None:
            raise self._failure("the gradient is not finite", rows, self._cure())
        if not self.loss_scale.halve():
            raise self._failure("the float16 gradient overflows even with a loss scale of 1", rows,
                                self._cure())
        self.optimizer.zero_grad()
        self.progress.write(
            f"step {self.state.global_step + 1}: the float16 gradient overflowed; repeated with "
            f"loss scale {self.loss_scale.value:g} ({self.loss_scale.overflows} times so far)")

    def _failure(self, what: str, rows: list[int], cure: str) -> TrainingError:
        names = ", ".join(str(self.row_names[index]) for index in rows[:16])
        more = f" and {len(rows) - 16} more" if len(rows) > 16 else ""
        return TrainingError(f"step {self.state.global_step + 1}: {what} (rows {names}{more}); "
                             f"{cure}")

    def _cure(self) -> str:
        cures = [f"lower --learning_rate (now {self.args.learning_rate:g})"]
        if self.model.dtype == torch.float16:
            cures.append("compute with --model_dtype bfloat16 or float32")
        cures.append("check these rows, the weights of the base and, if there is one, of the "
                     "--ptuning_checkpoint")
        return " or ".join(cures)

    def _log_and_save_after_step(self) -> None:
        args, step = self.args, self.state.global_step
        every = args.logging_strategy == "steps" and self._is_due(step, args.logging_steps)
        if every or (step == 1 and args.logging_first_step):
            self._log()
        if args.save_strategy == "steps" and self._is_due(step, args.save_steps):
            self._save()

    def _is_due(self, step: int, interval: float) -> bool:
        """`interval`: steps, or below 1 a share of all steps; zero or less is never."""
        if 0 < interval < 1:
            interval = math.ceil(self.plan.max_steps * interval)
        return interval > 0 and step % interval == 0

    def _log(self) -> None:
        """Log the mean loss of the steps since the last log, and the next learning rate."""
        steps = self.state.global_step - self._window_start
        logs = self.state.log({
            "loss": round(self._window_loss / steps, 4),
            "learning_rate": self.scheduler.get_last_lr()[0],
        })
        self._total_loss += self._window_loss
        self._window_loss = 0.0
        self._window_start = self.state.global_step
        self.progress.log(logs, self.state)

    def _save(self) -> None:
        if self.folder is None:
            return
        self.progress.write("Saving PrefixEncoder")
        self.folder.write_checkpoint(self.state.global_step, self._fill_checkpoint)

    def _fill_checkpoint(self, folder: Path) -> None:
        write_prefix(folder, self.model.prefix_encoder.state_dict())
        if self.write_companions is not None:
            self.write_companions(folder)
        write_torch(folder / "optimizer.pt", self.optimizer.state_dict())
        write_torch(folder / "scheduler.pt", self.scheduler.state_dict())
        if self.loss_scale is not None:
            write_torch(folder / "scaler.pt", self.loss_scale.state_dict())
        write_torch(folder / "rng_state.pth", rng_state())
        write_text(folder / "trainer_state.json", self.state.to_json())

    def _random_sampler(self) -> Sampler[int]:
        seed = self.args.data_seed
        if seed is None:
            seed = int(torch.empty((), dtype=torch.int64).random_().item())
        return RandomSampler(self.rows, generator=torch.Generator().manual_seed(seed))


def _count_non_embedding(model: nn.Module) -> int:
    """Parameters outside embeddings, which the official estimate of operations counts."""
    embeddings = {id(each.weight) for each in model.modules() if isinstance(each, nn.Embedding)}
    return sum(p.numel() for p in model.parameters() if id(p) not in embeddings)
