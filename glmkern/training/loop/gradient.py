"""The gradient of one optimiser step: over packs and ranks, unscaled, finite and clipped."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from glmkern.model.packing import Row
from glmkern.training.data.packs import Pack, pack_step, token_budget
from glmkern.training.flags.arguments import TrainingArguments
from glmkern.training.loop.distributed import World
from glmkern.training.loop.failures import StepFailure, locate_gradient_failure, locate_loss_failure
from glmkern.training.loop.loss_scale import LossScale


@dataclass(frozen=True)
class StepResult:
    """A step of all ranks.

    loss: the mean over its micro-batches. tokens: of its rows. stop: the signal that asked any rank
    to stop, or 0.
    """

    loss: float
    tokens: int
    stop: int


class StepGradient:
    """Leaves the gradient of an optimiser step in `parameters`.

    Attributes:
        parameters: the trained ones.
        loss_scale: of a float16 model; None for the others, which need none.
    """

    def __init__(
        self, model: nn.Module, rows: Sequence[Row], args: TrainingArguments, world: World
    ):
        self.model, self.rows, self.args, self.world = model, rows, args, world
        self.budget = token_budget(args.tokens_per_pack)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.loss_scale = LossScale() if model.dtype == torch.float16 else None

    def compute(
        self,
        window: list[list[int]],
        step: int,
        stop: Callable[[], int],
        notify: Callable[[str], None],
    ) -> StepResult:
        """Compute the micro-batches of `window`; where the float16 gradient overflows, halve the
        loss scale and compute them again.

        Args:
            step: how many steps have been taken before; decides the dropout masks.
            stop: called after the backward pass; returns the signal that this rank received, or 0.
            notify: called with a line for every overflow.

        Raises StepFailure, and PeerFailure where the failing rank is another.
        """
        packs = pack_step(self.rows, window, self.budget, self.world.rank, self.world.size)
        offset = step * self.model.config.num_layers
        while True:
            losses = self._backward(packs, offset)
            reports = self.world.sum_gradients(self.parameters, [sum(losses), stop()])
            self._require_finite_losses(reports, losses, packs, offset)
            if self._unscale_and_clip():
                break
            self._overflowed(window)
            notify(
                f"step {step + 1}: the float16 gradient overflowed; repeated with loss scale "
                f"{self.loss_scale.value:g} ({self.loss_scale.overflows} times so far)"
            )
        if self.loss_scale is not None:
            self.loss_scale.succeeded()
        tokens = sum(len(self.rows[index].input_ids) for each in window for index in each)
        return StepResult(
            sum(loss for loss, _ in reports), tokens, int(max(stop for _, stop in reports))
        )

    def _backward(self, packs: list[Pack], offset: int) -> list[float]:
        """Accumulate this rank's gradient; returns its packs' shares of the step's loss."""
        scale = self.loss_scale.value if self.loss_scale is not None else 1.0
        losses: list[Tensor] = []
        try:
            for pack in packs:
                loss = self.model.loss(pack.batch, dropout_offset=offset, seed=self.args.seed)
                loss = loss / self.args.gradient_accumulation_steps
                (loss * scale).backward()
                losses.append(loss.detach())
        except torch.OutOfMemoryError as error:
            raise StepFailure(
                "ran out of GPU memory",
                pack.rows,
                f"lower --tokens_per_pack (a pack had {pack.tokens} tokens) or pass "
                "--recompute layer",
            ) from error
        return torch.stack(losses).tolist() if losses else []

    def _require_finite_losses(
        self, reports: list[list[float]], losses: list[float], packs: list[Pack], offset: int
    ) -> None:
        for pack, loss in zip(packs, losses, strict=True):
            if not math.isfinite(loss):
                where = locate_loss_failure(self.model, pack.batch, offset, self.args.seed)
                raise StepFailure(f"the loss is {loss}", pack.rows, self._cure(), where)
        if not all(math.isfinite(loss) for loss, _ in reports):
            raise self.world.wait_for_failure()

    def _unscale_and_clip(self) -> bool:
        """Divide by the loss scale and clip the norm; False where the norm is not finite."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if self.loss_scale is not None:
            torch._foreach_div_(gradients, self.loss_scale.value)
        norm = nn.utils.get_total_norm(gradients)
        if not torch.isfinite(norm):
            return False
        if self.args.max_grad_norm > 0:
            nn.utils.clip_grads_with_norm_(self.parameters, self.args.max_grad_norm, norm)
        return True

    def _overflowed(self, window: list[list[int]]) -> None:
        """Halve the loss scale for another try of the same micro-batches, or give up."""
        rows = [index for micro_batch in window for index in micro_batch]
        what = "the gradient is not finite"
        if self.loss_scale is not None:
            if self.loss_scale.halve():
                for parameter in self.parameters:
                    parameter.grad = None
                return
            what = "the float16 gradient overflows even with a loss scale of 1"
        where = locate_gradient_failure(self.model)
        raise StepFailure(what, rows, self._cure(), where, everywhere=True)

    def _cure(self) -> str:
        cures = [f"lower --learning_rate (now {self.args.learning_rate:g})"]
        if self.model.dtype == torch.float16:
            cures.append("compute with --model_dtype bfloat16 or float32")
        cures.append(
            "check these rows, the weights of the base and, if there is one, of the "
            "--ptuning_checkpoint"
        )
        return " or ".join(cures)
