"""The optimisers and learning rate schedules of transformers 4.30.2, on top of torch's."""

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from glmkern.training.flags.arguments import TrainingArguments
from glmkern.training.flags.validation import POLYNOMIAL_END


class AdamWHF(AdamW):
    """`--optim adamw_hf`: AdamW with eps and the weight decay where transformers' class has them.

    That class adds eps to sqrt(v) before the bias correction,
        p -= lr * sqrt(1 - beta2^t) / (1 - beta1^t) * m / (sqrt(v) + eps).
    This is torch's formula with eps / sqrt(1 - beta2^t). It decays p after the update, not before.
    All parameters of a group take every step together.
    """

    @torch.no_grad()
    def step(self, closure: Callable | None = None):
        official = [(group["eps"], group["weight_decay"]) for group in self.param_groups]
        for group in self.param_groups:
            step = 1 + max(
                (int(self.state[p]["step"]) for p in group["params"] if p in self.state), default=0
            )
            group["eps"] /= math.sqrt(1 - group["betas"][1] ** step)
            group["weight_decay"] = 0.0
        try:
            loss = super().step(closure)
        finally:
            for group, (eps, weight_decay) in zip(self.param_groups, official, strict=True):
                group["eps"], group["weight_decay"] = eps, weight_decay
        for group in self.param_groups:
            if group["weight_decay"] > 0:
                for parameter in group["params"]:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
        return loss


def create_optimizer(model: nn.Module, args: TrainingArguments) -> Optimizer:
    """The optimiser of `args` for the trainable parameters, those named bias without decay."""
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {
            "params": [p for name, p in trainable if "bias" not in name],
            "weight_decay": args.weight_decay,
        },
        {"params": [p for name, p in trainable if "bias" in name], "weight_decay": 0.0},
    ]
    settings = {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
    }
    if args.optim == "adamw_hf":
        return AdamWHF(groups, **settings)
    return AdamW(groups, fused=args.optim == "adamw_torch_fused" or None, **settings)


def create_scheduler(optimizer: Optimizer, args: TrainingArguments, max_steps: int) -> LambdaLR:
    """`--lr_scheduler_type`: linear warm-up from 0 (`constant` has none), then the decay."""
    warmup = args.warmup_steps or math.ceil(max_steps * args.warmup_ratio)
    decay = _DECAYS[args.lr_scheduler_type]

    def factor(step: int) -> float:
        if step < warmup and args.lr_scheduler_type != "constant":
            return step / warmup
        return decay(step, warmup, max_steps, args.learning_rate)

    return LambdaLR(optimizer, factor)


def _constant(step: int, warmup: int, total: int, learning_rate: float) -> float:
    return 1.0


def _linear(step: int, warmup: int, total: int, learning_rate: float) -> float:
    return (total - step) / max(1, total - warmup)


def _cosine(step: int, warmup: int, total: int, learning_rate: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * (1.0 - _linear(step, warmup, total, learning_rate))))


def _polynomial(step: int, warmup: int, total: int, learning_rate: float) -> float:
    remaining = _linear(step, warmup, total, learning_rate)
    return ((learning_rate - POLYNOMIAL_END) * remaining + POLYNOMIAL_END) / learning_rate


def _inverse_sqrt(step: int, warmup: int, total: int, learning_rate: float) -> float:
    # The official scale is the warm-up itself, a division by zero without one; later releases of
    # transformers use 10,000 there.
    timescale = warmup or 10_000
    return math.sqrt(timescale / (step - warmup + timescale))


_DECAYS: dict[str, Callable[[int, int, int, float], float]] = {
    "constant": _constant,
    "constant_with_warmup": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "cosine_with_restarts": _cosine,  # officially one cycle, which is the cosine
    "polynomial": _polynomial,
    "inverse_sqrt": _inverse_sqrt,
}
