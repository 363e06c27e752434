"""swiglu at ChatGLM2's width, and at that of a short row, of which a program has several."""

from collections.abc import Iterator

import torch

from bench.triton_cases import Launch, recorded

REASON = """Tiles of 2 rows by 1,024 columns whatever the width, 16 elements a thread and tensor:
two 16-byte loads in half precision, four in fp32. Rows of up to 256 columns lie 8 to a program."""
MEMORY_BOUND = True


def launches() -> Iterator[Launch]:
    for width, dtype in ((13696, torch.float32), (13696, torch.bfloat16), (200, torch.float32)):
        x = torch.empty(1500, 2 * width, dtype=dtype, device="meta")
        dy = torch.empty(1500, width, dtype=dtype, device="meta")
        with recorded("swiglu", f"{width} {str(dtype).removeprefix('torch.')}") as record:
            yield from record("swiglu_fwd", x)
            yield from record("swiglu_bwd", dy, x)
