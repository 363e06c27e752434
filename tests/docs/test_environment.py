"""docs/environment.md names every variable that the code reads, and no other."""

import re
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
READS = r"""environ\S*?["'](GLMKERN_\w+)|getenv\("(GLMKERN_\w+)|ENV\{(GLMKERN_\w+)\}"""
SOURCES = (
    "glmkern/**/*.py",
    "csrc/**/*",
    "tests/**/*.py",
    "bench/**/*.py",
    "*.py",
    "CMakeLists.txt",
)


def variables_read() -> set[str]:
    text = "\n".join(
        path.read_text("utf-8")
        for pattern in SOURCES
        for path in REPOSITORY.glob(pattern)
        if path.is_file() and path != Path(__file__)
    )
    return {name for match in re.findall(READS, text) for name in match if name}


def test_every_variable_is_documented():
    page = (REPOSITORY / "docs/environment.md").read_text("utf-8")
    documented = set(re.findall(r"^\| `(GLMKERN_\w+)` \|", page, re.M))
    assert documented == variables_read()
