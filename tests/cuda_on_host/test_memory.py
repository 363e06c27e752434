"""The committed table of what the kernels ask of memory is what they ask for."""

import json

import pytest

from tests.cuda_on_host.memory import TABLE, as_markdown, count


@pytest.fixture(scope="module")
def rows():
    return count()


def test_the_committed_table_is_theirs(rows):
    assert rows == json.loads(TABLE.read_text()), "run python -m tests.cuda_on_host.memory"
    assert as_markdown(rows) == TABLE.with_suffix(".md").read_text()


def test_no_bank_conflicts(rows):
    assert sum(row["wavefronts"] for row in rows) > 100_000
    assert [row for row in rows if row["conflicts"]] == []


def test_streams_use_what_they_move(rows):
    """Of a weight, and of activations where a kernel does nothing else. The sums of splits are
    written 32 bytes a thread, in two halves, and are not the stream."""
    streams = (
        "mma_",
        "gemv_",
        "rms_norm_",
        "swiglu_",
        "bias_add_",
        "split_sums_",
        "cross_entropy_",
    )
    chosen = [
        row
        for row in rows
        if row["kernel"].startswith(streams)
        and not row["case"].startswith("linear_cross_entropy-256")
        and "-2-64x" not in row["case"]
    ]
    assert len(chosen) > 35
    assert [row for row in chosen if row["useful"] < 0.95] == []


def test_turing_has_64_kib(rows):
    """Of shared memory a multiprocessor, which two blocks share."""
    turing = [row["shared"] for row in rows if "<Sm75" in row["kernel"]]
    assert turing and max(turing) <= 32 * 1024
