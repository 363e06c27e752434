"""CONTRIBUTING.md lists every op's files: each op has exactly those, one name in every role."""

from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PAGE = (REPOSITORY / "CONTRIBUTING.md").read_text("utf-8")
OPS = (
    "rms_norm",
    "bias_dropout",
    "rope",
    "swiglu",
    "prefix_attention",
    "quant_linear",
    "linear_cross_entropy",
)
# role -> (folder, how a file's name begins before the op's); an op may have a folder of its name.
ROLES = {
    "function, checks, reference, autograd": ("glmkern/ops", ""),
    "Triton kernels": ("glmkern/triton_kernels", ""),
    "what all devices share": ("csrc/ops", ""),
    "C++: threads, registration": ("csrc/cpu", ""),
    "C++: kernels": ("csrc/cpu/kernels", ""),
    "CUDA C++: registration": ("csrc/cuda", ""),
    "CUDA C++: kernels": ("csrc/cuda/kernels", ""),
    "tests": ("tests/ops", "test_"),
    "bench": ("bench", "bench_"),
    "compiled Triton launches": ("bench/triton_cases", ""),
}
OPTIONAL = {"CUDA C++: registration", "CUDA C++: kernels"}


def files_of(op: str, folder: str, prefix: str) -> list[str]:
    """Files `<prefix><op>.*`, `<prefix><op>_*` and `<op>/*`, relative to the folder."""
    names, root = [f"{prefix}{op}.*", f"{prefix}{op}_*.*", f"{op}/*.*"], REPOSITORY / folder
    found = {path for name in names for path in root.glob(name) if path.is_file()}
    return [path.relative_to(root).as_posix() for path in sorted(found)]


def table(op: str) -> str:
    lines = [f"### {op}", "", "| role | folder | files |", "|---|---|---|"]
    for role, (folder, prefix) in ROLES.items():
        files = ", ".join(f"`{file}`" for file in files_of(op, folder, prefix))
        lines.append(f"| {role} | `{folder}/` | {files or 'none yet'} |")
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("op", OPS)
def test_an_op_has_exactly_the_files_of_its_table(op):
    assert table(op) in PAGE, f"CONTRIBUTING.md should say\n\n{table(op)}"
    for role, (folder, prefix) in ROLES.items():
        assert role in OPTIONAL or files_of(op, folder, prefix), f"{op} has no file in {folder}"


def test_no_op_is_left_out():
    modules = {path.stem for path in (REPOSITORY / "csrc/ops").glob("*_binding.h")}
    assert {module.removesuffix("_binding") for module in modules} == set(OPS)
