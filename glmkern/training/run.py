"""The official main.py from its arguments to its files: data, model, training, results."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from glmkern.errors import InputError
from glmkern.model.chatglm import ChatGLM
from glmkern.model.packing import Row
from glmkern.tokenizer import ChatGLMTokenizer
from glmkern.training.data.files import RunData, TrainingData, read_data
from glmkern.training.data.rows import EvaluationData
from glmkern.training.evaluation.answers import PredictionFile
from glmkern.training.evaluation.evaluation import Evaluation
from glmkern.training.flags.arguments import AUTO, Arguments, TrainingArguments
from glmkern.training.flags.validation import check_arguments, check_output_folder
from glmkern.training.loop.distributed import World, join_world
from glmkern.training.loop.hooks import Hooks, do_nothing
from glmkern.training.loop.resume import (
    check_same_run,
    describe_warm_start,
    find_checkpoint,
    read_flags,
    resume_is_requested,
)
from glmkern.training.loop.seeding import set_seed, use_deterministic_libraries
from glmkern.training.loop.trainer import Trainer
from glmkern.training.output.companions import write_companions
from glmkern.training.output.reports import Reports, check_reports
from glmkern.training.output.run_folder import RunFolder
from glmkern.training.output.samples import SampleWriter
from glmkern.training.output.trainer_state import metrics_table
from glmkern.training.setup import Setup, choose_device, prepare


class Forecast(NamedTuple):
    """What a run is expected to take, told before the weights of the base are read.

    lines: printed then. tokens_per_pack: what --tokens_per_pack comes to. on_step: called with the
    number of every step taken.
    """

    lines: Sequence[str]
    tokens_per_pack: int
    on_step: Callable[[int], None]


Forecaster = Callable[[Setup, Sequence[Row]], Forecast]


def run(arguments: Arguments, forecast: Forecaster | None = None) -> dict[str, float]:
    """Train, evaluate and predict as the official script does and write what it writes.

    Args:
        forecast: told about the training rows before the base takes memory; None: no forecast, and
            --tokens_per_pack auto is as many as suffice for speed.

    Returns the metrics of all that was asked for. Raises InputError where files or flags are
    wrong, before the base is loaded where that can be told, TrainingError where the run fails, and
    Interrupted where a signal stops it.
    """
    training_args = arguments.training
    check_arguments(arguments, os.environ)
    check_reports(training_args)
    device = choose_device(training_args)
    with join_world(training_args, device) as world, world.only_first_prints():
        checkpoint = _prepare_folder(training_args) if training_args.do_train else None
        world.wait_for_all()  # before the first writes into the folder that the others look at
        for line in _notes(arguments, checkpoint):
            print(line)
        _configure_process(training_args)
        setup = prepare(arguments, device)
        if checkpoint is not None:
            setup = _with_packs_of(setup, checkpoint)
        return _run(setup, world, checkpoint, forecast)


def _prepare_folder(args: TrainingArguments) -> Path | None:
    """The checkpoint to resume from, or None for a fresh run into a folder that may be written."""
    output, wanted = Path(args.output_dir), args.resume_from_checkpoint
    checkpoint = find_checkpoint(wanted, output)
    if checkpoint is None and resume_is_requested(wanted):
        print(f"no checkpoint in {output} to resume from: the run starts afresh")
    elif checkpoint is None:
        check_output_folder(output, args.overwrite_output_dir)
    return checkpoint


def _notes(arguments: Arguments, checkpoint: Path | None) -> list[str]:
    """What the user should know about the flags."""
    warm_start = arguments.model.ptuning_checkpoint
    if not arguments.training.do_train or warm_start is None or checkpoint is not None:
        return list(arguments.notes)
    return [*arguments.notes, describe_warm_start(warm_start)]


def _configure_process(args: TrainingArguments) -> None:
    if args.deterministic:
        use_deterministic_libraries()
    if args.tf32 is not None:
        torch.backends.cuda.matmul.allow_tf32 = args.tf32
    set_seed(args.seed)


def _with_packs_of(setup: Setup, checkpoint: Path) -> Setup:
    """With --tokens_per_pack of the stopped run, where it is left to this one: the same packs give
    the same bits. Raises InputError where the flags are of another run."""
    check_same_run(checkpoint, setup.arguments.to_dict())
    if setup.arguments.training.tokens_per_pack != AUTO:
        return setup
    return setup.with_tokens_per_pack(read_flags(checkpoint)["tokens_per_pack"])


def _run(
    setup: Setup, world: World, checkpoint: Path | None, forecast: Forecaster | None
) -> dict[str, float]:
    tokenizer = setup.load_tokenizer()
    data = read_data(setup.arguments, tokenizer, setup.config)
    if data.train is None and not world.is_first:
        return {}
    setup.check_quantization()
    on_step = do_nothing
    try:
        if data.train is not None and forecast is not None:
            lines, tokens_per_pack, on_step = forecast(setup, data.train.rows.rows)
            print(*lines, sep="\n")
            budgets = world.gather("tokens of a pack", str(tokens_per_pack))
            setup = setup.with_tokens_per_pack(min(budgets, key=int))
        model = setup.load_model(mapped=world.size > 1)
    except ValueError as error:  # a configuration or combination of flags that is not supported
        raise InputError(str(error)) from error

    arguments = setup.arguments
    folder = RunFolder(arguments.training.output_dir, arguments.training.save_total_limit)
    results, epoch = {}, {}
    if data.train is not None:
        metrics = _train(setup, model, tokenizer, data, folder, world, checkpoint, on_step)
        if world.is_first:
            results |= _write_split(
                "train", metrics, arguments.data.max_train_samples, data.train, folder
            )
        epoch = {"epoch": metrics["epoch"]}
    if not world.is_first:  # the first process alone measures and writes
        return results
    folder.make()
    if data.validation is not None:
        metrics = Evaluation.of(arguments, model, tokenizer, data.validation).evaluate() | epoch
        print(metrics)
        results |= _write_split(
            "eval", metrics, arguments.data.max_eval_samples, data.validation, folder
        )
    if data.test is not None:
        with PredictionFile(folder.path / "generated_predictions.txt") as file:
            metrics = Evaluation.of(arguments, model, tokenizer, data.test).predict(file)
        results |= _write_split(
            "predict", metrics, arguments.data.max_predict_samples, data.test, folder
        )
    return results


def _train(
    setup: Setup,
    model: ChatGLM,
    tokenizer: ChatGLMTokenizer,
    data: RunData,
    folder: RunFolder,
    world: World,
    checkpoint: Path | None,
    on_step: Callable[[int], None],
) -> dict[str, float]:
    """Train the model's prefix; returns the metrics, and leaves checkpoints and state in `folder`.

    `on_step` is called with the number of every step taken.
    """
    arguments, training_args = setup.arguments, setup.arguments.training
    evaluate = samples = None
    if training_args.evaluation_strategy != "no":
        evaluate = Evaluation.of(arguments, model, tokenizer, data.validation).greedy().evaluate
    if data.samples:
        samples = SampleWriter(arguments, model, tokenizer, data.samples)
    reports = Reports(
        training_args, lambda: trainer.state.log_history, arguments.to_dict(), writes=world.is_first
    )

    def after_step(step: int) -> None:
        on_step(step)
        reports.after_step(step)

    hooks = Hooks(
        write_companions=lambda checkpoint: write_companions(
            checkpoint, setup.tuned_config, tokenizer, arguments
        ),
        evaluate=evaluate,
        on_save=samples or do_nothing,
        on_step=after_step,
    )
    try:
        trainer = Trainer(
            model,
            data.train.rows.rows,
            training_args,
            folder=folder,
            row_names=[example.index for example in data.train.examples],
            world=world,
            hooks=hooks,
            flags=arguments.to_dict(),
        )
    except ValueError as error:  # flags that do not go with the rows
        raise InputError(str(error)) from error
    world.require_same("the start of the run", "afresh" if checkpoint is None else checkpoint.name)
    world.require_same("the fingerprint of the training rows", trainer.fingerprint)
    if samples is not None and checkpoint is not None and world.is_first:
        samples.resume_from(checkpoint)
    with reports:
        metrics = trainer.train(checkpoint)
    if world.is_first:
        folder.write_state(trainer.state)
    return metrics


def _write_split(
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
