"""The log of a run for other tools: TensorBoard's event files and a picture of the loss."""

import datetime
import importlib.util
import json
import math
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from glmkern.errors import InputError
from glmkern.files.atomic import replaced
from glmkern.training.flags.arguments import TrainingArguments

LOSS_CURVE = "training_loss.png"
TENSORBOARD = "tensorboard"
ALONE = ("none", "all")
# Name in a logged dict, and the group TensorBoard shows the rest of the name in.
GROUPS = {"eval_": "eval/", "test_": "test/", "": "train/"}

LogHistory = list[dict[str, float]]


def check_reports(args: TrainingArguments) -> None:
    """Raise InputError, with the cure, for a report that cannot be made here."""
    names = args.report_to or ()
    unknown = [name for name in names if name not in (TENSORBOARD, *ALONE)]
    if unknown:
        raise InputError(
            f"--report_to {unknown[0]} is not available; choose {TENSORBOARD}, all or none "
            "(other services read TensorBoard's event files or trainer_log.jsonl)"
        )
    if len(names) > 1 and set(names) & set(ALONE):
        raise InputError(
            f"--report_to {' '.join(names)} contradicts itself; none and all stand alone"
        )
    if TENSORBOARD in names:
        _require("--report_to tensorboard", "tensorboard")
    if args.plot_loss:
        _require("--plot_loss", "matplotlib")


def _require(flag: str, package: str) -> None:
    if not _is_installed(package):
        raise InputError(
            f"{flag} needs the package {package}; install it with `pip install {package}`"
        )


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


class Reports:
    """Follows a run's log_history, in a `with` block around the training.

    `after_step` is called after every optimiser step. Leaving the block reports the rest, and draws
    the loss where --plot_loss asks for it and nothing failed.

    Args:
        args: report_to, logging_dir, plot_loss and output_dir.
        history: returns the trainer's present log_history.
        flags: what was asked for, shown beside the curves.
        writes: False in all processes of a run but one.
    """

    def __init__(
        self,
        args: TrainingArguments,
        history: Callable[[], LogHistory],
        flags: dict[str, Any] | None = None,
        writes: bool = True,
    ):
        self.args, self.history, self.flags = args, history, flags or {}
        names = args.report_to or ()
        asked = TENSORBOARD in names or ("all" in names and _is_installed(TENSORBOARD))
        self._to_tensorboard = asked and writes
        self._draws = args.plot_loss and writes
        self._writer = None
        self._reported = 0  # entries of the history
        self._first_step = 0  # entries of earlier steps are reported already

    def __enter__(self) -> "Reports":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if self._to_tensorboard and self._writer is None and kind is None and self.history():
            self._open(self.history()[-1]["step"])  # no step was left to a resumed run
        if self._writer is not None:
            self._report()
            self._writer.close()
        if self._draws and kind is None:
            draw_loss(self.history(), Path(self.args.output_dir) / LOSS_CURVE)

    def after_step(self, step: int) -> None:
        """Report what was logged since the last call; `step` is the step just taken."""
        if not self._to_tensorboard:
            return
        if self._writer is None:
            self._open(step - 1)
        self._report()

    def _report(self) -> None:
        history = self.history()
        for entry in history[self._reported :]:
            if entry["step"] >= self._first_step:
                self._add(entry)
        self._reported = len(history)

    def _open(self, steps: int) -> None:
        """Open an event file for a run that has taken `steps` steps, 0 if it is a new one.

        A resumed run writes into the newest folder. It hides what was reported there of the
        checkpoint's step and of later ones, and reports that step again: where an epoch ended with
        it, a log and an evaluation may still follow.
        """
        from torch.utils.tensorboard import SummaryWriter

        resumed, self._first_step = steps > 0, steps
        folder = self.args.logging_dir
        if folder is None:
            runs = Path(self.args.output_dir) / "runs"
            earlier = sorted(runs.glob("*/"), key=lambda path: path.stat().st_mtime_ns)
            now = datetime.datetime.now().strftime("%b%d_%H-%M-%S")
            folder = earlier[-1] if resumed and earlier else runs / f"{now}_{socket.gethostname()}"
        self._writer = SummaryWriter(str(folder), purge_step=steps if resumed else None)
        self._writer.add_text("args", json.dumps(self.flags, indent=2))

    def _add(self, entry: dict[str, float]) -> None:
        for name, value in entry.items():
            if name != "step" and isinstance(value, (int, float)):
                self._writer.add_scalar(tag(name), value, entry["step"])
        self._writer.flush()


def tag(name: str) -> str:
    """TensorBoard's name of a logged number, as transformers writes it: eval_loss is eval/loss."""
    prefix = next(each for each in GROUPS if name.startswith(each))
    return GROUPS[prefix] + name.removeprefix(prefix)


def draw_loss(history: LogHistory, path: Path) -> None:
    """A PNG of the logged loss, smoothed on top, and of the evaluation loss where there is any."""
    from matplotlib.figure import Figure

    axes = (figure := Figure(figsize=(8, 5), layout="constrained")).subplots()
    steps, losses = _curve(history, "loss")
    axes.plot(steps, losses, alpha=0.4, label="loss")
    axes.plot(steps, smoothed(losses), label="smoothed")
    if any("eval_loss" in entry for entry in history):
        axes.plot(*_curve(history, "eval_loss"), marker="o", label="evaluation loss")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.legend()
    with replaced(path) as temporary:
        figure.savefig(temporary, format="png")


def _curve(history: LogHistory, name: str) -> tuple[list[float], list[float]]:
    points = [(entry["step"], entry[name]) for entry in history if name in entry]
    return [step for step, _ in points], [value for _, value in points]


def smoothed(values: Sequence[float]) -> list[float]:
    """The exponential moving average; its memory grows with the number of values, from none to
    nine tenths, so that short curves keep their shape."""
    memory = 1.8 * (1 / (1 + math.exp(-0.05 * len(values))) - 0.5)
    means: list[float] = []
    for value in values:
        means.append(value if not means else memory * means[-1] + (1 - memory) * value)
    return means
