"""The comparison of a prediction with the first steps."""

import torch

from glmkern.model.config import ChatGLMConfig
from glmkern.plan import run as plan_run
from glmkern.plan.machines import GIB, Machine
from glmkern.plan.precision import Precision
from glmkern.plan.run import FirstSteps
from tests.model.models import SMALL


class Clock:
    """time.perf_counter of a machine whose first step takes long."""

    def __init__(self, *times):
        self.times = list(times)

    def __call__(self):
        return self.times.pop(0)


def test_the_first_step_is_not_timed(monkeypatch):
    monkeypatch.setattr(plan_run.time, "perf_counter", Clock(100.0, 102.0, 104.0))
    monkeypatch.setattr(plan_run, "peak_memory", lambda device: 3 * GIB)

    class Expected:
        seconds, compared = 1.6, 4 * GIB

    written = []
    first_steps = FirstSteps(Expected, torch.device("cpu"), written.append)
    for step in (41, 42, 42, 43, 44, 45):  # resumed after 40
        first_steps(step)
    assert written == [
        "predicted 1.6 s a step and 4.00 GiB, in the first 3 steps measured 2 s "
        "(1.25 times) and 3.00 GiB (0.75 times)"
    ]


def test_a_gpu_is_compared_by_what_its_allocator_counts(monkeypatch):
    from glmkern.plan.prediction import Job, predict
    from glmkern.plan.work import RowLength

    config = ChatGLMConfig.from_dict({**SMALL, "pre_seq_len": 5})
    job = Job(config, Precision("float16", "float16"), [RowLength(9, 3)], 1, 1, 0, "none", 1)
    here = Machine("a GPU", "cuda", 8 * GIB, GIB, 1e12, 1e11, "nothing")
    predicted = predict(job, here)
    assert predicted.total - predicted.compared == GIB
