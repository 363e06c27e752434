"""Imports only go down the list of layers, and no two modules import each other.

Every import of glmkern/ and bench/ is read from the source: at the top of a file, inside a function
and under TYPE_CHECKING. `from package import name` imports the module `name` where there is one.
Where `name` is loaded lazily, it imports the module that the package's table _HOMES names.
"""

import ast
import graphlib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.conftest import REPOSITORY

# The lowest first. A module belongs to the entry that is its longest prefix.
LAYERS = (
    ("errors", ("glmkern", "glmkern.errors", "glmkern.environment")),
    ("ops", ("glmkern.dispatch", "glmkern.native", "glmkern.backend_table", "glmkern.ops")),
    ("triton_kernels", ("glmkern.triton_kernels",)),
    ("files", ("glmkern.files",)),
    ("model", ("glmkern.model",)),
    ("checkpoint", ("glmkern.checkpoint", "glmkern.tokenizer")),
    ("generation", ("glmkern.generation",)),
    ("chatglm", ("glmkern.chatglm",)),
    ("training", ("glmkern.training",)),
    ("applications", ("glmkern.plan", "glmkern.serve", "glmkern.demo")),
    ("verbs", ("glmkern.verbs",)),
    ("cli", ("glmkern.cli", "glmkern.__main__")),
    ("bench", ("bench",)),
)
NAMES = [name for name, _ in LAYERS]
LAYER_OF = {entry: name for name, entries in LAYERS for entry in entries}
ROOTS = ("glmkern", "bench")


class Import(NamedTuple):
    """One import: where it stands, and the modules on both sides."""

    place: str
    importer: str
    imported: str

    def __str__(self) -> str:
        importer, imported = (layer_of(name) for name in (self.importer, self.imported))
        return f"{self.place}: {self.importer} ({importer}) imports {self.imported} ({imported})"


def layer_of(module: str) -> str | None:
    """The layer of a module, or None where the list has no place for it."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        prefix = ".".join(parts[:length])
        # glmkern stands for its __init__.py alone: a new module needs an entry of its own.
        if prefix in LAYER_OF and (prefix != "glmkern" or length == len(parts)):
            return LAYER_OF[prefix]
    return None


def find_modules(root: Path) -> dict[str, Path]:
    """Every module below the ROOTS by its name; a package has the name of its folder."""
    found = {}
    for path in sorted(path for top in ROOTS for path in (root / top).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def read_imports(root: Path) -> list[Import]:
    """Every import of the ROOTS, and of tests, in the modules below the ROOTS."""
    paths = find_modules(root)
    trees = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in paths.items()}
    homes = {name: _lazy_homes(tree) for name, tree in trees.items()}
    found = []
    for importer, tree in trees.items():
        path = paths[importer]
        package = importer if path.name == "__init__.py" else importer.rpartition(".")[0]
        for node in ast.walk(tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                place = f"{path.relative_to(root)}:{node.lineno}"
                found += [
                    Import(place, importer, imported)
                    for imported in dict.fromkeys(_imported(node, package, paths, homes))
                    if imported.split(".")[0] in (*ROOTS, "tests")
                ]
    return found


def _lazy_homes(tree: ast.Module) -> dict[str, str]:
    """The table _HOMES of a package that loads names on first use: name to module."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_HOMES":
            return ast.literal_eval(node.value)
    return {}


def _imported(
    node: ast.Import | ast.ImportFrom,
    package: str,
    paths: dict[str, Path],
    homes: dict[str, dict[str, str]],
) -> Iterator[str]:
    """The modules that one import statement in `package` names."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
        return
    source = node.module or ""
    if node.level:
        parents = package.split(".")
        parents = parents[: len(parents) - node.level + 1]
        source = ".".join([*parents, source] if source else parents)
    for alias in node.names:
        submodule = f"{source}.{alias.name}"
        lazy = homes.get(source, {}).get(alias.name, source)
        yield submodule if submodule in paths else lazy


def upward(imports: Sequence[Import]) -> list[Import]:
    """Those that go up, or whose modules have no place in the list."""
    found = []
    for each in imports:
        importer, imported = layer_of(each.importer), layer_of(each.imported)
        known = importer is not None and imported is not None
        if not known or NAMES.index(importer) < NAMES.index(imported):
            found.append(each)
    return found


def circles(imports: Sequence[Import]) -> list[list[Import]]:
    """The imports of circles, until none is left without one of them."""
    between = {(each.importer, each.imported): each for each in imports}
    found = []
    while modules := _circle(between):
        found.append([between.pop(pair) for pair in zip(modules, modules[1:], strict=False)])
    return found


def _circle(pairs: Collection[tuple[str, str]]) -> list[str]:
    """Modules each of which imports the next, the first and the last the same; or none."""
    graph: dict[str, set[str]] = {}
    for importer, imported in pairs:
        graph.setdefault(importer, set()).add(imported)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1][::-1]
    return []


def lines(imports: Sequence[Import]) -> str:
    return "\n".join(map(str, imports))


@pytest.fixture(scope="module")
def imports() -> list[Import]:
    return read_imports(REPOSITORY)


def test_imports_only_go_down(imports):
    wrong = upward([each for each in imports if not each.imported.startswith("tests")])
    if wrong:
        pytest.fail(f"these imports go up, or have no layer:\n{lines(wrong)}", pytrace=False)


def test_no_modules_import_each_other(imports):
    found = circles(imports)
    if found:
        listed = "\n\n".join(map(lines, found))
        pytest.fail(f"these imports make circles:\n{listed}", pytrace=False)


def test_nothing_imports_the_tests(imports):
    wrong = [each for each in imports if each.imported.split(".")[0] == "tests"]
    if wrong:
        pytest.fail(f"these import the tests:\n{lines(wrong)}", pytrace=False)


def test_every_module_has_a_layer():
    assert [name for name in find_modules(REPOSITORY) if layer_of(name) is None] == []


def write_tree(root: Path, files: dict[str, str]) -> Path:
    """A made-up repository; every folder in it is a package."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for folder in [path for path in root.rglob("*") if path.is_dir()]:
        (folder / "__init__.py").touch()
    return root


@pytest.mark.parametrize(
    ("text", "line", "imported"),
    [
        ("from glmkern.training.loop import run", 2, "glmkern.training.loop (training)"),
        ("\n\nimport glmkern.training.loop as loop", 4, "glmkern.training.loop (training)"),
        ("from glmkern.training import loop", 2, "glmkern.training.loop (training)"),
        ("from glmkern.training import NUMBER", 2, "glmkern.training (training)"),
        ("def f():\n    from glmkern.training import loop", 3, "glmkern.training.loop (training)"),
        ("if X:\n    import glmkern.training.loop", 3, "glmkern.training.loop (training)"),
        ("from ..training.loop import run", 2, "glmkern.training.loop (training)"),
        ("from glmkern import ChatGLM", 2, "glmkern.chatglm (chatglm)"),
        ("import bench.clock", 2, "bench.clock (bench)"),
        ("import glmkern.unlisted", 2, "glmkern.unlisted (None)"),
    ],
)
def test_an_upward_import_is_found(tmp_path, text, line, imported):
    root = write_tree(
        tmp_path,
        {
            "glmkern/__init__.py": '_HOMES = {"ChatGLM": "glmkern.chatglm"}',
            "glmkern/model/layer.py": f"import torch\n{text}\n",
            "glmkern/training/loop.py": "import glmkern.model.layer",
            "glmkern/chatglm.py": "from glmkern.model import layer\nfrom glmkern.errors import E",
            "bench/clock.py": "from glmkern import ChatGLM",
        },
    )
    place = f"glmkern/model/layer.py:{line}: glmkern.model.layer (model)"
    assert lines(upward(read_imports(root))) == f"{place} imports {imported}"


def test_imports_that_go_down_are_left_alone(tmp_path):
    root = write_tree(
        tmp_path,
        {
            "glmkern/ops/rope.py": "import torch\nfrom glmkern import __version__",
            "glmkern/model/layer.py": "from glmkern import ops\nfrom glmkern.ops import rope",
            "bench/clock.py": "import glmkern.model.layer\nfrom bench import roofline",
            "bench/roofline.py": "from collections import abc",
        },
    )
    imports = read_imports(root)
    assert len(imports) == 5
    assert upward(imports) == [] and circles(imports) == []


@pytest.mark.parametrize("text", ["from bench import a", "def f():\n    import bench.a"])
def test_a_circle_is_found(tmp_path, text):
    root = write_tree(
        tmp_path,
        {
            "bench/a.py": "from bench.b import f",
            "bench/b.py": "from bench import c, d",
            "bench/c.py": text,
            "bench/d.py": "",
        },
    )
    (found,) = circles(read_imports(root))
    assert {(each.importer, each.imported) for each in found} == {
        ("bench.a", "bench.b"),
        ("bench.b", "bench.c"),
        ("bench.c", "bench.a"),
    }
    assert "bench/b.py:1: bench.b (bench) imports bench.c (bench)" in lines(found)


def test_circles_in_two_places_are_both_found(tmp_path):
    root = write_tree(
        tmp_path,
        {
            "bench/a.py": "import bench.b",
            "bench/b.py": "import bench.a",
            "glmkern/ops/c.py": "import glmkern.ops.d\nimport bench.a",
            "glmkern/ops/d.py": "import glmkern.ops.c",
        },
    )
    assert [len(each) for each in circles(read_imports(root))] == [2, 2]
