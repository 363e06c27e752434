"""Which checkpoint a stopped run resumes from, and whether it is of the same run."""

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from glmkern.errors import InputError
from glmkern.training.loop.checkpoint import NEEDED, RESUME_FILE, damaged, read_json
from glmkern.training.output.companions import FLAGS_FILE
from glmkern.training.output.trainer_state import TrainerState

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


def resume_is_requested(wanted: str | None) -> bool:
    """Whether a value of --resume_from_checkpoint means some checkpoint."""
    return wanted is not None and wanted.lower() not in NONE


def find_checkpoint(wanted: str | None, output_dir: Path) -> Path | None:
    """The folder that --resume_from_checkpoint means; None for a fresh start.

    `wanted` is a folder, "auto" (or "True"), which is the newest complete checkpoint of
    `output_dir` if there is one, or none. Raises InputError for a folder that is no checkpoint.
    """
    if not resume_is_requested(wanted):
        return None
    if wanted.lower() in NEWEST:
        complete = [path for path in output_dir.glob("checkpoint-*") if not _missing(path)]
        return max(complete, key=_recency, default=None)
    folder = Path(wanted).expanduser()
    if not folder.is_dir():
        raise InputError(
            f"--resume_from_checkpoint {wanted} is not a folder; name a checkpoint-N "
            "folder, or auto for the newest of --output_dir"
        )
    # The trainer does not write the file of the flags: with `auto`, read_flags reports its lack.
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
    flags = read_json(checkpoint / FLAGS_FILE)
    if not isinstance(flags.get("tokens_per_pack"), str):
        raise InputError(damaged(checkpoint / FLAGS_FILE))
    return flags


def describe_warm_start(prefix: str | Path) -> str:
    """What --ptuning_checkpoint does, for those who meant --resume_from_checkpoint."""
    line = f"a new run from the prefix in {prefix}, with a new optimiser and schedule, from step 0"
    if (Path(prefix) / RESUME_FILE).is_file():
        line += f"; --resume_from_checkpoint {prefix} would go on with the run that saved it"
    return line


def locate_best_checkpoint(
    checkpoint: Path, state: TrainerState, flags: Mapping[str, Any]
) -> str | None:
    """Set `state`, as read from `checkpoint`, to where the best checkpoint is now.

    It is beside `checkpoint`, or where it was recorded. Where `flags` measure the best otherwise
    than the run so far, `state` drops it, and a line that says so is returned. Raises InputError
    where --load_best_model_at_end needs it and it is in neither place.
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
    """The shell command that resumes the run that `argv` started."""
    program = [sys.orig_argv[0], "-m", "glmkern"]
    if Path(sys.argv[0]).stem == "glmkern":
        program = ["glmkern"]
    size, on_host = environment.get("WORLD_SIZE", "1"), environment.get("LOCAL_WORLD_SIZE", "1")
    if size != "1":
        program = ["torchrun", "--standalone", "--nproc-per-node", on_host, "-m", "glmkern"]
        if size != on_host:  # the user knows the addresses of several hosts
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


def _recency(folder: Path) -> tuple[int, int]:
    """Larger for the later of two checkpoints: by time and, where the clock is coarse, by step."""
    step = folder.name.removeprefix("checkpoint-")
    written = (folder / "trainer_state.json").stat().st_mtime_ns
    return written, int(step) if step.isdecimal() else 0


def _is_best(folder: Path, state: TrainerState) -> bool:
    """Whether `folder` is the checkpoint whose saving made best_metric what it is in `state`."""
    file = folder / "trainer_state.json"
    # As text, since a NaN is not equal to itself.
    return file.is_file() and str(read_json(file).get("best_metric")) == str(state.best_metric)
