"""The host's copy of the CUDA C++ kernels, and the machine that runs them."""

import pytest

from tests.cuda_on_host.machine import Machine
from tests.cuda_on_host.sanitized import library, load_kernels


@pytest.fixture(scope="module")
def kernels():
    return load_kernels()


@pytest.fixture(scope="module")
def machine(kernels):
    return Machine(library())
