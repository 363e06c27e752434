"""Checkpoints to resume from, and what a run has left, to be compared."""

import json
from pathlib import Path

import torch

from glmkern.training.flags.arguments import Arguments, DataTrainingArguments, ModelArguments
from glmkern.training.loop.trainer import Trainer
from glmkern.training.output.run_folder import RunFolder
from tests.training.stand_in import StandIn, arguments, simple_rows

TIMES = {"train_runtime", "train_samples_per_second", "train_steps_per_second"}


LOG_TIMES = {"elapsed_time", "remaining_time", "throughput", "ram_allocated", "vram_allocated"}


def without(record: dict, names: set[str]) -> dict:
    return {name: value for name, value in record.items() if name not in names}


def trainer_state(path: Path) -> dict:
    """trainer_state.json but for times, and the folder in the name of the best checkpoint."""
    state = json.loads(path.read_text())
    state["log_history"] = [without(log, TIMES) for log in state["log_history"]]
    state["best_model_checkpoint"] = Path(state["best_model_checkpoint"] or "").name
    return state


def plain(value):
    """Tensors as bytes, so that == compares every bit."""
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape), value.numpy().tobytes()
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, (list, tuple)) else value


def contents(folder: Path) -> dict[str, object]:
    """Everything a run left, times left out."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix in (".pt", ".pth", ".bin"):
            found[name] = plain(torch.load(path, weights_only=True))
        elif path.name == "trainer_state.json":
            found[name] = trainer_state(path)
        elif path.suffix == ".jsonl":
            found[name] = [
                without(json.loads(line), LOG_TIMES) for line in path.read_text().splitlines()
            ]
        elif path.is_file():
            found[name] = path.read_bytes()
        else:
            found[name] = "folder"
    return found


def make_checkpoint(folder: Path, step: int, **flags) -> Path:
    train_one(folder, step)
    checkpoint = folder / f"checkpoint-{step}"
    (checkpoint / "glmkern.json").write_text(json.dumps(every_flag(**flags)))
    return checkpoint


def train_one(folder: Path, step: int) -> None:
    Trainer(
        StandIn(),
        simple_rows(6),
        arguments(max_steps=step, save_steps=step),
        folder=RunFolder(folder),
    ).train()


def every_flag(**flags) -> dict:
    sections = (ModelArguments(), DataTrainingArguments(), arguments())
    return {**Arguments(*sections).to_dict(), **flags}


def rewrite(path: Path, value) -> None:
    if path.suffix == ".json":
        path.write_text(json.dumps(value))
    else:
        torch.save(value, path)
