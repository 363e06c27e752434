"""The verdicts and measurements of the whole model on a GPU, with planted faults."""

from types import SimpleNamespace

import pytest
import torch

from bench.gpu import model, profiler
from tests.gpu import judge_model


@pytest.mark.parametrize("broken", ["loss", "gradient"])
@pytest.mark.parametrize("value", [float("nan"), 1.01])
def test_a_wrong_step_is_wrong(monkeypatch, broken, value):
    """The loss, or the gradient, of our kernels in one of the precisions."""

    def found(model, dtype, backend):
        wrong = value if (dtype, backend) == (torch.float32, "triton") else 1.0
        noise = 0 if dtype == torch.float64 else 1e-3 if dtype == torch.float16 else 1e-6
        values = {"loss": 1.0 + noise, "gradient": 1.0 + noise}
        values[broken] *= wrong
        return tuple(torch.tensor([x], dtype=torch.float64) for x in values.values())

    monkeypatch.setattr(judge_model, "loss_and_gradient", found)
    assert [row["verdict"] for row in judge_model.judge_step(None)] == ["wrong"]
    value = 1.0
    assert [row["verdict"] for row in judge_model.judge_step(None)] == ["right"]


def test_a_graph_that_is_none_is_not_timed_as_one(monkeypatch):
    small = SimpleNamespace(eval=lambda: small, generate=lambda ids, **options: ids)
    ids = torch.zeros(1, 2)
    monkeypatch.setattr(model.Replay, "captures_fail", True)
    assert model.generate(small, ids, 3, graphs=False) is ids
    with pytest.raises(RuntimeError, match="without CUDA graphs since a capture has failed"):
        model.generate(small, ids, 3, graphs=True)


def test_launches_before_the_last_marker_do_not_count():
    """A session of the profiler may have lost its first ones."""

    def event(name, start):
        return SimpleNamespace(name=name, time_range=SimpleNamespace(start=start))

    marker = "void at::cuda::spin_kernel(long)"
    events = [event("b", 7), event("warm-up", 1), event(marker, 2), event(marker, 4), event("a", 5)]
    assert [x.name for x in profiler.after_markers(events)] == ["a", "b"]
    for lost in ([], events[:1], events[1:3]):
        with pytest.raises(RuntimeError, match="the profiler lost launches"):
            profiler.after_markers(lost)
