"""resolve_folder: local folders first, then the download caches, else what to type."""

import os
import subprocess
import sys

import pytest

from glmkern.errors import InputError
from glmkern.files.folder import resolve_folder


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty home and working folder; no cache variable set."""
    for variable in (
        "HF_HUB_CACHE",
        "HUGGINGFACE_HUB_CACHE",
        "HF_HOME",
        "XDG_CACHE_HOME",
        "MODELSCOPE_CACHE",
    ):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return tmp_path


def make_model(folder):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


def make_snapshot(hub, repository, commit, main=False, age=0):
    folder = make_model(hub / f"models--{repository}" / "snapshots" / commit)
    os.utime(folder, (1e9 - age, 1e9 - age))
    if main:
        refs = hub / f"models--{repository}" / "refs"
        refs.mkdir()
        (refs / "main").write_text(commit)
    return folder


def test_a_local_folder(home):
    folder = make_model(home / "my model")
    assert resolve_folder(folder) == resolve_folder(str(folder)) == folder


def test_a_home_relative_folder(home):
    folder = make_model(home / "chatglm")
    assert resolve_folder("~/chatglm") == folder


def test_a_local_folder_wins_over_the_caches(home):
    make_snapshot(home / ".cache/huggingface/hub", "THUDM--chatglm2-6b", "a1", main=True)
    make_model(home / "work/THUDM/chatglm2-6b")
    assert resolve_folder("THUDM/chatglm2-6b").resolve() == home / "work/THUDM/chatglm2-6b"


def test_a_folder_without_configuration(home):
    (home / "empty").mkdir()
    with pytest.raises(InputError, match=r"the folder .*empty has no config.json; pass the folder"):
        resolve_folder(home / "empty")


def test_a_file_instead_of_a_folder(home):
    (home / "model.bin").touch()
    with pytest.raises(InputError, match=r"model.bin is a file; pass the folder"):
        resolve_folder(home / "model.bin")


@pytest.mark.parametrize("asked", ["THUDM/chatglm2-6b", "zai-org/chatglm2-6b"])
@pytest.mark.parametrize("stored", ["THUDM--chatglm2-6b", "zai-org--chatglm2-6b"])
def test_hugging_face_cache_under_both_spellings(home, asked, stored):
    folder = make_snapshot(home / ".cache/huggingface/hub", stored, "a1", main=True)
    assert resolve_folder(asked) == folder


def test_the_spelling_asked_for_wins(home):
    hub = home / ".cache/huggingface/hub"
    old = make_snapshot(hub, "THUDM--chatglm2-6b", "a1", main=True)
    new = make_snapshot(hub, "zai-org--chatglm2-6b", "b2", main=True)
    assert resolve_folder("THUDM/chatglm2-6b") == old
    assert resolve_folder("zai-org/chatglm2-6b") == new


def test_snapshot_of_main_before_newer_ones(home):
    hub = home / ".cache/huggingface/hub"
    main = make_snapshot(hub, "some--model", "a1", main=True, age=100)
    make_snapshot(hub, "some--model", "b2")
    assert resolve_folder("some/model") == main


def test_newest_snapshot_without_refs(home):
    hub = home / ".cache/huggingface/hub"
    make_snapshot(hub, "some--model", "a1", age=100)
    newest = make_snapshot(hub, "some--model", "b2", age=1)
    make_snapshot(hub, "some--model", "c3", age=50)
    assert resolve_folder("some/model") == newest


def test_a_main_that_is_gone_falls_back_to_what_is_there(home):
    hub = home / ".cache/huggingface/hub"
    kept = make_snapshot(hub, "some--model", "a1", main=True)
    (hub / "models--some--model/refs/main").write_text("gone\n")
    assert resolve_folder("some/model") == kept


@pytest.mark.parametrize(
    ("variable", "below"),
    [
        ("HF_HUB_CACHE", ""),
        ("HUGGINGFACE_HUB_CACHE", ""),
        ("HF_HOME", "hub"),
        ("XDG_CACHE_HOME", "huggingface/hub"),
    ],
)
def test_hugging_face_cache_variables(home, monkeypatch, variable, below):
    monkeypatch.setenv(variable, str(home / "elsewhere"))
    folder = make_snapshot(home / "elsewhere" / below, "THUDM--chatglm2-6b", "a1", main=True)
    assert resolve_folder("THUDM/chatglm2-6b") == folder


@pytest.mark.parametrize(
    "below", ["hub/models/ZhipuAI", "hub/ZhipuAI", "models/ZhipuAI", "hub/THUDM"]
)
@pytest.mark.parametrize("variable", [None, "MODELSCOPE_CACHE"])
def test_modelscope_cache(home, monkeypatch, variable, below):
    root = home / ".cache/modelscope"
    if variable:
        root = home / "elsewhere"
        monkeypatch.setenv(variable, str(root))
    folder = make_model(root / below / "chatglm2-6b")
    assert resolve_folder("THUDM/chatglm2-6b") == folder
    assert resolve_folder("zai-org/chatglm2-6b") == folder


def test_modelscope_writes_dots_as_underscores(home):
    folder = make_model(home / ".cache/modelscope/hub/models/some/model-1___5")
    assert resolve_folder("some/model-1.5") == folder


def test_hugging_face_before_modelscope(home):
    make_model(home / ".cache/modelscope/hub/models/ZhipuAI/chatglm2-6b")
    folder = make_snapshot(home / ".cache/huggingface/hub", "zai-org--chatglm2-6b", "a1")
    assert resolve_folder("THUDM/chatglm2-6b") == folder


def test_a_partial_download_is_passed_over(home):
    (home / ".cache/huggingface/hub/models--THUDM--chatglm2-6b/snapshots/a1").mkdir(parents=True)
    folder = make_model(home / ".cache/modelscope/hub/models/ZhipuAI/chatglm2-6b")
    assert resolve_folder("THUDM/chatglm2-6b") == folder


@pytest.mark.parametrize(
    "name", ["THUDM/chatglm2-6b", "zai-org/chatglm2-6b", "ZhipuAI/chatglm2-6b"]
)
def test_both_download_commands_are_printed(home, name):
    with pytest.raises(InputError) as caught:
        resolve_folder(name)
    assert str(caught.value) == (
        f"{name} is neither a local folder nor in the Hugging Face or ModelScope cache; download "
        "it with `hf download zai-org/chatglm2-6b` or "
        "`modelscope download --model ZhipuAI/chatglm2-6b`"
    )


def test_download_commands_of_another_organisation(home):
    with pytest.raises(InputError, match=r"`hf download some/model` or .*--model some/model`"):
        resolve_folder("some/model")


@pytest.mark.parametrize(
    "name", ["chatglm2-6b", "./THUDM/chatglm2-6b", "../model", "/a/b", "a/b/c"]
)
def test_a_path_that_does_not_exist(home, name):
    with pytest.raises(InputError, match=r"there is no folder .*; pass the folder of a model, or"):
        resolve_folder(name)


def test_resolving_does_not_import_torch(tmp_path):
    folder = make_model(tmp_path / "model")
    program = (
        "import sys; from glmkern.files.folder import resolve_folder;"
        f"resolve_folder({str(folder)!r}); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
