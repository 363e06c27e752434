"""The inline PTX that decodes weights, as compiled kernels have it: every byte in every place of
a word, against the formula."""

import os

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from bench.triton_cases import Launch
from bench.triton_resources import CHIPS, compile_for
from glmkern.triton_kernels.quant_linear.decode import decode_field, decode_pair
from tests.triton_compile.ptx import LANES, Warp

BYTES = 4 * LANES


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


def compiled_ptx(kernel: triton.JITFunction, *args: Tensor, **constants: int) -> str:
    """For one warp; of `args` only the types count."""
    assert "TRITON_INTERPRET" not in os.environ, "triton.compile fails where it is set"
    launch = Launch("", kernel, args, num_warps=1, num_stages=3, constants=constants)
    return compile_for(CHIPS[0], launch).asm["ptx"]


def pair_ptx(dtype: torch.dtype, joined: bool) -> str:
    packed, codes = torch.empty(0, dtype=torch.int8), torch.empty(0, dtype=dtype)
    return compiled_ptx(decode_kernel, packed, codes, codes, JOINED=joined, BYTES=BYTES)


def decode(ptx: str, packed: np.ndarray, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The even and the odd columns of BYTES bytes; memory is NaN before."""
    even, odd = (torch.full((BYTES,), torch.nan, dtype=dtype) for _ in range(2))
    Warp([packed.copy(), *(x.view(torch.uint8).numpy() for x in (even, odd))]).run(ptx)
    return even, odd


@pytest.mark.parametrize("joined", [False, True], ids=["split", "joined"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_byte_in_every_place(dtype, joined):
    ptx = pair_ptx(dtype, joined)
    assert "prmt" in ptx and "fma.rn" in ptx
    every = np.arange(256, dtype=np.uint8)
    for place in range(4):
        for packed in np.split(np.roll(every, place), 2):
            even, odd = decode(ptx, packed, dtype)
            signed = torch.from_numpy(packed).view(torch.int8)
            for result, codes in ((even, signed >> 4), (odd, (signed << 4) >> 4)):
                assert torch.equal(result, codes.to(dtype))
                assert not torch.signbit(result[codes == 0]).any()


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("0x0100", "0x0101"),
        ("0x000F000F", "0x000F0007"),
        ("0x6A", "0x6C"),
        ("0xE408E408", "0xE408E400"),
    ],
)
def test_a_wrong_constant_is_seen(right, wrong):
    """The machine is no rubber stamp."""
    ptx = pair_ptx(torch.float16, False)
    packed = np.random.default_rng(0).permutation(256).astype(np.uint8)[:BYTES]
    expected = decode(ptx, packed, torch.float16)
    changed = decode(ptx.replace(right, wrong, 1), packed, torch.float16)
    assert not all(map(torch.equal, expected, changed))


@pytest.mark.parametrize(
    ("bits", "shift"),
    [*((4, shift) for shift in range(0, 32, 4)), *((8, shift) for shift in range(0, 32, 8))],
)
def test_every_field_of_a_word(bits, shift):
    words, codes = torch.empty(0, dtype=torch.int32), torch.empty(0)
    ptx = compiled_ptx(field_kernel, words, codes, SHIFT=shift, BITS=bits, WORDS=LANES)
    assert "lop3" in ptx
    for first in range(0, 2**bits, LANES):
        fields = np.arange(first, first + LANES) % 2**bits
        words = np.random.default_rng(first).integers(2**32, size=LANES)
        words = (words & ~((2**bits - 1) << shift) | fields << shift).astype(np.uint32)
        result = np.full(LANES, np.nan, dtype=np.float32)
        Warp([words.view(np.uint8), result.view(np.uint8)]).run(ptx)
        codes = np.where(fields < 2 ** (bits - 1), fields, fields - 2**bits)
        assert np.array_equal(result, codes)
