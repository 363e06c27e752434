"""The tests of the C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer.

    python -m tests.sanitize [pytest's arguments]     or: make sanitize

Builds _native.so with both into build/sanitize, beside a copy of the package, and runs the tests of
the ops there once for every instruction set that this chip has. The first error ends a run.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build/sanitize"
INSTRUCTION_SETS = ("default", "avx2", "avx512", "avx512_bf16")
# What csrc/cpu/isa.cpp says of an instruction set that the chip lacks.
LACKING = "but this chip runs at most"


def build() -> Path:
    """Builds; returns the folder with the copy of the package, its tests and its sources."""
    programs = Path(sys.executable).parent  # cmake and ninja, in an environment not activated too
    environment = os.environ | {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
    build_folder, copy = FOLDER / "native", FOLDER / "copy"
    torch_folder = Path(torch.__file__).parent
    subprocess.run(
        [
            "cmake",
            "-G",
            "Ninja",
            "-S",
            ROOT,
            "-B",
            build_folder,
            f"-DTORCH_DIR={torch_folder}",
            "-DGLMKERN_SANITIZE=ON",
        ],
        check=True,
        env=environment,
    )
    subprocess.run(
        ["cmake", "--build", build_folder, "--target", "_native"], check=True, env=environment
    )
    shutil.rmtree(copy, ignore_errors=True)
    for name in ("glmkern", "tests", "csrc"):
        shutil.copytree(
            ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.so")
        )
    shutil.copy(ROOT / "pyproject.toml", copy)
    shutil.copy(build_folder / "_native.so", copy / "glmkern")
    return copy


def sanitizers() -> str:
    """The run-time libraries, which must be there before Python is."""
    compiler = os.environ.get("CXX", "c++")
    return " ".join(
        subprocess.run(
            [compiler, f"-print-file-name={library}"], check=True, text=True, stdout=subprocess.PIPE
        ).stdout.strip()
        for library in ("libasan.so", "libubsan.so")
    )


def run_tests(copy: Path, isa: str, arguments: list[str]) -> bool:
    """True where all pass, or the chip lacks the instruction set."""
    environment = os.environ | {
        "LD_PRELOAD": sanitizers(),
        "GLMKERN_CPU_ISA": isa,
        # Python and torch keep what they have until the end.
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "GLMKERN_SHARED": os.environ.get("GLMKERN_SHARED", str(ROOT.parent / "shared")),
    }
    child = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "tests/ops",
            "-k",
            "cpu or bits",
            *arguments,
        ],
        cwd=copy,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(f"{isa}: {child.stdout}", flush=True)
    return child.returncode == 0 or f"GLMKERN_CPU_ISA is {isa}, {LACKING}" in child.stdout


def main() -> None:
    copy = build()
    passed = [run_tests(copy, isa, sys.argv[1:]) for isa in INSTRUCTION_SETS]
    sys.exit(not all(passed))


if __name__ == "__main__":
    main()
