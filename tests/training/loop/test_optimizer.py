"""The optimisers and schedules against their formulas and against transformers' own schedules."""

import math

import pytest
import torch
from torch import nn

from glmkern.training.flags.arguments import SCHEDULES, TrainingArguments
from glmkern.training.loop.optimizer import AdamWHF, create_optimizer, create_scheduler

BETAS, EPS, LR = (0.9, 0.999), 1e-3, 0.1


def gradients(steps: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(5, generator=generator, dtype=torch.float64) for _ in range(steps)]


def run(optimizer_class, steps: int, weight_decay: float = 0.0) -> torch.Tensor:
    parameter = nn.Parameter(torch.linspace(-1, 1, 5, dtype=torch.float64))
    optimizer = optimizer_class([parameter], lr=LR, betas=BETAS, eps=EPS, weight_decay=weight_decay)
    for gradient in gradients(steps):
        parameter.grad = gradient
        optimizer.step()
    assert optimizer.param_groups[0]["eps"] == EPS
    assert optimizer.param_groups[0]["weight_decay"] == weight_decay
    return parameter.detach()


def official(steps: int, weight_decay: float = 0.0) -> torch.Tensor:
    """transformers 4.30.2's AdamW, written out."""
    p = torch.linspace(-1, 1, 5, dtype=torch.float64)
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for t, g in enumerate(gradients(steps), 1):
        m = BETAS[0] * m + (1 - BETAS[0]) * g
        v = BETAS[1] * v + (1 - BETAS[1]) * g * g
        size = LR * math.sqrt(1 - BETAS[1] ** t) / (1 - BETAS[0] ** t)
        p = p - size * m / (v.sqrt() + EPS)
        p = p - LR * weight_decay * p
    return p


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("steps", [1, 2, 30])
def test_adamw_hf_is_the_official_formula(steps, weight_decay):
    torch.testing.assert_close(
        run(AdamWHF, steps, weight_decay), official(steps, weight_decay), rtol=1e-12, atol=1e-12
    )


def test_torch_adamw_is_not():
    difference = run(torch.optim.AdamW, 5) - official(5)
    assert difference.abs().max() > 1e-3


def test_adamw_hf_continues_from_a_saved_state():
    def fresh():
        parameter = nn.Parameter(torch.ones(5, dtype=torch.float64))
        return parameter, AdamWHF([parameter], lr=LR, betas=BETAS, eps=EPS)

    straight, optimizer = fresh()
    for gradient in gradients(6):
        straight.grad = gradient
        optimizer.step()

    broken, optimizer = fresh()
    for place, gradient in enumerate(gradients(6)):
        if place == 3:
            state, value = optimizer.state_dict(), broken.detach().clone()
            broken, optimizer = fresh()
            optimizer.load_state_dict(state)
            broken.data.copy_(value)
        broken.grad = gradient
        optimizer.step()
    assert torch.equal(straight, broken)


def test_biases_do_not_decay():
    model = nn.Sequential(nn.Embedding(3, 4), nn.Linear(4, 4))
    model[0].weight.requires_grad_(False)
    optimizer = create_optimizer(model, TrainingArguments(weight_decay=0.1))
    decaying, free = optimizer.param_groups
    assert [p.shape for p in decaying["params"]] == [(4, 4)] and decaying["weight_decay"] == 0.1
    assert [p.shape for p in free["params"]] == [(4,)] and free["weight_decay"] == 0.0


def test_optim_chooses_the_class():
    model = nn.Linear(2, 2)
    kinds = {
        name: create_optimizer(model, TrainingArguments(optim=name))
        for name in ("adamw_hf", "adamw_torch", "adamw_torch_fused")
    }
    assert type(kinds["adamw_hf"]) is AdamWHF
    assert type(kinds["adamw_torch"]) is torch.optim.AdamW
    assert kinds["adamw_torch_fused"].param_groups[0]["fused"] is True


@pytest.mark.parametrize(
    "name, warmup",
    [
        *((name, 0) for name in SCHEDULES),
        *((name, 7) for name in SCHEDULES if name != "constant"),  # which takes no warm-up
    ],
)
def test_schedule_is_that_of_transformers(name, warmup):
    from transformers import get_scheduler

    args = TrainingArguments(learning_rate=LR, lr_scheduler_type=name, warmup_steps=warmup)

    def rates(make) -> list[float]:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=LR)
        scheduler, values = make(optimizer), []
        for _ in range(50):
            values.append(scheduler.get_last_lr()[0])
            optimizer.step()
            scheduler.step()
        return [*values, scheduler.get_last_lr()[0]]

    ours = rates(lambda optimizer: create_scheduler(optimizer, args, 50))
    theirs = rates(lambda optimizer: get_scheduler(name, optimizer, warmup, 50))
    assert ours == pytest.approx(theirs, rel=1e-12, abs=1e-15)


def test_constant_schedule_ignores_warmup():
    args = TrainingArguments(lr_scheduler_type="constant", warmup_steps=7, learning_rate=LR)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=LR)
    assert create_scheduler(optimizer, args, 50).get_last_lr() == [LR]


def test_warmup_ratio_is_rounded_up_and_gives_way_to_steps():
    def first_full_rate(**flags) -> int:
        args = TrainingArguments(
            learning_rate=1.0, lr_scheduler_type="constant_with_warmup", **flags
        )
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        scheduler = create_scheduler(optimizer, args, 45)
        factors = [scheduler.lr_lambdas[0](step) for step in range(45)]
        return factors.index(1.0)

    assert first_full_rate(warmup_ratio=0.1) == 5
    assert first_full_rate(warmup_ratio=0.1, warmup_steps=2) == 2
