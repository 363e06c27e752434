"""The training state of a checkpoint, written and read back bit for bit.

A checkpoint holds the prefix, the official files of optimiser, schedule, loss scale, random
numbers and trainer state, and `resume.json`: the position in the data and in the logs.
"""

import hashlib
import json
import pickle
from array import array
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from glmkern.checkpoint import read_prefix, write_prefix
from glmkern.checkpoint.tensor_files import write_torch
from glmkern.errors import InputError
from glmkern.files.atomic import write_text
from glmkern.model.packing import Row
from glmkern.training.loop.loss_scale import LossScale
from glmkern.training.loop.seeding import rng_state, set_rng_state
from glmkern.training.output.trainer_state import TrainerState

RESUME_FILE = "resume.json"
NEEDED = (
    "pytorch_model.bin",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
    RESUME_FILE,
)


@dataclass
class Position:
    """Where a run stands, beyond what the official files hold.

    Attributes:
        micro_batches: of the steps taken, over all epochs.
        epochs_ended: epochs whose logs, evaluations and checkpoints are done.
        window_loss: sum over the steps since the last log.
        window_start: the step of that log.
        total_loss: sum over all steps up to it.
        tokens: of all rows so far.
        log_lines: lines of trainer_log.jsonl.
    """

    micro_batches: int = 0
    epochs_ended: int = 0
    window_loss: float = 0.0
    window_start: int = 0
    total_loss: float = 0.0
    tokens: int = 0
    log_lines: int = 0


@dataclass
class TrainingState:
    """What a checkpoint holds of a run: all that training changes.

    Attributes:
        prefix_encoder: the trained module.
        optimizer, scheduler: torch's, as optimizer.pt and scheduler.pt hold them.
        loss_scale: of a float16 model; None for the others, which need none.
        trainer_state: as trainer_state.json holds it.
        position: as resume.json holds it.
        rows: the fingerprint of the training rows.
        dtype: of the model's activations.
    """

    prefix_encoder: nn.Module
    optimizer: Optimizer
    scheduler: LRScheduler
    loss_scale: LossScale | None
    trainer_state: TrainerState
    position: Position
    rows: str
    dtype: torch.dtype

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


def fingerprint(rows: Sequence[Row]) -> str:
    """The same for the same rows in the same order, and for no others."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(len(row.input_ids).to_bytes(8, "little"))
        digest.update(array("q", row.input_ids))
        digest.update(array("q", row.labels))
    return digest.hexdigest()


def write_training_state(folder: Path, state: TrainingState) -> None:
    """Write the files of the state into a new checkpoint folder."""
    write_prefix(folder, state.prefix_encoder.state_dict())
    write_torch(folder / "optimizer.pt", state.optimizer.state_dict())
    write_torch(folder / "scheduler.pt", state.scheduler.state_dict())
    if state.loss_scale is not None:
        write_torch(folder / "scaler.pt", state.loss_scale.state_dict())
    write_torch(folder / "rng_state.pth", rng_state())
    write_text(folder / "trainer_state.json", state.trainer_state.to_json())
    position = {**asdict(state.position), "rows": state.rows, "dtype": state.dtype_name}
    write_text(folder / RESUME_FILE, json.dumps(position, indent=2) + "\n")


def read_training_state(folder: Path, state: TrainingState) -> None:
    """Set `state`, and the random number generators, to what the folder holds.

    The steps and epochs of the whole run stay those of `state`. Raises InputError where the folder
    is damaged, or of other rows, another prefix or precision.
    """
    position = read_json(folder / RESUME_FILE)
    if position.pop("rows", None) != state.rows:
        raise InputError(
            f"{folder} comes from a run over other rows; give it the --train_file, "
            "and the base's tokenizer, that it had"
        )
    dtype, now = position.pop("dtype", None), state.dtype_name
    if dtype is not None and dtype != now:
        raise InputError(
            f"{folder} comes from a run in {dtype} and this one is in {now}; pass "
            f"--model_dtype {dtype}"
        )
    try:
        state.position = Position(**position)
    except TypeError as error:
        raise InputError(
            f"{folder / RESUME_FILE} is of another version; start a new run from its "
            "prefix with --ptuning_checkpoint"
        ) from error
    _check_types(state.position, folder / RESUME_FILE)
    saved = TrainerState.from_dict(read_json(folder / "trainer_state.json"))
    _check_types(saved, folder / "trainer_state.json")
    if saved.global_step > state.trainer_state.max_steps:
        raise InputError(
            f"{folder} has {saved.global_step} steps, more than the "
            f"{state.trainer_state.max_steps} of this run; raise --max_steps"
        )
    saved.max_steps = state.trainer_state.max_steps
    saved.num_train_epochs = state.trainer_state.num_train_epochs
    state.trainer_state = saved
    _load_prefix(state.prefix_encoder, folder)
    _load_into(state.optimizer.load_state_dict, folder / "optimizer.pt")
    _check_moments(state.optimizer, folder / "optimizer.pt")
    _load_into(state.scheduler.load_state_dict, folder / "scheduler.pt")
    if state.scheduler.last_epoch != saved.global_step:
        raise InputError(
            f"scheduler.pt of {folder} is of step {state.scheduler.last_epoch} and "
            f"trainer_state.json of {saved.global_step}; resume from another "
            "checkpoint"
        )
    scaled = (folder / "scaler.pt").is_file()
    if scaled != (state.loss_scale is not None):
        raise InputError(
            f"{folder} has {'a' if scaled else 'no'} scaler.pt, which only a run in float16 saves,"
            f" and this one is in {now}; pass the --model_dtype that it had, or resume from "
            "another checkpoint"
        )
    if scaled:
        _load_into(state.loss_scale.load_state_dict, folder / "scaler.pt")
    _load_into(set_rng_state, folder / "rng_state.pth")


def read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} cannot be read ({error}); resume from another checkpoint"
        ) from error
    if not isinstance(values, dict):
        raise InputError(damaged(path))
    return values


def damaged(path: Path) -> str:
    return f"{path} is damaged or not of this kind; resume from another checkpoint"


def _load_prefix(encoder: torch.nn.Module, folder: Path) -> None:
    saved, wanted = read_prefix(folder), encoder.state_dict()
    for name in sorted(saved.keys() | wanted.keys()):
        shapes = [list(each[name].shape) if name in each else "absent" for each in (saved, wanted)]
        if shapes[0] != shapes[1]:
            raise InputError(
                f"{name} of the prefix in {folder} is {shapes[0]} and in this run "
                f"{shapes[1]}; pass the base and the prefix flags that it had"
            )
    encoder.load_state_dict(saved)


def _load_into(load_state: Callable[[Any], object], path: Path) -> None:
    """Hand the contents of a .pt file to `load_state`; InputError where either fails."""
    try:
        load_state(torch.load(path, map_location="cpu", weights_only=True))
    except torch.OutOfMemoryError:
        raise
    except (
        pickle.UnpicklingError,
        RuntimeError,
        OSError,
        EOFError,
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        IndexError,
    ) as error:
        raise InputError(damaged(path)) from error


def _check_moments(optimizer: torch.optim.Optimizer, path: Path) -> None:
    for parameter, state in optimizer.state.items():
        for value in state.values():
            if isinstance(value, torch.Tensor) and value.shape not in ((), parameter.shape):
                raise InputError(damaged(path))


def _check_types(record: Position | TrainerState, path: Path) -> None:
    """Raise InputError where a value is not of the kind of the field's default."""
    for name, default in vars(type(record)()).items():
        kind = (int, float) if isinstance(default, (int, float)) else type(default)
        if default is not None and not isinstance(getattr(record, name), kind):
            raise InputError(damaged(path))
    best = getattr(record, "best_model_checkpoint", None)
    if not isinstance(best, (str, type(None))):
        raise InputError(damaged(path))
