"""docs/ops.md: its examples run, and every public op has a section with its signature."""

import inspect
import re
from pathlib import Path

import pytest

from glmkern import ops

PAGE = Path(__file__).parents[2] / "docs/ops.md"
TEXT = PAGE.read_text("utf-8")
SECTIONS = {
    name: text
    for title, text in re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", TEXT, re.M | re.S)
    for name in title.split(", ")
}


def documented_signature(name: str) -> inspect.Signature:
    """Of the line `ops.name(...)` in the op's section, which may be broken."""
    parameters = re.search(rf"`ops\.{name}\(([^`]*)\)`", SECTIONS[name]).group(1)
    namespace = {}
    exec(f"def {name}({parameters}): ...", namespace)
    return inspect.signature(namespace[name])


def without_annotations(signature: inspect.Signature) -> inspect.Signature:
    parameters = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty)


def test_every_op_has_a_section():
    assert {*SECTIONS} == {*ops.__all__, "Registered pairs"}


@pytest.mark.parametrize("name", sorted({*ops.__all__} - {"QuantizedWeight"}))
def test_signatures(name):
    assert documented_signature(name) == without_annotations(inspect.signature(getattr(ops, name)))


def test_the_examples_run():
    assert all("```python" in section for section in SECTIONS.values())
    examples = re.findall(r"^```python\n(.*?)^```", TEXT, re.M | re.S)
    exec(compile("\n".join(examples), PAGE.name, "exec"), {})
