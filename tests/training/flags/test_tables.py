"""The tables of flags, against the official ones."""

import json
from pathlib import Path

import pytest

from glmkern.training.flags.arguments import honoured
from glmkern.training.flags.docs import flags_markdown
from glmkern.training.flags.parser import parse
from glmkern.training.flags.tables import ACCEPTED, ALIASES, REFUSED

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


def test_the_tables_are_documented():
    path = REPOSITORY / "docs" / "flags.md"
    assert path.read_text(encoding="utf-8") == flags_markdown(), (
        "docs/flags.md is not current: python -m glmkern.training.flags.docs > docs/flags.md"
    )
