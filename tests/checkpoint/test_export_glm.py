"""A base as a folder of the native GlmForCausalLM: what transformers and glmkern read from it."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GlmConfig, GlmForCausalLM

from bench.oracles import relative_error
from glmkern import ChatGLM, cli, ops
from glmkern.checkpoint import (
    expected_shapes,
    export_glm,
    quantize_folder,
    read_base,
    tensor_files,
    write_base,
    write_glm,
)
from glmkern.errors import InputError
from glmkern.model.config import ChatGLMConfig
from tests.model.models import SMALL, random_weights

QKV = "transformer.encoder.layers.1.self_attention.query_key_value"
SHAPES = {
    "one group": dict(multi_query_group_num=1),
    "three of six": dict(num_attention_heads=6, multi_query_group_num=3, kv_channels=20),
    "a group a head": dict(multi_query_group_num=4, add_qkv_bias=False),
    "32K": dict(rope_ratio=16),
}


@pytest.fixture
def base(tmp_path):
    """base(overrides, dtype, name) writes a random official folder; returns it and its weights."""

    def write(overrides=None, dtype=torch.float32, name="base"):
        values = SMALL | {"ffn_hidden_size": 38, "torch_dtype": str(dtype)} | (overrides or {})
        config = ChatGLMConfig.from_dict(values)
        weights = {key: tensor.to(dtype) for key, tensor in random_weights(config).items()}
        return write_base(tmp_path / name, config, weights), weights

    return write


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name, tensor in right.items():
        assert left[name].dtype == tensor.dtype, name
        assert torch.equal(left[name], tensor), name


def read(folder):
    return dict(read_base(folder, ChatGLMConfig.from_pretrained(folder)))


def sharded(folder, config, weights, limit=20_000):
    return write_glm(folder, config, weights.items(), max_shard_bytes=limit)


def logits_of(folder, ids):
    return ChatGLM.from_pretrained(folder, "cpu", dtype=torch.float32).eval()(ids).logits


@torch.no_grad()
def their_logits(folder, ids):
    model, loading = GlmForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()(ids).logits


@pytest.mark.parametrize("overrides", SHAPES.values(), ids=SHAPES.keys())
def test_transformers_computes_the_same_logits(tmp_path, base, overrides):
    source, _ = base(overrides)
    target = export_glm(source, tmp_path / "glm")
    ids = torch.randint(SMALL["padded_vocab_size"], (2, 23))
    ours = logits_of(source, ids)
    assert relative_error(ours, their_logits(target, ids)) < 1e-5
    assert torch.equal(logits_of(target, ids), ours)


def test_transformers_finds_the_class_and_keeps_the_dtype(tmp_path, base):
    source, _ = base(dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(export_glm(source, tmp_path / "glm"))
    assert type(model) is GlmForCausalLM and model.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("overrides", SHAPES.values(), ids=SHAPES.keys())
def test_there_and_back_the_same_bits(tmp_path, base, overrides, dtype):
    source, weights = base({**overrides, "eos_token_id": 2, "pad_token_id": 0}, dtype)
    config = ChatGLMConfig.from_pretrained(source)
    whole = export_glm(source, tmp_path / "whole")
    shards = sharded(tmp_path / "shards", config, weights)
    assert len(list(whole.glob("*.safetensors"))) == 1
    assert len(list(shards.glob("*.safetensors"))) > config.num_layers
    for folder in (whole, shards):
        assert_same(read(folder), weights)
        again = ChatGLMConfig.from_pretrained(folder)
        assert replace(again, extra={}) == replace(config, tie_word_embeddings=False, extra={})
    # and out again as the official code has it
    official = write_base(tmp_path / "official", again, read_base(shards, again), layout="bin")
    assert_same(read(official), weights)


def test_parts_of_query_key_value_in_different_files(tmp_path, base):
    """Any order of keys and files: q, k and v wait for each other."""
    source, weights = base()
    folder = export_glm(source, tmp_path / "glm")
    native = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number in range(3):
        file = f"model-{number + 1:05d}-of-00003.safetensors"
        names = sorted(native, reverse=True)[number::3]
        save_file({name: native[name] for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_same(read(folder), weights)


@pytest.mark.parametrize("kind", ["own output layer", "tied", "said to be tied"])
def test_folders_that_transformers_saved(tmp_path, base, kind):
    """Its own shards and config.json."""
    source, _ = base({"eos_token_id": 2, "pad_token_id": 0})
    model = GlmForCausalLM.from_pretrained(
        export_glm(source, tmp_path / "glm"), tie_word_embeddings=kind == "said to be tied"
    )
    if kind == "tied":
        values = {**model.config.to_dict(), "tie_word_embeddings": True}
        model = GlmForCausalLM(GlmConfig(**values))
    model.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    shards = list((tmp_path / "theirs").glob("*.safetensors"))
    held = {name for shard in shards for name in load_file(shard)}
    assert len(shards) > 2 and ("lm_head.weight" in held) == (kind != "tied")
    ids = torch.randint(SMALL["padded_vocab_size"], (2, 9))
    with torch.no_grad():
        expected = model.eval()(ids).logits
    assert relative_error(logits_of(tmp_path / "theirs", ids), expected) < 1e-5


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_from_either_layout_the_same_bits(tmp_path, base, bits):
    source, _ = base(dtype=torch.float16)
    native = export_glm(source, tmp_path / "glm")
    official = quantize_folder(source, tmp_path / "first", bits)
    from_native = quantize_folder(native, tmp_path / "second", bits)
    assert_same(read(from_native), read(official))
    ids = torch.randint(SMALL["padded_vocab_size"], (2, 9))
    loaded = ChatGLM.from_pretrained(native, "cpu", quantization_bit=bits).eval()
    assert torch.equal(loaded(ids).logits, logits_of(official, ids))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("layout", ["safetensors", "bin"])
def test_a_quantised_base_as_dense_weights(tmp_path, base, bits, layout, capsys):
    source, weights = base(dtype=torch.float16)
    codes = quantize_folder(source, tmp_path / "codes", bits, layout)
    target = tmp_path / "glm"
    assert cli.main(["export", str(codes), str(target), "--format", "glm"]) == 2
    assert f"is quantised to {bits} bits, which GlmForCausalLM cannot" in capsys.readouterr().err
    assert not target.exists()
    command = ["export", str(codes), str(target), "--format", "glm", "--dequantize"]
    assert cli.main(command) == 0
    stored = read(codes)
    for name, tensor in read(target).items():
        expected = weights[name]
        if f"{name}_scale" in stored:
            qweight = ops.QuantizedWeight(stored[name], stored[f"{name}_scale"], bits)
            expected = ops.dequantize(qweight, torch.float16)
        assert tensor.dtype == torch.float16 and torch.equal(tensor, expected), name
    ids = torch.randint(SMALL["padded_vocab_size"], (2, 9))
    # in float32 a code times its scale is exact, and float16 dense weights have rounded it once
    assert relative_error(their_logits(target, ids), logits_of(codes, ids)) < 5e-3
    assert relative_error(their_logits(target, ids), logits_of(target, ids)) < 1e-5


def test_the_command_and_what_is_copied(tmp_path, base, capsys):
    source, weights = base()
    for name in ("tokenizer.model", "tokenizer_config.json", "modeling_chatglm.py"):
        (source / name).write_text(name)
    target = tmp_path / "new" / "glm"
    command = ["export", str(source), str(target), "--format", "glm"]
    assert cli.main(command) == 0
    assert capsys.readouterr().out.startswith(f"{target}: native GlmForCausalLM, 0.")
    assert {path.name for path in target.iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.model",
        "tokenizer_config.json",
    }
    assert_same(read(target), weights)
    assert cli.main(command) == 2
    assert "already holds config.json; choose a new folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [
        dict(rmsnorm=False),
        dict(post_layer_norm=False),
        dict(add_bias_linear=True),
        dict(multi_query_attention=False, multi_query_group_num=4),
        dict(hidden_dropout=0.25),
    ],
    ids=str,
)
def test_architectures_without_a_native_form(tmp_path, base, change):
    source, _ = base(change)
    name = next(iter(change))
    with pytest.raises(InputError, match=rf"has no native form: {name} is {change[name]}; Glm"):
        export_glm(source, tmp_path / "glm")
    assert not (tmp_path / "glm").exists()


def test_a_failure_leaves_nothing(tmp_path, base, monkeypatch):
    source, weights = base()
    weights[f"{QKV}.weight"][5, 3] = float("nan")
    broken = write_base(tmp_path / "broken", ChatGLMConfig.from_pretrained(source), weights)
    with pytest.raises(InputError, match=f"{QKV}.weight in .* holds NaN"):
        export_glm(broken, tmp_path / "glm")

    def full(*arguments, **options):
        raise tensor_files.SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(tensor_files, "save_file", full)
    with pytest.raises(InputError, match="cannot write .*No space left on device"):
        export_glm(source, tmp_path / "glm")
    assert list((tmp_path / "glm").glob("*")) == []


@pytest.mark.parametrize(
    ("name", "replacement", "sentence"),
    [
        ("model.layers.2.self_attn.k_proj.weight", None, "lack model.layers.2.self_attn.k_proj"),
        (
            "model.layers.2.self_attn.q_proj.weight",
            torch.zeros(4, 50),
            r"q_proj.weight in .* has shape \[4, 50\], but config.json asks for \[48, 50\]",
        ),
        (
            "model.norm.weight",
            torch.full((50,), float("inf")),
            "model.norm.weight in .* holds NaN or",
        ),
        (
            "model.norm.bias",
            torch.zeros(50),
            "holds model.norm.bias, which the model that config.json",
        ),
        ("lm_head.weight", torch.zeros(151, 50, dtype=torch.int8), "lm_head.weight in .* is int8"),
    ],
)
def test_broken_native_folders(tmp_path, base, name, replacement, sentence):
    source, _ = base()
    folder = export_glm(source, tmp_path / "glm")
    native = load_file(folder / "model.safetensors")
    native.pop(name, None)
    if replacement is not None:
        native[name] = replacement
    save_file(native, folder / "model.safetensors")
    with pytest.raises(InputError, match=sentence):
        read(folder)


def test_official_names_in_a_folder_that_says_native(tmp_path, base):
    source, weights = base()
    folder = export_glm(source, tmp_path / "glm")
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(InputError, match="holds transformer.*, which the model that config.json"):
        read(folder)


def test_a_native_base_trains_like_the_official_one(tmp_path, base):
    source, _ = base()
    ids = torch.randint(SMALL["padded_vocab_size"], (2, 9))
    gradients = []
    for folder in (source, export_glm(source, tmp_path / "glm")):
        torch.manual_seed(3)
        model = ChatGLM.from_pretrained(folder, "cpu", pre_seq_len=5).eval()
        loss = model(ids, labels=ids).loss
        gradients += torch.autograd.grad(loss, model.prefix_encoder.embedding.weight)
    assert torch.equal(*gradients)


def test_the_name_of_the_base_stays(tmp_path, base):
    source, _ = base({"_name_or_path": "THUDM/chatglm3-6b"})
    target = export_glm(source, tmp_path / "glm")
    assert ChatGLMConfig.from_pretrained(target).family == "chatglm3-6b"
    assert GlmForCausalLM.from_pretrained(target).config.model_type == "glm"
    assert expected_shapes(ChatGLMConfig.from_pretrained(target)).keys() == read(target).keys()


def test_resident_memory_is_bounded(tmp_path):
    """A base of 92 MiB to the native layout and back, in shards of 6 MiB."""
    program = """
import sys, threading, time, torch
from glmkern.checkpoint import base, expected_shapes, read_base, write_base, write_glm
from glmkern.model.config import ChatGLMConfig

def resident_mib():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 2**20

def watch():
    while True:
        seen.append(resident_mib())
        time.sleep(0.002)

config = ChatGLMConfig(num_layers=8, padded_vocab_size=1024, hidden_size=512, kv_channels=32,
                       num_attention_heads=32, ffn_hidden_size=512, multi_query_attention=True,
                       multi_query_group_num=32)
folder = sys.argv[1]
source, native, back = (f"{folder}/{name}" for name in ("source", "native", "back"))
limit = 6 * 2**20
write_base(source, config, ((n, torch.ones(s)) for n, s in expected_shapes(config).items()), limit)
base.MAPPED_BYTES = 12 * 2**20
seen = [resident_mib()]
threading.Thread(target=watch, daemon=True).start()
write_glm(native, config, read_base(source, config), limit)
write_base(back, config, read_base(native, config), limit)
print(max(seen) - seen[0])
for name, tensor in read_base(back, config):
    assert tensor.sum() == tensor.numel()
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True
    )
    # A mapping of 12, a shard of 6, the largest tensor of 6 with its parts, and copies of both.
    assert float(done.stdout) < 60, done.stdout


@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
def test_rope_that_is_no_object(name):
    values = ChatGLMConfig.from_dict(SMALL).to_glm_dict() | {name: [1]}
    with pytest.raises(ValueError, match=rf"{name} is \[1\]; it must be an object"):
        ChatGLMConfig.from_dict(values)


def test_the_family_survives_where_only_auto_map_names_it():
    config = ChatGLMConfig.from_dict(
        SMALL
        | {"auto_map": {"AutoConfig": "THUDM/chatglm3-6b--configuration_chatglm.ChatGLMConfig"}}
    )
    assert config.family == "chatglm3-6b"
    assert ChatGLMConfig.from_dict(config.to_glm_dict()).family == "chatglm3-6b"
