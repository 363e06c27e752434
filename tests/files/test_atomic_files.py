"""Atomic writes: the old file or the new one, whatever happens in between."""

import os
import resource
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from glmkern.checkpoint.tensor_files import write_torch
from glmkern.errors import InputError
from glmkern.files.atomic import replaced, write_text


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def run_python(program: str, *arguments) -> int:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, check=False, stderr=subprocess.DEVNULL).returncode


def test_writes_text_in_utf8_and_makes_the_folder(tmp_path):
    path = tmp_path / "a" / "b" / "state.json"
    write_text(path, '{"答": "👋"}\n')
    assert path.read_bytes() == '{"答": "👋"}\n'.encode()
    write_text(str(path), "second")
    assert path.read_text() == "second"
    assert names(path.parent) == ["state.json"]


def test_writes_torch_files_byte_for_byte_alike(tmp_path):
    tensors = {"embedding.weight": torch.arange(6.0).view(2, 3)}
    write_torch(tmp_path / "one.bin", tensors)
    write_torch(tmp_path / "two.bin", tensors)
    assert torch.equal(
        torch.load(tmp_path / "one.bin")["embedding.weight"], tensors["embedding.weight"]
    )
    assert (tmp_path / "one.bin").read_bytes() == (tmp_path / "two.bin").read_bytes()


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), SystemExit(1)])
def test_a_failure_keeps_the_old_file_and_leaves_no_litter(tmp_path, error):
    path = tmp_path / "weights.bin"
    path.write_text("old")
    with pytest.raises(type(error)), replaced(path) as temporary:
        temporary.write_text("half of the ne")
        raise error
    assert path.read_text() == "old"
    assert names(tmp_path) == ["weights.bin"]


def test_the_new_name_appears_only_at_the_end(tmp_path):
    path = tmp_path / "weights.bin"
    with replaced(path) as temporary:
        temporary.write_text("new")
        assert temporary.parent == path.parent
        assert not path.exists()
    assert path.read_text() == "new"


KILLED_BEFORE_RENAME = """
import os, sys
from glmkern.files import atomic
atomic.os.replace = lambda *names: os._exit(9)
atomic.write_text(sys.argv[1], "new")
"""
KILLED_WHILE_WRITING = """
import os, sys
from glmkern.files.atomic import replaced
with replaced(sys.argv[1]) as temporary:
    temporary.write_text("half of the ne")
    os.kill(os.getpid(), 9)
"""
KILLED_AFTER_RENAME = """
import os, sys
from glmkern.files import atomic
rename = os.replace
atomic.os.replace = lambda *names: (rename(*names), os._exit(9))
atomic.write_text(sys.argv[1], "new")
"""


@pytest.mark.parametrize(
    ("program", "left"),
    [(KILLED_WHILE_WRITING, "old"), (KILLED_BEFORE_RENAME, "old"), (KILLED_AFTER_RENAME, "new")],
    ids=["while writing", "before the rename", "after the rename"],
)
def test_a_kill_leaves_a_whole_file(tmp_path, program, left):
    path = tmp_path / "trainer_state.json"
    path.write_text("old")
    assert run_python(program, path) in (9, -9)
    assert path.read_text() == left
    # What the killed process left behind is hidden and does not hinder the next write.
    assert all(name.startswith(".") for name in names(tmp_path) if name != path.name)
    write_text(path, "after")
    assert path.read_text() == "after"


def test_data_reach_the_disk_before_the_name_does(tmp_path, monkeypatch):
    calls = []
    fsync, rename = os.fsync, os.replace

    def record_fsync(descriptor):
        kind = "folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"
        calls.append(f"fsync {kind}")
        fsync(descriptor)

    def record_rename(source, target):
        calls.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_rename)
    write_text(tmp_path / "a.json", "{}")
    assert calls == ["fsync file", "rename", "fsync folder"]


def test_permissions_follow_the_umask(tmp_path):
    plain = tmp_path / "plain"
    plain.touch()
    with replaced(tmp_path / "ours") as temporary:
        temporary.write_text("new")
        temporary.chmod(0o600)
    assert (tmp_path / "ours").stat().st_mode == plain.stat().st_mode


def test_a_folder_in_the_place_of_the_file(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(
        InputError, match=r"cannot write .*out \(Is a directory\); .*choose a folder"
    ):
        write_text(tmp_path / "out", "text")
    assert names(tmp_path) == ["out"]


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(InputError, match=r"cannot write .*a.json"):
        write_text(tmp_path / "out" / "a.json", "text")


FULL_DISK = f"""
import resource, sys
from glmkern.checkpoint.tensor_files import write_torch
from glmkern.files.atomic import write_text
from glmkern.errors import InputError
resource.setrlimit({resource.RLIMIT_FSIZE}, (10_000, 10_000))
try:
    if sys.argv[2] == "torch":
        import torch
        write_torch(sys.argv[1], torch.zeros(100_000))
    else:
        write_text(sys.argv[1], "x" * 100_000)
except InputError as error:
    assert "free some space" in str(error)
    sys.exit(7)
"""


@pytest.mark.parametrize("kind", ["torch", "text"])
def test_a_full_disk_is_told_in_a_sentence(tmp_path, kind):
    path = tmp_path / "prefix.bin"
    path.write_text("old")
    assert run_python(FULL_DISK, path, kind) == 7
    assert path.read_text() == "old"
    assert names(tmp_path) == ["prefix.bin"]
