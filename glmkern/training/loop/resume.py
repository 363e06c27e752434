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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from glmkern.checkpoint import read_prefix, write_prefix
from glmkern.checkpoint.atomic import write_text, write_torch
from glmkern.errors import InputError
from glmkern.model.packing import Row
from glmkern.training.loop.seeding import rng_state, set_rng_state
from glmkern.training.output.state import TrainerState

if TYPE_CHECKING:
    from glmkern.training.loop.trainer import Trainer

RESUME_FILE = "resume.json"
FLAGS_FILE = "glmkern.json"
NEEDED = (
    "pytorch_model.bin",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
    RESUME_FILE,
)
NEWEST = ("auto", "true")
NONE = ("", "false", "none")  # what scripts pass for no value

# The flags that decide the numbers of a run; the others may change from one part to the next.
DECISIVE = (
    "pre_seq_len",
    "prefix_projection",
    "prefix_dropout",
    "quantization_bit",
    "output_layer_bit",
    "tf32",
    "rope_precision",
    "max_source_length",
    "max_target_length",
    "max_train_samples",
    "ignore_pad_token_for_loss",
    "source_prefix",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "optim",
    "lr_scheduler_type",
    "warmup_ratio",
    "warmup_steps",
    "seed",
    "data_seed",
    "dataloader_drop_last",
    "group_by_length",
    "label_smoothing_factor",
)
DECISIVE_FOR_A_DECAY = ("max_steps", "num_train_epochs")
# The flags that decide which checkpoint is the best.
DECISIVE_FOR_THE_BEST = (
    "metric_for_best_model",
    "greater_is_better",
    "validation_file",
    "max_eval_samples",
)
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


def asks_to_resume(wanted: str | None) -> bool:
    """Whether a value of --resume_from_checkpoint means some checkpoint."""
    return wanted is not None and wanted.lower() not in NONE


def find_checkpoint(wanted: str | None, output_dir: Path) -> Path | None:
    """The folder that --resume_from_checkpoint means; None for a fresh start.

    `wanted` is a folder, "auto" (or "True"), which is the newest complete checkpoint of
    `output_dir` if there is one, or none. Raises InputError for a folder that is no checkpoint.
    """
    if not asks_to_resume(wanted):
        return None
    if wanted.lower() in NEWEST:
        complete = [path for path in output_dir.glob("checkpoint-*") if not _missing(path)]
        return max(complete, key=_age, default=None)
    folder = Path(wanted).expanduser()
    if not folder.is_dir():
        raise InputError(
            f"--resume_from_checkpoint {wanted} is not a folder; name a checkpoint-N "
            "folder, or auto for the newest of --output_dir"
        )
    # Only the flags' file is not the trainer's own: `auto` leaves it to read_flags.
    missing = _missing(folder, (*NEEDED, FLAGS_FILE))
    if missing and any(folder.glob("checkpoint-*")):
        raise InputError(
            f"--resume_from_checkpoint {wanted} holds checkpoints but is none; name "
            "one of them, or pass auto with this --output_dir"
        )
    if missing:
        raise InputError(
            f"--resume_from_checkpoint {wanted} lacks {', '.join(missing)}, so the run cannot go "
            "on from there; --ptuning_checkpoint starts a new run from its prefix"
        )
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
            "them"
        )
    decisive = DECISIVE
    warms_up_by_share = flags["warmup_ratio"] > 0 and not flags["warmup_steps"]
    if flags["lr_scheduler_type"] not in SCHEDULES_WITHOUT_END or warms_up_by_share:
        decisive += DECISIVE_FOR_A_DECAY
    for name in decisive:
        if name in earlier and name in flags and earlier[name] != flags[name]:
            same = "leave it out" if earlier[name] is None else f"pass --{name} {earlier[name]}"
            raise InputError(
                f"--{name} is {flags[name]}, but {checkpoint} comes from a run with {earlier[name]}"
                f"; {same}, or start a new run from its prefix with --ptuning_checkpoint"
            )


def read_flags(checkpoint: Path) -> dict[str, Any]:
    """The flags of the run that saved the checkpoint."""
    flags = _read_json(checkpoint / FLAGS_FILE)
    if not isinstance(flags.get("tokens_per_pack"), str):
        raise InputError(_damaged(checkpoint / FLAGS_FILE))
    return flags


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
    position = {
        **asdict(trainer.position),
        "rows": trainer.fingerprint,
        "dtype": _dtype_name(trainer),
    }
    write_text(folder / RESUME_FILE, json.dumps(position, indent=2) + "\n")


def read_training_state(folder: Path, trainer: "Trainer") -> None:
    """Put the trainer, and the random number generators, into the state that the folder holds.

    Raises InputError where the folder is damaged, or of other rows, another prefix or precision.
    """
    position = _read_json(folder / RESUME_FILE)
    if position.pop("rows", None) != trainer.fingerprint:
        raise InputError(
            f"{folder} comes from a run over other rows; give it the --train_file, "
            "and the base's tokenizer, that it had"
        )
    dtype, now = position.pop("dtype", None), _dtype_name(trainer)
    if dtype is not None and dtype != now:
        raise InputError(
            f"{folder} comes from a run in {dtype} and this one is in {now}; pass "
            f"--model_dtype {dtype}"
        )
    try:
        trainer.position = Position(**position)
    except TypeError as error:
        raise InputError(
            f"{folder / RESUME_FILE} is of another version; start a new run from its "
            "prefix with --ptuning_checkpoint"
        ) from error
    _check_types(trainer.position, folder / RESUME_FILE)
    state = TrainerState.from_dict(_read_json(folder / "trainer_state.json"))
    _check_types(state, folder / "trainer_state.json")
    if state.global_step > trainer.plan.max_steps:
        raise InputError(
            f"{folder} has {state.global_step} steps, more than the "
            f"{trainer.plan.max_steps} of this run; raise --max_steps"
        )
    state.max_steps = trainer.plan.max_steps
    state.num_train_epochs = trainer.plan.num_train_epochs
    trainer.state = state
    _read_prefix_into(trainer.model.prefix_encoder, folder)
    _load_into(trainer.optimizer.load_state_dict, folder / "optimizer.pt")
    _check_moments(trainer.optimizer, folder / "optimizer.pt")
    _load_into(trainer.scheduler.load_state_dict, folder / "scheduler.pt")
    if trainer.scheduler.last_epoch != state.global_step:
        raise InputError(
            f"scheduler.pt of {folder} is of step {trainer.scheduler.last_epoch} and "
            f"trainer_state.json of {state.global_step}; resume from another "
            "checkpoint"
        )
    scaled = (folder / "scaler.pt").is_file()
    if scaled != (trainer.loss_scale is not None):
        raise InputError(
            f"{folder} has {'a' if scaled else 'no'} scaler.pt, which only a run in float16 saves,"
            f" and this one is in {now}; pass the --model_dtype that it had, or resume from "
            "another checkpoint"
        )
    if scaled:
        _load_into(trainer.loss_scale.load_state_dict, folder / "scaler.pt")
    _load_into(set_rng_state, folder / "rng_state.pth")


def take_up_best(checkpoint: Path, state: TrainerState, flags: Mapping[str, Any]) -> str | None:
    """Have `state`, as read from `checkpoint`, name the best checkpoint where it lies by now.

    It lies beside `checkpoint`, or where it was when it was recorded. Where `flags` judge by
    another measure than the run so far, `state` forgets it; returns the line that says so. Raises
    InputError where --load_best_model_at_end would not find it.
    """
    if state.best_model_checkpoint is None:
        return None
    recorded = Path(state.best_model_checkpoint)
    if (checkpoint / FLAGS_FILE).is_file():
        earlier = read_flags(checkpoint)
        for name in DECISIVE_FOR_THE_BEST:
            if name in earlier and name in flags and earlier[name] != flags[name]:
                line = (
                    f"--{name} was {earlier[name]} and is {flags[name]}: the best checkpoint "
                    f"so far, {recorded} ({state.best_metric}), does not count any more"
                )
                state.best_model_checkpoint = state.best_metric = None
                return line
    beside = checkpoint.parent / recorded.name
    found = next((path for path in (beside, recorded) if _is_best(path, state)), None)
    if found is not None:
        state.best_model_checkpoint = str(found.absolute())
    elif flags["load_best_model_at_end"]:
        raise InputError(
            f"--load_best_model_at_end would load {recorded}, the best checkpoint of the run so "
            f"far, but it is neither there nor at {beside}; put it back, or leave out the flag"
        )
    return None


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


def _missing(folder: Path, needed: Sequence[str] = NEEDED) -> list[str]:
    return [name for name in needed if not (folder / name).is_file()]


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
            raise InputError(
                f"{name} of the prefix in {folder} is {shapes[0]} and in this run "
                f"{shapes[1]}; pass the base and the prefix flags that it had"
            )
    encoder.load_state_dict(saved)


def _is_best(folder: Path, state: TrainerState) -> bool:
    """Whether `folder` is the checkpoint whose saving made best_metric what it is in `state`."""
    file = folder / "trainer_state.json"
    # As text, since a NaN is not equal to itself.
    return file.is_file() and str(_read_json(file).get("best_metric")) == str(state.best_metric)


def _dtype_name(trainer: "Trainer") -> str:
    return str(trainer.model.dtype).removeprefix("torch.")


def _damaged(path: Path) -> str:
    return f"{path} is damaged or not of this kind; resume from another checkpoint"


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
        raise InputError(_damaged(path)) from error


def _check_moments(optimizer: torch.optim.Optimizer, path: Path) -> None:
    for parameter, state in optimizer.state.items():
        for value in state.values():
            if isinstance(value, torch.Tensor) and value.shape not in ((), parameter.shape):
                raise InputError(_damaged(path))


def _check_types(record: Position | TrainerState, path: Path) -> None:
    """Raise InputError where a value is not of the kind of the field's default."""
    for name, default in vars(type(record)()).items():
        kind = (int, float) if isinstance(default, (int, float)) else type(default)
        if default is not None and not isinstance(getattr(record, name), kind):
            raise InputError(_damaged(path))
    best = getattr(record, "best_model_checkpoint", None)
    if not isinstance(best, (str, type(None))):
        raise InputError(_damaged(path))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} cannot be read ({error}); resume from another checkpoint"
        ) from error
    if not isinstance(values, dict):
        raise InputError(_damaged(path))
    return values
