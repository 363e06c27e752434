"""The official command line of ptuning/main.py: the flags that are honoured, and their parser.

Every field below is one flag, with the official default. `tables.py` holds the official flags that
are accepted without effect and those that are refused. Nothing here imports torch.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from glmkern.training.flags.tables import ALIASES

SCHEDULES = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
)
OPTIMIZERS = ("adamw_hf", "adamw_torch", "adamw_torch_fused")
INTERVALS = ("no", "steps", "epoch")
AUTO = "auto"
DTYPES = (AUTO, "float32", "float16", "bfloat16")


def _flag(default: Any, help: str, choices: tuple[str, ...] | None = None, own: bool = False):
    """A dataclass field that is a flag; `own` marks the flags the official script has not."""
    return field(default=default, metadata={"help": help, "choices": choices, "own": own})


@dataclass
class ModelArguments:
    """Which base, which prefix, and how the base is computed."""

    model_name_or_path: str | None = _flag(None, "folder or cached name of the base model")
    ptuning_checkpoint: str | None = _flag(
        None,
        "folder or file of a saved prefix: to evaluate, or to train on from with a fresh optimiser",
    )
    quantization_bit: int | None = _flag(
        None,
        "quantise the base's linears to 4 or 8 bits as it is read; a folder that is quantised"
        " already needs no flag",
    )
    output_layer_bit: int | None = _flag(
        None, "8 quantises the output layer as it is read", own=True
    )
    offload_embedding: bool = _flag(
        False, "keep the embedding in host memory, and send the GPU the rows it needs", own=True
    )
    pre_seq_len: int | None = _flag(
        None, "length of the prefix in virtual tokens; with --ptuning_checkpoint, that prefix's"
    )
    prefix_projection: bool = _flag(False, "compute the prefix with a two-layer tanh MLP")
    prefix_dropout: float = _flag(0.1, "dropout of the prefix keys and values", own=True)
    model_dtype: str = _flag(
        AUTO, "precision of the base; auto is float32 on a CPU, float16 on a GPU", DTYPES, own=True
    )
    rope_precision: str = _flag(
        "float32",
        "precision of the rotary angles; model is the base's own, as the official code rounds them",
        ("float32", "model"),
        own=True,
    )
    recompute: str = _flag(
        "none",
        "what a layer computes again in the backward pass instead of keeping it",
        ("none", "mlp", "layer"),
        own=True,
    )


@dataclass
class DataTrainingArguments:
    """Which rows, and how they become tokens."""

    train_file: str | None = _flag(None, "training rows: .json (lines or an array), .jsonl or .csv")
    validation_file: str | None = _flag(None, "rows of --do_eval; its first are in samples.md")
    test_file: str | None = _flag(None, "rows of --do_predict")
    prompt_column: str | None = _flag(None, "column of the prompts")
    response_column: str | None = _flag(None, "column of the responses")
    history_column: str | None = _flag(None, "column of the past [query, response] pairs")
    max_source_length: int = _flag(1024, "prompt tokens kept, special tokens included")
    max_target_length: int = _flag(128, "response tokens kept, the end token not included")
    val_max_target_length: int | None = _flag(
        None,
        "response tokens kept in evaluation, [gMASK] and sop included; else --max_target_length",
    )
    max_train_samples: int | None = _flag(None, "read only this many rows")
    max_eval_samples: int | None = _flag(None, "read only this many rows of --validation_file")
    max_predict_samples: int | None = _flag(None, "read only this many rows of --test_file")
    num_beams: int | None = _flag(None, "beams of generation; else --generation_num_beams")
    ignore_pad_token_for_loss: bool = _flag(True, "no loss on the prompt")
    source_prefix: str = _flag("", "text before every prompt")

    @property
    def padded_length(self) -> int:
        """Tokens to which the official script pads a row: prompt, response, end of text."""
        return self.max_source_length + self.max_target_length + 1

    @property
    def evaluation_target_flag(self) -> str:
        """The name of the flag that limits the responses of an evaluation."""
        return (
            "max_target_length" if self.val_max_target_length is None else "val_max_target_length"
        )


# What --cuda_graphs says, as generate() has it.
CUDA_GRAPHS = {"auto": None, "off": False}


@dataclass
class TrainingArguments:
    """How the prefix is trained and evaluated; names and defaults of transformers 4.30.2."""

    output_dir: str | None = _flag(None, "folder of checkpoints, logs and results")
    overwrite_output_dir: bool = _flag(False, "write into an output folder that is not empty")
    do_train: bool = _flag(False, "train")
    do_eval: bool = _flag(False, "measure --validation_file, after training if there is any")
    do_predict: bool = _flag(False, "measure --test_file, after training if there is any")
    predict_with_generate: bool = _flag(
        False,
        "answer the prompts and score the answers; --do_predict writes them to"
        " generated_predictions.txt",
    )
    greedy: bool = _flag(
        False,
        "take the likeliest token instead of drawing with top_p 0.7 and temperature 0.95",
        own=True,
    )
    cuda_graphs: str = _flag(
        "auto",
        "answer prompts on a GPU by replaying a CUDA graph a token, or off, op by op; the answers"
        " are the same",
        tuple(CUDA_GRAPHS),
        own=True,
    )
    generation_max_length: int | None = _flag(
        None,
        "tokens of a padded prompt and its answer; else --max_source_length +"
        " --max_target_length + 1",
    )
    generation_num_beams: int | None = _flag(None, "beams of generation; else 1")
    prediction_loss_only: bool = _flag(False, "no answers although --predict_with_generate")
    sample_prompts: int = _flag(
        3, "prompts answered greedily in samples.md at every save; 0 leaves the file out", own=True
    )
    per_device_train_batch_size: int = _flag(8, "rows of a micro-batch")
    per_device_eval_batch_size: int = _flag(
        8, "prompts answered at once, and rows of a batch of the evaluation loss"
    )
    gradient_accumulation_steps: int = _flag(1, "micro-batches of an optimiser step")
    tokens_per_pack: str = _flag(
        AUTO,
        "tokens that are computed at once: the rows of an optimiser step are packed to at most this"
        " many; auto is 2,048, or fewer where that is predicted not to fit; 0 is one micro-batch at"
        " a time; the gradient does not depend on it",
        own=True,
    )
    learning_rate: float = _flag(5e-5, "learning rate after warm-up")
    weight_decay: float = _flag(0.0, "decoupled weight decay of all but biases")
    adam_beta1: float = _flag(0.9, "decay of the first moment")
    adam_beta2: float = _flag(0.999, "decay of the second moment")
    adam_epsilon: float = _flag(1e-8, "added to the root of the second moment")
    max_grad_norm: float = _flag(1.0, "clip the gradient to this norm; 0 does not clip")
    label_smoothing_factor: float = _flag(
        0.0, "share of every label that goes to all tokens alike, also in the evaluation loss"
    )
    optim: str = _flag("adamw_hf", "optimiser", OPTIMIZERS)
    num_train_epochs: float = _flag(3.0, "passes over the rows, unless --max_steps is given")
    max_steps: int = _flag(-1, "optimiser steps; -1 leaves it to --num_train_epochs")
    lr_scheduler_type: str = _flag("linear", "learning rate schedule", SCHEDULES)
    warmup_ratio: float = _flag(0.0, "share of the steps that warm up, where --warmup_steps is 0")
    warmup_steps: int = _flag(0, "steps that warm up")
    logging_strategy: str = _flag("steps", "when to log", INTERVALS)
    logging_first_step: bool = _flag(False, "log the first step too")
    logging_steps: float = _flag(500, "steps between logs; below 1 a share of all steps")
    report_to: tuple | None = _flag(
        None, "tensorboard, all that is installed, or none, which is the default here"
    )
    logging_dir: str | None = _flag(
        None, "folder of TensorBoard's event files; else runs/<date>_<host> in --output_dir"
    )
    plot_loss: bool = _flag(
        False, "draw the loss into training_loss.png at the end; needs matplotlib", own=True
    )
    save_strategy: str = _flag("steps", "when to save a checkpoint", INTERVALS)
    save_steps: float = _flag(500, "steps between checkpoints; below 1 a share of all steps")
    save_total_limit: int | None = _flag(
        None, "keep only this many checkpoints, the newest and always the best"
    )
    save_safetensors: bool = _flag(
        False, "write the prefix as model.safetensors too; pytorch_model.bin is always written"
    )
    no_cuda: bool = _flag(False, "compute on the CPU although there is a GPU")
    seed: int = _flag(42, "seed of the prefix, of the order of rows and of dropout")
    data_seed: int | None = _flag(None, "seed of the order of rows alone")
    bf16: bool = _flag(False, "bfloat16 base, as --model_dtype bfloat16")
    fp16: bool = _flag(False, "float16 base on a GPU, as --model_dtype float16")
    tf32: bool | None = _flag(None, "TF32 for float32 matrix products on a GPU")
    deterministic: bool = _flag(
        False, "the same bits on every run, also from the libraries underneath", own=True
    )
    local_rank: int = _flag(-1, "the GPU of this process; torchrun says it too")
    dataloader_drop_last: bool = _flag(False, "leave out an epoch's last, shorter micro-batch")
    disable_tqdm: bool | None = _flag(None, "no progress bar; the log lines stay")
    resume_from_checkpoint: str | None = _flag(
        None,
        "go on with a stopped run: its checkpoint-N folder, or auto for the newest of"
        " --output_dir (a fresh start where there is none)",
    )
    group_by_length: bool = _flag(False, "rows of like length in a step, the longest ones first")
    ddp_timeout: int = _flag(1800, "seconds a process waits for the others")
    ddp_backend: str | None = _flag(
        None,
        "how processes communicate; nccl on GPUs and gloo on CPUs without it",
        ("nccl", "gloo"),
    )
    evaluation_strategy: str = _flag(
        "no",
        "when to measure --validation_file during training; steps and epoch imply --do_eval",
        INTERVALS,
    )
    eval_steps: float | None = _flag(
        None, "steps between evaluations, below 1 a share of all steps; else --logging_steps"
    )
    eval_delay: float = _flag(0, "steps, or epochs, before the first evaluation")
    load_best_model_at_end: bool = _flag(
        False, "end with the prefix of the best checkpoint, which is never deleted"
    )
    metric_for_best_model: str | None = _flag(
        None, "what the best checkpoint is best in; else the loss"
    )
    greater_is_better: bool | None = _flag(
        None, "whether more of the metric is better; else yes, but for the loss"
    )

    @property
    def evaluation_interval(self) -> float:
        """Steps between evaluations, or below 1 a share of all steps."""
        return self.eval_steps or self.logging_steps


SECTIONS = (ModelArguments, DataTrainingArguments, TrainingArguments)


class Arguments(NamedTuple):
    """A parsed command line: the three sections, and what the user should know about it."""

    model: ModelArguments
    data: DataTrainingArguments
    training: TrainingArguments
    notes: tuple[str, ...] = ()

    @property
    def evaluates(self) -> bool:
        """Whether --validation_file is measured, at the end or on the way."""
        return self.training.do_eval or self.training.evaluation_strategy != "no"

    @property
    def generates(self) -> bool:
        """Whether prompts are answered wherever a file is measured."""
        return self.training.predict_with_generate and not self.training.prediction_loss_only

    def to_dict(self) -> dict[str, Any]:
        """Every honoured flag and its value, as glmkern.json keeps them."""
        sections = (self.model, self.data, self.training)
        return {name: value for each in sections for name, value in vars(each).items()}


def honoured() -> dict[str, dataclasses.Field]:
    """Every honoured flag by name, in the order of the sections."""
    return {each.name: each for section in SECTIONS for each in dataclasses.fields(section)}


def build(given: dict[str, Any], notes: tuple[str, ...] = ()) -> Arguments:
    """The three sections from the values given by name; the rest are defaults."""
    sections = []
    for section in SECTIONS:
        names = {each.name for each in dataclasses.fields(section)}
        sections.append(section(**{name: given[name] for name in names & given.keys()}))
    return Arguments(*sections, notes)


def canonical(name: str) -> str:
    """A flag's name without the spellings: dashes are underscores, aliases their flag."""
    name = name.replace("-", "_")
    return ALIASES.get(name, name)
