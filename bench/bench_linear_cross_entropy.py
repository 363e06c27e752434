"""linear_cross_entropy, the loss alone and with its gradient, of every backend and of PyTorch.

    python -m bench.bench_linear_cross_entropy                       prints a table and writes
                                                                     bench/results/
    pytest --benchmark-enable bench/bench_linear_cross_entropy.py    the same calls under
                                                                     pytest-benchmark

ChatGLM2-6B's output layer over sequences of 192 tokens of which 127 carry a label, one in float32
on a CPU, 16 in bfloat16 on a GPU: hidden 4096, vocabulary 65024, a frozen weight. Useful flops are
2 a weight and labelled token for the logits, and as many for the gradient of the hidden states. The
peer is F.linear and F.cross_entropy over all tokens, its gradient by autograd.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Work, available_backends, forced, main, pytest_generate_tests, test_speed  # noqa: F401 (pytest finds its two here)

SEQUENCES = {"cpu": 1, "cuda": 16}
DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}
TOKENS, LABELLED, HIDDEN, VOCABULARY = 192, 127, 4096, 65024
IGNORE_INDEX = -100
PEER = "F.linear + F.cross_entropy"


def works(device: str) -> list[Work]:
    return list(_works(device))


def _works(device: str) -> Iterator[Work]:
    sequences, dtype = SEQUENCES[device], DTYPE[device]
    hidden = torch.randn(sequences * TOKENS, HIDDEN, device=device).to(dtype)
    weight = (torch.randn(VOCABULARY, HIDDEN, device=device) / HIDDEN**0.5).to(dtype)
    labels = torch.full((sequences, TOKENS), IGNORE_INDEX, device=device)
    labels[:, -LABELLED - 1 : -1] = torch.randint(VOCABULARY, (sequences, LABELLED), device=device)
    labels = labels.flatten()
    calls = {
        name: _calls(name, hidden, weight, labels)
        for name in available_backends("linear_cross_entropy_fwd", device)
    }
    calls[PEER] = _peer_calls(hidden, weight, labels)
    product = 2 * sequences * LABELLED * HIDDEN * VOCABULARY
    for implementation, (loss, gradient) in calls.items():
        for name, call, products in (("loss", loss, 1), ("loss and gradient", gradient, 2)):
            yield Work(
                f"linear_cross_entropy {name}",
                implementation,
                (len(hidden), HIDDEN, VOCABULARY),
                dtype,
                0,
                products * product,
                call,
                peer=implementation == PEER,
            )


def _calls(
    backend: str, hidden: Tensor, weight: Tensor, labels: Tensor
) -> tuple[Callable, Callable]:
    """The loss alone, and with its gradient, by one backend of glmkern."""
    return tuple(
        forced(
            backend,
            torch.ops.glmkern.linear_cross_entropy_fwd,
            hidden,
            weight,
            None,
            8 * weight.element_size(),
            labels,
            None,
            IGNORE_INDEX,
            0.0,
            hidden_grad,
        )
        for hidden_grad in (False, True)
    )


def _peer_calls(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Callable, Callable]:
    """The same by F.linear, F.cross_entropy and autograd."""
    leaf = hidden.clone().requires_grad_()

    def loss(hidden: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight), labels, ignore_index=IGNORE_INDEX)

    return lambda: loss(hidden), lambda: torch.autograd.grad(loss(leaf), leaf)


if __name__ == "__main__":
    main("linear_cross_entropy", works, __doc__)
