"""The prefix: the official file, every spelling that is in use, and each wrong one."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from glmkern.checkpoint import check_prefix, describe_prefix, read_prefix, write_prefix
from glmkern.errors import InputError

OFFICIAL = "transformer.prefix_encoder."


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name, tensor in right.items():
        assert left[name].dtype == torch.float32
        assert torch.equal(left[name], tensor.float()), name


def named(state, start):
    return {start + name: tensor for name, tensor in state.items()}


@pytest.fixture(params=["prefix", "projected"])
def either(request):
    return request.getfixturevalue(request.param)


def test_the_official_file(tmp_path, either):
    path = write_prefix(tmp_path / "checkpoint-10", either)
    assert path == tmp_path / "checkpoint-10" / "pytorch_model.bin"
    assert [p.name for p in path.parent.iterdir()] == ["pytorch_model.bin"]
    stored = torch.load(path, weights_only=True)
    assert_same(stored, named(either, OFFICIAL))
    assert_same(read_prefix(path.parent), either)
    assert_same(read_prefix(path), either)


def test_the_official_file_of_128_tokens_has_its_7_34_mb(tmp_path):
    path = write_prefix(tmp_path, {"embedding.weight": torch.zeros(128, 14336)})
    assert 128 * 14336 * 4 <= path.stat().st_size < 128 * 14336 * 4 + 4096


def test_half_parts_of_a_larger_tensor_are_written_whole_and_alone(tmp_path):
    large = torch.randn(100, 96).half()
    path = write_prefix(tmp_path, {"embedding.weight": large[3:8]})
    assert path.stat().st_size < 5 * 96 * 4 + 4096
    assert_same(read_prefix(path), {"embedding.weight": large[3:8]})


@pytest.mark.parametrize("start", [OFFICIAL, "prefix_encoder.", ""])
@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors", "mine.pt"])
def test_every_spelling(tmp_path, either, start, file):
    save = save_file if file.endswith("safetensors") else torch.save
    save(named(either, start), tmp_path / file)
    assert_same(read_prefix(tmp_path / file), either)
    if file != "mine.pt":
        assert_same(read_prefix(str(tmp_path)), either)


def test_recorded_official_prefixes(golden, either):
    name = "prefix_proj" if len(either) > 1 else "prefix_noproj"
    state = read_prefix(golden / "chatglm2_tiny" / f"{name}.safetensors")
    assert state.keys() == either.keys()
    assert describe_prefix(state) == (8, 128, len(either) > 1)


def test_a_full_checkpoint_in_shards(store, state, either):
    """ChatGLM3's fine-tuning demo saves the whole model with the prefix in it."""
    whole = {**state, **named(either, OFFICIAL)}
    for layout in ("sharded_bin", "single_safetensors"):
        assert_same(read_prefix(store(whole, layout)), either)


def test_half_precision_is_read_as_fp32(tmp_path, prefix):
    half = {name: tensor.half() for name, tensor in prefix.items()}
    torch.save(named(half, OFFICIAL), tmp_path / "pytorch_model.bin")
    assert_same(read_prefix(tmp_path), half)


def test_the_file_may_be_replaced_while_its_prefix_is_in_use(tmp_path, prefix):
    path = write_prefix(tmp_path, prefix)
    state = read_prefix(path)
    path.write_bytes(bytes(path.stat().st_size))
    assert_same(state, prefix)


def test_reading_into_a_frozen_encoder_matches_torch(tmp_path, projected):
    """The names are those of a state_dict that has an embedding and a Sequential."""
    encoder = torch.nn.Module()
    encoder.embedding = torch.nn.Embedding(*projected["embedding.weight"].shape)
    hidden, columns = projected["trans.0.weight"].shape
    encoder.trans = torch.nn.Sequential(
        torch.nn.Linear(columns, hidden), torch.nn.Tanh(), torch.nn.Linear(hidden, columns)
    )
    encoder.load_state_dict(read_prefix(write_prefix(tmp_path, projected)), strict=True)
    assert_same(encoder.state_dict(), projected)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite(tmp_path, prefix, value):
    prefix["embedding.weight"][2, 3] = value
    path = write_prefix(tmp_path, prefix)
    with pytest.raises(InputError, match=rf"{OFFICIAL}embedding.weight in {path} holds NaN or inf"):
        read_prefix(tmp_path)


def refused(path, message):
    with pytest.raises(InputError, match=message) as caught:
        read_prefix(path)
    assert "\n" not in str(caught.value)


def test_missing_path(tmp_path):
    refused(tmp_path / "checkpoint-9", "there is no prefix checkpoint .*checkpoint-9; pass a")


def test_folder_without_weights(tmp_path):
    refused(tmp_path, "holds no weights")


def test_a_base_model_instead_of_a_prefix(store, state):
    refused(store(state), f"holds no prefix .*{OFFICIAL}.*checkpoint-N folder")


def test_git_lfs_pointer(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    refused(tmp_path, "pytorch_model.bin is a Git LFS pointer")


def test_truncated_file(tmp_path, prefix):
    path = write_prefix(tmp_path, prefix)
    path.write_bytes(path.read_bytes()[:-100])
    refused(tmp_path, "pytorch_model.bin .* is truncated")


def test_integers(tmp_path):
    torch.save({"embedding.weight": torch.zeros(2, 3, dtype=torch.int8)}, tmp_path / "a.bin")
    refused(tmp_path / "a.bin", "embedding.weight in .*a.bin is int8; expected float16")


@pytest.mark.parametrize("name", ["embedding.weight", "trans.0.bias", "trans.2.weight"])
def test_a_projection_that_is_not_whole(tmp_path, projected, name):
    del projected[name]
    torch.save(named(projected, OFFICIAL), tmp_path / "pytorch_model.bin")
    refused(tmp_path, rf"lacks {name} of the prefix encoder")


def test_a_weight_no_encoder_has(tmp_path, prefix):
    prefix["gate.weight"] = torch.zeros(1, 1)
    torch.save(named(prefix, OFFICIAL), tmp_path / "pytorch_model.bin")
    refused(tmp_path, "holds gate.weight, which no prefix encoder has")


def test_a_weight_of_another_rank(tmp_path):
    torch.save({"embedding.weight": torch.zeros(3)}, tmp_path / "pytorch_model.bin")
    refused(tmp_path, r"embedding.weight of .* has shape \[3\], .* has 2 dim")


def test_the_same_weight_twice(tmp_path, prefix):
    torch.save({**named(prefix, OFFICIAL), **prefix}, tmp_path / "pytorch_model.bin")
    refused(tmp_path, "holds embedding.weight of the prefix a second time")


@pytest.mark.parametrize("names", [[], ["trans.0.weight"], ["embedding.weight", "other"]])
def test_writing_something_else_is_refused(tmp_path, names):
    with pytest.raises(ValueError, match="a prefix has the weights"):
        write_prefix(tmp_path, {name: torch.zeros(2, 2) for name in names})
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_layout(tmp_path, prefix):
    with pytest.raises(ValueError, match="layout must be 'bin' or 'safetensors', not 'gguf'"):
        write_prefix(tmp_path, prefix, "gguf")


def test_describe(prefix, projected, config):
    assert describe_prefix(prefix) == (5, config.kv_size, False)
    assert describe_prefix(projected) == (5, config.kv_size, True)


def test_check_accepts_the_right_prefix(prefix, projected, config):
    check_prefix(prefix, config, 5, False)
    check_prefix(projected, config, 5, True)


def test_check_wrong_length(either, config):
    with pytest.raises(
        InputError,
        match=r"run/a.bin holds 5 virtual tokens, but pre_seq_len is 8; .*--pre_seq_len 5",
    ):
        check_prefix(either, config, 8, len(either) > 1, source="run/a.bin")


def test_check_wrong_projection(prefix, projected, config):
    with pytest.raises(InputError, match="was trained with prefix_projection; add --prefix_proj"):
        check_prefix(projected, config, 5, False)
    with pytest.raises(InputError, match="was trained without prefix_projection; remove --prefix"):
        check_prefix(prefix, config, 5, True)


def test_check_wrong_width(either, config):
    config.num_layers = 3
    with pytest.raises(
        InputError,
        match=r"has 96 columns, but this base needs 144 \(num_layers 3 x 2 x .* x .* 8\)",
    ):
        check_prefix(either, config, 5, len(either) > 1)


def test_check_wrong_projection_width(projected, config):
    projected["trans.0.weight"] = torch.zeros(21, config.kv_size)
    with pytest.raises(
        InputError, match=r"trans.0.weight of .* has shape \[21, 96\], but .* needs \[20, 96\]"
    ):
        check_prefix(projected, config, 5, True)


def test_a_kill_while_writing_keeps_the_old_prefix(tmp_path, prefix):
    path = write_prefix(tmp_path, prefix)
    program = """
import os, sys, torch
from glmkern.checkpoint import write_prefix
from glmkern.files import atomic
atomic.os.replace = lambda *names: os._exit(9)
write_prefix(sys.argv[1], {"embedding.weight": torch.zeros(4, 4)})
"""
    killed = subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)
    assert killed.returncode == 9
    assert_same(read_prefix(path), prefix)
    assert_same(read_prefix(tmp_path), prefix)


@pytest.mark.parametrize(
    ("tensor", "sentence"),
    [
        (torch.zeros(0, 8), "has no virtual tokens"),
        (torch.ones(2, 8).to_sparse(), "is a sparse tensor; save it dense"),
    ],
)
def test_tensors_that_are_no_prefix(tmp_path, tensor, sentence):
    torch.save(
        {"transformer.prefix_encoder.embedding.weight": tensor}, tmp_path / "pytorch_model.bin"
    )
    with pytest.raises(InputError, match=sentence):
        read_prefix(tmp_path)
