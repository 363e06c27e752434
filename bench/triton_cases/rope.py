"""rope and qkv_rope at ChatGLM2's size."""

from collections.abc import Iterator

import torch

from bench.triton_cases import Launch, recorded

REASON = """One token and 16 of its heads of 128 channels, 16 elements a thread: whole heads, whose
pairs lie in one thread, and one load of the token's angles for all of them."""
MEMORY_BOUND = True

T, N, G, C, R = 1500, 32, 2, 128, 32


def launches() -> Iterator[Launch]:
    cos_sin = torch.empty(8192, R, 2, device="meta")
    positions = torch.empty(T, dtype=torch.int64, device="meta")
    for dtype in (torch.float32, torch.bfloat16):
        qkv = torch.empty(T, (N + 2 * G) * C, dtype=dtype, device="meta")
        x, q = (torch.empty(T, heads, C, dtype=dtype, device="meta") for heads in (N + G, N))
        k = torch.empty(T, G, C, dtype=dtype, device="meta")
        with recorded("rope", f"{N} + 2 x {G} heads {str(dtype).removeprefix('torch.')}") as record:
            yield from record("rope_fwd", x, cos_sin, positions)
            yield from record("rope_bwd", x, cos_sin, positions, note=" backward")
            yield from record("qkv_rope_fwd", qkv, qkv[0], cos_sin, positions, N, G, False)
            caches = torch.empty(2, T, G, C, dtype=dtype, device="meta")
            into = (qkv, qkv[0], cos_sin, positions, N, G, False, *caches, positions)
            yield from record("qkv_rope_cache_fwd", *into, note=", cache")
            yield from record("qkv_rope_bwd", q, k, k, cos_sin, positions, False)
