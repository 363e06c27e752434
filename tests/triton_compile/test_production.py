"""What no run on a GPU should be the first to tell: every launch of `make gpu`, of a step and of a
token of ChatGLM2-6B compiles for it, spills nothing and fits."""

import json

import pytest

from bench.triton_production import is_bad


@pytest.fixture(scope="module")
def measured(measured_by) -> list[dict]:
    return measured_by("bench.triton_production")


def test_every_launch_compiles_for_an_h100(measured):
    assert len(measured) > 100
    assert [row for row in measured if is_bad(row)] == []


def test_every_kernel_is_there(measured):
    """Those of the committed tables, but for the variants of other types."""
    kernels = {row["kernel"] for row in measured}
    from bench.triton_resources import RESULTS

    table = json.loads((RESULTS / "triton_resources_3.9.json").read_text())
    assert {row["kernel"] for row in table["rows"]} <= kernels


@pytest.mark.parametrize(
    ("row", "bad"),
    [
        (dict(stack=0, shared=9, limit=9), False),
        (dict(stack=8, shared=9, limit=9), True),
        (dict(stack=0, shared=10, limit=9), True),
        (dict(error="CompilationError"), True),
    ],
)
def test_what_is_bad(row, bad):
    assert is_bad(row) is bad
