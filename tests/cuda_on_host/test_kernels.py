"""What holds for every CUDA kernel, shown on the machine that runs them without a GPU."""

import contextlib
import os
import re
import subprocess

import pytest

from tests.cuda_on_host import test_rope
from tests.cuda_on_host.cases import every_case
from tests.cuda_on_host.machine import short_name
from tests.cuda_on_host.sanitized import SANITIZED, assert_sanitizers_find_nothing, library
from tests.ops.numerics import same_bits

# AddressSanitizer looks at accesses, which no order of threads changes, and which are bfloat16's
# where they are half's.
UNDER_SANITIZERS = SANITIZED in os.environ
SEEDS = () if UNDER_SANITIZERS else (2, 3, 4, 5, 6)
CASES = {
    str(case): case for case in every_case() if not (UNDER_SANITIZERS and "bfloat16" in str(case))
}


@pytest.fixture(scope="module")
def counted(kernels, machine):
    """Of each case, what its kernels do."""
    found = {}
    for name, case in CASES.items():
        with machine.counting() as found[name]:
            case.run(kernels, machine)
    return found


@pytest.mark.parametrize("case", CASES.values(), ids=str)
def test_the_same_bits_in_any_order_of_threads(kernels, machine, case):
    first = case.run(kernels, machine)
    assert all(result.isfinite().all() for result in first)
    for seed in SEEDS:
        with machine.seed(seed):
            assert all(map(same_bits, first, case.run(kernels, machine)))


def test_every_instance_runs(counted):
    """The cases leave out no kernel that the library has."""
    symbols = subprocess.run(["nm", "-C", library()], check=True, capture_output=True, text=True)
    functions = re.findall(r"^\w+ [tTwW] (.*_kernel(?:<.*>)?\(.*\))$", symbols.stdout, re.MULTILINE)
    instances = {short_name(function) for function in functions}
    assert len(instances) > 150
    assert instances == {name for kernels in counted.values() for name in kernels}


def test_every_barrier_is_needed(kernels, machine, counted):
    """Without any one of them, the machine finds a race in some case."""
    needed, every_place = set(), set()
    for name, found in counted.items():
        barriers = {pc: place for k in found.values() for pc, place in k.barrier_places.items()}
        every_place.update(barriers.values())
        for pc, place in barriers.items():
            if place in needed:
                continue
            with machine.without_barrier(pc), contextlib.suppress(RuntimeError):
                CASES[name].run(kernels, machine)
                continue
            needed.add(place)
    assert len(every_place) > 5
    assert needed == every_place


def test_sanitizers_find_nothing():
    """AddressSanitizer and UndefinedBehaviorSanitizer, which look at each access."""
    tests = [
        test_the_same_bits_in_any_order_of_threads,
        test_rope.test_strides,
        test_rope.test_one_tensor_alone_is_unaligned,
    ]
    assert_sanitizers_find_nothing(tests)
