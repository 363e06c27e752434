"""From a command line or a file to arguments."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from glmkern.training.flags.arguments import Arguments, honoured
from glmkern.training.flags.parser import parse
from glmkern.training.flags.validation import check_arguments
from tests.training.flags.commands import TRAIN, refusal

REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    "argv, name, value",
    [
        (["--do_train"], "do_train", True),
        (["--do_train", "True"], "do_train", True),
        (["--do_train=yes"], "do_train", True),
        (["--do_train", "False"], "do_train", False),
        (["--do-train"], "do_train", True),
        (["--no_ignore_pad_token_for_loss"], "ignore_pad_token_for_loss", False),
        (["--no-ignore-pad-token-for-loss"], "ignore_pad_token_for_loss", False),
        (["--prefix_projection", "True"], "prefix_projection", True),
        (["--max_steps", "3000"], "max_steps", 3000),
        (["--max-steps=3000"], "max_steps", 3000),
        (["--max_steps", "-1"], "max_steps", -1),
        (["--learning_rate", "2e-2"], "learning_rate", 0.02),
        (["--learning_rate=1", "--learning_rate=2"], "learning_rate", 2.0),
        (["--per_gpu_train_batch_size", "2"], "per_device_train_batch_size", 2),
        (["--per_gpu_eval_batch_size", "2"], "per_device_eval_batch_size", 2),
        (["--eval_strategy", "steps"], "evaluation_strategy", "steps"),
        (["--use_cpu"], "no_cuda", True),
        (["--full_determinism"], "deterministic", True),
        (["--source_prefix", ""], "source_prefix", ""),
        (["--source_prefix=--a-b"], "source_prefix", "--a-b"),
        (["--local-rank=0"], "local_rank", 0),
        (["--tf32", "False"], "tf32", False),
        (["--logging_steps", "0.1"], "logging_steps", 0.1),
        (["--report_to", "TensorBoard"], "report_to", ("tensorboard",)),
        (["--report_to", "none", "wandb", "--do_train"], "report_to", ("none", "wandb")),
        (["--report_to=all,tensorboard"], "report_to", ("all", "tensorboard")),
    ],
)
def test_spellings(argv, name, value):
    assert parse(argv).to_dict()[name] == value


def test_published_train_sh():
    arguments = parse(
        [
            "--do_train",
            "--train_file",
            "AdvertiseGen/train.json",
            "--validation_file",
            "AdvertiseGen/dev.json",
            "--preprocessing_num_workers",
            "10",
            "--prompt_column",
            "content",
            "--response_column",
            "summary",
            "--overwrite_cache",
            "--model_name_or_path",
            "THUDM/chatglm2-6b",
            "--output_dir",
            "output/adgen",
            "--overwrite_output_dir",
            "--max_source_length",
            "64",
            "--max_target_length",
            "128",
            "--per_device_train_batch_size",
            "1",
            "--per_device_eval_batch_size",
            "1",
            "--gradient_accumulation_steps",
            "16",
            "--predict_with_generate",
            "--max_steps",
            "3000",
            "--logging_steps",
            "10",
            "--save_steps",
            "1000",
            "--learning_rate",
            "2e-2",
            "--pre_seq_len",
            "128",
        ]
    )
    check_arguments(arguments, {"WORLD_SIZE": "1", "LOCAL_RANK": "0"})
    noted = [note.split()[0] for note in arguments.notes]
    assert noted == ["--preprocessing_num_workers", "--overwrite_cache"]


def test_published_evaluate_sh():
    arguments = parse(
        [
            "--do_predict",
            "--validation_file",
            "AdvertiseGen/dev.json",
            "--test_file",
            "AdvertiseGen/dev.json",
            "--overwrite_cache",
            "--prompt_column",
            "content",
            "--response_column",
            "summary",
            "--model_name_or_path",
            "THUDM/chatglm2-6b",
            "--ptuning_checkpoint",
            "./output/adgen/checkpoint-3000",
            "--output_dir",
            "./output/adgen",
            "--overwrite_output_dir",
            "--max_source_length",
            "64",
            "--max_target_length",
            "64",
            "--per_device_eval_batch_size",
            "1",
            "--predict_with_generate",
            "--pre_seq_len",
            "128",
            "--quantization_bit",
            "4",
        ]
    )
    check_arguments(arguments, {})
    assert arguments.generates and not arguments.evaluates
    assert [note.split()[0] for note in arguments.notes] == ["--overwrite_cache"]


def test_flags_from_json(tmp_path):
    path = tmp_path / "flags.json"
    path.write_text(
        json.dumps(
            {
                "do_train": True,
                "max_steps": 3000,
                "learning_rate": "2e-2",
                "num_train_epochs": 2,
                "report_to": ["tensorboard"],
                "fsdp": [],
                "data_seed": None,
                "eval_strategy": "no",
                "tokens_per_pack": 4096,
                "num_beams": 4,
            }
        )
    )
    arguments = parse([str(path)])
    assert arguments.training.do_train is True
    assert arguments.training.learning_rate == 0.02
    assert arguments.training.num_train_epochs == 2.0
    assert arguments.training.tokens_per_pack == "4096"
    assert arguments.training.report_to == ("tensorboard",)
    assert arguments.data.num_beams == 4
    assert not arguments.notes


@pytest.mark.parametrize(
    "content, words",
    [
        ('{"max_stepz": 1}', "--max_stepz; the nearest is --max_steps"),
        ('{"max_steps": true}', "--max_steps takes a whole number, not True"),
        ('{"max_steps": 1.5}', "--max_steps takes a whole number, not 1.5"),
        ('{"do_train": 2}', "--do_train takes True or False, not 2"),
        ('{"output_dir": ["a"]}', "--output_dir takes a text"),
        ('{"quantization_bit": "four"}', "--quantization_bit takes a whole number"),
        ("[1]", "holds a JSON list"),
        ('{"a": ', "cannot be read as JSON"),
    ],
)
def test_mistakes_in_json(tmp_path, content, words):
    path = tmp_path / "flags.json"
    path.write_text(content)
    assert words in refusal(str(path))


def test_missing_json(tmp_path):
    assert "does not exist" in refusal(str(tmp_path / "none.json"))


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--max_stepz", "3"], "there is no flag --max_stepz; the nearest is --max_steps"),
        (["--pre_seq_length=3"], "the nearest is --pre_seq_len"),
        (["--max_step", "3"], "the nearest is --max_steps"),
        (["--no_max_steps"], "there is no flag --no_max_steps"),
        (["stray"], "'stray' does not belong to a flag"),
        (["--max_steps", "many"], "--max_steps takes a whole number, not 'many'"),
        (["--max_steps"], "--max_steps: expected one argument"),
        (["--learning_rate", "nan"], "--learning_rate takes a finite number"),
        (["--do_train", "perhaps"], "--do_train takes True or False, not 'perhaps'"),
        (["--optim", "sgd"], "choose adamw_hf, adamw_torch or adamw_torch_fused"),
        (["--lr_scheduler_type", "reduce_lr_on_plateau"], "--lr_scheduler_type"),
        (["--quantization_bit", "four"], "--quantization_bit takes a whole number, not 'four'"),
        (["--deepspeed", "ds.json"], "--deepspeed ds.json is refused"),
        (["--past_index", "2"], "--past_index 2 is refused"),
        ([], "pass --do_train, --do_eval or --do_predict"),
    ],
)
def test_mistakes(argv, words):
    assert words in refusal(*argv)


def test_flags_behind_a_file_go_before_it(tmp_path):
    path = tmp_path / "flags.json"
    path.write_text('{"max_steps": 3, "seed": 4}')
    training = parse([str(path), "--max_steps", "5", "--group-by-length"]).training
    assert (training.max_steps, training.seed, training.group_by_length) == (5, 4, True)


def test_help_lists_every_honoured_flag(capsys):
    with pytest.raises(SystemExit) as end:
        parse(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert all(f"--{name} " in text for name in honoured())
    assert max(map(len, text.split("\n"))) <= 120


def test_parsing_needs_no_torch():
    code = (
        "import sys; from glmkern.training.flags.parser import parse; parse(['--do_train']); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 0


def test_arguments_round_trip(tmp_path):
    """glmkern.json's flags, given back as a configuration, are the same run."""
    arguments = parse([*TRAIN, "--max_steps", "7", "--tf32", "True", "--save_steps", "0.5"])
    path = tmp_path / "flags.json"
    path.write_text(json.dumps(arguments.to_dict()))
    again = parse([str(path)])
    assert isinstance(again, Arguments) and again == arguments
