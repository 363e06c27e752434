"""The library of CUDA kernels for the host: who builds it, and how often."""

import threading
import time

from tests.cuda_on_host import library


def test_who_asks_at_the_same_time_gets_the_one_that_is_built(tmp_path, monkeypatch):
    built = []

    def compile_slowly(compiler, flags, path):
        built.append(path)
        time.sleep(0.2)
        path.write_text("a library")

    monkeypatch.setattr(library, "FOLDER", tmp_path)
    monkeypatch.setattr(library, "_compile", compile_slowly)
    found = []
    callers = [threading.Thread(target=lambda: found.append(library.build())) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(built) == 1 and found == built * 3
    assert library.build(sanitize=True) != found[0] and len(built) == 2


def test_another_kernel_is_another_library(tmp_path, monkeypatch):
    kernels = tmp_path / "csrc/cuda/kernels"
    kernels.mkdir(parents=True)
    monkeypatch.setattr(library, "CSRC", tmp_path / "csrc")
    monkeypatch.setattr(library, "ROOT", tmp_path)
    monkeypatch.setattr(library, "HERE", tmp_path)
    (tmp_path / "host_library.cpp").touch()
    digests = set()
    for source in ("one", "two"):
        (kernels / "op.cu").write_text(source)
        digests.add(library._digest(["c++"], []))
    assert len(digests) == 2
