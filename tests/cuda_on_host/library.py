"""The CUDA kernels as a library for tensors of the CPU: csrc/cuda, compiled as C++ for the machine
in machine/, with the registration that GPUs get.

    torch.ops.load_library(build())     # after `import glmkern`, which defines the ops' schemas
    torch.ops.glmkern_cuda.rms_norm_fwd(x, weight, eps)
"""

from pathlib import Path

import torch

from tests.cuda_on_host.host import (
    CHECKED,
    CSRC,
    FLAGS,
    HERE,
    SANITIZED,
    SANITIZERS,
    built,
    compile_objects,
    link,
    machine,
)

TORCH = Path(torch.__file__).parent
NAME = "_native_cuda_host.so"
# As CMakeLists.txt compiles what torch.ops.load_library loads.
LIBRARY_FLAGS = [
    *FLAGS,
    "-fvisibility=hidden",
    "-isystem",
    f"{TORCH / 'include'}",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
    "-DGLMKERN_CUDA_KEY=CPU",
]


def build(sanitize: bool = False) -> Path:
    """The library's path; it is built where nothing that it is made of has been built before.

    A sanitized library needs a process that was started with the sanitizers' own libraries in
    LD_PRELOAD: tests.sanitize.sanitizers() names them.
    """
    others = SANITIZED if sanitize else ["-O1"]
    kernels = SANITIZED if sanitize else [*CHECKED, "--coverage"]

    def compile_library(folder: Path) -> None:
        compile_objects(registrations(), [*LIBRARY_FLAGS, *others], folder)
        compile_objects(kernel_sources(), [*LIBRARY_FLAGS, *kernels], folder)
        runtime = SANITIZERS if sanitize else ["--coverage"]
        objects = [*folder.glob("*.o"), *machine(sanitize)]
        link(["-shared", *runtime, *objects, TORCH / "lib/libtorch_cpu.so", "-o", folder / NAME])

    made_of = [*registrations(), *kernel_sources(), *HERE.glob("machine/*.cpp")]
    return built(made_of, [*LIBRARY_FLAGS, *kernels], compile_library) / NAME


def registrations() -> list[Path]:
    """All of csrc/cuda/*.cpp but library.cpp, which needs CUDA's own library."""
    on_gpus = CSRC / "cuda/library.cpp"
    return [HERE / "host_library.cpp", *sorted({*CSRC.glob("cuda/*.cpp")} - {on_gpus})]


def kernel_sources() -> list[Path]:
    return sorted(CSRC.glob("cuda/kernels/**/*.cu"))
