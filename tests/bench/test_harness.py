"""What a benchmark reports, from calls and times that are known."""

import pytest
import torch

from bench import harness
from bench.harness import Work
from bench.roofline import Probe


def work(name="op", implementation="cpu", bytes=0, flops=0, call=lambda: None, peer=False) -> Work:
    return Work(name, implementation, (3, 4), torch.float32, bytes, flops, call, peer)


@pytest.fixture
def probes(monkeypatch):
    """A machine that copies 1 GB/s and multiplies 10 GFLOP/s."""
    monkeypatch.setattr(harness, "copy_probe", lambda device: Probe("copy", 10**9, 0, None))
    monkeypatch.setattr(harness, "gemm_probe", lambda device, dtype: Probe("gemm", 0, 10**10, None))


def measured(monkeypatch, works, *seconds):
    """`measure` where the probes and then the works take these seconds in each round."""
    monkeypatch.setattr(harness, "seconds_per_round", lambda calls, device, rounds: list(seconds))
    return harness.measure(works, "cpu")


def test_fraction_of_copy_bandwidth(monkeypatch, probes):
    (row,) = measured(monkeypatch, [work(bytes=2 * 10**9)], [1.0, 1.0, 1.0], [4.0, 2.0, 2.5])
    assert row.fraction == 0.8
    assert row.median_ms == 2500
    assert row.gb_per_s == 0.8


def test_fraction_is_of_the_tighter_limit(monkeypatch, probes):
    (row,) = measured(monkeypatch, [work(bytes=10**9, flops=3 * 10**10)], [1.0], [1.0], [6.0])
    assert row.fraction == 0.5


def test_ratios_are_taken_within_a_round(monkeypatch, probes):
    """A machine that slows down threefold between rounds leaves them as they are."""
    works = [work(bytes=10**9), work(implementation="torch", bytes=10**9, peer=True)]
    ours, peer = measured(monkeypatch, works, [1.0, 3.0], [2.0, 6.0], [3.0, 9.0])
    assert ours.fraction == 0.5
    assert ours.vs_peer == 1.5
    assert peer.vs_peer is None


def test_fastest_peer_of_the_same_work_counts(monkeypatch, probes):
    works = [
        work(bytes=1),
        work(implementation="slow", bytes=1, peer=True),
        work(implementation="fast", bytes=1, peer=True),
        work("other", implementation="faster", bytes=1, peer=True),
    ]
    rows = measured(monkeypatch, works, [1.0], [2.0], [4.0], [3.0], [1.0])
    assert rows[0].vs_peer == 1.5


def test_on_a_gpu_a_work_that_raises_is_left_out(monkeypatch, probes, capsys):
    def raises():
        raise ValueError("out of resources\nmore")

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(
        harness, "seconds_per_round", lambda calls, device, rounds: [[1.0]] * len(calls)
    )
    rows = harness.measure([work(call=raises), work("other", bytes=1)], "cuda")
    assert [row.name for row in rows] == ["other"]
    assert capsys.readouterr().out == (
        "op-cpu torch.float32 is left out: ValueError: out of resources\n"
    )


def test_no_gpu_is_said():
    text = harness.as_markdown("op", {"cpu": None, "cuda": None})
    assert "not measured on a GPU" in text
