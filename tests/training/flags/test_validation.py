"""What a command must have and in which ranges."""

import sys

import pytest

from glmkern.errors import InputError
from glmkern.training.flags.parser import parse
from glmkern.training.flags.validation import check_arguments, check_output_folder
from tests.training.flags.commands import BASE, EVALUATE, TRAIN, refusal


@pytest.mark.parametrize(
    "missing, words",
    [
        ("--pre_seq_len", "only prefixes are trained here, so pass --pre_seq_len 128"),
        ("--model_name_or_path", "--model_name_or_path is missing"),
        ("--train_file", "--train_file is missing"),
        ("--prompt_column", "--prompt_column is missing"),
        ("--response_column", "--response_column is missing"),
        ("--output_dir", "--output_dir is missing"),
    ],
)
def test_what_training_needs(missing, words):
    check_arguments(parse(TRAIN), {})
    place = TRAIN.index(missing)
    assert words in refusal(*TRAIN[:place], *TRAIN[place + 2 :])


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--pre_seq_len", "0"], "--pre_seq_len is 0; it must be at least 1"),
        (["--prefix_dropout", "1"], "--prefix_dropout is 1.0; it must be in [0, 1)"),
        (["--max_source_length", "2"], "--max_source_length is 2"),
        (["--max_target_length", "0"], "--max_target_length is 0"),
        (["--max_train_samples", "0"], "--max_train_samples is 0"),
        (["--per_device_train_batch_size", "0"], "--per_device_train_batch_size is 0"),
        (["--gradient_accumulation_steps", "0"], "--gradient_accumulation_steps is 0"),
        (["--learning_rate=-1"], "--learning_rate is -1.0"),
        (["--adam_beta2", "1"], "--adam_beta2 is 1.0"),
        (
            ["--label_smoothing_factor", "1"],
            "--label_smoothing_factor is 1.0; it must be in [0, 1)",
        ),
        (["--warmup_ratio", "1.5"], "--warmup_ratio is 1.5"),
        (["--num_train_epochs", "0"], "--num_train_epochs is 0.0"),
        (["--logging_steps", "0"], "--logging_steps is 0"),
        (["--save_steps", "1.5"], "--save_steps is 1.5; it must be a whole number"),
        (["--seed", "-1"], "--seed is -1"),
        (["--tokens_per_pack", "few"], "--tokens_per_pack is few"),
        (["--lr_scheduler_type", "polynomial", "--learning_rate", "1e-8"], "polynomial"),
        (["--fp16", "--bf16"], "--fp16 and --bf16 ask for different precisions"),
        (["--fp16", "--model_dtype", "bfloat16"], "keep one of them"),
    ],
)
def test_ranges(argv, words):
    assert words in refusal(*TRAIN, *argv)


@pytest.mark.parametrize(
    "task, file",
    [
        (["--do_eval"], "validation_file"),
        (["--eval_strategy", "epoch"], "validation_file"),
        (["--do_predict"], "test_file"),
    ],
)
def test_what_evaluation_needs(task, file):
    check_arguments(parse([*BASE, *task, f"--{file}", "rows.json"]), {})
    assert f"--{file} is missing; name the file of" in refusal(*BASE, *task)


def test_a_checkpoint_says_how_long_its_prefix_is():
    for flags in (TRAIN[: TRAIN.index("--pre_seq_len")], EVALUATE):
        check_arguments(parse([*flags, "--ptuning_checkpoint", "old"]), {})


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--pre_seq_len", "128"], "without --ptuning_checkpoint is a random prefix"),
        (
            ["--max_target_length", "2"],
            "--max_target_length is 2; it must be at least 3 in evaluation",
        ),
        (["--val_max_target_length", "2"], "--val_max_target_length is 2"),
        (["--per_device_eval_batch_size", "0"], "--per_device_eval_batch_size is 0"),
        (["--num_beams", "0"], "--num_beams is 0"),
        (["--generation_num_beams", "0"], "--generation_num_beams is 0"),
        (["--generation_max_length", "0"], "--generation_max_length is 0"),
        (["--max_eval_samples", "0"], "--max_eval_samples is 0"),
        (["--max_predict_samples", "0"], "--max_predict_samples is 0"),
        (["--eval_delay=-1"], "--eval_delay is -1"),
        (
            ["--metric_for_best_model", "bleu-4"],
            "the evaluation has loss (more with --predict_with_generate)",
        ),
        (
            ["--predict_with_generate", "--metric_for_best_model", "eval_f1"],
            "--metric_for_best_model is f1; the evaluation has loss, rouge-1, rouge-2, rouge-l, "
            "bleu-4",
        ),
    ],
)
def test_ranges_of_evaluation(argv, words):
    check_arguments(parse(EVALUATE), {})
    assert words in refusal(*EVALUATE, *argv)


def test_metrics_for_the_best_model():
    check_arguments(parse([*EVALUATE, "--metric_for_best_model", "eval_loss"]), {})
    for name in ("loss", "rouge-l", "eval_bleu-4"):
        check_arguments(
            parse([*EVALUATE, "--predict_with_generate", "--metric_for_best_model", name]), {}
        )


@pytest.mark.parametrize("package", ["jieba", "rouge_chinese", "nltk"])
def test_packages_of_the_scores(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    check_arguments(parse(EVALUATE), {})
    message = refusal(*EVALUATE, "--predict_with_generate")
    assert f"needs {package} for its scores; pip install 'glmkern[eval]'" in message


def test_agreeing_precisions_are_fine():
    check_arguments(parse([*TRAIN, "--bf16", "--model_dtype", "bfloat16"]), {})


def test_several_processes_need_the_launcher():
    launched = {
        "WORLD_SIZE": "4",
        "RANK": "1",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "29500",
    }
    check_arguments(parse(TRAIN), launched)
    del launched["RANK"], launched["MASTER_PORT"]
    with pytest.raises(InputError, match="WORLD_SIZE is 4, but RANK, MASTER_PORT are not set"):
        check_arguments(parse(TRAIN), launched)
    with pytest.raises(InputError, match="WORLD_SIZE is 'many'"):
        check_arguments(parse(TRAIN), {"WORLD_SIZE": "many"})


@pytest.mark.parametrize(
    "argv, words",
    [
        ([], "--evaluation_strategy is no and --save_strategy is steps"),
        (["--evaluation_strategy", "epoch"], "give both the same"),
        (
            ["--evaluation_strategy", "steps", "--eval_steps", "3", "--save_steps", "10"],
            "--save_steps is 10 and --eval_steps is 3",
        ),
        (
            ["--evaluation_strategy", "steps", "--eval_steps=-2"],
            "--eval_steps is -2; it must be above",
        ),
        (
            ["--evaluation_strategy", "steps", "--logging_steps", "0", "--logging_strategy", "no"],
            "--eval_steps is 0; it must be above 0",
        ),
        (
            ["--evaluation_strategy", "steps", "--eval_steps", "0.1", "--save_steps", "10"],
            "multiple",
        ),
    ],
)
def test_the_best_model_needs_an_evaluation_at_every_save(argv, words):
    flags = [*TRAIN, "--validation_file", "dev.json", "--load_best_model_at_end"]
    assert words in refusal(*flags, *argv)
    fitting = ["--evaluation_strategy", "steps", "--eval_steps", "0.1", "--save_steps", "0.3"]
    check_arguments(parse([*flags, *fitting]), {})


def test_output_folder(tmp_path):
    check_output_folder(tmp_path / "new", overwrite=False)
    check_output_folder(tmp_path, overwrite=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="--overwrite_output_dir"):
        check_output_folder(tmp_path, overwrite=False)
    check_output_folder(tmp_path, overwrite=True)
    with pytest.raises(InputError, match="is a file"):
        check_output_folder(tmp_path / "file", overwrite=True)
