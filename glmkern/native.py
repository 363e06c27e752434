"""The native libraries: loading them, or saying why they are not there."""

import json
import os
import struct
from functools import cache
from pathlib import Path

import torch

LIBRARIES = {"cpu": "_native.so", "cuda": "_native_cuda.so"}


@cache
def load_library(backend: str) -> str | None:
    """Loads the library of "cpu" or "cuda"; None on success, or why it is not there.

    Raises:
        RuntimeError: GLMKERN_CPU_ISA names an instruction set that cannot be served.
    """
    path = Path(__file__).with_name(LIBRARIES[backend])
    if backend == "cuda" and (family := os.environ.get("GLMKERN_CUDA_PATH")):
        path = path.with_stem(f"{path.stem}_{family}")
    if not path.is_file():
        return f"{path.name} was not built: {_why_not_built(path.stem)}"
    if backend == "cuda" and not torch.cuda.is_available():
        return "torch sees no GPU"
    reason = load_file(path)
    if reason is None and backend == "cpu":
        torch.ops.glmkern_cpu.isa()  # a GLMKERN_CPU_ISA that cannot be served is an error at once
    return reason


@cache
def load_file(path: Path) -> str | None:
    """Loads a library that registers kernels; None on success, or why it failed."""
    if not path.is_file():
        return f"there is no file {path}"
    if _is_cut_short(path):  # loading it would kill the process
        return f"{path.name} could not be loaded: it is cut short, install glmkern again"
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        return f"{path.name} could not be loaded: {str(error).splitlines()[0]}"
    return None


def _why_not_built(library: str) -> str:
    report = Path(__file__).with_name("_build.json")
    if not report.is_file():
        return "glmkern runs from a folder that was never installed (pip install -e .)"
    reason: str | None = json.loads(report.read_text()).get(library)
    return reason or "its file is gone: install glmkern again"


def _is_cut_short(path: Path) -> bool:
    """Whether an ELF file ends before the table of sections that its header promises at the end."""
    with path.open("rb") as file:
        header = file.read(64)
    if len(header) < 64 or not header.startswith(b"\x7fELF\x02\x01"):
        return False  # not 64-bit little-endian ELF: for the loader to judge
    offset: int
    entry_size: int
    entries: int
    offset, entry_size, entries = struct.unpack_from("<40xQ10xHH", header)
    return path.stat().st_size < offset + entry_size * entries
