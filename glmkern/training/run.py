"""The official main.py from its arguments to its files: data, model, training, results."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from glmkern.chatglm import ChatGLM
from glmkern.errors import InputError, TrainingError
from glmkern.model.config import ChatGLMConfig
from glmkern.model.packing import Row
from glmkern.tokenizer import ChatGLMTokenizer
from glmkern.training.data.files import RunData, read_data
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
    number of every step taken. memory: what was expected, and what would need less, for a run that
    is out of memory.
    """

    lines: Sequence[str]
    tokens_per_pack: int
    on_step: Callable[[int], None]
    memory: str


Forecaster = Callable[[Setup, Sequence[Row]], Forecast]


def run(arguments: Arguments, forecast: Forecaster | None = None) -> dict[str, float]:
    """Train, evaluate and predict as the official script does and write what it writes.

    Args:
        forecast: told about the training rows before the base takes memory; None: no forecast, and
            --tokens_per_pack auto is as many as suffice for speed.

    Returns the metrics of all that was asked for.

    Raises:
        InputError: files or flags are wrong; where possible before the base is loaded.
        TrainingError: the run fails.
        Interrupted: a signal stops it.
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
    on_step, expected = do_nothing, ""
    try:
        if data.train is not None and forecast is not None:
            lines, tokens_per_pack, on_step, expected = forecast(setup, data.train.rows.rows)
            print(*lines, sep="\n")
            budgets = world.gather("tokens of a pack", str(tokens_per_pack))
            setup = setup.with_tokens_per_pack(min(budgets, key=int))
        with _told_what_was_expected(expected):
            model = setup.load_model(mapped=world.size > 1)
    except ValueError as error:  # a configuration or combination of flags that is not supported
        raise InputError(str(error)) from error

    training_args = setup.arguments.training
    folder = RunFolder(training_args.output_dir, training_args.save_total_limit)
    tasks = _Tasks(setup.arguments, model, tokenizer, data, folder)
    results, epoch = {}, {}
    if data.train is not None:
        with _told_what_was_expected(expected):
            metrics = tasks.train(world, checkpoint, on_step, setup.tuned_config)
        if world.is_first:
            results |= tasks.write("train", metrics)
        epoch = {"epoch": metrics["epoch"]}
    if not world.is_first:  # the first process alone measures and writes
        return results
    folder.make()
    if data.validation is not None:
        metrics = tasks.evaluation(data.validation).evaluate() | epoch
        print(metrics)
        results |= tasks.write("eval", metrics)
    if data.test is not None:
        with PredictionFile(folder.path / "generated_predictions.txt") as file:
            metrics = tasks.evaluation(data.test).predict(file)
        results |= tasks.write("predict", metrics)
    return results


@contextmanager
def _told_what_was_expected(memory: str) -> Iterator[None]:
    """Of a GPU that ran out of memory: TrainingError, with what was expected."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        words = "ran out of GPU memory while the base was loaded"
        raise TrainingError("; ".join(filter(None, [words, memory]))) from error
    except TrainingError as error:
        if not memory or not _is_out_of_memory(error):
            raise
        raise TrainingError(f"{error}; {memory}") from error


def _is_out_of_memory(error: BaseException | None) -> bool:
    while error is not None and not isinstance(error, torch.OutOfMemoryError):
        error = error.__cause__
    return error is not None


@dataclass(frozen=True)
class _Tasks:
    """What --do_train, --do_eval and --do_predict do with the model and the rows."""

    arguments: Arguments
    model: ChatGLM
    tokenizer: ChatGLMTokenizer
    data: RunData
    folder: RunFolder

    def train(
        self,
        world: World,
        checkpoint: Path | None,
        on_step: Callable[[int], None],
        saved_config: ChatGLMConfig,
    ) -> dict[str, float]:
        """Train the model's prefix; returns the metrics, and leaves checkpoints and state in the
        folder.

        Args:
            checkpoint: to resume from; None for a fresh start.
            on_step: called with the number of every step taken.
            saved_config: the configuration in every checkpoint.
        """
        flags, data = self.arguments.to_dict(), self.data
        samples = self._sample_writer()
        reports = Reports(
            self.arguments.training, lambda: trainer.state.log_history, flags, world.is_first
        )

        def after_step(step: int) -> None:
            on_step(step)
            reports.after_step(step)

        hooks = Hooks(
            write_companions=lambda folder: write_companions(
                folder, saved_config, self.tokenizer, self.arguments
            ),
            evaluate=self._evaluate_while_training(),
            on_save=samples or do_nothing,
            on_step=after_step,
        )
        try:
            trainer = Trainer(
                self.model,
                data.train.rows.rows,
                self.arguments.training,
                folder=self.folder,
                row_names=[example.index for example in data.train.examples],
                world=world,
                hooks=hooks,
                flags=flags,
            )
        except ValueError as error:  # flags that do not go with the rows
            raise InputError(str(error)) from error
        start = "afresh" if checkpoint is None else checkpoint.name
        world.require_same("the start of the run", start)
        world.require_same("the fingerprint of the training rows", trainer.fingerprint)
        if samples is not None and checkpoint is not None and world.is_first:
            samples.resume_from(checkpoint)
        with reports:
            metrics = trainer.train(checkpoint)
        if world.is_first:
            self.folder.write_state(trainer.state)
        return metrics

    def evaluation(self, data: EvaluationData) -> Evaluation:
        return Evaluation.of(self.arguments, self.model, self.tokenizer, data)

    def write(self, split: str, metrics: dict[str, float]) -> dict[str, float]:
        """Count the rows, print the official table of a split and write its results.

        `split`: "train", "eval" or "predict".
        """
        data, args = self.data, self.arguments.data
        rows, limit = {
            "train": (data.train, args.max_train_samples),
            "eval": (data.validation, args.max_eval_samples),
            "predict": (data.test, args.max_predict_samples),
        }[split]
        count = len(rows.examples)
        metrics[f"{split}_samples"] = min(limit or count, count)
        for line in metrics_table(metrics, split):
            print(line)
        self.folder.write_results(split, metrics)
        return metrics

    def _sample_writer(self) -> SampleWriter | None:
        if not self.data.samples:
            return None
        return SampleWriter(self.arguments, self.model, self.tokenizer, self.data.samples)

    def _evaluate_while_training(self) -> Callable[[], dict[str, float]] | None:
        """For --evaluation_strategy; officially without draws."""
        if self.arguments.training.evaluation_strategy == "no":
            return None
        return self.evaluation(self.data.validation).greedy().evaluate
