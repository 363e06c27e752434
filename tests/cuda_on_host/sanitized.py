"""What tests of CUDA kernels on the CPU share: the kernels, unaligned tensors, and a second run
under AddressSanitizer and UndefinedBehaviorSanitizer, which look at accesses and not at numbers."""

import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

import glmkern.ops  # noqa: F401 (defines the schemas that the library implements)
from tests.cuda_on_host.library import build
from tests.sanitize import sanitizers

# A process that was started with the sanitizers loads the sanitized library.
SANITIZED = "GLMKERN_TEST_SANITIZED"


def library() -> Path:
    """The library of CUDA kernels for tensors of the CPU."""
    return build(sanitize=SANITIZED in os.environ)


def load_kernels():
    """Its ops."""
    torch.ops.load_library(library())
    return torch.ops.glmkern_cuda


def unaligned(x: Tensor) -> Tensor:
    """A copy of x that starts one element after an address that 16-byte accesses need."""
    room = torch.empty(x.numel() + 1, dtype=x.dtype)
    return room[1:].view(x.shape).copy_(x)


def assert_sanitizers_find_nothing(tests: Sequence[Callable]) -> None:
    """Runs tests in a process of their own."""
    child = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-s",  # a sanitizer ends the process, and what pytest holds back with it
            "-p",
            "no:cacheprovider",
            *(f"{inspect.getfile(test)}::{test.__name__}" for test in tests),
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
    assert re.search(r"^\d+ passed", child.stdout, re.MULTILINE), child.stdout
