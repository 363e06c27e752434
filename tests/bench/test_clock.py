"""Calls are timed in interleaved rounds."""

import time

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
