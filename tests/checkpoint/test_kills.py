"""A kill before any file operation of any write leaves what was there or what was meant to be."""

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from glmkern.checkpoint import quantize_folder, read_base, read_prefix, write_base, write_prefix
from glmkern.checkpoint.adapter import read_adapter, write_adapter
from glmkern.checkpoint.export import export_glm
from glmkern.errors import InputError
from glmkern.files.atomic import write_text
from glmkern.model.config import ChatGLMConfig
from glmkern.tokenizer import ChatGLMTokenizer
from glmkern.training.output.run_folder import RunFolder
from tests.model.models import SMALL, random_weights

CONFIG = ChatGLMConfig.from_dict(
    SMALL | dict(num_layers=1, padded_vocab_size=7, hidden_size=6, ffn_hidden_size=4)
)
OPERATIONS = (
    "open",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.mkdir",
    "os.chmod",
    "os.truncate",
    "shutil.copyfile",
    "shutil.rmtree",
)
KILLED, DONE, FAILED = 9, 0, 1


def run_until(operation: int, write: Callable[[], object]) -> int:
    """Runs `write` in a process of its own, which dies before its n-th file operation."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    seen = 0

    def die(event: str, arguments) -> None:
        nonlocal seen
        changes = event != "open" or not isinstance(arguments[1], str) or arguments[1] != "r"
        seen += event in OPERATIONS and changes
        if seen == operation:
            os._exit(KILLED)

    try:
        sys.addaudithook(die)
        write()
        os._exit(DONE)
    except BaseException:
        os._exit(FAILED)


def kill_everywhere(
    folder: Path, write: Callable[[], object], read: Callable[[], object]
) -> list[object]:
    """What `read` gives after a kill at every file operation, each time on the same old folder."""
    old = folder.with_name("old")
    shutil.copytree(folder, old)
    found = []
    for operation in range(1, 1000):
        shutil.rmtree(folder)
        shutil.copytree(old, folder)
        status = run_until(operation, write)
        found.append(read())
        if status == DONE:
            return found
        assert status == KILLED
    raise AssertionError("the write never ends")


def weights_in(folder: Path) -> dict[str, list] | str:
    """The base's numbers, or the sentence with which it is refused."""
    try:
        config = ChatGLMConfig.from_pretrained(folder)
        return {name: tensor.tolist() for name, tensor in read_base(folder, config)}
    except InputError as error:
        return str(error)


@pytest.mark.parametrize("layout", ["safetensors", "bin"])
@pytest.mark.parametrize(
    ("before", "after"), [(10**9, 10**9), (10**9, 200), (200, 10**9), (200, 300)]
)
def test_a_base_over_another(tmp_path, before, after, layout):
    folder = tmp_path / "base"
    write_base(folder, CONFIG, random_weights(CONFIG), before, layout)
    old, weights = weights_in(folder), random_weights(CONFIG)
    found = kill_everywhere(
        folder,
        lambda: write_base(folder, CONFIG, weights, after, layout),
        lambda: weights_in(folder),
    )
    new = {name: tensor.tolist() for name, tensor in weights.items()}
    assert found[0] == old and found[-1] == new
    # Several files cannot change at once: in between the folder says that it is no model.
    assert all(each in (old, new) or "no config.json" in each for each in found)


@pytest.mark.parametrize("layout", ["safetensors", "bin"])
def test_a_quantised_folder(tmp_path, shared, layout):
    source, target = tmp_path / "source", tmp_path / "target"
    write_base(source, CONFIG, random_weights(CONFIG))
    tokenizer = (shared / "data/tokenizer/tokenizer.model").read_bytes()
    (source / "tokenizer.model").write_bytes(tokenizer)
    quantize_folder(source, tmp_path / "whole", 4, layout)
    target.mkdir()

    def read():
        weights = weights_in(target)
        if not isinstance(weights, str):  # a model has its tokenizer
            assert (target / "tokenizer.model").read_bytes() == tokenizer
        return weights

    found = kill_everywhere(target, lambda: quantize_folder(source, target, 4, layout), read)
    assert found[-1] == weights_in(tmp_path / "whole")
    assert all(each == found[-1] or "no config.json" in each for each in found)


def test_a_native_folder(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    weights = random_weights(CONFIG)
    write_base(source, CONFIG, weights)
    target.mkdir()
    found = kill_everywhere(target, lambda: export_glm(source, target), lambda: weights_in(target))
    assert found[-1] == {name: tensor.tolist() for name, tensor in weights.items()}
    assert all(each == found[-1] or "no config.json" in each for each in found)


@pytest.mark.parametrize("layout", ["bin", "safetensors"])
def test_a_prefix(tmp_path, layout):
    folder = tmp_path / "checkpoint"
    old, new = ({"embedding.weight": torch.randn(3, 8)} for _ in range(2))
    write_prefix(folder, old, layout)
    found = kill_everywhere(
        folder,
        lambda: write_prefix(folder, new, layout),
        lambda: read_prefix(folder)["embedding.weight"].tolist(),
    )
    values = [state["embedding.weight"].tolist() for state in (old, new)]
    assert [found[0], found[-1]] == values
    assert all(each in values for each in found)


def test_an_adapter(tmp_path):
    """Two files: in between, the folder says that it holds none."""
    folder = tmp_path / "adapter"
    old, new = (torch.randn(3, CONFIG.kv_size) for _ in range(2))
    write_adapter(folder, old, CONFIG)

    def read():
        try:
            return read_adapter(folder).tolist()
        except InputError as error:
            return str(error)

    first = read()
    found = kill_everywhere(folder, lambda: write_adapter(folder, new, CONFIG), read)
    assert found[0] == first != found[-1]
    assert all(each in (first, found[-1]) or "adapter_config.json" in each for each in found)


def test_small_files(tmp_path, shared):
    folder = tmp_path / "files"
    folder.mkdir()
    tokenizer = ChatGLMTokenizer((shared / "data/tokenizer/tokenizer.model").read_bytes())

    def write(text):
        write_text(folder / "text.json", text)
        tokenizer.save(folder)
        CONFIG.save(folder)

    write("old")
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    found = kill_everywhere(
        folder,
        lambda: write("new"),
        lambda: {
            path.name: path.read_bytes()
            for path in folder.iterdir()
            if not path.name.startswith(".")
        },
    )
    assert found[0] == whole and found[-1] == whole | {"text.json": b"new"}
    assert all(each in (found[0], found[-1]) for each in found)


def test_a_checkpoint_folder_has_its_name_when_it_is_whole(tmp_path):
    folder = tmp_path / "run"

    def save(step, keep):
        def fill(checkpoint):
            write_text(checkpoint / "one", str(step))
            write_text(checkpoint / "two", str(step))

        RunFolder(folder, keep).write_checkpoint(step, fill)

    def read():
        return {
            path.name: sorted(file.read_text() for file in path.iterdir())
            for path in folder.glob("checkpoint-*")
        }

    folder.mkdir()
    save(1, None)
    found = kill_everywhere(folder, lambda: save(2, 1), read)
    assert found[-1] == {"checkpoint-2": ["2", "2"]}
    for each in found:
        assert each.get("checkpoint-2", ["2", "2"]) == ["2", "2"]
        assert "checkpoint-2" in each or each == {"checkpoint-1": ["1", "1"]}
