"""How a C++ compiler builds CUDA code for the machine in machine/, and programs made of it."""

import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
FOLDER = ROOT / "build/cuda_on_host"
KEPT = 12
FLAGS = [
    "-std=c++17",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    "-fPIC",
    f"-I{HERE / 'include'}",
    f"-I{HERE / 'machine'}",
    f"-I{CSRC}",
]
# For kernels: the compiler calls machine/accesses.cpp before each access to memory. It must not
# take structs apart, as 16 bytes at a time are what a GPU is to access.
CHECKED = [
    *("-O1", "-g1", "-fno-tree-sra"),
    *("-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0"),
]
# Or else AddressSanitizer does its work: no compiler does both.
SANITIZERS = ["-fsanitize=address,undefined"]
SANITIZED = ["-O0", "-g1", *SANITIZERS, "-fno-sanitize-recover=all"]


def find_compiler() -> list[str]:
    """The C++ compiler and the arguments that CXX gives it."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    assert compiler, "these tests need a C++ compiler: install g++ or set CXX"
    return compiler.split()


def machine(sanitize: bool = False) -> list[Path]:
    """The objects of the machine."""
    sources = sorted(HERE.glob("machine/*.cpp"))
    flags = [*FLAGS, "-fvisibility=hidden", *(SANITIZED if sanitize else ["-O2"])]
    folder = built(sources, flags, lambda folder: compile_objects(sources, flags, folder))
    return sorted(folder.glob("*.o"))


def compile_program(source: Path, folder: Path, sanitize: bool = False) -> Path:
    """`source` as a program in `folder`."""
    compile_objects([source], [*FLAGS, *(SANITIZED if sanitize else CHECKED)], folder)
    program = folder / source.stem
    runtime = SANITIZERS if sanitize else []
    link([*runtime, *folder.glob("*.o"), *machine(sanitize), "-o", program])
    return program


def compile_objects(sources: Sequence[Path], flags: Sequence[str], folder: Path) -> None:
    """An object of each source in `folder`."""

    def compile_one(source: Path) -> None:
        what = ["-x", "c++", "-c", source, "-o", folder / f"{source.parent.name}.{source.name}.o"]
        subprocess.run([*find_compiler(), *flags, *what], check=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, sources))


def link(arguments: Sequence[str | Path]) -> None:
    subprocess.run([*find_compiler(), *arguments], check=True)


def built(sources: Sequence[Path], flags: Sequence[str], build: Callable[[Path], None]) -> Path:
    """A folder that `build` has filled, named after everything that it is made of. Where it is not
    there yet, one process builds it while others wait. Only the KEPT last used ones stay."""
    folder = FOLDER / digest(sources, flags)
    folder.mkdir(parents=True, exist_ok=True)
    os.utime(folder)
    complete = folder / "complete"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not complete.exists():
            build(folder)
            complete.touch()
            for unused in sorted(FOLDER.iterdir(), key=lambda path: path.stat().st_mtime)[:-KEPT]:
                shutil.rmtree(unused, ignore_errors=True)
    return folder


def digest(sources: Sequence[Path], flags: Sequence[str]) -> str:
    compiler = [*find_compiler(), "--version"]
    version = subprocess.run(compiler, check=True, capture_output=True, text=True).stdout
    result = hashlib.sha256("\n".join([*flags, version, torch.__version__]).encode())
    headers = [*CSRC.rglob("*.h"), *CSRC.rglob("*.cuh"), *HERE.rglob("*.h"), *HERE.rglob("*.cuh")]
    how = [HERE / "host.py", HERE / "library.py"]
    for path in sorted({*sources, *headers, *how}):
        result.update(str(path.relative_to(ROOT)).encode() + b"\0")
        result.update(path.read_bytes())
    return result.hexdigest()[:16]


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
