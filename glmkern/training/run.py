"""The official main.py from its arguments to its files: data, model, training, results."""

import json
import os
from dataclasses import replace
from pathlib import Path

import torch

from glmkern import __version__
from glmkern.checkpoint import (
    check_bits,
    describe_prefix,
    read_prefix,
    resolve_folder,
    write_prefix,
)
from glmkern.checkpoint.atomic import write_text
from glmkern.errors import InputError
from glmkern.model.chatglm import ChatGLM
from glmkern.model.config import ChatGLMConfig
from glmkern.plan.prediction import Prediction
from glmkern.plan.run import FirstSteps, predict_run
from glmkern.tokenizer import ChatGLMTokenizer
from glmkern.training.data.files import RunData, TrainingData, read_data
from glmkern.training.evaluation.answers import PredictionFile
from glmkern.training.evaluation.evaluation import Evaluation, EvaluationData
from glmkern.training.flags.arguments import Arguments, ModelArguments, TrainingArguments
from glmkern.training.flags.validation import check_arguments, check_output_folder
from glmkern.training.loop.distributed import World, join_world
from glmkern.training.loop.resume import (
    asks_to_resume,
    check_same_run,
    describe_warm_start,
    find_checkpoint,
    read_flags,
)
from glmkern.training.loop.seeding import set_seed, use_deterministic_libraries
from glmkern.training.loop.trainer import Trainer
from glmkern.training.output.progress import write_line
from glmkern.training.output.reports import Reports, check_reports
from glmkern.training.output.run_folder import RunFolder
from glmkern.training.output.samples import SampleWriter
from glmkern.training.output.state import metrics_table


def run(arguments: Arguments) -> dict[str, float]:
    """Train, evaluate and predict as the official script does and write what it writes.

    Returns the metrics of all that was asked for. Raises InputError where files or flags are
    wrong, before the base is loaded where that can be told, TrainingError where the run fails, and
    Interrupted where a signal stops it.
    """
    training_args = arguments.training
    check_arguments(arguments, os.environ)
    check_reports(training_args)
    device = choose_device(training_args)
    with join_world(training_args, device) as world, world.first_prints():
        checkpoint = _prepare_folder(arguments) if training_args.do_train else None
        world.wait_for_all()  # before the first writes into the folder that the others look at
        return _run(arguments, device, world, checkpoint)


def _prepare_folder(arguments: Arguments) -> Path | None:
    """The checkpoint to go on from, or None for a fresh run into a folder that may be written."""
    training_args = arguments.training
    output = Path(training_args.output_dir)
    wanted = training_args.resume_from_checkpoint
    checkpoint = find_checkpoint(wanted, output)
    if checkpoint is None and asks_to_resume(wanted):
        print(f"no checkpoint in {output} to resume from: the run starts afresh")
    elif checkpoint is None:
        check_output_folder(output, training_args.overwrite_output_dir)
    return checkpoint


def _run(
    arguments: Arguments, device: torch.device, world: World, checkpoint: Path | None
) -> dict[str, float]:
    training_args = arguments.training
    dtype = choose_dtype(arguments.model, training_args, device)
    for note in arguments.notes:
        print(note)
    warm_start = arguments.model.ptuning_checkpoint
    if training_args.do_train and warm_start is not None and checkpoint is None:
        print(describe_warm_start(warm_start))
    if training_args.deterministic:
        use_deterministic_libraries()
    if training_args.tf32 is not None:
        torch.backends.cuda.matmul.allow_tf32 = training_args.tf32
    set_seed(training_args.seed)

    base = resolve_folder(arguments.model.model_name_or_path)
    config = ChatGLMConfig.from_pretrained(base)
    arguments = take_prefix_from_checkpoint(arguments, config)
    if checkpoint is not None:
        check_same_run(checkpoint, arguments.to_dict())
        arguments = take_packs_from_checkpoint(arguments, checkpoint)
    tokenizer = ChatGLMTokenizer.from_pretrained(base)
    check_vocabulary(tokenizer, config)
    data = read_data(arguments, tokenizer, config)
    if data.train is None and not world.is_first:
        return {}
    if arguments.model.quantization_bit:
        check_bits(base, config, arguments.model.quantization_bit)
    prediction = None
    try:
        if data.train is not None:
            prediction, lines = predict_run(arguments, config, data.train.rows.rows, device, dtype)
            print(*lines, sep="\n")
            budgets = world.gather("tokens of a pack", str(prediction.job.budget))
            arguments = with_tokens_per_pack(arguments, min(budgets, key=int))
        model = load_model(base, arguments.model, device, dtype, mapped=world.size > 1)
        model.label_smoothing = training_args.label_smoothing_factor
    except ValueError as error:  # a configuration or combination of flags that is not supported
        raise InputError(str(error)) from error

    folder = RunFolder(training_args.output_dir, training_args.save_total_limit)
    results, epoch = {}, {}
    if data.train is not None:
        metrics = _train(
            arguments, model, tokenizer, config, data, folder, world, checkpoint, prediction
        )
        if world.is_first:
            results |= _finish(
                "train", metrics, arguments.data.max_train_samples, data.train, folder
            )
        epoch = {"epoch": metrics["epoch"]}
    if not world.is_first:  # the first process alone measures and writes
        return results
    folder.make()
    if data.validation is not None:
        metrics = Evaluation.of(arguments, model, tokenizer, data.validation).evaluate() | epoch
        print(metrics)
        results |= _finish(
            "eval", metrics, arguments.data.max_eval_samples, data.validation, folder
        )
    if data.test is not None:
        with PredictionFile(folder.path / "generated_predictions.txt") as file:
            metrics = Evaluation.of(arguments, model, tokenizer, data.test).predict(file)
        results |= _finish(
            "predict", metrics, arguments.data.max_predict_samples, data.test, folder
        )
    return results


def _train(
    arguments: Arguments,
    model: ChatGLM,
    tokenizer: ChatGLMTokenizer,
    config: ChatGLMConfig,
    data: RunData,
    folder: RunFolder,
    world: World,
    checkpoint: Path | None,
    prediction: Prediction,
) -> dict[str, float]:
    """Train the model's prefix; returns the metrics, and leaves checkpoints and state behind."""
    model_args, _, training_args, _ = arguments
    saved_config = replace(
        config,
        pre_seq_len=model_args.pre_seq_len,
        prefix_projection=model_args.prefix_projection,
        quantization_bit=model_args.quantization_bit or config.quantization_bit,
    )
    evaluate = on_save = None
    if training_args.evaluation_strategy != "no":
        evaluate = Evaluation.of(arguments, model, tokenizer, data.validation).greedy().evaluate
    if data.samples:
        on_save = SampleWriter.of(arguments, model, tokenizer, data.samples)
    first_steps = FirstSteps(prediction, model.device, write_line)
    reports = Reports(
        training_args, lambda: trainer.state.log_history, arguments.to_dict(), writes=world.is_first
    )

    def on_step(step: int) -> None:
        first_steps(step)
        reports.after_step(step)

    try:
        trainer = Trainer(
            model,
            data.train.rows.rows,
            training_args,
            folder=folder,
            write_companions=lambda checkpoint: write_companions(
                checkpoint, saved_config, tokenizer, arguments
            ),
            row_names=[example.index for example in data.train.examples],
            world=world,
            evaluate=evaluate,
            on_save=on_save,
            on_step=on_step,
            flags=arguments.to_dict(),
        )
    except ValueError as error:  # flags that do not go with the rows
        raise InputError(str(error)) from error
    world.require_same("the start of the run", "afresh" if checkpoint is None else checkpoint.name)
    world.require_same("the fingerprint of the training rows", trainer.fingerprint)
    if on_save is not None and checkpoint is not None and world.is_first:
        on_save.go_on_from(checkpoint)
    with reports:
        metrics = trainer.train(checkpoint)
    if world.is_first:
        folder.write_state(trainer.state)
    return metrics


def _finish(
    split: str,
    metrics: dict[str, float],
    limit: int | None,
    data: TrainingData | EvaluationData,
    folder: RunFolder,
) -> dict[str, float]:
    """Count the rows, print the official table of a split and write its results."""
    count = len(data.examples)
    metrics[f"{split}_samples"] = min(limit or count, count)
    for line in metrics_table(metrics, split):
        print(line)
    folder.write_results(split, metrics)
    return metrics


def take_prefix_from_checkpoint(arguments: Arguments, config: ChatGLMConfig) -> Arguments:
    """--pre_seq_len and --prefix_projection as --ptuning_checkpoint has them, where the former is
    not given."""
    args = arguments.model
    if args.ptuning_checkpoint is None or args.pre_seq_len is not None:
        return arguments
    length, _, projection = describe_prefix(read_prefix(args.ptuning_checkpoint, config))
    return arguments._replace(model=replace(args, pre_seq_len=length, prefix_projection=projection))


def take_packs_from_checkpoint(arguments: Arguments, checkpoint: Path) -> Arguments:
    """--tokens_per_pack as the stopped run had it, where it is left to this one: the same packs
    give the same bits."""
    if arguments.training.tokens_per_pack != "auto":
        return arguments
    return with_tokens_per_pack(arguments, read_flags(checkpoint)["tokens_per_pack"])


def with_tokens_per_pack(arguments: Arguments, tokens: str) -> Arguments:
    return arguments._replace(training=replace(arguments.training, tokens_per_pack=tokens))


def choose_device(args: TrainingArguments) -> torch.device:
    """The GPU of this process, or the CPU where there is none or --no_cuda is given."""
    if args.no_cuda or not torch.cuda.is_available():
        return torch.device("cpu")
    # The official script would spread over all visible GPUs; a process here computes on one.
    rank = int(os.environ.get("LOCAL_RANK", max(args.local_rank, 0)))
    return torch.device("cuda", rank)


def choose_dtype(
    model_args: ModelArguments, args: TrainingArguments, device: torch.device
) -> torch.dtype:
    """The precision of the base, from --model_dtype, --fp16, --bf16 and the device."""
    if args.fp16 and device.type == "cpu":
        raise InputError("--fp16 needs a GPU; leave it out for float32, or pass --bf16")
    name = "float16" if args.fp16 else "bfloat16" if args.bf16 else model_args.model_dtype
    if name == "auto":
        name = "float32" if device.type == "cpu" else "float16"
    return getattr(torch, name)


def load_model(
    folder: Path,
    args: ModelArguments,
    device: torch.device,
    dtype: torch.dtype,
    mapped: bool = False,
) -> ChatGLM:
    """The frozen base with its prefix, fresh or from --ptuning_checkpoint; `mapped`: see
    ChatGLM.from_pretrained."""
    model = ChatGLM.from_pretrained(
        folder,
        device=device,
        dtype=dtype,
        quantization_bit=args.quantization_bit,
        pre_seq_len=args.pre_seq_len,
        prefix_projection=args.prefix_projection,
        prefix_checkpoint=args.ptuning_checkpoint,
        rope_precision=args.rope_precision,
        output_layer_bit=args.output_layer_bit,
        offload_embedding=args.offload_embedding,
        mapped=mapped,
    )
    model.prefix_dropout = args.prefix_dropout
    model.recompute = args.recompute
    return model


def check_vocabulary(tokenizer: ChatGLMTokenizer, config: ChatGLMConfig) -> None:
    """Raise InputError where the tokenizer has ids that the base has no embedding for."""
    if tokenizer.vocab_size > config.padded_vocab_size:
        raise InputError(
            f"the tokenizer has {tokenizer.vocab_size} ids, but the base has only "
            f"{config.padded_vocab_size}; tokenizer.model and config.json are of different models"
        )


def write_companions(
    folder: Path, config: ChatGLMConfig, tokenizer: ChatGLMTokenizer, arguments: Arguments
) -> None:
    """What a checkpoint holds beside the prefix and the training state."""
    config.save(folder)
    tokenizer.save(folder)
    generation = {
        "_from_model_config": True,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
    }
    write_text(folder / "generation_config.json", _json(generation))
    write_text(folder / "glmkern.json", _json({"version": __version__, **arguments.to_dict()}))
    if arguments.training.save_safetensors:
        # The bits of the pytorch_model.bin that is in the folder already.
        write_prefix(folder, read_prefix(folder), "safetensors", config.family)


def _json(value: object) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
