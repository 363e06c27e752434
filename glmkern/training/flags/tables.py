"""Official flags that the command line knows and does not act on, each with its reason.

Two of the three tables of flags live here: `ACCEPTED` (no effect) and `REFUSED` (by name). The
third, the honoured ones, is the dataclasses of `arguments.py`. Moving a flag from one table to
another is moving one entry; the parser, `docs/flags.md` and the tests follow.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Flag:
    """`default` is the official default: giving it explicitly asks for nothing."""

    default: Any
    reason: str


_UNUSED = "the official script never reads it"
_HUB = "it only acts with --push_to_hub"
_FSDP = "it only acts with --fsdp"
_FIRST_RANK = "the first process alone prints and writes"
_ONE_SUM = "processes share one sum a step, of the prefix gradient, which has nothing to tune"
_LOGS = "the numbers always go to trainer_log.jsonl and trainer_state.json"
_NO_WORKERS = "rows are tokenised once and stay in memory, so there is nothing to load in parallel"
_NO_PADDING = "rows are packed end to end, so there is no padding to save"
_COMPILED = "the kernels are compiled ahead of time"
_PRECISION = "--model_dtype, --fp16 and --bf16 choose the precision"

ACCEPTED: dict[str, Flag] = {
    # ModelArguments
    "config_name": Flag(None, _UNUSED),
    "tokenizer_name": Flag(None, _UNUSED),
    "cache_dir": Flag(None, "data files are read in place, without a cache"),
    "use_fast_tokenizer": Flag(True, _UNUSED),
    "model_revision": Flag("main", _UNUSED),
    "use_auth_token": Flag(False, "nothing is downloaded"),
    "resize_position_embeddings": Flag(None, _UNUSED),
    # DataTrainingArguments
    "lang": Flag(None, _UNUSED),
    "dataset_config_name": Flag(None, _UNUSED),
    "overwrite_cache": Flag(False, "rows are tokenised afresh in every run, without a cache"),
    "preprocessing_num_workers": Flag(None, _NO_WORKERS),
    "pad_to_max_length": Flag(False, _UNUSED),
    "forced_bos_token": Flag(None, _UNUSED),
    # Seq2SeqTrainingArguments: evaluation
    "generation_config": Flag(None, _UNUSED),
    "eval_accumulation_steps": Flag(None, "answers are scored as they come"),
    "include_inputs_for_metrics": Flag(False, "the official scores do not look at the prompts"),
    "use_legacy_prediction_loop": Flag(False, "there is one loop"),
    "jit_mode_eval": Flag(False, _COMPILED),
    "bf16_full_eval": Flag(False, _PRECISION),
    "fp16_full_eval": Flag(False, _PRECISION),
    "label_names": Flag(None, "the labels of a row are always the answer's tokens"),
    # logging
    "log_level": Flag("passive", "the header and the log lines are always printed"),
    "log_level_replica": Flag("warning", _FIRST_RANK),
    "log_on_each_node": Flag(True, _FIRST_RANK),
    "logging_nan_inf_filter": Flag(True, "a NaN or infinite loss stops the run, never hidden"),
    "run_name": Flag(None, _LOGS),
    "skip_memory_metrics": Flag(True, "the progress bar shows the peak memory"),
    "save_on_each_node": Flag(False, _FIRST_RANK),
    # data loading
    "dataloader_num_workers": Flag(0, _NO_WORKERS),
    "dataloader_pin_memory": Flag(True, _NO_WORKERS),
    "remove_unused_columns": Flag(True, "only the named columns are read"),
    "length_column_name": Flag("length", _NO_PADDING),
    "sortish_sampler": Flag(False, _NO_PADDING),
    "ignore_data_skip": Flag(False, "a resumed run always goes on at its place in the data"),
    # how it is computed
    "gradient_checkpointing": Flag(False, "--recompute chooses what is computed twice"),
    "fp16_opt_level": Flag("O1", _PRECISION),
    "half_precision_backend": Flag("auto", _PRECISION),
    "fp16_backend": Flag("auto", _PRECISION),
    "use_ipex": Flag(False, _COMPILED),
    "torch_compile": Flag(False, _COMPILED),
    "torch_compile_backend": Flag(None, _COMPILED),
    "torch_compile_mode": Flag(None, _COMPILED),
    "torchdynamo": Flag(None, _COMPILED),
    # several processes
    "xpu_backend": Flag(None, _ONE_SUM),
    "ddp_find_unused_parameters": Flag(None, _ONE_SUM),
    "ddp_bucket_cap_mb": Flag(None, _ONE_SUM),
    "ddp_broadcast_buffers": Flag(None, _ONE_SUM),
    "ray_scope": Flag("last", "there is no hyper-parameter search"),
    "fsdp_min_num_params": Flag(0, _FSDP),
    "fsdp_config": Flag(None, _FSDP),
    "fsdp_transformer_layer_cls_to_wrap": Flag(None, _FSDP),
    "tpu_metrics_debug": Flag(False, "it only acts with --tpu_num_cores"),
    # the hub
    "hub_model_id": Flag(None, _HUB),
    "hub_strategy": Flag("every_save", _HUB),
    "hub_token": Flag(None, _HUB),
    "hub_private_repo": Flag(False, _HUB),
    "push_to_hub_model_id": Flag(None, _HUB),
    "push_to_hub_organization": Flag(None, _HUB),
    "push_to_hub_token": Flag(None, _HUB),
}

_WHOLE_MODEL = "a prefix of a few MB is trained and the base is frozen: nothing is to be sharded"

REFUSED: dict[str, Flag] = {
    "dataset_name": Flag(None, "the official script fails with it; name a file with --train_file"),
    "optim_args": Flag(None, "adamw_hf and adamw_torch take none"),
    "adafactor": Flag(False, "--optim knows adamw_hf, adamw_torch and adamw_torch_fused"),
    "auto_find_batch_size": Flag(
        False, "--tokens_per_pack bounds the memory without changing the batch"
    ),
    "past_index": Flag(-1, "ChatGLM does not feed hidden states from one batch to the next"),
    "debug": Flag("", "a NaN or infinite loss already stops the run with its step and rows"),
    "deepspeed": Flag(None, _WHOLE_MODEL),
    "sharded_ddp": Flag("", _WHOLE_MODEL),
    "fsdp": Flag("", _WHOLE_MODEL),
    "mp_parameters": Flag("", _WHOLE_MODEL),
    "tpu_num_cores": Flag(None, "it runs on CPUs and NVIDIA GPUs"),
    "use_mps_device": Flag(False, "it runs on CPUs and NVIDIA GPUs"),
    "push_to_hub": Flag(False, "nothing is uploaded; a checkpoint folder can be uploaded as it is"),
}

ALIASES: dict[str, str] = {
    "eval_strategy": "evaluation_strategy",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "use_cpu": "no_cuda",
    "full_determinism": "deterministic",
}
