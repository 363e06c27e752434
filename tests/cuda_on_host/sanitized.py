"""What tests of CUDA kernels on the CPU share: the kernels, unaligned tensors, and a second run
under AddressSanitizer and UndefinedBehaviorSanitizer, which look at accesses and not at numbers."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import glmkern.ops  # noqa: F401 (defines the schemas that the library implements)
from tests.cuda_on_host.library import build
from tests.sanitize import sanitizers

# A process that was started with the sanitizers loads the sanitized library.
SANITIZED = "GLMKERN_TEST_SANITIZED"


def load_kernels():
    """The ops of the CUDA kernels for tensors of the CPU."""
    torch.ops.load_library(build(sanitize=SANITIZED in os.environ))
    return torch.ops.glmkern_cuda


def unaligned(x: Tensor) -> Tensor:
    """A copy of x that starts one element after an address that 16-byte accesses need."""
    room = torch.empty(x.numel() + 1, dtype=x.dtype)
    return room[1:].view(x.shape).copy_(x)


def assert_sanitizers_find_nothing(file: str, tests: Sequence[Callable], cases: int) -> None:
    """Runs tests of `file`, so many cases in all, in a process of their own."""
    child = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-s",  # a sanitizer ends the process, and what pytest holds back with it
            "-p",
            "no:cacheprovider",
            *(f"{file}::{test.__name__}" for test in tests),
        ],
        env=os.environ
        | {
            SANITIZED: "1",
            "LD_PRELOAD": sanitizers(),
            "ASAN_OPTIONS": "detect_leaks=0",  # Python and torch keep what they have until the end
            "UBSAN_OPTIONS": "print_stacktrace=1",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert child.returncode == 0, child.stdout
    assert f"{cases} passed" in child.stdout
