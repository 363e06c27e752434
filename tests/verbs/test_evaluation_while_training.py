"""Evaluations, the best checkpoint and samples.md of a training run on the command line."""

import json
from pathlib import Path

import pytest
import torch

from glmkern import cli
from glmkern.checkpoint import read_prefix
from tests.official import command, refused, write_base


@pytest.fixture(scope="module")
def base(shared, tmp_path_factory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"), shared / "data" / "tokenizer")


@pytest.fixture
def flags(base, shared, tmp_path) -> dict[str, object]:
    lines = (shared / "data" / "advertisegen" / "train.json").read_text().split("\n")
    (tmp_path / "train.json").write_text("\n".join(lines[:8]))
    (tmp_path / "dev.json").write_text("\n".join(lines[20:25]))
    return {
        "do_train": True,
        "train_file": tmp_path / "train.json",
        "validation_file": tmp_path / "dev.json",
        "prompt_column": "content",
        "response_column": "summary",
        "model_name_or_path": base,
        "output_dir": tmp_path / "out",
        "max_source_length": 24,
        "max_target_length": 12,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "max_steps": 6,
        "logging_steps": 3,
        "save_steps": 2,
        "learning_rate": "2",
        "pre_seq_len": 4,
        "disable_tqdm": True,
        "predict_with_generate": True,
    }


def state(out: Path) -> dict:
    return json.loads((out / "trainer_state.json").read_text())


def test_best_checkpoint(flags, tmp_path, capsys):
    """Evaluated at its steps, kept though it is old, and what the run ends with."""
    run = {
        **flags,
        "evaluation_strategy": "steps",
        "eval_steps": 2,
        "load_best_model_at_end": True,
        "save_total_limit": 1,
        "greater_is_better": True,
    }  # so that the first is the best
    assert cli.main(command(run)) == 0
    out = tmp_path / "out"
    evaluations = [log for log in state(out)["log_history"] if "eval_loss" in log]
    assert [log["step"] for log in evaluations] == [2, 4, 6]
    assert {"eval_bleu-4", "eval_rouge-l", "eval_runtime", "epoch"} <= evaluations[0].keys()
    losses = [log["eval_loss"] for log in evaluations]
    assert losses[0] > max(losses[1:])
    assert state(out)["best_metric"] == losses[0]
    assert state(out)["best_model_checkpoint"] == str(out / "checkpoint-2")
    assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-6"}
    results = json.loads((out / "eval_results.json").read_text())
    assert results["eval_loss"] == losses[0]
    assert capsys.readouterr().out.count("{'eval_loss': ") == 4


def test_evaluations_change_no_bit_of_the_training(flags, tmp_path):
    plain = {**flags, "output_dir": tmp_path / "plain"}
    assert cli.main(command(plain)) == 0
    assert cli.main(command({**flags, "evaluation_strategy": "epoch", "sample_prompts": 0})) == 0
    ends = [
        read_prefix(tmp_path / name / "checkpoint-6")["embedding.weight"]
        for name in ("plain", "out")
    ]
    assert torch.equal(*ends)
    assert not (tmp_path / "out" / "samples.md").exists()


def test_samples_at_every_save(flags, tmp_path):
    assert cli.main(command(flags)) == 0
    text = (tmp_path / "out" / "samples.md").read_text()
    assert [line for line in text.split("\n") if line.startswith("## ")] == [
        "## Step 2",
        "## Step 4",
        "## Step 6",
    ]
    assert text.count("Answer\n\n   > ") == 9
    first = json.loads((tmp_path / "dev.json").read_text().split("\n")[0])
    assert text.count(first["content"]) == text.count(first["summary"]) == 3

    resumed = {**flags, "resume_from_checkpoint": tmp_path / "out" / "checkpoint-4"}
    assert cli.main(command(resumed)) == 0
    assert (tmp_path / "out" / "samples.md").read_text() == text


def test_samples_without_a_validation_file_are_training_rows(flags, tmp_path):
    del flags["validation_file"]
    assert cli.main(command({**flags, "sample_prompts": 1})) == 0
    first = json.loads((tmp_path / "train.json").read_text().split("\n")[0])
    assert (tmp_path / "out" / "samples.md").read_text().count(first["summary"]) == 3


def test_best_model_needs_its_metric(flags, tmp_path, capsys):
    run = {
        **flags,
        "evaluation_strategy": "steps",
        "eval_steps": 2,
        "predict_with_generate": False,
        "load_best_model_at_end": True,
        "metric_for_best_model": "bleu-4",
    }
    assert "the evaluation has loss (more with" in refused(command(run), capsys)
    assert not (tmp_path / "out").exists()
