"""Command lines that pass the checks, and the refusal of others."""

import pytest

from glmkern.errors import InputError
from glmkern.training.flags.parser import parse
from glmkern.training.flags.validation import check_arguments

BASE = [
    "--model_name_or_path",
    "base",
    "--prompt_column",
    "content",
    "--response_column",
    "summary",
    "--output_dir",
    "out",
]


TRAIN = ["--do_train", *BASE, "--train_file", "rows.json", "--pre_seq_len", "128"]


EVALUATE = ["--do_eval", *BASE, "--validation_file", "rows.json"]


def refusal(*argv: str) -> str:
    with pytest.raises(InputError) as error:
        check_arguments(parse(argv), {})
    message = str(error.value)
    assert "\n" not in message
    return message
