"""quant_linear: the first linear of a ChatGLM2-6B layer, each kernel a few times: at its usual
tiles in bfloat16, once in float16, whose backward scales the weights, and where it takes most; and
swiglu in the last kernel, of few rows, whose sums are split, and of as many as the MLP has."""

from collections.abc import Iterator

import torch

from bench.gpu.rows import plain
from bench.triton_cases import Launch, recorded

REASON = """The decoded weights of a fused product live in registers beside its sums, so that 64
tokens by 128 rows (forward) or by 256 columns (backward) are what four warps hold; chips with
227 KiB of shared memory have instructions that take one factor from there, and 128 tokens."""
MEMORY_BOUND = False
N, K = 4608, 4096
GATES_AND_UPS = 27392


def launches() -> Iterator[Launch]:
    half, bf16, single = torch.float16, torch.bfloat16, torch.float32
    seen = set()
    for M, dtype, bits in [
        (16, bf16, 4),
        (192, bf16, 4),
        (192, half, 4),
        (512, bf16, 4),
        (1, half, 4),
        (8, single, 4),
        (32, single, 4),
        (64, half, 8),
    ]:
        for launch in _both_directions(M, dtype, bits):
            if launch.kernel.__name__ not in seen:
                yield launch
        seen.update({"sum_splits_kernel"})
    for M, rows in [(1, N), (16, N), (16, GATES_AND_UPS), (512, GATES_AND_UPS)]:
        for launch in _with_swiglu(M, rows, half):
            if launch.constants.get("SWIGLU"):
                yield launch


def _with_swiglu(M: int, rows: int, dtype: torch.dtype) -> Iterator[Launch]:
    packed = torch.empty(rows, K // 2, dtype=torch.int8, device="meta")
    scale = torch.empty(rows, dtype=torch.float16, device="meta")
    x = torch.empty(M, K, dtype=dtype, device="meta")
    with recorded("quant_linear", f"4 bits, {M} tokens, {plain(dtype)}") as record:
        yield from record("quant_linear_swiglu_fwd", x, packed, scale, 4, None, note=" + swiglu")


def _both_directions(M: int, dtype: torch.dtype, bits: int) -> Iterator[Launch]:
    packed = torch.empty(N, K * bits // 8, dtype=torch.int8, device="meta")
    scale = torch.empty(N, dtype=torch.float16, device="meta")
    x, dy = (torch.empty(M, length, dtype=dtype, device="meta") for length in (K, N))
    case = f"{bits} bits, {M} tokens, {plain(dtype)}"
    with recorded("quant_linear", case) as record:
        yield from _once(record("quant_linear_fwd", x, packed, scale, bits, None))
        yield from _once(record("quant_linear_bwd", dy, packed, scale, bits, note=" (dx)"))


def _once(launches: Iterator[Launch]) -> Iterator[Launch]:
    """One launch of each kernel: all slabs but the last have the same size."""
    yield from {launch.kernel: launch for launch in launches}.values()
