"""Builds the CUDA kernels with a C++ compiler, against the stand-ins in include/, and runs them."""

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
FLAGS = [
    "-std=c++17",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    f"-I{HERE / 'include'}",
    f"-I{CSRC}",
]
SANITIZE = ["-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def compile_program(
    source: Path, kernels: Sequence[str], folder: Path, sanitize: bool = False
) -> Path:
    """`source` with the kernels of csrc/cuda/kernels/<name>.cu, as a program in `folder`."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    assert compiler, "these tests need a C++ compiler: install g++ or set CXX"
    program = folder / (source.stem + ("-sanitized" if sanitize else ""))
    units = [str(source)] + [f"{CSRC / 'cuda/kernels' / name}.cu" for name in kernels]
    subprocess.run(
        [
            *compiler.split(),
            *FLAGS,
            *(SANITIZE if sanitize else ["-O1"]),
            "-x",
            "c++",
            *units,
            "-o",
            str(program),
        ],
        check=True,
    )
    return program


def run(
    program: Path,
    arguments: Sequence,
    inputs: Sequence[Tensor],
    outputs: Sequence[tuple[tuple[int, ...], torch.dtype]],
) -> list[Tensor]:
    """Runs `program`; `outputs` are the shapes and dtypes of the tensors it returns."""
    given = b"".join(
        x.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() for x in inputs
    )
    done = subprocess.run([program, *map(str, arguments)], input=given, capture_output=True)
    assert done.returncode == 0, f"{program.name} {list(arguments)}: {done.stderr.decode()}"
    result, at = [], 0
    for shape, dtype in outputs:
        numel = torch.Size(shape).numel()
        size = numel * dtype.itemsize
        part = bytearray(done.stdout[at : at + size])
        result.append(
            torch.frombuffer(part, dtype=dtype).view(shape)
            if numel
            else torch.empty(shape, dtype=dtype)
        )
        at += size
    assert at == len(done.stdout), f"{program.name} wrote {len(done.stdout)} bytes, expected {at}"
    return result
