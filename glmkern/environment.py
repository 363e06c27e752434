"""Settings that libraries read once, when they are loaded; nothing here imports torch."""

import os
from collections.abc import MutableMapping
from pathlib import Path


def make_deterministic(environment: MutableMapping[str, str] = os.environ) -> None:
    """Ask MKL and cuBLAS for results that depend neither on the run nor on the thread count.

    Values that the user has set stay. Without effect once torch is loaded.
    """
    isa = "AVX512" if "avx512f" in _cpu_flags() else "AVX2"
    environment.setdefault("MKL_CBWR", f"{isa},STRICT")
    environment.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def _cpu_flags() -> str:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return ""
