"""bias_dropout at ChatGLM2's width, packed, and at a width that no counter of four divides."""

from collections.abc import Iterator

import torch

from bench.triton_cases import Launch, recorded

REASON = """Tiles of 2 rows by 1,024 columns, 16 elements a thread, so four draws of Philox. Rows of
a width that four does not divide draw every element's group; they have 8 elements a thread, for
their draws took up to 173 registers of 4 warps and left two blocks a multiprocessor."""
MEMORY_BOUND = True


def launches() -> Iterator[Launch]:
    seed, sequence_ids = (
        torch.empty(2, dtype=torch.int64, device="meta"),
        torch.empty(16, dtype=torch.int64, device="meta"),
    )
    cu_seqlens = torch.empty(17, dtype=torch.int32, device="meta")
    drop = (0.1, seed, cu_seqlens, sequence_ids)
    for width, dtype in ((4096, torch.float32), (4096, torch.bfloat16), (4099, torch.float32)):
        x = torch.empty(1500, width, dtype=dtype, device="meta")
        with recorded("bias_dropout", f"{width} {str(dtype).removeprefix('torch.')}") as record:
            if width == 4096:
                yield from record(
                    "bias_dropout_add_fwd", x, x[0], x, 0.0, None, None, None, note=" p=0"
                )
            yield from record("bias_dropout_add_fwd", x, x[0], x, *drop)
            yield from record("bias_dropout_add_bwd", x, *drop, False)
            yield from record("bias_dropout_add_bwd", x, *drop, True, note=" + dbias")
