"""The reports of a run through the command line."""

import json

import pytest
from matplotlib.image import imread
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from glmkern import cli
from glmkern.training.output import reports
from glmkern.training.output.reports import tag
from tests.official import command, refused


def test_a_run_is_reported_and_drawn(flags, tmp_path):
    """By the packages themselves."""
    asked = {"report_to": "tensorboard", "plot_loss": True, "logging_dir": tmp_path / "tb"}
    assert cli.main(command({**flags, **asked})) == 0
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    events = EventAccumulator(str(tmp_path / "tb"), {"scalars": 0}).Reload()
    written = {
        (name, event.step): event.value
        for name in events.Tags()["scalars"]
        for event in events.Scalars(name)
    }
    assert written == {
        (tag(name), entry["step"]): pytest.approx(value)
        for entry in history
        for name, value in entry.items()
        if name != "step"
    }
    picture = imread(tmp_path / "out" / "training_loss.png")
    assert picture[..., :3].std() > 0.01  # something is drawn


def test_a_missing_package_stops_the_run_before_it_starts(flags, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(reports, "_is_installed", lambda package: False)
    line = refused(command({**flags, "plot_loss": True}), capsys)
    assert line == (
        "--plot_loss needs the package matplotlib; install it with `pip install matplotlib`"
    )
    assert not (tmp_path / "out").exists()
