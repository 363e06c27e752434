"""Which published base a folder holds, and prefixes of another one refused by name."""

import json
from dataclasses import replace

import pytest
import torch

from glmkern import ChatGLM
from glmkern.checkpoint import (
    check_family,
    export_glm,
    prefix_family,
    write_adapter,
    write_base,
    write_prefix,
)
from glmkern.errors import InputError
from glmkern.model.config import FAMILIES, UNKNOWN_FAMILY, ChatGLMConfig
from tests.model.models import SMALL, random_weights


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("chatglm2-6b", "chatglm2-6b"),
        ("chatglm2-6b-int4", "chatglm2-6b"),
        ("chatglm3-6b", "chatglm3-6b"),
    ],
)
def test_published_files(shared, tmp_path, name, family):
    config = ChatGLMConfig.from_pretrained(shared / "data/configs" / name)
    assert config.family == family
    replace(config, pre_seq_len=128, quantization_bit=4).save(tmp_path)
    assert ChatGLMConfig.from_pretrained(tmp_path).family == family


@pytest.mark.parametrize(
    ("change", "family"),
    [
        ({"_name_or_path": "THUDM/chatglm2-6b-32k", "rope_ratio": 16}, "chatglm2-6b-32k"),
        ({"rope_ratio": 16}, "chatglm2-6b-32k"),
        ({"_name_or_path": "THUDM/codegeex2-6b"}, "codegeex2-6b"),
        (
            {
                "_name_or_path": "",
                "torch_dtype": "bfloat16",
                "pad_token_id": None,
                "seq_length": 8192,
            },
            "codegeex2-6b",
        ),
        ({"_name_or_path": "zai-org/ChatGLM3-6B-base"}, "chatglm3-6b"),
        ({"_name_or_path": "/data/chatglm2-6b/tuned/chatglm3-6b"}, "chatglm3-6b"),
        (
            {
                "_name_or_path": "/models/mine",
                "auto_map": {
                    "AutoModel": "THUDM/chatglm3-6b--modeling_chatglm"
                    ".ChatGLMForConditionalGeneration"
                },
            },
            "chatglm3-6b",
        ),
        (
            {"_name_or_path": "/chatglm3-6b", "auto_map": {"AutoModel": "THUDM/chatglm2-6b--m.C"}},
            "chatglm3-6b",
        ),
        ({"_name_or_path": "/models/mine"}, UNKNOWN_FAMILY),
        ({"_name_or_path": None}, UNKNOWN_FAMILY),
    ],
)
def test_family(shared, change, family):
    path = shared / "data/configs/chatglm2-6b/config.json"
    config = ChatGLMConfig.from_dict({**json.loads(path.read_text()), **change})
    assert config.family == family
    assert ChatGLMConfig.from_dict(config.to_dict()).family == family


def test_a_configuration_of_ones_own_is_no_published_base():
    assert ChatGLMConfig().family == ChatGLMConfig.from_dict(SMALL).family == UNKNOWN_FAMILY


MARKS = {
    "chatglm2-6b": {"_name_or_path": "THUDM/chatglm2-6b"},
    "chatglm2-6b-32k": {"rope_ratio": 16},
    "chatglm3-6b": {"_name_or_path": "THUDM/chatglm3-6b"},
    "codegeex2-6b": {"_name_or_path": "THUDM/codegeex2-6b"},
    UNKNOWN_FAMILY: {},
}


def small_config(family: str) -> ChatGLMConfig:
    return ChatGLMConfig.from_dict(SMALL | MARKS[family])


def checkpoint(folder, family, layout):
    """A prefix in `layout` that knows its family; returns its path."""
    config = small_config(family)
    rows = torch.randn(5, config.kv_size)
    if layout == "peft":
        return write_adapter(folder / "peft", rows, config)
    state = {"embedding.weight": rows}
    if layout == "bin":
        path = write_prefix(folder / "bin", state)
        replace(config, pre_seq_len=5).save(path.parent)
        return path.parent
    return write_prefix(folder / "safetensors", state, "safetensors", family)


@pytest.mark.parametrize("layout", ["bin", "safetensors", "peft"])
@pytest.mark.parametrize("trained", MARKS)
def test_what_a_prefix_says_of_its_base(tmp_path, trained, layout):
    path = checkpoint(tmp_path, trained, layout)
    assert prefix_family(path) == prefix_family(str(path)) == trained
    for family in MARKS:
        config = small_config(family)
        if UNKNOWN_FAMILY in (trained, family) or trained == family:
            check_family(path, config)
            continue
        with pytest.raises(
            InputError,
            match=f"the prefix {path} was trained on {trained}, but the "
            f"base is {family}; load it on {trained}, or",
        ):
            check_family(path, config)
    assert set(MARKS) == {*FAMILIES, UNKNOWN_FAMILY}


@pytest.mark.parametrize("layout", ["bin", "safetensors", "peft"])
def test_loading_on_another_base(tmp_path, layout):
    config = small_config("chatglm2-6b")
    base = write_base(tmp_path / "base", config, random_weights(config))
    path = checkpoint(tmp_path, "chatglm3-6b", layout)
    for folder in (base, export_glm(base, tmp_path / "glm")):
        with pytest.raises(InputError, match="trained on chatglm3-6b, but the base is chatglm2-6b"):
            ChatGLM.from_pretrained(folder, "cpu", prefix_checkpoint=path)
        right = checkpoint(tmp_path / "right", "chatglm2-6b", layout)
        ChatGLM.from_pretrained(folder, "cpu", prefix_checkpoint=right)


def test_a_file_alone_cannot_be_checked(tmp_path):
    path = write_prefix(tmp_path, {"embedding.weight": torch.zeros(5, 144)})
    for source in (path, tmp_path):
        assert prefix_family(source) == UNKNOWN_FAMILY
        check_family(source, small_config("chatglm2-6b"))
    # nor does a config.json that is none keep a prefix from being loaded
    (tmp_path / "config.json").write_text("{")
    assert prefix_family(path) == UNKNOWN_FAMILY
