"""PEFT adapters: PEFT's logits from ours, ours from PEFT's, and what rotating keeps."""

import json
import math
from dataclasses import replace

import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GlmForCausalLM
from transformers.models.glm.modeling_glm import GlmRotaryEmbedding, apply_rotary_pos_emb

from bench.oracles import relative_error
from glmkern import ChatGLM
from glmkern.checkpoint import (
    export_glm,
    fold_prefix,
    read_adapter,
    read_prefix,
    tensor_files,
    write_adapter,
    write_base,
)
from glmkern.checkpoint.adapter import Geometry, rotate_keys
from glmkern.errors import InputError
from glmkern.model.config import ChatGLMConfig
from tests.model.models import SMALL, padded_batch, small_model

SHAPES = {
    "two groups": {},
    "one group": dict(multi_query_group_num=1),
    "three groups": dict(num_attention_heads=6, multi_query_group_num=3, kv_channels=20),
    "a group a head": dict(multi_query_group_num=4),
    "32K": dict(rope_ratio=16),
}
each_shape = pytest.mark.parametrize("overrides", SHAPES.values(), ids=SHAPES.keys())


@pytest.fixture
def folders(tmp_path):
    """folders(model): the official and the native folder of its base."""

    def write(model: ChatGLM):
        base = {name: weight for name, weight in model.state_dict().items() if "prefix" not in name}
        config = replace(model.config, pre_seq_len=None, prefix_projection=False)
        official = write_base(tmp_path / "base", config, base)
        return official, export_glm(official, tmp_path / "glm")

    return write


def flat_rows(model: ChatGLM) -> torch.Tensor:
    state = model.prefix_encoder.state_dict()
    return fold_prefix(state, model.config)["embedding.weight"]


def native_model(folder) -> GlmForCausalLM:
    return GlmForCausalLM.from_pretrained(folder, dtype=torch.float32)


@torch.no_grad()
def peft_logits(model, batch) -> torch.Tensor:
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
    return model.eval()(**inputs).logits


def our_logits(model: ChatGLM, batch) -> torch.Tensor:
    inputs = [batch[name] for name in ("input_ids", "attention_mask", "position_ids")]
    return model.eval()(*inputs).logits.detach()


def assert_same_logits(ours, theirs, batch):
    real = batch["attention_mask"].bool()
    assert relative_error(ours[real], theirs[real]) < 1e-5


@each_shape
@pytest.mark.parametrize("tokens", [1, 13])
@pytest.mark.parametrize("projection", [False, True])
def test_peft_computes_the_same_logits(tmp_path, folders, overrides, tokens, projection):
    model = small_model(overrides, pre_seq_len=tokens, projection=projection)
    official, native = folders(model)
    adapter = write_adapter(tmp_path / "adapter", flat_rows(model), model.config, str(native))
    peft = PeftModel.from_pretrained(native_model(native), adapter)
    batch = padded_batch([9, 1, 17, 4], SMALL["padded_vocab_size"], "left")
    assert_same_logits(our_logits(model, batch), peft_logits(peft, batch), batch)

    again = ChatGLM.from_pretrained(official, "cpu", prefix_checkpoint=adapter)
    assert_same_logits(our_logits(again, batch), our_logits(model, batch), batch)
    # without position ids PEFT counts from the number of virtual tokens, too
    ids = batch["input_ids"][2:3]
    with torch.no_grad():
        assert relative_error(model(ids).logits, peft(ids).logits) < 1e-5


def test_unrotated_keys_give_other_logits(tmp_path, folders):
    """What the rotation is for."""
    model = small_model(pre_seq_len=13)
    _, native = folders(model)
    adapter = write_adapter(tmp_path / "adapter", flat_rows(model), model.config)
    save_file({"prompt_embeddings": flat_rows(model)}, adapter / "adapter_model.safetensors")
    batch = padded_batch([17], SMALL["padded_vocab_size"], "left")
    theirs = peft_logits(PeftModel.from_pretrained(native_model(native), adapter), batch)
    assert relative_error(our_logits(model, batch), theirs) > 0.01


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_adapters_that_peft_saved(tmp_path, folders, groups, projection):
    """Trained on the native base by PEFT itself; with its projection they are saved flat."""
    official, native = folders(small_model(dict(multi_query_group_num=groups), pre_seq_len=None))
    settings = PrefixTuningConfig(
        task_type=TaskType.CAUSAL_LM,
        num_virtual_tokens=7,
        prefix_projection=projection,
        encoder_hidden_size=10,
    )
    peft = get_peft_model(native_model(native), settings)
    for parameter in peft.prompt_encoder.parameters():
        torch.nn.init.normal_(parameter)
    peft.save_pretrained(tmp_path / "theirs")
    batch = padded_batch([9, 1, 17, 4], SMALL["padded_vocab_size"], "left")
    for base in (official, native):
        ours = ChatGLM.from_pretrained(base, "cpu", prefix_checkpoint=tmp_path / "theirs")
        assert_same_logits(our_logits(ours, batch), peft_logits(peft, batch), batch)


def test_an_adapter_of_the_32k_base_that_peft_saved_again(tmp_path, folders):
    """Its metadata is gone, so that rope_ratio is that of the base."""
    model = small_model(dict(rope_ratio=16), pre_seq_len=9)
    official, native = folders(model)
    adapter = write_adapter(tmp_path / "adapter", flat_rows(model), model.config)
    PeftModel.from_pretrained(native_model(native), adapter).save_pretrained(tmp_path / "theirs")
    for each in (adapter, tmp_path / "theirs"):
        loaded = ChatGLM.from_pretrained(official, "cpu", prefix_checkpoint=each)
        assert relative_error(flat_rows(loaded), flat_rows(model)) < 1e-6
    # alone, the first says so itself
    assert relative_error(read_adapter(adapter), flat_rows(model)) < 1e-6
    assert relative_error(read_adapter(tmp_path / "theirs"), flat_rows(model)) > 0.1


@each_shape
@pytest.mark.parametrize("tokens", [1, 6, 129])
def test_what_rotating_keeps(overrides, tokens):
    config = ChatGLMConfig.from_dict(SMALL | overrides)
    geometry = Geometry.of(config)
    rows = torch.randn(tokens, config.kv_size) * torch.rand(tokens, 1) * 10
    rotated = rotate_keys(rows, geometry, tokens, config.rope_ratio)
    back = rotate_keys(rotated, geometry, -tokens, config.rope_ratio)

    def divided(x):
        return x.view(tokens, config.num_layers, 2, config.num_groups, config.kv_channels)

    half = config.kv_channels // 2
    for each in (rotated, back):
        assert torch.equal(divided(each)[:, :, 1], divided(rows)[:, :, 1])
        assert torch.equal(divided(each)[..., half:], divided(rows)[..., half:])
    pairs, again = (
        divided(x)[:, :, 0, :, :half].double().unflatten(-1, (-1, 2)) for x in (rows, back)
    )
    # Rotated, rounded, and rotated back and rounded: two roundings of at most 2^-24 of the pair.
    allowed = 2.0**-23 * (1 + 1e-6) * pairs.norm(dim=-1, keepdim=True)
    assert ((pairs - again).abs() <= allowed).all()
    assert not torch.equal(divided(rotated)[:, :, 0], divided(rows)[:, :, 0])


@each_shape
def test_rotation_against_transformers(overrides):
    """In float64, by the functions that rotate GlmForCausalLM's own keys."""
    from transformers import GlmConfig

    config = ChatGLMConfig.from_dict(SMALL | overrides)
    tokens = 11
    rows = torch.randn(tokens, config.kv_size)
    rotary = GlmRotaryEmbedding(GlmConfig(**config.to_glm_dict()))
    keys = rows.view(tokens, config.num_layers, 2, config.num_groups, config.kv_channels)[:, :, 0]
    keys = keys.double().flatten(1, 2).unsqueeze(0)  # [1, T, L * G, C]
    cos, sin = rotary(keys, torch.full((1, tokens), tokens))
    expected, _ = apply_rotary_pos_emb(keys, keys, cos, sin, unsqueeze_dim=2)
    rotated = rotate_keys(rows, Geometry.of(config), tokens, config.rope_ratio)
    ours = rotated.view(tokens, config.num_layers, 2, config.num_groups, config.kv_channels)
    # their angles are float32: 11 radians to half an ulp
    assert relative_error(ours[:, :, 0].flatten(1, 2), expected[0]) < math.ulp(11.0) * 2**29


# Folders that are not an adapter of a prefix


@pytest.fixture
def adapter(tmp_path):
    config = ChatGLMConfig.from_dict(SMALL)
    return write_adapter(tmp_path / "adapter", torch.randn(5, config.kv_size), config)


def test_files_of_an_adapter(adapter):
    assert {path.name for path in adapter.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    settings = json.loads((adapter / "adapter_config.json").read_text())
    geometry = (3, 24, 2)  # SMALL's layers, groups * channels, groups
    names = ("num_layers", "token_dim", "num_attention_heads")
    assert tuple(settings[name] for name in names) == geometry
    assert settings["base_model_name_or_path"] is None
    state = read_prefix(adapter)
    for path in (adapter / "adapter_model.safetensors", str(adapter)):
        assert torch.equal(read_prefix(path)["embedding.weight"], state["embedding.weight"])
    # as releases of PEFT before 0.7 saved
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    assert torch.equal(read_prefix(adapter)["embedding.weight"], state["embedding.weight"])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"peft_type": "LORA"}, "says peft_type 'LORA'; only 'PREFIX_TUNING' is a prefix"),
        ({"num_layers": 0}, "says num_layers 0; it must be a positive integer"),
        ({"token_dim": None}, "says token_dim None; it must be a positive integer"),
        ({"num_virtual_tokens": "5"}, "says num_virtual_tokens '5'; it must be a positive integer"),
        ({"num_attention_heads": True}, "says num_attention_heads True; it must be"),
        ({"num_attention_heads": 4}, "says token_dim 24 in num_attention_heads 4; a head has a"),
        ({"num_transformer_submodules": 2}, "says num_transformer_submodules 2; Glm.* has 1"),
        (
            {"num_virtual_tokens": 6},
            r"has shape \[5, 144\], but adapter_config.json asks for \[6, 144",
        ),
    ],
)
def test_adapters_that_are_refused(adapter, change, sentence):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(InputError, match=sentence):
        read_prefix(adapter)


@pytest.mark.parametrize("text", ["{", "[]", "{}", "3"])
def test_a_configuration_that_is_none(adapter, text):
    (adapter / "adapter_config.json").write_text(text)
    with pytest.raises(InputError, match="adapter_config.json is not the configuration of a PEFT"):
        read_prefix(adapter)


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        (
            {"base_model.q.lora_A.weight": torch.zeros(2, 2)},
            "holds base_model.q.lora_A.weight; the",
        ),
        (
            {"prompt_embeddings": torch.zeros(5, 144, dtype=torch.int8)},
            "prompt_embeddings in .* int8",
        ),
        ({"prompt_embeddings": torch.full((5, 144), math.nan)}, "holds NaN or infinite values"),
        ({"prompt_embeddings": torch.zeros(5, 145)}, r"has shape \[5, 145\]"),
    ],
)
def test_weights_that_are_refused(adapter, tensors, sentence):
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(InputError, match=sentence):
        read_prefix(adapter)


@pytest.mark.parametrize("ratio", ["", "0", "-1", "nan", "sixteen"])
def test_a_rope_ratio_that_is_none(adapter, ratio):
    file = adapter / "adapter_model.safetensors"
    save_file(load_file(file), file, metadata={"rope_ratio": ratio})
    with pytest.raises(InputError, match=f"says rope_ratio '{ratio}', which is no number"):
        read_prefix(adapter)


def test_rows_in_any_memory_order(tmp_path, adapter):
    rows = read_prefix(adapter)["embedding.weight"]
    strided = write_adapter(
        tmp_path / "strided", rows.T.contiguous().T, ChatGLMConfig.from_dict(SMALL)
    )
    assert torch.equal(
        read_adapter(strided),
        read_adapter(write_adapter(tmp_path / "plain", rows, ChatGLMConfig.from_dict(SMALL))),
    )


def test_missing_weights(adapter):
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match="has adapter_config.json, but lacks adapter_model.safe"):
        read_prefix(adapter)


def test_columns_divided_otherwise(adapter):
    """As many of them, so that only the adapter's own words tell."""
    config = ChatGLMConfig.from_dict(SMALL | dict(multi_query_group_num=1, kv_channels=24))
    assert config.kv_size == ChatGLMConfig.from_dict(SMALL).kv_size
    with pytest.raises(
        InputError,
        match="describes 3 layers of 2 groups of 12 channels, but this "
        "base has 3 layers of 1 groups of 24 channels",
    ):
        read_prefix(adapter, config)


def test_a_failure_leaves_the_old_adapter(adapter, monkeypatch):
    before = {path.name: path.read_bytes() for path in adapter.iterdir()}

    def full(*arguments, **options):
        raise tensor_files.SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(tensor_files, "save_file", full)
    config = ChatGLMConfig.from_dict(SMALL)
    with pytest.raises(InputError, match="cannot write .*No space left on device"):
        write_adapter(adapter, torch.zeros(5, config.kv_size), config)
    assert {path.name: path.read_bytes() for path in adapter.iterdir()} == before
