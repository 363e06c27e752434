"""The Triton kernels compiled for every chip they serve, without a GPU."""

import json

import pytest

from bench import triton_cases, triton_resources

# What Triton 3.6, the oldest served, and newer ones made of the kernels.
COMMITTED = {
    path: json.loads(path.read_text())
    for path in sorted(triton_resources.RESULTS.glob("triton_resources_*.json"))
}


@pytest.fixture(scope="module")
def measured(measured_by) -> dict:
    return measured_by("bench.triton_resources")


def rows(table: dict):
    return [(row, usage) for row in table["rows"] for usage in row["usage"]]


def test_every_chip(measured):
    assert {usage["sm"] for _, usage in rows(measured)} == {80, 86, 89, 90, 100, 120}


def test_nothing_spills(measured):
    for table in (measured, *COMMITTED.values()):
        spilling = [(row["launch"], usage) for row, usage in rows(table) if usage["stack"]]
        assert not spilling, table["triton"]


def test_shared_memory_fits(measured):
    limits = {chip.sm: chip.block_kib * 1024 for chip in triton_resources.CHIPS}
    assert limits[80] == 163 * 1024
    assert limits[120] == 99 * 1024
    for table in (measured, *COMMITTED.values()):
        too_much = [
            (row["launch"], usage)
            for row, usage in rows(table)
            if usage["shared"] > limits[usage["sm"]]
        ]
        assert not too_much, table["triton"]


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
    alone = [
        (row["launch"], usage)
        for row, usage in rows(measured)
        if modules[row["op"]].MEMORY_BOUND
        and usage["tile"]["warps"] <= 8
        and usage["occupancy"] * warps[usage["sm"]] < 2 * usage["tile"]["warps"] - 0.1
    ]
    assert not alone


def test_committed_tables_are_current(measured):
    """The same launches with the same tiles in all; the same numbers from the same Triton."""
    assert {path.stem for path in COMMITTED} >= {"triton_resources_3.6"}
    again = "run `python -m bench.triton_resources` and `make oldest`, and commit their files"
    for path, table in COMMITTED.items():
        for key in ("op", "launch", "kernel"):
            assert [row[key] for row in measured["rows"]] == [row[key] for row in table["rows"]]
        for (row, now), (_, then) in zip(rows(measured), rows(table), strict=True):
            assert now["tile"] == then["tile"], f"{path.name}, {row['launch']}: {again}"
        if measured["triton"] == table["triton"]:
            assert measured == table, again


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_committed_markdown_shows_the_table(path):
    assert path.with_suffix(".md").read_text() == triton_resources.as_markdown(COMMITTED[path])
