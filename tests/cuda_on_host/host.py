"""How a C++ compiler builds CUDA code, against the stand-ins in include/; programs made of it."""

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


def find_compiler() -> list[str]:
    """The C++ compiler and the arguments that CXX gives it."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    assert compiler, "these tests need a C++ compiler: install g++ or set CXX"
    return compiler.split()


def compile_program(source: Path, folder: Path) -> Path:
    """`source` as a program in `folder`."""
    program = folder / source.stem
    subprocess.run([*find_compiler(), *FLAGS, "-O1", str(source), "-o", str(program)], check=True)
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
