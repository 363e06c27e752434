"""The inline PTX that decodes weights, as compiled kernels have it: every byte in every place of
a word, against the formula."""

import numpy as np
import pytest
import torch

from tests.triton_compile.decode_kernels import BYTES, FIELDS, field_name, pair_name
from tests.triton_compile.ptx import LANES, Warp


@pytest.fixture(scope="module")
def compiled(measured_by) -> dict[str, str]:
    return measured_by("tests.triton_compile.decode_kernels")


def decode(ptx: str, packed: np.ndarray, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The even and the odd columns of BYTES bytes; memory is NaN before."""
    even, odd = (torch.full((BYTES,), torch.nan, dtype=dtype) for _ in range(2))
    Warp([packed.copy(), *(x.view(torch.uint8).numpy() for x in (even, odd))]).run(ptx)
    return even, odd


@pytest.mark.parametrize("joined", [False, True], ids=["split", "joined"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_byte_in_every_place(compiled, dtype, joined):
    ptx = compiled[pair_name(dtype, joined)]
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
def test_a_wrong_constant_is_seen(compiled, right, wrong):
    """The machine is no rubber stamp."""
    ptx = compiled[pair_name(torch.float16, False)]
    packed = np.random.default_rng(0).permutation(256).astype(np.uint8)[:BYTES]
    expected = decode(ptx, packed, torch.float16)
    changed = decode(ptx.replace(right, wrong, 1), packed, torch.float16)
    assert not all(map(torch.equal, expected, changed))


@pytest.mark.parametrize(("bits", "shift"), FIELDS)
def test_every_field_of_a_word(compiled, bits, shift):
    ptx = compiled[field_name(bits, shift)]
    assert "lop3" in ptx
    for first in range(0, 2**bits, LANES):
        fields = np.arange(first, first + LANES) % 2**bits
        words = np.random.default_rng(first).integers(2**32, size=LANES)
        words = (words & ~((2**bits - 1) << shift) | fields << shift).astype(np.uint32)
        result = np.full(LANES, np.nan, dtype=np.float32)
        Warp([words.view(np.uint8), result.view(np.uint8)]).run(ptx)
        codes = np.where(fields < 2 ** (bits - 1), fields, fields - 2**bits)
        assert np.array_equal(result, codes)
