"""What a GPU would do wrong without a word: the machine names it."""

import re
import subprocess

import pytest
import torch

from tests.cuda_on_host.host import HERE, compile_program, run

ROWS, DEPTH = 32, 256
# Who reads too early finds memory that is written later, or half of a copy.
TOO_EARLY = r"( what thread \d+ has written at .*, and no barrier orders them"
TOO_EARLY += r"| 4 bytes of shared memory at \d+ that this block has not written"
TOO_EARLY += r"| what cp.async of thread \d+ still copies: that thread has not waited)"
READS = r"thread \d+ reads at (ptx.cuh:\d+ < )?planted.cpp:\d+"


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return compile_program(HERE / "planted.cpp", tmp_path_factory.mktemp("host"))


@pytest.fixture
def matrices():
    return torch.randn(ROWS, DEPTH).half(), torch.randn(8, DEPTH).half()


def product(program, fault, matrices):
    (c,) = run(program, [fault, ROWS, DEPTH], matrices, [((ROWS, 8), torch.float32)])
    return c


def test_without_a_fault(program, matrices):
    a, b = matrices
    exact = a.double() @ b.double().T
    torch.testing.assert_close(product(program, "none", matrices), exact.float())


@pytest.mark.parametrize("fault", ["rows_swapped", "transposed"])
def test_a_wrong_layout_gives_wrong_numbers(program, matrices, fault):
    a, b = matrices
    error = product(program, fault, matrices).double() - a.double() @ b.double().T
    assert error.abs().max() > 1


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("no_barrier_before_read", READS + TOO_EARLY),
        (
            "no_barrier_before_write",
            r"a race: thread \d+ writes at ptx.cuh:\d+ < planted.cpp:\d+ < planted.cpp:\d+ what"
            r" thread \d+ has read at ptx.cuh:\d+ < planted.cpp:\d+, and no barrier orders them",
        ),
        ("no_barrier_before_sum", READS + TOO_EARLY),
        ("no_wait", READS + TOO_EARLY),
        ("one_stage_too_few", READS + TOO_EARLY),
        ("no_write", READS + r" 2 bytes of shared memory at \d+ that this block has not written"),
        (
            "too_far",
            r"thread \d+ writes at ptx.cuh:\d+ < planted.cpp:\d+ < planted.cpp:\d+ 16 bytes of "
            r"shared memory at \d+, but the launch asked for 6912",
        ),
        ("misaligned", r"thread \d+ gives cp.async addresses that are no multiples of 16"),
    ],
)
def test_a_fault_is_named(program, matrices, fault, sentence):
    given = b"".join(x.numpy().tobytes() for x in matrices)
    done = subprocess.run([program, fault, str(ROWS), str(DEPTH)], input=given, capture_output=True)
    assert done.returncode == 1
    assert re.search(r"product_kernel<.*>\(.*\): " + sentence, done.stderr.decode()), done.stderr
