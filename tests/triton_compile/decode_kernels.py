"""The PTX of kernels that decode weights, for one warp each, as JSON by name.

python -m tests.triton_compile.decode_kernels --json FILE
"""

import argparse
import json
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch import Tensor

from bench.triton_cases import Launch
from bench.triton_resources import CHIPS, compile_for
from glmkern.triton_kernels.quant_linear.decode import decode_field, decode_pair
from tests.triton_compile.ptx import LANES

BYTES = 4 * LANES
FIELDS = [(bits, shift) for bits in (4, 8) for shift in range(0, 32, bits)]


@triton.jit
def decode_kernel(packed, even, odd, JOINED: tl.constexpr, BYTES: tl.constexpr):
    # [BYTES]
    o_j = tl.arange(0, BYTES)
    b_even, b_odd = decode_pair(tl.load(packed + o_j), even.dtype.element_ty, JOINED)
    tl.store(even + o_j, b_even)
    tl.store(odd + o_j, b_odd)


@triton.jit
def field_kernel(words, fields, SHIFT: tl.constexpr, BITS: tl.constexpr, WORDS: tl.constexpr):
    # [WORDS]
    o_w = tl.arange(0, WORDS)
    tl.store(fields + o_w, decode_field(tl.load(words + o_w), SHIFT, BITS))


def pair_name(dtype: torch.dtype, joined: bool) -> str:
    return f"pairs {dtype} {'joined' if joined else 'split'}"


def field_name(bits: int, shift: int) -> str:
    return f"field of {bits} bits at {shift}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path, required=True)
    result = {}
    for dtype in (torch.float16, torch.bfloat16):
        codes = torch.empty(0, dtype=dtype)
        for joined in (False, True):
            arguments = torch.empty(0, dtype=torch.int8), codes, codes
            ptx = compiled_ptx(decode_kernel, *arguments, JOINED=joined, BYTES=BYTES)
            result[pair_name(dtype, joined)] = ptx
    words, codes = torch.empty(0, dtype=torch.int32), torch.empty(0)
    for bits, shift in FIELDS:
        ptx = compiled_ptx(field_kernel, words, codes, SHIFT=shift, BITS=bits, WORDS=LANES)
        result[field_name(bits, shift)] = ptx
    parser.parse_args().json.write_text(json.dumps(result))


def compiled_ptx(kernel: triton.JITFunction, *args: Tensor, **constants: int) -> str:
    """For one warp; of `args` only the types count."""
    launch = Launch("", kernel, args, num_warps=1, num_stages=3, constants=constants)
    return compile_for(CHIPS[0], launch).asm["ptx"]


if __name__ == "__main__":
    main()
