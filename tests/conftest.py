"""Fixtures every test may use."""

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with recorded official outputs (golden/), real data and configurations (data/)."""
    folder = Path(os.environ.get("GLMKERN_SHARED", REPOSITORY.parent / "shared"))
    if not (folder / "golden").is_dir():
        pytest.fail(f"{folder} has no golden/ folder; set GLMKERN_SHARED to the folder that has it")
    return folder


@pytest.fixture(scope="session")
def golden(shared: Path) -> Path:
    return shared / "golden"
