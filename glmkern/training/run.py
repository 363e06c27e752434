"""The official main.py from its arguments to its files: data, model, training, results."""

import json
import os
from dataclasses import replace
from pathlib import Path

import torch

from glmkern import __version__
from glmkern.checkpoint import resolve_folder
from glmkern.checkpoint.atomic import write_text
from glmkern.errors import InputError
from glmkern.model.chatglm import ChatGLM
from glmkern.model.config import ChatGLMConfig
from glmkern.tokenizer import ChatGLMTokenizer
from glmkern.training.arguments import (
    Arguments,
    DataTrainingArguments,
    ModelArguments,
    TrainingArguments,
)
from glmkern.training.dataset import TrainingRows, build_training_rows, read_examples
from glmkern.training.distributed import World, join_world
from glmkern.training.resume import check_same_run, describe_warm_start, find_checkpoint
from glmkern.training.run_folder import RunFolder
from glmkern.training.seeding import set_seed, use_deterministic_libraries
from glmkern.training.state import metrics_table
from glmkern.training.trainer import Trainer
from glmkern.training.validation import check_arguments, check_output_folder


def run_training(arguments: Arguments) -> dict[str, float]:
    """Train as the official script does and write what it writes; returns the training metrics.

    Raises InputError where files or flags are wrong, before the base is loaded where that can be
    told, TrainingError where the run fails, and Interrupted where a signal stops it.
    """
    training_args = arguments.training
    check_arguments(arguments, os.environ)
    device = choose_device(training_args)
    with join_world(training_args, device) as world, world.first_prints():
        output = Path(training_args.output_dir)
        checkpoint = find_checkpoint(training_args.resume_from_checkpoint, output)
        if checkpoint is not None:
            check_same_run(checkpoint, arguments.to_dict())
        elif training_args.resume_from_checkpoint is not None:
            print(f"no checkpoint in {output} to resume from: the run starts afresh")
        else:
            check_output_folder(output, training_args.overwrite_output_dir)
        world.wait_for_all()  # before the first writes into the folder that the others look at
        return _train(arguments, device, world, checkpoint)


def _train(arguments: Arguments, device: torch.device, world: World,
           checkpoint: Path | None) -> dict[str, float]:
    model_args, data_args, training_args, notes = arguments
    dtype = choose_dtype(model_args, training_args, device)
    for note in notes:
        print(note)
    if model_args.ptuning_checkpoint is not None and checkpoint is None:
        print(describe_warm_start(model_args.ptuning_checkpoint))
    if training_args.deterministic:
        use_deterministic_libraries()
    if training_args.tf32 is not None:
        torch.backends.cuda.matmul.allow_tf32 = training_args.tf32
    set_seed(training_args.seed)

    examples = read_examples(
        data_args.train_file, data_args.prompt_column, data_args.response_column,
        data_args.history_column, data_args.max_train_samples)
    folder = resolve_folder(model_args.model_name_or_path)
    config = ChatGLMConfig.from_pretrained(folder)
    tokenizer = ChatGLMTokenizer.from_pretrained(folder)
    rows = build_training_rows(
        examples, tokenizer, max_source_length=data_args.max_source_length,
        max_target_length=data_args.max_target_length, source_prefix=data_args.source_prefix,
        ignore_pad_token_for_loss=data_args.ignore_pad_token_for_loss)
    check_fit(rows, tokenizer, config)
    for line in describe_rows(rows, data_args):
        print(line)
    print_example(rows, tokenizer)

    try:
        saved_config = replace(
            config, pre_seq_len=model_args.pre_seq_len,
            prefix_projection=model_args.prefix_projection,
            quantization_bit=model_args.quantization_bit or config.quantization_bit)
        model = load_model(folder, model_args, device, dtype, mapped=world.size > 1)
        trainer = Trainer(
            model, rows.rows, training_args,
            folder=RunFolder(training_args.output_dir, training_args.save_total_limit),
            write_companions=lambda checkpoint: write_companions(
                checkpoint, saved_config, tokenizer, arguments),
            row_names=[example.index for example in examples], world=world)
    except ValueError as error:  # a configuration or combination of flags that is not supported
        raise InputError(str(error)) from error
    metrics = trainer.train(checkpoint)
    metrics["train_samples"] = min(data_args.max_train_samples or len(rows.rows), len(rows.rows))
    for line in metrics_table(metrics):
        print(line)
    if world.is_first:
        trainer.folder.write_results("train", metrics)
        trainer.folder.write_state(trainer.state)
    return metrics


def choose_device(args: TrainingArguments) -> torch.device:
    """The GPU of this process, or the CPU where there is none or --no_cuda is given."""
    if args.no_cuda or not torch.cuda.is_available():
        return torch.device("cpu")
    # The official script would spread over all visible GPUs; a process here computes on one.
    rank = int(os.environ.get("LOCAL_RANK", max(args.local_rank, 0)))
    return torch.device("cuda", rank)


def choose_dtype(model_args: ModelArguments, args: TrainingArguments,
                 device: torch.device) -> torch.dtype:
    """The precision of the base, from --model_dtype, --fp16, --bf16 and the device."""
    if args.fp16 and device.type == "cpu":
        raise InputError("--fp16 needs a GPU; leave it out for float32, or pass --bf16")
    name = "float16" if args.fp16 else "bfloat16" if args.bf16 else model_args.model_dtype
    if name == "auto":
        name = "float32" if device.type == "cpu" else "float16"
    return getattr(torch, name)


def load_model(folder: Path, args: ModelArguments, device: torch.device,
               dtype: torch.dtype, mapped: bool = False) -> ChatGLM:
    """The frozen base with its prefix, fresh or from --ptuning_checkpoint; `mapped`: see
    ChatGLM.from_pretrained."""
    model = ChatGLM.from_pretrained(
        folder, device=device, dtype=dtype, quantization_bit=args.quantization_bit,
        pre_seq_len=args.pre_seq_len, prefix_projection=args.prefix_projection,
        prefix_checkpoint=args.ptuning_checkpoint, rope_precision=args.rope_precision,
        mapped=mapped)
    model.prefix_dropout = args.prefix_dropout
    model.recompute = args.recompute
    return model


def check_fit(rows: TrainingRows, tokenizer: ChatGLMTokenizer, config: ChatGLMConfig) -> None:
    """Raise InputError where the rows are too long, or the tokenizer too large, for the base."""
    longest = max(len(row.input_ids) for row in rows.rows)
    if longest > config.seq_length:
        raise InputError(
            f"the longest row has {longest} tokens, but the base has {config.seq_length} positions;"
            " lower --max_source_length or --max_target_length")
    if tokenizer.vocab_size > config.padded_vocab_size:
        raise InputError(
            f"the tokenizer has {tokenizer.vocab_size} ids, but the base has only "
            f"{config.padded_vocab_size}; tokenizer.model and config.json are of different models")


def describe_rows(rows: TrainingRows, args: DataTrainingArguments) -> list[str]:
    """What became of the data file, and what packing saves against the official padding."""
    lengths = sorted(len(row.input_ids) for row in rows.rows)
    total = sum(lengths)
    padded = len(lengths) * (args.max_source_length + args.max_target_length + 1)
    return [
        rows.report(),
        f"tokens a row: mean {total / len(lengths):.1f}, median {lengths[len(lengths) // 2]}, "
        f"longest {lengths[-1]}; {total:,} in all",
        f"padding avoided: {1 - total / padded:.0%} of the official "
        f"{args.max_source_length + args.max_target_length + 1} tokens a row",
    ]


def print_example(rows: TrainingRows, tokenizer: ChatGLMTokenizer) -> None:
    """The first row, as the official script prints it."""
    first = rows.rows[0]
    print("input_ids", first.input_ids)
    print("inputs", tokenizer.decode(first.input_ids))
    print("label_ids", first.labels)
    print("labels", tokenizer.decode(first.labels))


def write_companions(folder: Path, config: ChatGLMConfig, tokenizer: ChatGLMTokenizer,
                     arguments: Arguments) -> None:
    """What a checkpoint holds beside the prefix and the training state."""
    config.save(folder)
    tokenizer.save(folder)
    generation = {"_from_model_config": True, "eos_token_id": config.eos_token_id,
                  "pad_token_id": config.pad_token_id}
    write_text(folder / "generation_config.json", _json(generation))
    write_text(folder / "glmkern.json", _json({"version": __version__, **arguments.to_dict()}))


def _json(value: object) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
