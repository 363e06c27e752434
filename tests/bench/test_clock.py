"""Calls are timed in interleaved rounds."""

import time
from types import SimpleNamespace

import pytest
import torch

from bench import clock
from bench.clock import seconds_per_round


def test_seconds_per_round():
    """Every call is timed once a round, and the order rotates."""
    order = []
    calls = [lambda i=i: (order.append(i), time.sleep(0.02 * (i + 1))) for i in range(2)]
    seconds = seconds_per_round(calls, "cpu", rounds=3)
    assert order[-6:] == [0, 1, 1, 0, 0, 1]
    assert [len(s) for s in seconds] == [3, 3]
    assert min(seconds[0]) >= 0.02
    assert min(seconds[1]) >= 0.04


@pytest.mark.parametrize(
    ("seconds", "busy"), [(0, clock.QUEUE_SECONDS), (0.004, 0.006), (0.02, clock.QUEUE_SECONDS)]
)
def test_a_gpu_is_busy_until_a_call_is_queued(monkeypatch, seconds, busy):
    """Unless the call is a whole step, whose host is timed too."""
    ticks = iter((0.0, seconds))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(clock, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    assert clock._queue_seconds(lambda: None) == pytest.approx(busy)
