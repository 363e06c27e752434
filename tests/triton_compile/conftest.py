"""What the tests of compiled kernels share."""

import json
import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from tests.conftest import REPOSITORY


@pytest.fixture(scope="module")
def measured_by(tmp_path_factory) -> Callable:
    """`measured_by(module, *arguments)` is what the module writes with --json when it compiles
    everything: in a process of its own, as in this one Triton interprets kernels."""

    def measure(module: str, *arguments: str):
        path = tmp_path_factory.mktemp("compiled") / "measured.json"
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        environment["TRITON_CACHE_DIR"] = str(path.with_name("cache"))
        subprocess.run(
            [sys.executable, "-m", module, "--json", path, *arguments],
            cwd=REPOSITORY,
            env=environment,
            check=True,
        )
        return json.loads(path.read_text())

    return measure
