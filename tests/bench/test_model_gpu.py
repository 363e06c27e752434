"""Predictions for GPUs: what they are made of, and that the committed ones fit the code."""

import json

import pytest
import torch

from bench import model_gpu
from bench.bench_full_size import chatglm2_6b
from bench.fake_gpu import DEVICE
from bench.gpu.cases import CHATGLM2_6B, OPS
from bench.launches import count_all
from bench.model_gpu import NAMED, RESULTS, Row, events_of, predict_launch

H100, T4 = NAMED["H100"], NAMED["T4"]


def case_of(op, number=0):
    makers = list(OPS[op](CHATGLM2_6B, torch.float16, DEVICE))
    return makers[number][1]()


def test_a_kernel_that_streams_takes_its_bytes():
    """Gate and up are read once, their product is written once."""
    (event,) = events_of(case_of("swiglu"), H100)["forward"]
    moved = 2080 * 3 * CHATGLM2_6B.ffn * 2
    assert event.bytes == moved
    predicted = predict_launch(event, H100)
    assert predicted.bound == "bytes"
    seconds = moved / (3350e9 * model_gpu.SHARE) + model_gpu.START
    assert predicted.seconds == pytest.approx(seconds)


def test_a_large_product_takes_the_tensor_cores():
    """Of torch, a slab of the weight after the other; each pays for its start."""
    case = next(
        case
        for _, make in OPS["quant_linear"](CHATGLM2_6B, torch.float16, DEVICE)
        if (case := make()).shape == "2080 x 27392 x 4096" and "4 bits" in case.op
    )
    events = events_of(case, H100)["forward"]
    products = [event for event in events if event.name in ("mm", "addmm")]
    assert sum(event.flops for event in products) == case.flops
    assert all(predict_launch(event, H100).bound == "tensor" for event in products)
    rate = 989e12 * model_gpu.SHARE_OF_TORCH
    total = sum(predict_launch(event, H100).seconds for event in products)
    assert total == pytest.approx(case.flops / rate + len(products) * model_gpu.START)


@pytest.mark.parametrize(("blocks", "waves"), [(9, 1), (2, 3)])
def test_a_kernel_that_waits_takes_its_turns(monkeypatch, blocks, waves):
    """One token through a small weight, on a chip with fast memory: 576 programs of 8 rows, of
    which so many fit."""
    monkeypatch.setattr(model_gpu, "_issue_cycles", lambda key, gpu: 1.0)
    monkeypatch.setattr(model_gpu, "_resident_blocks", lambda key, gpu: blocks)
    (event,) = events_of(case_of("quant_linear"), H100)["forward"]
    assert (event.name, event.call.grid) == ("gemv_fwd", (576,))
    floor = event.bytes / (3350e9 * model_gpu.SHARE)
    turns = waves * event.call["W"] / event.call["BW"]
    predicted = predict_launch(event, H100)
    seconds = max(floor, turns * model_gpu.LATENCY) + model_gpu.START
    assert predicted.seconds == pytest.approx(seconds)
    assert predicted.bound == ("latency" if turns * model_gpu.LATENCY > floor else "bytes")


def test_a_launch_takes_no_less_than_its_start():
    (event,) = events_of(case_of("swiglu", 1), T4)["forward"]
    assert predict_launch(event, H100).seconds > model_gpu.START


def committed():
    return [Row(**row) for row in json.loads((RESULTS / "model_gpu.json").read_text())]


def test_the_committed_predictions_name_every_timed_case_and_gpu():
    cases = {
        (case.op, case.shape)
        for make in OPS.values()
        for _, make_case in make(CHATGLM2_6B, torch.float16, DEVICE)
        for case in [make_case()]
        if case.timed
    }
    rows = committed()
    of_ops = {(row.op, row.shape) for row in rows if not row.op.startswith(("step", "token"))}
    assert of_ops == cases
    assert all(set(row.ms) == set(row.bound) == set(NAMED) for row in rows)


@pytest.mark.parametrize("op", ["swiglu", "rms_norm", "rope"])
def test_the_committed_predictions_are_current(op):
    """Of the ops whose prediction compiles nothing."""
    rows = {(row.op, row.direction, row.shape): row for row in committed()}
    for _, make in OPS[op](CHATGLM2_6B, torch.float16, DEVICE):
        case = make()
        for direction, events in events_of(case, H100).items():
            seconds = sum(predict_launch(event, H100).seconds for event in events)
            row = rows[case.op, direction, case.shape]
            assert row.ms["H100"] == pytest.approx(seconds * 1e3, rel=0.01)
            assert row.launches == len(events)


def test_the_committed_counts_are_current():
    """bench/results/launches.json, of the step and the token."""
    stored = json.loads((RESULTS / "launches.json").read_text())
    assert [vars(count) for count in count_all(chatglm2_6b())] == stored
    for count in stored:
        assert count["host_reads"] == []
        assert len(count["host_copies"]) == count["name"].startswith("a pack")
    assert next(c for c in stored if c["name"] == "a token of 1 row")["launches_a_layer"] <= 12
