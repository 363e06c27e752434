"""What was predicted against what is measured, once a run is under way."""

import time
from collections.abc import Callable

import torch

from glmkern.plan.machines import GIB
from glmkern.plan.prediction import Prediction
from glmkern.training.progress import peak_memory

COMPARED_STEPS = 3


class FirstSteps:
    """Called after every optimiser step; tells once, after COMPARED_STEPS of them.

    The first step is not timed: kernels are compiled and memory is claimed in it.
    """

    def __init__(self, prediction: Prediction, device: torch.device, write: Callable[[str], None]):
        self.prediction, self.device, self.write = prediction, device, write
        self._steps: dict[int, float] = {}  # when each ended

    def __call__(self, step: int) -> None:
        if len(self._steps) == COMPARED_STEPS:
            return
        self._steps.setdefault(step, time.perf_counter())
        if len(self._steps) == COMPARED_STEPS:
            times = list(self._steps.values())
            self.write(self._comparison((times[-1] - times[0]) / (COMPARED_STEPS - 1)))

    def _comparison(self, seconds: float) -> str:
        expected, memory = self.prediction.seconds, self.prediction.compared
        peak = peak_memory(self.device)
        return (f"predicted {expected:.3g} s a step and {memory / GIB:.2f} GiB, in the first "
                f"{COMPARED_STEPS} steps measured {seconds:.3g} s ({seconds / expected:.2f} times)"
                f" and {peak / GIB:.2f} GiB ({peak / memory:.2f} times)")
