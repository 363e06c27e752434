"""What every registered op must pass besides its numbers."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def check_registration(op: torch._ops.OpOverload, inputs: Sequence) -> None:
    """torch.library.opcheck, with whatever requires a gradient in `inputs`."""
    torch.library.opcheck(op, tuple(inputs))


def check_compiles(function: Callable, batches: Sequence[Sequence[Tensor]]) -> None:
    """`function` compiles without a graph break, and gives the eager results and gradients at
    every batch of inputs (two token counts, say)."""
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for inputs in batches:
        results = []
        for f in (function, compiled):
            leaves = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
            y = f(*leaves)
            wanted = [x for x in leaves if x.requires_grad]
            results.append([y, *torch.autograd.grad(y, wanted, torch.ones_like(y))])
        for eager, traced in zip(*results, strict=True):
            torch.testing.assert_close(traced, eager, rtol=0, atol=0)
    torch._dynamo.reset()
