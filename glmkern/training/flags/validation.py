"""What a command must have and in which ranges, checked before anything is loaded."""

import math
from collections.abc import Mapping
from pathlib import Path

from glmkern.errors import InputError
from glmkern.training.flags.arguments import AUTO, Arguments, ModelArguments, TrainingArguments
from glmkern.training.flags.packages import SCORES, require_score_packages

LAUNCHER = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
POLYNOMIAL_END = 1e-7  # the learning rate at which the polynomial schedule ends


def check_arguments(arguments: Arguments, environment: Mapping[str, str]) -> None:
    """Raise InputError, one sentence with the cure, where a run cannot start from these.

    `environment` holds the launcher's variables (WORLD_SIZE), as os.environ does.
    """
    training = arguments.training
    if not (training.do_train or arguments.evaluates or training.do_predict):
        raise InputError("there is nothing to do; pass --do_train, --do_eval or --do_predict")
    _check_launcher(environment)
    _check_model(arguments.model, training.do_train)
    _check_data(arguments)
    _check_training(training)
    if arguments.evaluates or training.do_predict:
        _check_evaluation(arguments)
    elif training.metric_for_best_model is not None:
        raise InputError(
            f"--metric_for_best_model is {training.metric_for_best_model}, but nothing is "
            "evaluated; pass --evaluation_strategy steps or epoch, or leave it out"
        )
    _check_precision(arguments.model, training)


def _require(value: object, name: str, cure: str) -> None:
    if value in (None, ""):  # "" is an unset variable of a shell script
        raise InputError(f"--{name} is missing; {cure}")


def _require_range(name: str, value: float | None, low: float, high: float, words: str) -> None:
    """Accept None and low <= value <= high."""
    if value is not None and not low <= value <= high:
        raise InputError(f"--{name} is {value}; it must be {words}")


def _require_count(name: str, value: int | None) -> None:
    _require_range(name, value, 1, math.inf, "at least 1")


def _check_launcher(environment: Mapping[str, str]) -> None:
    size = environment.get("WORLD_SIZE", "1")
    if not size.isdecimal() or int(size) < 1:
        raise InputError(f"the variable WORLD_SIZE is {size!r}; unset it, or start with torchrun")
    missing = [name for name in LAUNCHER if name not in environment]
    if int(size) > 1 and missing:
        raise InputError(
            f"the variable WORLD_SIZE is {size}, but {', '.join(missing)} are not set; start with "
            "torchrun --standalone --nproc-per-node N, or unset WORLD_SIZE"
        )


def _check_model(model: ModelArguments, trains: bool) -> None:
    _require(model.model_name_or_path, "model_name_or_path", "name the folder of the base model")
    if model.ptuning_checkpoint is None:
        if trains and model.pre_seq_len is None:
            raise InputError(
                "--pre_seq_len is missing, which officially means fine-tuning the whole model; "
                "only prefixes are trained here, so pass --pre_seq_len 128"
            )
        if not trains and model.pre_seq_len is not None:
            raise InputError(
                f"--pre_seq_len {model.pre_seq_len} without --ptuning_checkpoint is a random "
                "prefix; name the checkpoint, or leave out --pre_seq_len for the plain base"
            )
    _require_count("pre_seq_len", model.pre_seq_len)
    if model.quantization_bit not in (None, 4, 8):
        raise InputError(f"--quantization_bit is {model.quantization_bit}; it must be 4 or 8")
    if model.output_layer_bit not in (None, 8):
        raise InputError(f"--output_layer_bit is {model.output_layer_bit}; it must be 8")
    if not 0 <= model.prefix_dropout < 1:
        raise InputError(f"--prefix_dropout is {model.prefix_dropout}; it must be in [0, 1)")


def _check_data(arguments: Arguments) -> None:
    data, training = arguments.data, arguments.training
    for name, needed, words in (
        ("train_file", training.do_train, "training rows"),
        ("validation_file", arguments.evaluates, "validation rows"),
        ("test_file", training.do_predict, "rows to predict"),
    ):
        if needed:
            _require(getattr(data, name), name, f"name the file of {words} (.json, .jsonl, .csv)")
    _require(data.prompt_column, "prompt_column", "name the column of the prompts")
    _require(data.response_column, "response_column", "name the column of the responses")
    _require_range(
        "max_source_length",
        data.max_source_length,
        3,
        math.inf,
        "at least 3: [gMASK], sop and one token of the prompt",
    )
    _require_count("max_target_length", data.max_target_length)
    for name in ("max_train_samples", "max_eval_samples", "max_predict_samples"):
        _require_count(name, getattr(data, name))


def _check_training(training: TrainingArguments) -> None:
    _require(training.output_dir, "output_dir", "name the folder to write to")
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        _require_count(name, getattr(training, name))
    for name in ("learning_rate", "weight_decay", "adam_epsilon", "max_grad_norm", "warmup_steps"):
        _require_range(name, getattr(training, name), 0, math.inf, "at least 0")
    for name in ("adam_beta1", "adam_beta2", "label_smoothing_factor"):
        if not 0 <= getattr(training, name) < 1:
            raise InputError(f"--{name} is {getattr(training, name)}; it must be in [0, 1)")
    _require_range("warmup_ratio", training.warmup_ratio, 0, 1, "in [0, 1]")
    for name in ("seed", "data_seed"):
        _require_range(name, getattr(training, name), 0, 2**32 - 1, "in [0, 2**32 - 1]")
    if training.max_steps <= 0 and training.num_train_epochs <= 0:
        raise InputError(
            f"--num_train_epochs is {training.num_train_epochs}; it must be above 0 where "
            "--max_steps is not given"
        )
    if training.lr_scheduler_type == "polynomial" and training.learning_rate <= POLYNOMIAL_END:
        raise InputError(
            f"--learning_rate is {training.learning_rate}; the polynomial schedule needs one above "
            f"its end, {POLYNOMIAL_END}"
        )
    _require_count("ddp_timeout", training.ddp_timeout)
    _check_interval("logging_steps", training.logging_steps, training.logging_strategy, least=True)
    _check_interval("save_steps", training.save_steps, training.save_strategy, least=False)
    _check_evaluations(training)
    _require_range("sample_prompts", training.sample_prompts, 0, math.inf, "at least 0")
    if training.tokens_per_pack != AUTO and not training.tokens_per_pack.isdecimal():
        raise InputError(
            f"--tokens_per_pack is {training.tokens_per_pack}; it must be auto or a whole number "
            "of tokens (0 is one micro-batch at a time)"
        )


def _check_evaluations(training: TrainingArguments) -> None:
    """Their interval, and that every save has one where the best model is to be loaded."""
    every = training.evaluation_interval
    if training.evaluation_strategy == "steps":
        _check_interval("eval_steps", every, "steps", least=False)
        if every <= 0:
            raise InputError(f"--eval_steps is {every:g}; it must be above 0")
    if not training.load_best_model_at_end:
        return
    if training.evaluation_strategy != training.save_strategy:
        raise InputError(
            f"--load_best_model_at_end needs evaluations and saves at the same time, but "
            f"--evaluation_strategy is {training.evaluation_strategy} and --save_strategy is "
            f"{training.save_strategy}; give both the same"
        )
    if training.save_strategy == "steps":
        ratio = training.save_steps / every
        both_shares_or_none = (every < 1) == (training.save_steps < 1)
        if not both_shares_or_none or not math.isclose(ratio, round(ratio)):
            raise InputError(
                f"--load_best_model_at_end needs an evaluation at every save, but --save_steps is "
                f"{training.save_steps:g} and --eval_steps is {every:g}; make it a multiple of that"
            )


def _check_evaluation(arguments: Arguments) -> None:
    data, training = arguments.data, arguments.training
    name = data.evaluation_target_flag
    _require_range(
        name,
        getattr(data, name),
        3,
        math.inf,
        "at least 3 in evaluation: [gMASK], sop and one token of the response",
    )
    _require_count("per_device_eval_batch_size", training.per_device_eval_batch_size)
    _require_count("num_beams", data.num_beams)
    _require_count("generation_num_beams", training.generation_num_beams)
    _require_count("generation_max_length", training.generation_max_length)
    _require_range("eval_delay", training.eval_delay, 0, math.inf, "at least 0")
    _check_best_metric(arguments)
    if arguments.generates:
        require_score_packages()


def _check_best_metric(arguments: Arguments) -> None:
    """Raise InputError where an evaluation will not have --metric_for_best_model."""
    names = ("loss", *SCORES) if arguments.generates else ("loss",)
    metric = (arguments.training.metric_for_best_model or "loss").removeprefix("eval_")
    if metric not in names:
        raise InputError(
            f"--metric_for_best_model is {metric}; the evaluation has {', '.join(names)}"
            + ("" if arguments.generates else " (more with --predict_with_generate)")
        )


def _check_interval(name: str, steps: float, strategy: str, least: bool) -> None:
    """`least`: zero is an error; else zero or less means never, as officially for save_steps."""
    if strategy != "steps":
        return
    if least and steps <= 0:
        raise InputError(f"--{name} is {steps:g}; it must be above 0, or --logging_strategy no")
    if steps > 1 and steps != int(steps):
        raise InputError(f"--{name} is {steps:g}; it must be a whole number, or a share below 1")


def _check_precision(model: ModelArguments, training: TrainingArguments) -> None:
    asked = {
        "--fp16": training.fp16,
        "--bf16": training.bf16,
        f"--model_dtype {model.model_dtype}": model.model_dtype != AUTO,
    }
    names = [name for name, given in asked.items() if given]
    agreed = names == ["--fp16", "--model_dtype float16"] or names == [
        "--bf16",
        "--model_dtype bfloat16",
    ]
    if len(names) > 1 and not agreed:
        raise InputError(f"{' and '.join(names)} ask for different precisions; keep one of them")


def check_output_folder(folder: Path, overwrite: bool) -> None:
    """Raise InputError where the folder has content that nobody allowed to be overwritten."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output_dir {folder} is a file; name a folder")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise InputError(
            f"--output_dir {folder} exists and is not empty; pass --overwrite_output_dir, or "
            "--resume_from_checkpoint auto to go on with its run, or name another folder"
        )
