"""read_base: every official layout, and each broken folder in one sentence."""

import json
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glmkern.checkpoint import expected_shapes, read_base, write_prefix
from glmkern.checkpoint.tensor_files import weight_files
from glmkern.errors import InputError
from glmkern.model.config import ChatGLMConfig

EMBEDDING = "transformer.embedding.word_embeddings.weight"
OUTPUT = "transformer.output_layer.weight"
QKV = "transformer.encoder.layers.1.self_attention.query_key_value.weight"
INV_FREQ = "transformer.rotary_pos_emb.inv_freq"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 1827780615\n"


def assert_refused(folder, config, message):
    """One sentence, found when the folder is opened and not in the middle of the stream."""
    with pytest.raises(InputError, match=message) as caught:
        read_base(folder, config)
    assert "\n" not in str(caught.value)


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name, tensor in right.items():
        assert left[name].dtype == tensor.dtype
        assert torch.equal(left[name], tensor), name


def test_reads_every_layout(store, state, config, layout):
    folder = store({**state, INV_FREQ: torch.ones(2)}, layout)
    assert_same(dict(read_base(folder, config)), state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_keeps_the_stored_dtype(store, state, config, layout, dtype):
    half = {name: tensor.to(dtype) for name, tensor in state.items()}
    assert_same(dict(read_base(store(half, layout), config)), half)


def test_reads_files_that_are_links_out_of_the_folder(tmp_path, store, state, config):
    """A snapshot of the Hugging Face cache holds links into another folder."""
    folder = store(state, "sharded_bin")
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for path in list(folder.iterdir()):
        (folder / path.name).rename(blobs / path.name)
        path.symlink_to(os.path.relpath(blobs / path.name, folder))
    assert_same(dict(read_base(folder, config)), state)


def test_skips_a_prefix_stored_in_the_base(store, state, prefix, config, layout):
    extra = {f"transformer.prefix_encoder.{name}": value for name, value in prefix.items()}
    assert_same(dict(read_base(store({**state, **extra}, layout), config)), state)


@pytest.mark.parametrize("name", ["chatglm2-6b", "chatglm3-6b"])
def test_expected_shapes_are_those_of_the_published_index(shared, name):
    folder = shared / "data/configs" / name
    shapes = expected_shapes(ChatGLMConfig.from_pretrained(folder))
    index = json.loads((folder / "pytorch_model.bin.index.json").read_text())
    assert shapes.keys() | {INV_FREQ} == index["weight_map"].keys()
    elements = sum(torch.Size(shape).numel() for shape in shapes.values())
    assert 2 * (elements + 32) == index["metadata"]["total_size"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"add_qkv_bias": True, "multi_query_attention": True, "multi_query_group_num": 2},
        {"add_bias_linear": True, "rmsnorm": False},
        {"post_layer_norm": False, "multi_query_attention": True},
        {"post_layer_norm": False, "rmsnorm": False, "add_qkv_bias": True},
    ],
)
def test_expected_shapes_are_those_of_the_official_architecture(options):
    """diffusers carries the official modelling code for its Kolors pipeline."""
    from diffusers.pipelines.kolors import text_encoder as kolors

    sizes = {
        "num_layers": 2,
        "padded_vocab_size": 12,
        "hidden_size": 20,
        "ffn_hidden_size": 15,
        "kv_channels": 8,
        "num_attention_heads": 4,
        "seq_length": 16,
    }
    official = kolors.ChatGLMConfig(**sizes, **options)
    official.original_rope = True
    state = kolors.ChatGLMModel(official).state_dict()
    shapes = {f"transformer.{name}": tuple(value.shape) for name, value in state.items()}
    shapes.pop(INV_FREQ, None)
    assert shapes == expected_shapes(ChatGLMConfig(**sizes, **options))


def test_resident_memory_is_bounded(tmp_path):
    """A file of 368 MiB, of which the consumer keeps nothing, with mappings of 48 MiB."""
    program = """
import sys, torch
from glmkern.checkpoint import base, expected_shapes, read_base
from glmkern.model.config import ChatGLMConfig

def resident_mib():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 2**20

config = ChatGLMConfig(num_layers=8, padded_vocab_size=2048, hidden_size=1024, kv_channels=64,
                       num_attention_heads=32, ffn_hidden_size=1024)
folder = sys.argv[1]
config.save(folder)
torch.save({n: torch.ones(s) for n, s in expected_shapes(config).items()},
           folder + "/pytorch_model.bin")
base.MAPPED_BYTES = 48 * 2**20
before, most = resident_mib(), 0
for name, tensor in read_base(folder, config):
    assert tensor.sum() == tensor.numel()
    most = max(most, resident_mib() - before)
print(most)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True
    )
    # The largest tensor, query_key_value [6144, 1024], has 24 MiB.
    assert float(done.stdout) < 120


def test_no_weight_file(tmp_path, config):
    assert_refused(tmp_path, config, "holds no weights; expected pytorch_model.bin")


def test_shards_without_their_index(store, state, config):
    folder = store(state, "sharded_bin")
    (folder / "pytorch_model.bin.index.json").unlink()
    assert_refused(folder, config, r"00001-of-00002.bin but no pytorch_model.bin.index.json")


@pytest.mark.parametrize(
    "name", ["pytorch_model-00002-of-00002.bin", "pytorch_model.bin.index.json"]
)
def test_git_lfs_pointer(store, state, config, name):
    folder = store(state, "sharded_bin")
    (folder / name).write_bytes(POINTER)
    assert_refused(folder, config, rf"{name} is a Git LFS pointer.*git lfs pull")


@pytest.mark.parametrize("keep", [0.0, 0.02, 0.5, 0.999])
def test_truncated_file(store, state, config, layout, keep):
    folder = store(state, layout)
    path = max((p for p in folder.iterdir() if p.suffix != ".json"), key=str)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    assert_refused(folder, config, rf"{path.name} \([\d,]+ bytes\) is truncated.*download it again")


def test_file_that_holds_something_else(store, state, config, layout):
    folder = store(state, layout)
    path = next(p for p in folder.iterdir() if p.suffix != ".json")
    path.write_bytes(b"<html>404 not found</html>" * 50)
    assert_refused(folder, config, rf"{path.name} .* is truncated or not a weight file")


class Attack:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_code_in_a_pickle_is_never_run(tmp_path, store, state, config):
    target = tmp_path / "executed"
    folder = store({**state, "transformer.attack": Attack(target)})
    assert_refused(folder, config, r"pytorch_model.bin holds posix.mkdir beside tensors.*refused")
    assert not target.exists()


def test_pickle_of_another_kind(store, config):
    assert_refused(store([torch.ones(2)]), config, "holds a list, not a dictionary")
    assert_refused(
        store({"state_dict": {"a": torch.ones(2)}}), config, "holds a dict under 'state_dict'"
    )


def edit_index(folder, change):
    path = next(folder.glob("*.index.json"))
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("place", ["../pytorch_model.bin", "/etc/passwd", "a\\b.bin", "..", "", 7])
def test_index_pointing_outside_the_folder(store, state, config, place):
    folder = store(state, "sharded_bin")
    edit_index(folder, lambda content: content["weight_map"].update({QKV: place}))
    assert_refused(folder, config, rf"index.json places {QKV} in .* not a file of its own folder")


def test_index_listing_a_missing_shard(store, state, config):
    folder = store(state, "sharded_safetensors")
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert_refused(
        folder, config, r"index.json lists model-00002-of-00002.safetensors, which is not"
    )


def test_index_placing_a_key_in_the_wrong_shard(store, state, config):
    folder = store(state, "sharded_bin")
    home = {}

    def move(content):
        home[QKV] = content["weight_map"][QKV]
        other = min(set(content["weight_map"].values()) - {home[QKV]})
        content["weight_map"][QKV] = other

    edit_index(folder, move)
    assert_refused(folder, config, rf"lacks {QKV}, which the index of its folder places there")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": ["a"]}', '{"weight_map": {}}'],
)
def test_broken_index(tmp_path, config, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    assert_refused(tmp_path, config, r"model.safetensors.index.json .*download it again")


def test_index_with_a_key_twice(tmp_path, config):
    text = '{"weight_map": {"a": "x.bin", "b": "x.bin", "a": "y.bin"}}'
    (tmp_path / "pytorch_model.bin.index.json").write_text(text)
    assert_refused(tmp_path, config, "a is listed twice")


def test_key_in_two_shards(store, state, config):
    folder = store(state, "sharded_bin")
    second = folder / "pytorch_model-00002-of-00002.bin"
    torch.save({**torch.load(second), EMBEDDING: state[EMBEDDING]}, second)
    assert_refused(
        folder, config, rf"{EMBEDDING} is both in .*00001-of-00002.bin and in .*00002-of-00002.bin"
    )


def test_missing_keys(store, state, config, layout):
    del state[QKV]
    assert_refused(store(state, layout), config, rf"lack {QKV}, which config.json asks for")


def test_many_missing_keys_are_counted(store, state, config):
    few = {EMBEDDING: state[EMBEDDING]}
    assert_refused(store(few), config, rf"lack .* and {len(state) - 4} more, .*num_layers 2")


def test_unexpected_key(store, state, config):
    head = "transformer.classifier_head.weight"
    folder = store({**state, head: torch.ones(2, 2)})
    assert_refused(folder, config, rf"pytorch_model.bin holds {head}, which the model .* not have")


def test_wrong_shape(store, state, config):
    state[OUTPUT] = state[OUTPUT][:-1].clone()
    assert_refused(
        store(state), config, rf"{OUTPUT} in .* has shape \[36, 20\].*asks for \[37, 20\]"
    )


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64])
def test_dtype_that_is_not_floating(store, state, config, dtype):
    state[OUTPUT] = state[OUTPUT].to(dtype)
    name = str(dtype).removeprefix("torch.")
    assert_refused(
        store(state), config, rf"{OUTPUT} in .*pytorch_model.bin is {name}; expected float"
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite(store, state, config, layout, value):
    """Found when the tensor passes: values are read once."""
    state[QKV][3, 5] = value
    stream = read_base(store(state, layout), config)
    with pytest.raises(InputError, match=rf"{QKV} in .* holds NaN or infinite values"):
        list(stream)


def test_quantisation_asked_for_in_memory_is_no_reason_to_refuse(store, state, config):
    folder = store(state)
    config.quantization_bit = 4
    assert_same(dict(read_base(folder, config)), state)


def test_folder_with_only_a_prefix(tmp_path, config):
    """As an official run saves it: the base's configuration, quantised or not, and the prefix."""
    config.quantization_bit = 4
    config.save(tmp_path)
    write_prefix(tmp_path, {"embedding.weight": torch.zeros(128, 14336)})
    assert_refused(
        tmp_path,
        config,
        r"holds only a prefix \(7.3 MB\), not a base model; .*--ptuning_checkpoint",
    )


names = st.sampled_from(["a.bin", "b.bin", "c.bin", "../a.bin", "", "..", ".", "/a.bin", "a.bin\0"])
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4) | names,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)
indices = anything | st.fixed_dictionaries(
    {"weight_map": anything | st.dictionaries(st.text(max_size=4), names | anything, max_size=4)}
)


@settings(max_examples=200, deadline=None)
@given(content=indices)
def test_any_index_is_read_or_refused(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp() / "any_index"
    folder.mkdir(exist_ok=True)
    for name in ("a.bin", "b.bin"):
        (folder / name).touch()
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(content), encoding="utf-8")
    try:
        files = weight_files(folder)
    except InputError:
        return
    assert set(files) <= {folder / "a.bin", folder / "b.bin"}
    listed = [(name, path.name) for path, promised in files.items() for name in promised]
    assert sorted(listed) == sorted(content["weight_map"].items())
