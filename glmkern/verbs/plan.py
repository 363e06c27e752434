"""`glmkern plan --model_name_or_path BASE [training flags] [--gpu NAME]`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from glmkern.training.flags.arguments import Arguments
from glmkern.training.flags.parser import parse as parse_flags

if TYPE_CHECKING:
    from glmkern.training.data.rows import Row
    from glmkern.training.setup import Setup

# What checking a training command asks for and a plan can do without.
PLACEHOLDERS = {"train_file": "rows.json", "prompt_column": "prompt", "response_column": "response"}


def run(argv: Sequence[str]) -> int:
    """Prints the memory and time that a training command is predicted to take."""
    parser = argparse.ArgumentParser(
        prog="glmkern plan",
        usage="glmkern plan --model_name_or_path BASE --pre_seq_len N [training flags] "
        "[--gpu NAME]",
        description="Tell the memory and time of a training command before anything is loaded: the"
        " flags of `glmkern train`, or its .json file. The base needs no more than its config.json."
        " With --train_file and a tokenizer.model the real rows are counted; without, every row is"
        " taken to be as long as the flags allow.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--gpu",
        metavar="NAME",
        help="plan for this GPU, not for this machine; a wrong name lists the known ones",
    )
    try:
        own, flags = parser.parse_known_args(argv)
    except SystemExit as ended:
        return int(ended.code or 0)
    arguments = parse_flags(flags, "glmkern plan")
    for line in plan(arguments, own.gpu):
        print(line)
    return 0


def plan(arguments: Arguments, gpu: str | None = None) -> list[str]:
    """The lines of the plan; InputError for flags a run would refuse, or an unknown GPU."""
    import torch

    from glmkern.errors import InputError
    from glmkern.plan.machines import named_gpu, this_machine
    from glmkern.plan.precision import Precision
    from glmkern.plan.run import predict_setup
    from glmkern.training.flags.validation import check_arguments
    from glmkern.training.setup import prepare

    check_arguments(_with_placeholders(arguments), {})
    setup = prepare(arguments, torch.device("cuda") if gpu else None)
    setup.check_quantization()
    precision = Precision.of_setup(setup)
    machine = (
        named_gpu(gpu, precision.activations)
        if gpu
        else this_machine(str(setup.device), precision.activations)
    )
    rows, lines = _rows(setup)
    try:
        prediction = predict_setup(setup, precision, machine, rows)
    except ValueError as error:
        raise InputError(str(error)) from error
    bits = prediction.job.config.quantization_bit
    return [*lines, *precision.lines(bits), *prediction.table()]


def _with_placeholders(arguments: Arguments) -> Arguments:
    """The flags with stand-ins for those that only a run needs, to be checked like a run's."""
    data = arguments.data
    if data.train_file is None:
        data = replace(
            data, **{name: getattr(data, name) or value for name, value in PLACEHOLDERS.items()}
        )
    training = replace(
        arguments.training, do_train=True, output_dir=arguments.training.output_dir or "out"
    )
    return arguments._replace(data=data, training=training)


def _rows(setup: Setup) -> tuple[Sequence[Row] | None, list[str]]:
    """The rows of --train_file, or None, and the lines that describe them."""
    from glmkern.training.data.files import describe_rows, training_data

    data = setup.arguments.data
    if data.train_file is None:
        return None, [f"no --train_file: every row is taken to have {data.padded_length:,} tokens"]
    rows = training_data(data, setup.load_tokenizer(), setup.config).rows
    return rows.rows, describe_rows(rows, data)
