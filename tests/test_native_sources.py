"""How csrc is laid out: one role a folder, every include written from csrc, no name twice."""

import re
from collections import Counter
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[1] / "csrc"
SOURCES = sorted(path.relative_to(CSRC) for path in CSRC.rglob("*") if path.is_file())
# Which folders a folder's files may include.
ROLES = {
    "ops": {"ops"},
    "cpu": {"ops", "cpu", "cpu/kernels"},
    "cpu/kernels": {"ops", "cpu", "cpu/kernels"},
    "cuda": {"ops", "cuda", "cuda/kernels"},
    "cuda/device": {"ops", "cuda/device"},
    "cuda/kernels": {"ops", "cuda/device", "cuda/kernels"},
}


def includes(path: Path, brackets: str) -> list[str]:
    first, last = brackets
    pattern = rf'^\s*#\s*include\s*{re.escape(first)}([^>"]+){re.escape(last)}'
    return re.findall(pattern, (CSRC / path).read_text(), re.MULTILINE)


def role(path: Path) -> str:
    """The nearest folder that has a role: an op with several kernels has a folder below one."""
    return next(str(folder) for folder in path.parents if str(folder) in ROLES)


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_includes_go_down(path):
    for name in includes(path, '""'):
        assert Path(name) in SOURCES, f"{path} includes {name}, which is no file of csrc"
        assert role(Path(name)) in ROLES[role(path)], f"{role(path)} must not include {name}"


def test_every_header_has_a_name_of_its_own():
    names = Counter(path.name for path in SOURCES if path.suffix in (".h", ".cuh"))
    assert [name for name, count in names.items() if count > 1] == []


@pytest.mark.parametrize("folder", ["cpu/kernels", "cuda/kernels"])
def test_kernels_see_no_torch_header(folder):
    """What is compiled once per instruction set, or by nvcc, is compiled fast and alone."""
    reached = {path for path in SOURCES if role(path) == folder}
    waiting = list(reached)
    while waiting:
        path = waiting.pop()
        assert not [name for name in includes(path, "<>") if name.startswith("torch/")], path
        found = {Path(name) for name in includes(path, '""')} - reached
        reached |= found
        waiting += found
