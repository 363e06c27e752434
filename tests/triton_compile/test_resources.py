"""The Triton kernels compiled for every chip they serve, without a GPU.

In a process of its own: `triton.compile` fails where TRITON_INTERPRET is set.
"""

import json
import os
import subprocess
import sys

import pytest

from bench import triton_cases, triton_resources
from tests.conftest import REPOSITORY

COMMITTED = json.loads(triton_resources.RESULTS.with_suffix(".json").read_text())


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> dict:
    path = tmp_path_factory.mktemp("resources") / "table.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(path.with_name("cache"))
    subprocess.run([sys.executable, "-m", "bench.triton_resources", "--json", path],
                   cwd=REPOSITORY, env=environment, check=True)
    return json.loads(path.read_text())


def rows(table: dict):
    return [(row, usage) for row in table["rows"] for usage in row["usage"]]


def test_every_chip(measured):
    assert {usage["sm"] for _, usage in rows(measured)} == {80, 86, 89, 90, 100, 120}


def test_nothing_spills(measured):
    spilling = [(row["launch"], usage) for row, usage in rows(measured) if usage["stack"]]
    assert not spilling


def test_shared_memory_fits(measured):
    limits = {chip.sm: chip.block_kib * 1024 for chip in triton_resources.CHIPS}
    assert limits[80] == 163 * 1024
    assert limits[120] == 99 * 1024
    too_much = [(row["launch"], usage) for row, usage in rows(measured)
                if usage["shared"] > limits[usage["sm"]]]
    assert not too_much


def test_a_chip_with_64_kib_makes_the_same_launches():
    """The class of chips that are not in the table; the interpreter runs its tiles."""
    sm_80 = triton_resources.CHIPS[0]
    for op in triton_cases.modules():
        usual = [launch.label for launch in triton_cases.launches_on(op, sm_80.block_kib)]
        launches = triton_cases.launches_on(op, 64)
        assert [launch.label for launch in launches] == usual


def test_two_blocks_a_multiprocessor(measured):
    """Up to 8 warps, one block of a memory-bound kernel can compute while another waits."""
    warps = {chip.sm: chip.warps for chip in triton_resources.CHIPS}
    modules = triton_cases.modules()
    alone = [(row["launch"], usage) for row, usage in rows(measured)
             if modules[row["op"]].MEMORY_BOUND and usage["tile"]["warps"] <= 8
             and usage["occupancy"] * warps[usage["sm"]] < 2 * usage["tile"]["warps"] - 0.1]
    assert not alone


def test_committed_table_is_current(measured):
    """The same launches always; the same numbers from the Triton that made the table."""
    for key in ("op", "launch", "kernel"):
        assert [row[key] for row in measured["rows"]] == [row[key] for row in COMMITTED["rows"]]
    for (row, now), (_, then) in zip(rows(measured), rows(COMMITTED), strict=True):
        assert now["tile"] == then["tile"], row["launch"]
    if measured["triton"] == COMMITTED["triton"]:
        assert measured == COMMITTED, "run `python -m bench.triton_resources` and commit its files"


def test_committed_markdown_shows_the_table():
    shown = triton_resources.RESULTS.with_suffix(".md").read_text()
    assert shown == triton_resources.as_markdown(COMMITTED)
