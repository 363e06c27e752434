"""A small base model and the official ways to store it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from glmkern.checkpoint import expected_shapes
from glmkern.model.config import ChatGLMConfig

LAYOUTS = ("single_bin", "sharded_bin", "single_safetensors", "sharded_safetensors")


@pytest.fixture
def config() -> ChatGLMConfig:
    return ChatGLMConfig(
        num_layers=2,
        padded_vocab_size=37,
        hidden_size=20,
        ffn_hidden_size=15,
        kv_channels=8,
        num_attention_heads=6,
        multi_query_attention=True,
        multi_query_group_num=3,
        add_qkv_bias=True,
        torch_dtype="float32",
    )


@pytest.fixture
def state(config) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        name: torch.randn(shape, generator=generator)
        for name, shape in expected_shapes(config).items()
    }


@pytest.fixture
def prefix(config) -> dict[str, torch.Tensor]:
    return {"embedding.weight": torch.randn(5, config.kv_size)}


@pytest.fixture
def projected(config) -> dict[str, torch.Tensor]:
    hidden, columns = config.hidden_size, config.kv_size
    shapes = {
        "embedding.weight": (5, columns),
        "trans.0.weight": (hidden, columns),
        "trans.0.bias": (hidden,),
        "trans.2.weight": (columns, hidden),
        "trans.2.bias": (columns,),
    }
    return {name: torch.randn(shape) for name, shape in shapes.items()}


@pytest.fixture
def store(tmp_path, config):
    """store(tensors, layout) writes a folder as the official code does, and returns it."""

    def write(tensors: dict, layout: str = "single_bin") -> Path:
        folder = tmp_path / "model"
        config.save(folder)
        suffix = layout.rsplit("_", maxsplit=1)[1]
        save = torch.save if suffix == "bin" else save_file
        stem = "pytorch_model" if suffix == "bin" else "model"
        if layout.startswith("single"):
            save(tensors, folder / f"{stem}.{suffix}")
            return folder
        weight_map = {}
        for number, names in enumerate((list(tensors)[::2], list(tensors)[1::2]), 1):
            file = f"{stem}-{number:05d}-of-00002.{suffix}"
            save({name: tensors[name] for name in names}, folder / file)
            weight_map |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index), encoding="utf-8")
        return folder

    return write


@pytest.fixture(params=LAYOUTS)
def layout(request) -> str:
    return request.param
