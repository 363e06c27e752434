"""A small base, rows and the flags of a training run."""

import json
from pathlib import Path

import pytest

from tests.official import PREFIX_LENGTH, write_base


@pytest.fixture(scope="module")
def base(shared, tmp_path_factory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"), shared / "data" / "tokenizer")


@pytest.fixture
def rows(shared, tmp_path) -> Path:
    """Twelve rows of AdvertiseGen, two of them without an answer."""
    lines = (shared / "data" / "advertisegen" / "train.json").read_text().split("\n")[:12]
    records = [json.loads(line) for line in lines]
    records[3]["summary"] = records[7]["summary"] = ""
    path = tmp_path / "train.json"
    path.write_text("\n".join(json.dumps(record, ensure_ascii=False) for record in records))
    return path


@pytest.fixture
def flags(base, rows, tmp_path) -> dict[str, object]:
    """The published train.sh, made small."""
    return {
        "do_train": True,
        "train_file": str(rows),
        "preprocessing_num_workers": 10,
        "prompt_column": "content",
        "response_column": "summary",
        "overwrite_cache": True,
        "model_name_or_path": str(base),
        "output_dir": str(tmp_path / "out"),
        "overwrite_output_dir": True,
        "max_source_length": 24,
        "max_target_length": 16,
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 1,
        "gradient_accumulation_steps": 4,
        "predict_with_generate": True,
        "max_steps": 4,
        "logging_steps": 2,
        "save_steps": 2,
        "learning_rate": "2e-2",
        "pre_seq_len": PREFIX_LENGTH,
        "disable_tqdm": True,
    }
