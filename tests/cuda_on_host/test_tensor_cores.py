"""The emulated instructions of csrc/cuda/device/ptx.cuh against the formulas of the PTX manual."""

import re

import pytest
import torch

from tests.cuda_on_host.host import CSRC, HERE, compile_program, run

LANES = range(32)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return compile_program(HERE / "fragments.cpp", tmp_path_factory.mktemp("host"))


# "Matrix Fragments for mma.m16n8k16 with floating point type" and "... mma.m16n8k8", as the manual
# writes them: the row and the column of a thread's number i.
def a16(lane, i):
    row = lane >> 2 if 0 <= i < 2 or 4 <= i < 6 else (lane >> 2) + 8
    column = (lane % 4) * 2 + (i & 0x1) + (0 if i < 4 else 8)
    return row, column


def b16(lane, i):
    row = (lane % 4) * 2 + (i & 0x1) + (0 if i < 2 else 8)
    return row, lane >> 2


def a8(lane, i):
    return (lane >> 2) + (0 if i < 2 else 8), (lane % 4) * 2 + (i & 0x1)


def b8(lane, i):
    return (lane % 4) * 2 + i, lane >> 2


def c(lane, i):
    return (lane >> 2) + (0 if i < 2 else 8), (lane % 4) * 2 + (i & 0x1)


def spread(matrix, place, count):
    """[32, count]: what each lane holds of a matrix."""
    numbers = [[matrix[place(lane, i)] for i in range(count)] for lane in LANES]
    return torch.stack([torch.stack(of_lane) for of_lane in numbers])


@pytest.mark.parametrize(
    ("name", "dtype", "a_place", "b_place", "k"),
    [
        ("mma16", torch.float16, a16, b16, 16),
        ("mma16", torch.bfloat16, a16, b16, 16),
        ("mma8", torch.float16, a8, b8, 8),
    ],
    ids=["m16n8k16 half", "m16n8k16 bfloat16", "m16n8k8 half"],
)
def test_mma(program, name, dtype, a_place, b_place, k):
    a, b = torch.randn(16, k).to(dtype), torch.randn(k, 8).to(dtype)
    inputs = [spread(a, a_place, k // 2), spread(b, b_place, k // 4)]
    type_name = {torch.float16: "half", torch.bfloat16: "bfloat16"}[dtype]
    (result,) = run(program, [name, type_name], inputs, [((32, 4), torch.float32)])
    torch.testing.assert_close(result, spread(a.double() @ b.double(), c, 4).float())


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("name", ["load", "load_transposed"])
def test_ldmatrix(program, name, count):
    """Matrix i's row r is at lane 8 i + r's address; lane l gets row l / 4, numbers 2 (l % 4) and
    the next one. Transposed, the matrix is as if stored by columns."""
    rows = torch.arange(256).to(torch.int16).view(32, 8)
    (result,) = run(program, [name, count], [rows], [((32, count, 2), torch.int16)])
    for i in range(count):
        matrix = rows[8 * i : 8 * i + 8]
        matrix = matrix.T if name == "load_transposed" else matrix
        for lane in LANES:
            first = lane % 4 * 2
            assert result[lane, i].equal(matrix[lane // 4, first : first + 2])


def test_lop3(program):
    """A table's bit 4 a + 2 b + c is the function's value for the bits a, b and c."""
    words = [0xF0F0A5C3, 0xCC33A5C3, 0xAAAA0F55]
    given = [torch.tensor([word - (1 << 32)], dtype=torch.int32) for word in words]
    (results,) = run(program, ["lop3", ""], given, [((256,), torch.int32)])
    for table, result in enumerate(results.tolist()):
        for bit in range(32):
            a, b, c = (word >> bit & 1 for word in words)
            assert result >> bit & 1 == table >> (4 * a + 2 * b + c) & 1


def test_every_instruction_is_emulated():
    """The two headers declare the same functions."""
    own = CSRC / "cuda/device/ptx.cuh"
    emulated = HERE / "include/cuda/device/ptx.cuh"
    name = re.compile(
        r"^(?:__device__ |__forceinline__ )?(?:inline )?(?:void|uint32_t) (\w+)\(", re.MULTILINE
    )
    found = set(name.findall(own.read_text())) - {"shared_address"}  # of use only to assembly
    assert found == set(name.findall(emulated.read_text()))
    assert len(found) == 10


def test_only_ptx_has_assembly():
    sources = [p for p in CSRC.glob("cuda/**/*") if p.suffix in (".cu", ".cuh", ".cpp", ".h")]
    with_assembly = {p.name for p in sources if re.search(r"\basm\b", p.read_text())}
    assert len(sources) > 5
    assert with_assembly == {"ptx.cuh"}
