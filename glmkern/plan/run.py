"""A run's own prediction: made before the base is loaded, and held against its first steps."""

import os
import time
from collections.abc import Callable, Sequence

import torch

from glmkern.model.config import ChatGLMConfig
from glmkern.model.packing import Row
from glmkern.plan.machines import GIB, this_machine
from glmkern.plan.precision import Precision
from glmkern.plan.prediction import Job, Prediction, as_seconds, fitted, predict
from glmkern.training.flags.arguments import Arguments
from glmkern.training.output.progress import peak_memory

COMPARED_STEPS = 3


def predict_run(
    arguments: Arguments,
    config: ChatGLMConfig,
    rows: Sequence[Row],
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Prediction, list[str]]:
    """The memory and time of this run on this machine, its job with the tokens a pack that
    --tokens_per_pack auto comes to, and the lines that tell them and which number has which
    precision; to be called before the base takes memory."""
    precision = Precision.of(config, dtype, device, arguments.model.rope_precision)
    job = Job.of(arguments, config, precision, rows, processes=int(os.environ.get("WORLD_SIZE", 1)))
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if device.type == "cpu" else 1
    machine = this_machine(str(device), precision.activations, sharing)
    if arguments.training.tokens_per_pack == "auto":
        job = fitted(job, machine)
    prediction = predict(job, machine)
    return prediction, [*precision.lines(job.config.quantization_bit), *prediction.summary()]


class FirstSteps:
    """Called after every optimiser step; tells once, after COMPARED_STEPS of them.

    The first step is not timed: kernels are compiled and memory is claimed in it.
    """

    def __init__(self, prediction: Prediction, device: torch.device, write: Callable[[str], None]):
        self.prediction, self.device, self.write = prediction, device, write
        self._steps: dict[int, float] = {}  # when each ended

    def __call__(self, step: int) -> None:
        if step in self._steps or len(self._steps) == COMPARED_STEPS:
            return
        self._steps[step] = time.perf_counter()
        if len(self._steps) == COMPARED_STEPS:
            times = list(self._steps.values())
            self.write(self._comparison((times[-1] - times[0]) / (COMPARED_STEPS - 1)))

    def _comparison(self, seconds: float) -> str:
        expected, memory = self.prediction.seconds, self.prediction.compared
        peak = peak_memory(self.device)
        return (
            f"predicted {as_seconds(expected)} a step and {memory / GIB:.2f} GiB, in the first "
            f"{COMPARED_STEPS} steps measured {as_seconds(seconds)} ({seconds / expected:.2f} "
            f"times) and {peak / GIB:.2f} GiB ({peak / memory:.2f} times)"
        )
