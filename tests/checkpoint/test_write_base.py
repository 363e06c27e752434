"""write_base: what is written is what is read, whole or not at all."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from glmkern.checkpoint import read_base, tensor_files, write_base
from glmkern.errors import InputError
from glmkern.files.folder import resolve_folder
from glmkern.model.config import ChatGLMConfig


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def assert_holds(folder, config, state):
    assert ChatGLMConfig.from_pretrained(folder) == config
    read = dict(read_base(folder, config))
    assert read.keys() == state.keys()
    for name, tensor in state.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_single_file(tmp_path, config, state, dtype):
    state = {name: tensor.to(dtype) for name, tensor in state.items()}
    assert write_base(tmp_path / "new", config, state) == tmp_path / "new"
    assert names(tmp_path / "new") == ["config.json", "model.safetensors"]
    assert_holds(tmp_path / "new", config, state)


@pytest.mark.parametrize("limit", [1, 4_000, 20_000])
def test_shards(tmp_path, config, state, limit):
    write_base(tmp_path, config, state, max_shard_bytes=limit)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in state.values())
    files = sorted(set(index["weight_map"].values()))
    assert names(tmp_path) == ["config.json", *files, "model.safetensors.index.json"]
    for file in files:
        held = [name for name, home in index["weight_map"].items() if home == file]
        assert len(held) == 1 or sum(state[name].nbytes for name in held) <= limit
    assert_holds(tmp_path, config, state)


def test_parts_of_larger_and_transposed_tensors(tmp_path, config, state):
    parts = {
        name: torch.cat([tensor, tensor])[len(tensor) :]
        if tensor.dim() == 1
        else tensor.T.clone().T
        for name, tensor in state.items()
    }
    write_base(tmp_path, config, parts)
    assert_holds(tmp_path, config, state)


@pytest.mark.parametrize(("before", "after"), [(4_000, 10**9), (10**9, 4_000), (4_000, 9_000)])
def test_replacing_another_model_leaves_nothing_of_it(tmp_path, config, state, before, after):
    write_base(tmp_path, config, state, max_shard_bytes=before)
    (tmp_path / "tokenizer.model").touch()
    new = {name: tensor + 1 for name, tensor in state.items()}
    write_base(tmp_path, config, new, max_shard_bytes=after)
    assert_holds(tmp_path, config, new)
    write_base(tmp_path / "alone", config, new, max_shard_bytes=after)
    assert names(tmp_path) == sorted(["alone", "tokenizer.model", *names(tmp_path / "alone")])


def test_weights_that_are_not_the_configurations(tmp_path, config, state):
    name = "transformer.output_layer.weight"
    tensor = state.pop(name)
    with pytest.raises(ValueError, match=f"{name} is in the configuration only"):
        write_base(tmp_path, config, state)
    with pytest.raises(ValueError, match="other is in the state only"):
        write_base(tmp_path, config, {**state, name: tensor, "other": tensor})
    with pytest.raises(ValueError, match=rf"{name} has shape \[36, 20\]; .* \[37, 20\]"):
        write_base(tmp_path, config, {**state, name: tensor[:-1]})
    assert names(tmp_path) == []


def test_a_failure_keeps_the_old_model(tmp_path, config, state, monkeypatch):
    write_base(tmp_path, config, state, max_shard_bytes=4_000)
    before = names(tmp_path)
    written = []

    def fail_at_the_third(tensors, path, metadata):
        if len(written) == 2:
            raise tensor_files.SafetensorError("I/O error: No space left on device")
        written.append(path)
        save_file(tensors, path, metadata)

    monkeypatch.setattr(tensor_files, "save_file", fail_at_the_third)
    with pytest.raises(
        InputError, match=r"cannot write .*No space left on device.*free some space"
    ):
        write_base(tmp_path, config, {name: tensor + 1 for name, tensor in state.items()}, 5_000)
    assert names(tmp_path) == before
    assert_holds(tmp_path, config, state)


KILLED_AT_RENAME = """
import os, sys, torch
from glmkern.checkpoint import expected_shapes, write_base
from glmkern.files import atomic
from glmkern.model.config import ChatGLMConfig

config = ChatGLMConfig.from_pretrained(sys.argv[1])
calls = 0
rename = os.replace

def replace(*names):
    global calls
    calls += 1
    if calls == int(sys.argv[2]):
        os._exit(9)
    rename(*names)

atomic.os.replace = replace
new = {name: torch.ones(shape) for name, shape in expected_shapes(config).items()}
write_base(sys.argv[1], config, new, max_shard_bytes=20_000)
"""


@pytest.mark.parametrize("rename", [1, 4])
def test_a_kill_between_the_renames_never_leaves_a_mixture(tmp_path, config, state, rename):
    """Two shards, their index and config.json are four renames; config.json is the last."""
    write_base(tmp_path, config, state, max_shard_bytes=20_000)
    assert len(names(tmp_path)) == 4
    command = [sys.executable, "-c", KILLED_AT_RENAME, str(tmp_path), str(rename)]
    assert subprocess.run(command, check=False, env=os.environ).returncode == 9
    with pytest.raises(InputError, match=r"has no config.json"):
        resolve_folder(tmp_path)
    write_base(tmp_path, config, state, max_shard_bytes=20_000)
    assert_holds(tmp_path, config, state)
