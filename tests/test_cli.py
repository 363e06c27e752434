"""The command line's verbs, exit statuses, and what it does before torch loads."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import glmkern
from glmkern import cli
from glmkern.errors import InputError, Interrupted, TrainingError
from glmkern.training.flags.arguments import ModelArguments, TrainingArguments
from glmkern.training.setup import choose_device, choose_dtype
from tests.official import refused

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    "error, status",
    [
        (InputError("wrong"), 2),
        (TrainingError("wrong"), 1),
        (KeyboardInterrupt(), 130),
        (Interrupted("stopped", signal=15), 143),
    ],
)
def test_exit_status(monkeypatch, capsys, error, status):
    def fail(argv):
        raise error

    monkeypatch.setitem(cli.VERBS, "backends", fail)
    refused(["backends"], capsys, status=status)


# Verbs


@pytest.mark.parametrize(
    "argv, words",
    [
        (["trian"], "there is no verb 'trian'; the nearest is 'train'"),
        (["bench"], "bench is not in this release"),
        (["backends", "now"], "backends takes no arguments"),
        (["--do_trian"], "there is no flag --do_trian; the nearest is --do_train"),
        (["--max_steps", "3"], "pass --do_train"),
        (["missing.json"], "missing.json does not exist"),
    ],
)
def test_wrong_commands(argv, words, capsys):
    assert words in refused(argv, capsys)


def test_version(capsys):
    for argv in (["--version"], ["version"]):
        assert cli.main(argv) == 0
        assert capsys.readouterr().out == f"glmkern {glmkern.__version__}\n"


def test_help(capsys):
    for argv in ([], ["--help"], ["-h"]):
        assert cli.main(argv) == 0
        text = capsys.readouterr().out
        assert all(f"  {verb} " in text for verb in cli.VERBS)
    for verb in ("train", "predict"):
        for argv in ([verb], [verb, "--help"]):
            assert cli.main(argv) == 0
            text = capsys.readouterr().out
            assert text.startswith(f"usage: glmkern {verb} --flag") and "--pre_seq_len INT" in text


def test_backends(capsys):
    assert cli.main(["backends"]) == 0
    assert "rms_norm_fwd" in capsys.readouterr().out


def test_demo_gets_its_arguments(monkeypatch):
    from glmkern import demo

    seen = []
    monkeypatch.setattr(demo, "run", lambda argv: seen.append(argv) or 5)
    assert cli.main(["demo", "--output_dir", "x"]) == 5
    assert seen == [["--output_dir", "x"]]


@pytest.mark.parametrize(
    "argv", [["--help"], ["train", "--help"], ["--version"], ["trian"], ["--do_trian"]]
)
def test_help_and_mistakes_need_no_torch(argv):
    code = (
        f"import sys; from glmkern.cli import main; main({argv!r}); "
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_deterministic_libraries_are_asked_before_torch_loads():
    code = (
        "import os, sys; from glmkern import cli, environment\n"
        "def stop(*a): sys.exit(10 + ('torch' in sys.modules))\n"
        "environment.make_deterministic = stop\n"
        "cli.main(['--do_train', '--deterministic'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY)
    assert done.returncode == 10


def test_deterministic_environment():
    from glmkern.environment import make_deterministic

    chosen = {}
    make_deterministic(chosen)
    assert chosen["MKL_CBWR"] in ("AVX512,STRICT", "AVX2,STRICT")
    assert chosen["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    kept = {"MKL_CBWR": "COMPATIBLE"}
    make_deterministic(kept)
    assert kept["MKL_CBWR"] == "COMPATIBLE"


# Where and in which precision


@pytest.mark.parametrize(
    "flags, device, expected",
    [
        ({}, "cpu", torch.float32),
        ({}, "cuda", torch.float16),
        ({"bf16": True}, "cpu", torch.bfloat16),
        ({"fp16": True}, "cuda", torch.float16),
        ({"model_dtype": "float32"}, "cuda", torch.float32),
    ],
)
def test_precision(flags, device, expected):
    model = ModelArguments(**{k: v for k, v in flags.items() if k == "model_dtype"})
    training = TrainingArguments(**{k: v for k, v in flags.items() if k != "model_dtype"})
    assert choose_dtype(model, training, torch.device(device)) == expected


def test_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device(TrainingArguments(no_cuda=True)) == torch.device("cpu")
    assert choose_device(TrainingArguments()) == torch.device("cuda", 0)
    assert choose_device(TrainingArguments(local_rank=2)) == torch.device("cuda", 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert choose_device(TrainingArguments()) == torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device(TrainingArguments()) == torch.device("cpu")
