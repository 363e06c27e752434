"""The ops' benchmarks: every implementation does the same work, and the tables are complete."""

import itertools

import pytest

from bench import bench_linear_cross_entropy, bench_prefix_attention, bench_quant_linear
from bench.oracles import relative_error


@pytest.fixture
def small_attention(monkeypatch):
    for name, value in dict(
        HEADS=4, GROUPS=2, CHANNELS=8, PREFIX=3, LENGTHS={"cpu": (5,)}, CACHES={"cpu": ((3, 7),)}
    ).items():
        monkeypatch.setattr(bench_prefix_attention, name, value)


def test_attention_peers_do_the_same(small_attention):
    works = bench_prefix_attention.works("cpu")
    assert {work.implementation for work in works if work.peer} == {
        "sdpa, expanded",
        "sdpa, enable_gqa",
    }
    for name, group in itertools.groupby(sorted(works, key=lambda w: w.name), lambda w: w.name):
        results = [work.call() for work in group]
        if "bwd" not in name:  # ours gives the log-sum-exp too
            results = [(result[0] if isinstance(result, tuple) else result,) for result in results]
        for result in results[1:]:
            assert len(result) == len(results[0])
            for ours, theirs in zip(results[0], result, strict=True):
                assert relative_error(ours, theirs) < 1e-5, name


def test_attention_flops_by_hand(small_attention):
    """Five tokens see 3 of the prefix each and 1 .. 5 tokens."""
    assert bench_prefix_attention.flops(5) == 4 * 8 * 4 * (15 + 15)


def test_cross_entropy_peer_does_the_same(monkeypatch):
    for name, value in dict(TOKENS=9, LABELLED=5, HIDDEN=12, VOCABULARY=31).items():
        monkeypatch.setattr(bench_linear_cross_entropy, name, value)
    works = bench_linear_cross_entropy.works("cpu")
    (peer,) = (work.call() for work in works if work.peer and work.name.endswith(" loss"))
    (gradient,) = next(work.call() for work in works if work.peer and "gradient" in work.name)
    for work in works:
        if not work.peer:
            loss, dhidden = work.call()
            assert relative_error(loss, peer) < 1e-5
            if "gradient" in work.name:
                assert relative_error(dhidden, gradient) < 1e-5


def test_quant_linear_table(monkeypatch):
    monkeypatch.setattr(bench_quant_linear, "COPIES_BYTES", 2**16)
    rows = bench_quant_linear.measure_shape(64, 128, tokens=(1, 5), rounds=1)
    assert [(row.direction, row.M) for row in rows] == [
        ("fwd", 1),
        ("bwd", 1),
        ("fwd", 5),
        ("bwd", 5),
    ]
    assert all((row.of_read is None) == (row.M > 1) for row in rows)
    assert all(row.vs_bf16 is None for row in rows if row.direction == "bwd")
    table = bench_quant_linear.as_markdown(
        {"machine": {"cpu": "x"}, "rounds": 1, "rows": [vars(row) for row in rows]}
    )
    assert table.count("\n| fwd |") == table.count("\n| bwd |") == 2
