"""Taking up a stopped run where a checkpoint left it, bit for bit.

A checkpoint holds the prefix, the official files of optimiser, schedule, loss scale, random
numbers and trainer state, and `resume.json`: the position in the data and in the logs.
"""

import hashlib
import json
import pickle
import shlex
import sys
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from glmkern.checkpoint import read_prefix, write_prefix
from glmkern.checkpoint.atomic import write_text, write_torch
from glmkern.errors import InputError
from glmkern.model.packing import Row
from glmkern.training.seeding import rng_state, set_rng_state
from glmkern.training.state import TrainerState

if TYPE_CHECKING:
    from glmkern.training.trainer import Trainer

RESUME_FILE = "resume.json"
FLAGS_FILE = "glmkern.json"
NEEDED = ("pytorch_model.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth",
          "trainer_state.json", RESUME_FILE)
NEWEST = ("auto", "true")

# The flags that decide the numbers of a run; the others may change from one part to the next.
DECISIVE = (
    "pre_seq_len", "prefix_projection", "prefix_dropout", "quantization_bit", "output_layer_bit",
    "model_dtype", "fp16", "bf16", "rope_precision", "max_source_length", "max_target_length",
    "max_train_samples", "ignore_pad_token_for_loss", "source_prefix",
    "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "weight_decay",
    "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "optim", "lr_scheduler_type",
    "warmup_ratio", "warmup_steps", "seed", "data_seed", "dataloader_drop_last",
    "group_by_length", "label_smoothing_factor")
DECISIVE_FOR_A_DECAY = ("max_steps", "num_train_epochs")
SCHEDULES_WITHOUT_END = ("constant", "constant_with_warmup", "inverse_sqrt")


@dataclass
class Position:
    """Where a run stands, beyond what the official files hold.

    micro_batches: of the steps taken, over all epochs. epochs_ended: whose logs, evaluations and
    checkpoints are done. window_loss: sum over the steps since the last log; window_start: that
    log's step; total_loss: sum over all steps up to it. tokens: of all rows so far; log_lines: in
    trainer_log.jsonl.
    """

    micro_batches: int = 0
    epochs_ended: int = 0
    window_loss: float = 0.0
    window_start: int = 0
    total_loss: float = 0.0
    tokens: int = 0
    log_lines: int = 0


def find_checkpoint(wanted: str | None, output_dir: Path) -> Path | None:
    """The folder that --resume_from_checkpoint means; None for a fresh start.

    `wanted` is a folder, "auto" (or "True"), which is the newest complete checkpoint of
    `output_dir` if there is one, or None. Raises InputError for a folder that is no checkpoint.
    """
    if wanted is None:
        return None
    if wanted.lower() in NEWEST:
        complete = [path for path in output_dir.glob("checkpoint-*") if not _missing(path)]
        return max(complete, key=_age, default=None)
    folder = Path(wanted).expanduser()
    if not folder.is_dir():
        raise InputError(f"--resume_from_checkpoint {wanted} is not a folder; name a checkpoint-N "
                         "folder, or auto for the newest of --output_dir")
    missing = _missing(folder)
    if missing and any(folder.glob("checkpoint-*")):
        raise InputError(f"--resume_from_checkpoint {wanted} holds checkpoints but is none; name "
                         "one of them, or pass auto with this --output_dir")
    if missing:
        raise InputError(
            f"--resume_from_checkpoint {wanted} lacks {', '.join(missing)}, so the run cannot go "
            "on from there; --ptuning_checkpoint starts a new run from its prefix")
    return folder


def check_same_run(checkpoint: Path, flags: Mapping[str, Any]) -> None:
    """Raise InputError, naming the flag and both values, where `flags` are of another run.

    `flags` are those of Arguments.to_dict().
    """
    earlier = read_flags(checkpoint)
    start = flags.get("ptuning_checkpoint")
    if start is not None and start != earlier.get("ptuning_checkpoint"):
        raise InputError(
            "--resume_from_checkpoint goes on with a stopped run, prefix, optimiser and schedule "
            "included, and --ptuning_checkpoint starts a new run from a saved prefix; keep one of "
            "them")
    decisive = DECISIVE
    warms_up_by_share = flags["warmup_ratio"] > 0 and not flags["warmup_steps"]
    if flags["lr_scheduler_type"] not in SCHEDULES_WITHOUT_END or warms_up_by_share:
        decisive += DECISIVE_FOR_A_DECAY
    for name in decisive:
        if name in earlier and name in flags and earlier[name] != flags[name]:
            same = "leave it out" if earlier[name] is None else f"pass --{name} {earlier[name]}"
            raise InputError(
                f"--{name} is {flags[name]}, but {checkpoint} comes from a run with {earlier[name]}"
                f"; {same}, or start a new run from its prefix with --ptuning_checkpoint")


def read_flags(checkpoint: Path) -> dict[str, Any]:
    """The flags of the run that saved the checkpoint."""
    return _read_json(checkpoint / FLAGS_FILE)


def describe_warm_start(prefix: str | Path) -> str:
    """What --ptuning_checkpoint does, for those who meant --resume_from_checkpoint."""
    line = f"a new run from the prefix in {prefix}, with a new optimiser and schedule, from step 0"
    if (Path(prefix) / RESUME_FILE).is_file():
        line += f"; --resume_from_checkpoint {prefix} would go on with the run that saved it"
    return line


def fingerprint(rows: Sequence[Row]) -> str:
    """The same for the same rows in the same order, and for no others."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(len(row.input_ids).to_bytes(8, "little"))
        digest.update(array("q", row.input_ids))
        digest.update(array("q", row.labels))
    return digest.hexdigest()


def write_training_state(folder: Path, trainer: "Trainer") -> None:
    """Everything of a checkpoint that the trainer knows, into a new folder."""
    write_prefix(folder, trainer.model.prefix_encoder.state_dict())
    write_torch(folder / "optimizer.pt", trainer.optimizer.state_dict())
    write_torch(folder / "scheduler.pt", trainer.scheduler.state_dict())
    if trainer.loss_scale is not None:
        write_torch(folder / "scaler.pt", trainer.loss_scale.state_dict())
    write_torch(folder / "rng_state.pth", rng_state())
    write_text(folder / "trainer_state.json", trainer.state.to_json())
    position = {**asdict(trainer.position), "rows": trainer.fingerprint}
    write_text(folder / RESUME_FILE, json.dumps(position, indent=2) + "\n")


def read_training_state(folder: Path, trainer: "Trainer") -> None:
    """Put the trainer, and the random number generators, into the state that the folder holds.

    Raises InputError where the folder is damaged, or of other rows, another prefix or precision.
    """
    position = _read_json(folder / RESUME_FILE)
    if position.pop("rows", None) != trainer.fingerprint:
        raise InputError(f"{folder} comes from a run over other rows; give it the --train_file, "
                         "and the base's tokenizer, that it had")
    try:
        trainer.position = Position(**position)
    except TypeError as error:
        raise InputError(f"{folder / RESUME_FILE} is of another version; start a new run from its "
                         "prefix with --ptuning_checkpoint") from error
    state = TrainerState.from_dict(_read_json(folder / "trainer_state.json"))
    if state.global_step > trainer.plan.max_steps:
        raise InputError(f"{folder} has {state.global_step} steps, more than the "
                         f"{trainer.plan.max_steps} of this run; raise --max_steps")
    state.max_steps = trainer.plan.max_steps
    state.num_train_epochs = trainer.plan.num_train_epochs
    trainer.state = state
    _read_prefix_into(trainer.model.prefix_encoder, folder)
    trainer.optimizer.load_state_dict(_load(folder / "optimizer.pt"))
    trainer.scheduler.load_state_dict(_load(folder / "scheduler.pt"))
    scaled = (folder / "scaler.pt").is_file()
    if scaled != (trainer.loss_scale is not None):
        raise InputError(f"{folder} comes from a run {'in' if scaled else 'not in'} float16 and "
                         "this one is not; pass the --model_dtype that it had")
    if scaled:
        trainer.loss_scale.load_state_dict(_load(folder / "scaler.pt"))
    set_rng_state(_load(folder / "rng_state.pth"))


def resume_command(argv: Sequence[str], environment: Mapping[str, str]) -> str:
    """The command, for a shell, that goes on with the run that `argv` started."""
    program = [sys.orig_argv[0], "-m", "glmkern"]
    if Path(sys.argv[0]).stem == "glmkern":
        program = ["glmkern"]
    size, on_host = environment.get("WORLD_SIZE", "1"), environment.get("LOCAL_WORLD_SIZE", "1")
    if size != "1":
        program = ["torchrun", "--standalone", "--nproc-per-node", on_host, "-m", "glmkern"]
        if size != on_host:  # of several hosts the user knows the addresses
            program[1:2] = ["..."]
    flag, kept, words = "--resume_from_checkpoint", [], iter(argv)
    for word in words:
        name, equals, _ = word.partition("=")
        if name.replace("-", "_").replace("__", "--", 1) != flag:
            kept.append(word)
        elif not equals:
            next(words, None)
    return shlex.join([*program, *kept, flag, "auto"])


def _missing(folder: Path) -> list[str]:
    return [name for name in NEEDED if not (folder / name).is_file()]


def _age(folder: Path) -> tuple[int, int]:
    """Grows with the time of writing, and within the clock's resolution with the step."""
    step = folder.name.removeprefix("checkpoint-")
    written = (folder / "trainer_state.json").stat().st_mtime_ns
    return written, int(step) if step.isdecimal() else 0


def _read_prefix_into(encoder: torch.nn.Module, folder: Path) -> None:
    saved, wanted = read_prefix(folder), encoder.state_dict()
    for name in sorted(saved.keys() | wanted.keys()):
        shapes = [list(each[name].shape) if name in each else "absent" for each in (saved, wanted)]
        if shapes[0] != shapes[1]:
            raise InputError(f"{name} of the prefix in {folder} is {shapes[0]} and in this run "
                             f"{shapes[1]}; pass the base and the prefix flags that it had")
    encoder.load_state_dict(saved)


def _load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, KeyError) as error:
        raise InputError(f"{path} is damaged or not of this kind; resume from another checkpoint"
                         ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); resume from another checkpoint"
                         ) from error
