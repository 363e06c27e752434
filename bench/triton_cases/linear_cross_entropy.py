"""linear_cross_entropy over ChatGLM2's vocabulary, and the gradient's product with dloss."""

from collections.abc import Iterator

import torch

from bench.triton_cases import Launch, recorded

REASON = """Blocks of 4,096 logits by 16 warps, 8 elements a thread: a chunk has few rows for a
large chip, so that a program, which has one, needs many warps, and with 16 elements a thread
registers left one such program to a multiprocessor. The product with dloss is elementwise: 2 rows
by 1,024 columns, 16 elements a thread."""
MEMORY_BOUND = True


def launches() -> Iterator[Launch]:
    labels = torch.empty(500, dtype=torch.int64, device="meta")
    loss, dhidden = torch.empty(500, device="meta"), torch.empty(500, 4096, device="meta")
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        logits = torch.empty(500, 65024, dtype=dtype, device="meta")
        with recorded("linear_cross_entropy", f"65024 {name}") as record:
            yield from record("cross_entropy", logits, labels, loss, loss, False)
            yield from record("cross_entropy", logits, labels, loss, loss, True, note=" + gradient")
            yield from record(
                "cross_entropy",
                logits,
                labels,
                loss,
                loss,
                True,
                0.1,
                note=" + gradient, smoothed labels",
            )
        with recorded("linear_cross_entropy", f"4096 {name}") as record:
            yield from record("linear_cross_entropy_bwd", loss[0], dhidden, dtype)
