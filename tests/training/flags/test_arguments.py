"""The official flags: each in one table, their defaults, spellings, and one-line mistakes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from glmkern.errors import InputError
from glmkern.training.flags.arguments import Arguments, honoured
from glmkern.training.flags.docs import flags_markdown
from glmkern.training.flags.parser import parse
from glmkern.training.flags.tables import ACCEPTED, ALIASES, REFUSED
from glmkern.training.flags.validation import check_arguments, check_output_folder

REPOSITORY = Path(__file__).resolve().parents[3]

# Names and defaults of ptuning/arguments.py and of Seq2SeqTrainingArguments (transformers 4.30.2).
OFFICIAL = {
    "model_name_or_path": None,
    "ptuning_checkpoint": None,
    "config_name": None,
    "tokenizer_name": None,
    "cache_dir": None,
    "use_fast_tokenizer": True,
    "model_revision": "main",
    "use_auth_token": False,
    "resize_position_embeddings": None,
    "quantization_bit": None,
    "pre_seq_len": None,
    "prefix_projection": False,
    "lang": None,
    "dataset_name": None,
    "dataset_config_name": None,
    "prompt_column": None,
    "response_column": None,
    "history_column": None,
    "train_file": None,
    "validation_file": None,
    "test_file": None,
    "overwrite_cache": False,
    "preprocessing_num_workers": None,
    "max_source_length": 1024,
    "max_target_length": 128,
    "val_max_target_length": None,
    "pad_to_max_length": False,
    "max_train_samples": None,
    "max_eval_samples": None,
    "max_predict_samples": None,
    "num_beams": None,
    "ignore_pad_token_for_loss": True,
    "source_prefix": "",
    "forced_bos_token": None,
    "output_dir": None,
    "overwrite_output_dir": False,
    "do_train": False,
    "do_eval": False,
    "do_predict": False,
    "evaluation_strategy": "no",
    "prediction_loss_only": False,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,
    "per_gpu_train_batch_size": None,
    "per_gpu_eval_batch_size": None,
    "gradient_accumulation_steps": 1,
    "eval_accumulation_steps": None,
    "eval_delay": 0,
    "learning_rate": 5e-5,
    "weight_decay": 0.0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "max_grad_norm": 1.0,
    "num_train_epochs": 3.0,
    "max_steps": -1,
    "lr_scheduler_type": "linear",
    "warmup_ratio": 0.0,
    "warmup_steps": 0,
    "log_level": "passive",
    "log_level_replica": "warning",
    "log_on_each_node": True,
    "logging_dir": None,
    "logging_strategy": "steps",
    "logging_first_step": False,
    "logging_steps": 500,
    "logging_nan_inf_filter": True,
    "save_strategy": "steps",
    "save_steps": 500,
    "save_total_limit": None,
    "save_safetensors": False,
    "save_on_each_node": False,
    "no_cuda": False,
    "use_mps_device": False,
    "seed": 42,
    "data_seed": None,
    "jit_mode_eval": False,
    "use_ipex": False,
    "bf16": False,
    "fp16": False,
    "fp16_opt_level": "O1",
    "half_precision_backend": "auto",
    "bf16_full_eval": False,
    "fp16_full_eval": False,
    "tf32": None,
    "local_rank": -1,
    "ddp_backend": None,
    "tpu_num_cores": None,
    "tpu_metrics_debug": False,
    "debug": "",
    "dataloader_drop_last": False,
    "eval_steps": None,
    "dataloader_num_workers": 0,
    "past_index": -1,
    "run_name": None,
    "disable_tqdm": None,
    "remove_unused_columns": True,
    "label_names": None,
    "load_best_model_at_end": False,
    "metric_for_best_model": None,
    "greater_is_better": None,
    "ignore_data_skip": False,
    "sharded_ddp": "",
    "fsdp": "",
    "fsdp_min_num_params": 0,
    "fsdp_config": None,
    "fsdp_transformer_layer_cls_to_wrap": None,
    "deepspeed": None,
    "label_smoothing_factor": 0.0,
    "optim": "adamw_hf",
    "optim_args": None,
    "adafactor": False,
    "group_by_length": False,
    "length_column_name": "length",
    "report_to": None,
    "ddp_find_unused_parameters": None,
    "ddp_bucket_cap_mb": None,
    "dataloader_pin_memory": True,
    "skip_memory_metrics": True,
    "use_legacy_prediction_loop": False,
    "push_to_hub": False,
    "resume_from_checkpoint": None,
    "hub_model_id": None,
    "hub_strategy": "every_save",
    "hub_token": None,
    "hub_private_repo": False,
    "gradient_checkpointing": False,
    "include_inputs_for_metrics": False,
    "fp16_backend": "auto",
    "push_to_hub_model_id": None,
    "push_to_hub_organization": None,
    "push_to_hub_token": None,
    "mp_parameters": "",
    "auto_find_batch_size": False,
    "full_determinism": False,
    "torchdynamo": None,
    "ray_scope": "last",
    "ddp_timeout": 1800,
    "torch_compile": False,
    "torch_compile_backend": None,
    "torch_compile_mode": None,
    "xpu_backend": None,
    "sortish_sampler": False,
    "predict_with_generate": False,
    "generation_max_length": None,
    "generation_num_beams": None,
    "generation_config": None,
}
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


@pytest.mark.parametrize("name", OFFICIAL)
def test_every_official_flag_is_in_one_table(name):
    tables = [honoured(), ACCEPTED, REFUSED, ALIASES]
    assert sum(name in table for table in tables) == 1


@pytest.mark.parametrize("name", sorted(OFFICIAL.keys() - ALIASES.keys()))
def test_official_default(name):
    table = next(each for each in (honoured(), ACCEPTED, REFUSED) if name in each)
    assert table[name].default == OFFICIAL[name]


def test_tables_hold_nothing_else_than_official_and_own_flags():
    own = {name for name, each in honoured().items() if each.metadata["own"]}
    assert honoured().keys() - own <= OFFICIAL.keys()
    assert (ACCEPTED.keys() | REFUSED.keys()) - OFFICIAL.keys() == {"ddp_broadcast_buffers"}
    assert set(ALIASES.values()) <= honoured().keys() | ACCEPTED.keys() | REFUSED.keys()


@pytest.mark.parametrize("name", sorted(OFFICIAL))
def test_official_default_given_explicitly_changes_nothing(name, tmp_path):
    path = tmp_path / "flags.json"
    path.write_text(json.dumps({name: OFFICIAL[name]}))
    assert parse([str(path)]) == parse([])
    if OFFICIAL[name] not in (None, ""):
        assert parse([f"--{name}", str(OFFICIAL[name])]) == parse([])


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


def test_flags_behind_a_file_go_before_it(tmp_path):
    path = tmp_path / "flags.json"
    path.write_text('{"max_steps": 3, "seed": 4}')
    training = parse([str(path), "--max_steps", "5", "--group-by-length"]).training
    assert (training.max_steps, training.seed, training.group_by_length) == (5, 4, True)


def test_output_folder(tmp_path):
    check_output_folder(tmp_path / "new", overwrite=False)
    check_output_folder(tmp_path, overwrite=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="--overwrite_output_dir"):
        check_output_folder(tmp_path, overwrite=False)
    check_output_folder(tmp_path, overwrite=True)
    with pytest.raises(InputError, match="is a file"):
        check_output_folder(tmp_path / "file", overwrite=True)


def test_help_lists_every_honoured_flag(capsys):
    with pytest.raises(SystemExit) as end:
        parse(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert all(f"--{name} " in text for name in honoured())
    assert max(map(len, text.split("\n"))) <= 120


def test_the_tables_are_documented():
    path = REPOSITORY / "docs" / "flags.md"
    assert path.read_text(encoding="utf-8") == flags_markdown(), (
        "docs/flags.md is not current: python -m glmkern.training.flags.docs > docs/flags.md"
    )


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
