"""The tests of the C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer.

    python -m tests.sanitize [pytest's arguments]     or: make sanitize

Builds _native.so with both into build/sanitize, beside a copy of the package, and runs the tests of
the ops there, with every instruction set that this chip has. The first error ends the run.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build/sanitize"


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


def run_tests(copy: Path, arguments: list[str]) -> int:
    """The exit code of pytest."""
    environment = os.environ | {
        "LD_PRELOAD": sanitizers(),
        # Python and torch keep what they have until the end.
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "GLMKERN_SHARED": os.environ.get("GLMKERN_SHARED", str(ROOT.parent / "shared")),
    }
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "tests/ops",
            "-k",
            "cpu and not cuda",
            *arguments,
        ],
        cwd=copy,
        env=environment,
    ).returncode


def main() -> None:
    sys.exit(run_tests(build(), sys.argv[1:]))


if __name__ == "__main__":
    main()
