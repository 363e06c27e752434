"""ChatGLMConfig: published files load verbatim, and what is not computed is refused by name."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch

from glmkern.errors import InputError
from glmkern.model.config import ChatGLMConfig

# The fields of a config.json from the first days of the release, as a training run saved them.
FIRST_RELEASE = {
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_query_key_layer_scaling": True,
    "apply_residual_connection_post_layernorm": False,
    "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True,
    "bias_dropout_fusion": True,
    "eos_token_id": 2,
    "ffn_hidden_size": 13696,
    "fp32_residual_connection": False,
    "hidden_dropout": 0.0,
    "hidden_size": 4096,
    "kv_channels": 128,
    "layernorm_epsilon": 1e-05,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "num_attention_heads": 32,
    "num_layers": 28,
    "original_rope": True,
    "pad_token_id": 2,
    "padded_vocab_size": 65024,
    "post_layer_norm": True,
    "pre_seq_len": 136,
    "prefix_projection": False,
    "quantization_bit": 0,
    "rmsnorm": True,
    "seq_length": 32768,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "use_cache": True,
    "vocab_size": 65024,
}


@pytest.fixture
def folder(tmp_path):
    """Write an object as config.json; returns its folder."""

    def write(values):
        text = values if isinstance(values, str) else json.dumps(values)
        (tmp_path / "config.json").write_text(text, encoding="utf-8")
        return tmp_path

    return write


@pytest.mark.parametrize("name", ["chatglm2-6b", "chatglm2-6b-int4", "chatglm3-6b"])
def test_published_files_load_and_round_trip(shared, tmp_path, name):
    published = json.loads((shared / "data/configs" / name / "config.json").read_text())
    config = ChatGLMConfig.from_pretrained(shared / "data/configs" / name)
    assert published.items() <= config.to_dict().items()
    assert config.extra.keys() == {
        "_name_or_path",
        "architectures",
        "auto_map",
        "transformers_version",
    }
    config.save(tmp_path)
    assert ChatGLMConfig.from_pretrained(tmp_path) == config


def test_recorded_tiny_file_loads_verbatim(golden):
    published = json.loads((golden / "chatglm2_tiny/config.json").read_text())
    config = ChatGLMConfig.from_dict(published)
    assert published.items() <= config.to_dict().items()
    assert config.dtype == torch.float32


def test_first_release_fields_load_verbatim():
    config = ChatGLMConfig.from_dict(FIRST_RELEASE)
    assert FIRST_RELEASE.items() <= config.to_dict().items()
    assert config.extra == {}
    assert config.pad_token_id == config.eos_token_id == 2
    assert config.pre_seq_len * config.kv_size == 1_949_696


def test_class_defaults_are_the_official_ones():
    config = ChatGLMConfig()
    assert config.seq_length == 2048
    assert config.multi_query_attention is False
    assert config.multi_query_group_num == 1
    assert config.add_qkv_bias is False
    assert config.tie_word_embeddings is True
    assert config.max_length == 20
    assert config.vocab_size == config.padded_vocab_size == 65024
    assert config.dtype == torch.float32


def test_every_field_is_documented():
    for field in dataclasses.fields(ChatGLMConfig):
        if field.name != "extra":
            assert f"        {field.name}: " in ChatGLMConfig.__doc__


def test_sizes_of_chatglm2_6b(shared):
    config = ChatGLMConfig.from_pretrained(shared / "data/configs/chatglm2-6b")
    assert (config.num_groups, config.query_size, config.qkv_size) == (2, 4096, 4608)
    assert (config.kv_size, config.rotary_dim) == (14336, 64)
    assert config.dtype == torch.float16


def test_sizes_without_multi_query_attention():
    config = ChatGLMConfig(num_attention_heads=6, kv_channels=8)
    assert (config.num_groups, config.query_size, config.qkv_size) == (6, 48, 3 * 48)


@pytest.mark.parametrize("spelling", ["bfloat16", "torch.bfloat16", torch.bfloat16])
def test_torch_dtype_spellings(spelling):
    config = ChatGLMConfig(torch_dtype=spelling)
    assert (config.torch_dtype, config.dtype) == ("bfloat16", torch.bfloat16)


def test_newer_dtype_key_is_torch_dtype():
    assert ChatGLMConfig.from_dict({"dtype": "float16"}).dtype == torch.float16


def test_null_quantization_bit_is_none_at_all():
    assert ChatGLMConfig.from_dict({"quantization_bit": None}).quantization_bit == 0


def test_unknown_keys_are_kept():
    config = ChatGLMConfig.from_dict({"num_layers": 3, "my_note": {"a": [1]}})
    assert config.extra == {"my_note": {"a": [1]}}
    assert ChatGLMConfig.from_dict(config.to_dict()) == config


def test_rope_ratio_of_the_32k_variant_is_kept():
    assert ChatGLMConfig.from_dict({"rope_ratio": 16}).rope_ratio == 16


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kv_channels": None}, r"kv_channels is None.* 4096 // 32"),
        ({"kv_channels": 6}, r"kv_channels is 6; .* multiple of 4"),
        ({"kv_channels": 7}, r"kv_channels is 7; .* multiple of 4"),
        (
            {"multi_query_attention": True, "multi_query_group_num": 5},
            r"num_attention_heads 32 is not divisible by multi_query_group_num 5",
        ),
        (
            {"pre_seq_len": 8, "multi_query_group_num": 2},
            r"pre_seq_len is 8 with multi_query_attention False.* 2; .*num_attention_heads 32",
        ),
        ({"pre_seq_len": 0}, r"pre_seq_len is 0; it must be a positive integer"),
        ({"num_layers": "28"}, r"num_layers is '28'; it must be a positive integer"),
        ({"hidden_size": True}, r"hidden_size is True; it must be a positive integer"),
        ({"seq_length": 0}, r"seq_length is 0; it must be a positive integer"),
        ({"rmsnorm": 1}, r"rmsnorm is 1; it must be true or false"),
        ({"layernorm_epsilon": "1e-5"}, r"layernorm_epsilon is '1e-5'; it must be a number and"),
        (
            {"layernorm_epsilon": -1.0},
            r"layernorm_epsilon is -1.0; it must be a number and not negative",
        ),
        ({"hidden_dropout": 1.0}, r"hidden_dropout is 1.0; it must be a number in \[0, 1\)"),
        ({"rope_ratio": 0}, r"rope_ratio is 0; it must be 1, or 16"),
        ({"rope_ratio": None}, r"rope_ratio is None; it must be 1, or 16"),
        ({"quantization_bit": 3}, r"quantization_bit is 3; it must be one of 0, 4, 8"),
        ({"torch_dtype": "int8"}, r"torch_dtype is 'int8'; it must be one of None, float16"),
        ({"model_type": "llama"}, r"model_type is 'llama'; supported is 'chatglm'"),
    ],
)
def test_unsupported_values_are_refused_by_name(values, message):
    with pytest.raises(ValueError, match=message):
        ChatGLMConfig.from_dict(values)


def test_a_prefix_without_multi_query_attention_needs_as_many_groups_as_heads():
    config = ChatGLMConfig(num_attention_heads=4, multi_query_group_num=4, pre_seq_len=8)
    assert config.kv_size == 28 * 2 * 4 * 128
    with pytest.raises(ValueError, match="pre_seq_len is 8"):
        dataclasses.replace(config, multi_query_group_num=2)


def test_validate_sees_fields_set_later():
    config = ChatGLMConfig(multi_query_group_num=2)
    config.pre_seq_len = 4
    with pytest.raises(ValueError, match="pre_seq_len is 4"):
        config.validate()


@pytest.mark.parametrize("dtype", [torch.float16, "bfloat16", torch.float64])
def test_fp32_residual_connection_needs_fp32_weights(dtype):
    ChatGLMConfig().check_dtype(dtype)
    config = ChatGLMConfig(fp32_residual_connection=True)
    config.check_dtype(torch.float32)
    with pytest.raises(ValueError, match=r"fp32_residual_connection is True.* the weights are "):
        config.check_dtype(dtype)


def test_chatglm_6b_is_recognised_and_refused(shared):
    with pytest.raises(InputError, match=r"config.json: this is ChatGLM-6B, the first version"):
        ChatGLMConfig.from_pretrained(shared / "data/configs/chatglm-6b")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"config.json cannot be read as JSON \(.*line 1"),
        ("[1]", r"config.json holds a JSON list"),
        ({"num_layers": -1}, r"config.json: num_layers is -1"),
        ({"model_type": "glm4"}, r"config.json: model_type is 'glm4'"),
        ({"model_type": "glm"}, r"config.json: num_hidden_layers is missing, which"),
    ],
)
def test_a_broken_file_is_an_input_error_naming_it(folder, text, message):
    with pytest.raises(InputError, match=message):
        ChatGLMConfig.from_pretrained(folder(text))


def test_a_file_that_is_not_utf8(tmp_path):
    (tmp_path / "config.json").write_bytes(b'{"num_layers": "\xff"}')
    with pytest.raises(InputError, match="cannot be read as JSON"):
        ChatGLMConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("native", [False, True])
def test_reading_and_saving_does_not_import_torch(folder, tmp_path, native):
    config = ChatGLMConfig(num_layers=3, torch_dtype="float16", multi_query_attention=True)
    path = folder(config.to_glm_dict() if native else config.to_dict())
    program = (
        "import sys; from glmkern.model.config import ChatGLMConfig;"
        f"ChatGLMConfig.from_pretrained({str(path)!r}).save({str(tmp_path / 'out')!r});"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    assert ChatGLMConfig.from_pretrained(tmp_path / "out").num_layers == 3
