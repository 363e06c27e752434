"""A checkpoint, rows to predict and the flags of the published evaluate.sh."""

import json
from pathlib import Path

import pytest
import torch

from glmkern.checkpoint import write_prefix
from glmkern.tokenizer import ChatGLMTokenizer
from tests.verbs.predict.official_scores import PREFIX_LENGTH, SOURCE, TARGET


@pytest.fixture(scope="module")
def tokenizer(base) -> ChatGLMTokenizer:
    return ChatGLMTokenizer.from_pretrained(base)


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """What a training run left in the output folder: a prefix and its results."""
    folder = tmp_path / "out" / "checkpoint-3000"
    folder.mkdir(parents=True)
    write_prefix(folder, {"embedding.weight": torch.randn(PREFIX_LENGTH, 16)})
    (tmp_path / "out" / "all_results.json").write_text('{"train_loss": 3.5}')
    return folder


@pytest.fixture
def records(shared) -> list[dict[str, str]]:
    """Seven rows of AdvertiseGen whose prompts have several lengths."""
    lines = (shared / "data" / "advertisegen" / "dev.json").read_text().split("\n")[20:27]
    records = [json.loads(line) for line in lines]
    return [
        {**record, "content": record["content"][: 14 + 9 * i]} for i, record in enumerate(records)
    ]


@pytest.fixture
def dev(records, tmp_path) -> Path:
    path = tmp_path / "dev.json"
    path.write_text("\n".join(json.dumps(record, ensure_ascii=False) for record in records))
    return path


@pytest.fixture
def flags(base, dev, checkpoint) -> dict[str, object]:
    """The published evaluate.sh, made small."""
    return {
        "do_predict": True,
        "validation_file": dev,
        "test_file": dev,
        "overwrite_cache": True,
        "prompt_column": "content",
        "response_column": "summary",
        "model_name_or_path": base,
        "ptuning_checkpoint": checkpoint,
        "output_dir": checkpoint.parent,
        "overwrite_output_dir": True,
        "max_source_length": SOURCE,
        "max_target_length": TARGET,
        "per_device_eval_batch_size": 1,
        "predict_with_generate": True,
        "pre_seq_len": PREFIX_LENGTH,
        "quantization_bit": 4,
    }


@pytest.fixture
def plain(flags) -> dict[str, object]:
    """The same without a prefix and in full precision."""
    return {
        name: value
        for name, value in flags.items()
        if name not in ("ptuning_checkpoint", "pre_seq_len", "quantization_bit")
    }
