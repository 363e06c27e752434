"""rms_norm: every line of the table of row tiles in fp32, the widest type, and the model's size in
bf16."""

from collections.abc import Iterator

import torch

from bench.triton_cases import Launch, recorded

REASON = """A row in registers, at most 16 elements a thread: four 16-byte loads a tensor in fp32,
and the four tensors of a backward in 64 of a thread's registers. Rows beyond 8,192 are walked in
blocks of 2,048 by 4 warps: more warps have too few registers each for the walk and spilled."""
MEMORY_BOUND = True


def launches() -> Iterator[Launch]:
    widths = [(width, torch.float32) for width in (256, 1024, 4096, 8192, 16384)]
    for width, dtype in [*widths, (4096, torch.bfloat16)]:
        x = torch.empty(1500, width, dtype=dtype, device="meta")
        weight, rstd = x[0], torch.empty(1500, device="meta")
        with recorded("rms_norm", f"{width} {str(dtype).removeprefix('torch.')}") as record:
            yield from record("rms_norm_fwd", x, weight, 1e-5)
            yield from record("add_rms_norm_fwd", x, x, weight, 1e-5, note=" + residual")
            yield from record("rms_norm_bwd", x, x, weight, rstd, x, False)
            yield from record("rms_norm_bwd", x, x, weight, rstd, x, True, note=" + dweight")
