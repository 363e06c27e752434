"""A run's own prediction: made before the base is loaded, and compared with its first steps."""

import os
import time
from collections.abc import Callable, Sequence

import torch

from glmkern.model.packing import Row
from glmkern.plan.machines import GIB, Machine, this_machine
from glmkern.plan.precision import Precision
from glmkern.plan.prediction import Job, Prediction, as_seconds, fitted, predict
from glmkern.training.flags.arguments import AUTO
from glmkern.training.output.progress import peak_memory, write_line
from glmkern.training.run import Forecast
from glmkern.training.setup import Setup

COMPARED_STEPS = 3


def predict_setup(
    setup: Setup,
    precision: Precision,
    machine: Machine,
    rows: Sequence[Row] | None,
    processes: int = 1,
) -> Prediction:
    """The memory and time of a run on a machine, with the tokens a pack that --tokens_per_pack auto
    comes to there.

    Args:
        rows: None: as long as the flags let them be.
        processes: that share the run.

    Raises ValueError where the flags do not go with the rows.
    """
    job = Job.of(setup, precision, rows, processes)
    if setup.arguments.training.tokens_per_pack == AUTO:
        job = fitted(job, machine)
    return predict(job, machine)


def forecast_run(setup: Setup, rows: Sequence[Row]) -> Forecast:
    """What this run is predicted to take on this machine; to be called before the base takes
    memory. The lines tell it, and which number has which precision."""
    device, precision = setup.device, Precision.of_setup(setup)
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if device.type == "cpu" else 1
    machine = this_machine(str(device), precision.activations, sharing)
    processes = int(os.environ.get("WORLD_SIZE", 1))
    prediction = predict_setup(setup, precision, machine, rows, processes)
    lines = [*precision.lines(prediction.job.config.quantization_bit), *prediction.summary()]
    on_step = FirstSteps(prediction, device, write_line)
    return Forecast(lines, prediction.job.budget, on_step, expected_memory(prediction))


def expected_memory(prediction: Prediction) -> str:
    """For a run that is out of memory."""
    memory = prediction.machine.memory
    free = f" of the {memory / GIB:.2f} GiB that were free" if memory else ""
    return f"{prediction.total / GIB:.2f} GiB were predicted{free}: {prediction.cure()}"


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
