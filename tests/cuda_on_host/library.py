"""The CUDA kernels as a library for tensors of the CPU: csrc/cuda, compiled as C++ against the
stand-ins in include/, with the registration that GPUs get.

    torch.ops.load_library(build())     # after `import glmkern`, which defines the ops' schemas
    torch.ops.glmkern_cuda.rms_norm_fwd(x, weight, eps)
"""

import fcntl
import hashlib
import os
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from tests.cuda_on_host.host import CSRC, FLAGS, HERE, SANITIZE, find_compiler

ROOT = HERE.parents[1]
TORCH = Path(torch.__file__).parent
FOLDER = ROOT / "build/cuda_on_host"
NAME = "_native_cuda_host.so"
# As CMakeLists.txt compiles what torch.ops.load_library loads.
LIBRARY_FLAGS = [
    *FLAGS,
    "-fPIC",
    "-fvisibility=hidden",
    "-isystem",
    f"{TORCH / 'include'}",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
    "-DGLMKERN_CUDA_KEY=CPU",
]


def build(sanitize: bool = False) -> Path:
    """The library's path, in a folder named after everything it is made of. Where it is not there
    yet, one process builds it while others wait.

    A sanitized library needs a process that was started with the sanitizers' own libraries in
    LD_PRELOAD: tests.sanitize.sanitizers() names them.
    """
    compiler = find_compiler()
    flags = [*LIBRARY_FLAGS, *(SANITIZE if sanitize else ["-O1"])]
    library = FOLDER / _digest(compiler, flags) / NAME
    library.parent.mkdir(parents=True, exist_ok=True)
    with open(library.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.is_file():
            _compile(compiler, flags, library)
    return library


def _sources() -> list[Path]:
    """What is compiled: all of csrc/cuda but library.cpp, which needs CUDA's own library."""
    on_gpus = CSRC / "cuda/library.cpp"
    sources = [path for path in CSRC.glob("cuda/*.cpp") if path != on_gpus]
    return [HERE / "host_library.cpp", *sorted(sources), *sorted(CSRC.glob("cuda/kernels/**/*.cu"))]


def _digest(compiler: list[str], flags: list[str]) -> str:
    version = subprocess.run([*compiler, "--version"], check=True, capture_output=True, text=True)
    digest = hashlib.sha256("\n".join([*flags, version.stdout, torch.__version__]).encode())
    headers = [*CSRC.rglob("*.h"), *CSRC.rglob("*.cuh"), *HERE.glob("include/**/*.h")]
    for path in sorted({*_sources(), *headers}):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0")
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _compile(compiler: list[str], flags: list[str], library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        sources = _sources()
        objects = [str(Path(folder, f"{i}.o")) for i in range(len(sources))]

        def compile_one(i: int) -> None:
            what = ["-x", "c++", "-c", str(sources[i]), "-o", objects[i]]
            subprocess.run([*compiler, *flags, *what], check=True)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(compile_one, range(len(sources))))
        unfinished = Path(folder, NAME)
        torch_library = str(TORCH / "lib/libtorch_cpu.so")
        subprocess.run(
            [*compiler, *flags, "-shared", *objects, torch_library, "-o", str(unfinished)],
            check=True,
        )
        unfinished.replace(library)
