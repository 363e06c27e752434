"""The library of CUDA kernels for the host: who builds it, and how often."""

import os
import threading
import time

import pytest

from tests.cuda_on_host import host


def test_who_asks_at_the_same_time_gets_the_one_that_is_built(tmp_path, monkeypatch):
    made = []

    def build_slowly(folder):
        made.append(folder)
        time.sleep(0.2)
        (folder / "library").write_text("a library")

    monkeypatch.setattr(host, "FOLDER", tmp_path)
    found = []
    callers = [
        threading.Thread(target=lambda: found.append(host.built([], ["-O1"], build_slowly)))
        for _ in range(3)
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(made) == 1 and found == [found[0]] * 3
    assert (found[0] / "library").read_text() == "a library"
    assert host.built([], ["-O0"], build_slowly) != found[0] and len(made) == 2


def test_what_was_not_used_for_long_goes(tmp_path, monkeypatch):
    monkeypatch.setattr(host, "FOLDER", tmp_path)
    monkeypatch.setattr(host, "KEPT", 2)
    first, second = (host.built([], [flag], lambda folder: None) for flag in ("-a", "-b"))
    os.utime(second, (1, 1))
    third = host.built([], ["-c"], lambda folder: None)
    assert set(tmp_path.iterdir()) == {first, third}


def test_a_build_that_fails_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(host, "FOLDER", tmp_path)

    def fail(folder):
        (folder / "half").touch()
        raise OSError("the disk is full")

    for _ in range(2):
        with pytest.raises(OSError, match="the disk is full"):
            host.built([], [], fail)


def test_another_kernel_is_another_library(tmp_path, monkeypatch):
    source = tmp_path / "op.cu"
    monkeypatch.setattr(host, "ROOT", tmp_path)
    for name in ("CSRC", "HERE"):
        monkeypatch.setattr(host, name, tmp_path)
    for name in ("host.py", "library.py"):
        (tmp_path / name).touch()
    digests = set()
    for text in ("one", "two"):
        source.write_text(text)
        digests.add(host.digest([source], []))
    assert len(digests) == 2
