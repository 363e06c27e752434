"""The tiny recorded model and the rows of its recorded training runs."""

import json

import pytest
import torch
from safetensors.torch import load_file

from glmkern.chatglm import ChatGLM
from glmkern.checkpoint import expected_shapes
from glmkern.model.config import ChatGLMConfig
from glmkern.training.data.rows import Row
from tests.training.stand_in import OFFICIAL


@pytest.fixture
def tiny(golden):
    folder = golden / "chatglm2_tiny"
    config = ChatGLMConfig.from_dict(json.loads((folder / "config.json").read_text()))
    weights = load_file(folder / "weights.safetensors")

    def build(projection: bool, dtype: torch.dtype = torch.float32) -> ChatGLM:
        model = ChatGLM(config, pre_seq_len=8, prefix_projection=projection)
        model.load_base([(name, weights[name]) for name in expected_shapes(config)], dtype, "cpu")
        start = load_file(folder / f"prefix_{'proj' if projection else 'noproj'}.safetensors")
        model.prefix_encoder.load_state_dict(
            {name.removeprefix(OFFICIAL): value for name, value in start.items()}
        )
        return model

    return build


@pytest.fixture
def tiny_rows(golden) -> list[Row]:
    recorded = load_file(golden / "chatglm2_tiny" / "train_hf_adamw_noproj.safetensors")
    lengths = (recorded["X"] != 0).sum(1).tolist()  # right-padded with 0
    return [
        Row(x[:n].tolist(), y[:n].tolist())
        for n, x, y in zip(lengths, recorded["X"], recorded["Y"], strict=True)
    ]
