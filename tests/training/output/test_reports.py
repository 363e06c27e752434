"""TensorBoard and the picture of the loss, with stand-ins for the packages; trainer_log.jsonl."""

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from glmkern.errors import InputError, Interrupted
from glmkern.training.output import reports
from glmkern.training.output.progress import Progress
from glmkern.training.output.reports import Reports, check_reports, smoothed, tag
from glmkern.training.output.trainer_state import TrainerState
from tests.training.stand_in import arguments

TRAINED = {"loss": 3.5, "learning_rate": 0.02, "epoch": 0.5}


EVALUATED = {"eval_loss": 3.25, "eval_rouge-1": 30.0, "epoch": 0.5}


class Writer:
    """torch.utils.tensorboard.SummaryWriter, as far as it is used."""

    made = []

    def __init__(self, log_dir, purge_step):
        self.log_dir, self.purge_step = log_dir, purge_step
        self.scalars, self.texts, self.flushed, self.closed = [], {}, 0, False
        Writer.made.append(self)

    def add_text(self, tag, text):
        self.texts[tag] = text

    def add_scalar(self, tag, value, step):
        self.scalars.append((tag, value, step))

    def flush(self):
        self.flushed = len(self.scalars)

    def close(self):
        self.closed = True


class Figure:
    """matplotlib.figure.Figure with the one pair of axes that is drawn on."""

    def __init__(self, **options):
        self.lines, self.labels = {}, []
        Figure.last = self

    def subplots(self):
        return SimpleNamespace(
            plot=lambda x, y, label, **style: self.lines.update({label: (x, y)}),
            set_xlabel=self.labels.append,
            set_ylabel=self.labels.append,
            legend=lambda: self.labels.append("legend"),
        )

    def savefig(self, path, format):
        path.write_bytes(b"\x89PNG " + format.encode())


@pytest.fixture
def installed(monkeypatch):
    """Both packages, as stand-ins."""
    Writer.made = []
    for name, content in (
        ("torch.utils.tensorboard", {"SummaryWriter": Writer}),
        ("matplotlib", {}),
        ("matplotlib.figure", {"Figure": Figure}),
    ):
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(reports, "_is_installed", lambda package: True)


def logged(*entries: tuple[int, dict]) -> list[dict]:
    return [{**values, "step": step} for step, values in entries]


# What may be asked for


@pytest.mark.parametrize("flags", [{}, {"report_to": ("none",)}, {"report_to": ("all",)}])
def test_what_needs_no_package(monkeypatch, flags):
    monkeypatch.setattr(reports, "_is_installed", lambda package: False)
    check_reports(arguments(**flags))


@pytest.mark.parametrize(
    "flags, words",
    [
        (
            {"report_to": ("tensorboard",)},
            "needs the package tensorboard; install it with `pip inst",
        ),
        (
            {"plot_loss": True},
            "--plot_loss needs the package matplotlib; install it with `pip install",
        ),
        (
            {"report_to": ("wandb",)},
            "--report_to wandb is not available; choose tensorboard, all or",
        ),
        ({"report_to": ("tensorboard", "mlflow")}, "--report_to mlflow is not available"),
        ({"report_to": ("none", "tensorboard")}, "none tensorboard contradicts itself"),
    ],
)
def test_what_is_refused(monkeypatch, flags, words):
    monkeypatch.setattr(reports, "_is_installed", lambda package: False)
    with pytest.raises(InputError) as error:
        check_reports(arguments(**flags))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_installed_packages_are_fine(installed):
    check_reports(arguments(report_to=("tensorboard",), plot_loss=True))


# TensorBoard


@pytest.mark.parametrize(
    "name, expected",
    [
        ("loss", "train/loss"),
        ("learning_rate", "train/learning_rate"),
        ("epoch", "train/epoch"),
        ("train_loss", "train/train_loss"),
        ("eval_loss", "eval/loss"),
        ("test_loss", "test/loss"),
        ("eval_bleu-4", "eval/bleu-4"),
        ("evaluated", "train/evaluated"),
    ],
)
def test_names_are_those_of_transformers(name, expected):
    assert tag(name) == expected


def test_entries_are_reported_once_and_in_time(installed, tmp_path):
    history = []
    args = arguments(report_to=("tensorboard",), logging_dir=str(tmp_path / "tb"))
    with Reports(args, lambda: history, {"seed": 42}) as following:
        following.after_step(1)
        history += logged((1, TRAINED), (1, EVALUATED))
        following.after_step(2)
        (writer,) = Writer.made
        assert writer.log_dir == str(tmp_path / "tb") and writer.purge_step is None
        assert json.loads(writer.texts["args"]) == {"seed": 42}
        expected = [
            ("train/loss", 3.5, 1),
            ("train/learning_rate", 0.02, 1),
            ("train/epoch", 0.5, 1),
            ("eval/loss", 3.25, 1),
            ("eval/rouge-1", 30.0, 1),
            ("train/epoch", 0.5, 1),
        ]
        assert writer.scalars == expected and writer.flushed == len(expected)
        history += logged((2, {"train_runtime": 8.5}))
    assert writer.scalars == [*expected, ("train/train_runtime", 8.5, 2)] and writer.closed


def test_a_resumed_run_goes_on_where_it_was(installed, tmp_path):
    args = arguments(report_to=("all",), output_dir=str(tmp_path))
    (tmp_path / "runs" / "Jan01_00-00-00_host").mkdir(parents=True)
    history = logged((5, TRAINED), (10, TRAINED))
    with Reports(args, lambda: history) as following:
        following.after_step(11)
        history += logged((11, {"loss": 2.0}))
    (writer,) = Writer.made
    assert writer.log_dir == str(tmp_path / "runs" / "Jan01_00-00-00_host")
    # What the first part reported of the checkpoint's step is hidden and reported again.
    assert writer.purge_step == 10
    assert {step for _, _, step in writer.scalars} == {10, 11}
    assert writer.scalars[-1] == ("train/loss", 2.0, 11)


@pytest.mark.parametrize("steps_left", [0, 1])
def test_what_was_due_at_the_end_of_a_stopped_epoch_is_reported_once(tmp_path, steps_left):
    """The stop came in the epoch's last step, after that step's log; by the package itself."""
    args = arguments(report_to=("tensorboard",), logging_dir=str(tmp_path))
    history = []
    with pytest.raises(Interrupted), Reports(args, lambda: history) as following:
        for step in (1, 2):
            following.after_step(step)
            history += logged((step, {"loss": 4.0 - step}))
        raise Interrupted("stopped after step 2", 2)
    with Reports(args, lambda: history) as following:
        history += logged((2, {"eval_loss": 1.5}))  # while the trainer ends the epoch
        for step in range(3, 3 + steps_left):
            following.after_step(step)
            history += logged((step, {"loss": 0.5}))
    events = EventAccumulator(str(tmp_path), {"scalars": 0}).Reload()
    written = {
        name: [(event.step, event.value) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }
    assert written == {
        "train/loss": [(1, 3.0), (2, 2.0), (3, 0.5)][: 2 + steps_left],
        "eval/loss": [(2, 1.5)],
    }


def test_a_new_run_has_a_new_folder(installed, tmp_path):
    (tmp_path / "runs" / "Jan01_00-00-00_host").mkdir(parents=True)
    Reports(arguments(report_to=("all",), output_dir=str(tmp_path)), list).after_step(1)
    folder = Writer.made[0].log_dir
    assert folder.startswith(str(tmp_path / "runs")) and "Jan01_00-00-00_host" not in folder


def test_a_failed_run_keeps_its_events_and_draws_nothing(installed, tmp_path):
    args = arguments(report_to=("tensorboard",), plot_loss=True, output_dir=str(tmp_path))
    history = []
    with pytest.raises(KeyboardInterrupt), Reports(args, lambda: history) as following:
        following.after_step(1)
        history += logged((1, TRAINED))
        raise KeyboardInterrupt
    (writer,) = Writer.made
    assert len(writer.scalars) == 3 and writer.closed
    assert not (tmp_path / "training_loss.png").exists()


@pytest.mark.parametrize("names, writes", [(None, True), (("none",), True), (("all",), False)])
def test_nothing_is_reported_unasked_or_by_other_ranks(installed, tmp_path, names, writes):
    args = arguments(report_to=names, output_dir=str(tmp_path), plot_loss=not writes)
    with Reports(args, lambda: logged((1, TRAINED)), writes=writes) as following:
        following.after_step(1)
    assert not Writer.made and not any(tmp_path.iterdir())


# The picture of the loss


def test_loss_curve(installed, tmp_path):
    history = logged((2, {"loss": 4.0}), (2, EVALUATED), (4, {"loss": 3.0}), (4, {"x": 1}))
    with Reports(arguments(plot_loss=True, output_dir=str(tmp_path)), lambda: history):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["training_loss.png"]
    assert (tmp_path / "training_loss.png").read_bytes().startswith(b"\x89PNG")
    lines = Figure.last.lines
    assert lines["loss"] == ([2, 4], [4.0, 3.0])
    assert lines["smoothed"] == ([2, 4], smoothed([4.0, 3.0]))
    assert lines["evaluation loss"] == ([2], [3.25])
    assert Figure.last.labels == ["step", "loss", "legend"]


def test_smoothing():
    assert smoothed([]) == [] and smoothed([2.5]) == [2.5]
    constant = smoothed([3.0] * 50)
    assert constant == pytest.approx([3.0] * 50)
    noisy = (torch.linspace(4, 2, 400) + torch.randn(400)).tolist()
    steps = torch.tensor(smoothed(noisy)).diff().abs().mean()
    assert steps < 0.2 * torch.tensor(noisy).diff().abs().mean()
    assert min(noisy) <= min(smoothed(noisy)) and max(smoothed(noisy)) <= max(noisy)


# trainer_log.jsonl


def test_log_file_has_losses_of_training_and_evaluation_only(tmp_path, capsys):
    state = TrainerState(max_steps=10, global_step=5)
    progress = Progress(10, torch.device("cpu"), show_bar=False, log_file=tmp_path / "log.jsonl")
    for logs in (TRAINED, EVALUATED, {"eval_rouge-1": 30.0, "epoch": 0.5}):
        progress.log(logs, state)
    progress.close()
    first, second = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    assert (first["loss"], first["lr"], first["epoch"], first["current_steps"]) == (
        3.5,
        0.02,
        0.5,
        5,
    )
    assert second["eval_loss"] == 3.25 and not {"loss", "lr"} & second.keys()
    assert second["percentage"] == 50.0
    assert capsys.readouterr().out.splitlines() == [
        str(TRAINED),
        str(EVALUATED),
        str({"eval_rouge-1": 30.0, "epoch": 0.5}),
    ]


def test_a_run_that_would_never_end_has_a_log(tmp_path):
    state = TrainerState(max_steps=10**18, global_step=1)
    progress = Progress(
        10**18, torch.device("cpu"), show_bar=False, log_file=tmp_path / "log.jsonl"
    )
    progress._start -= 60
    progress.log(TRAINED, state)
    progress.close()
    assert "days" in json.loads((tmp_path / "log.jsonl").read_text())["remaining_time"]
