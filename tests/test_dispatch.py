"""Which implementation serves an op: the table, forcing one, and what an import costs."""

import os
import subprocess
import sys
from unittest import mock

import pytest
import torch

import glmkern
from glmkern import dispatch, ops


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )


def test_every_op_has_a_row_for_every_backend():
    table = glmkern.backends("cpu")
    names = {op for op, _ in table.rows}
    for op in (
        "rms_norm",
        "add_rms_norm",
        "bias_dropout_add",
        "rope",
        "swiglu",
        "prefix_attention",
        "prefix_attention_decode",
        "quant_linear",
        "linear_cross_entropy",
    ):
        assert f"{op}_fwd" in names
    for op in names:
        states = [table.rows[op, name] for name in dispatch.NAMES]
        assert states.count("chosen") == 1, (op, states)
        assert table.rows[op, "cuda"] == "it runs on cuda tensors, these are on cpu"
        assert op in str(table)


def test_a_forced_backend_serves_or_says_why_not():
    x = torch.randn(2, 6)
    with glmkern.backend("reference"):
        assert glmkern.backends("cpu").rows["swiglu_fwd", "reference"] == "chosen"
        expected = ops.swiglu(x)
    with pytest.raises(
        RuntimeError,
        match="the backend 'cuda' is forced, but cannot serve "
        "swiglu_fwd: it runs on cuda tensors, .* on cpu",
    ):
        with glmkern.backend("cuda"):
            ops.swiglu(x)
    torch.testing.assert_close(ops.swiglu(x), expected)


@pytest.mark.parametrize(
    ("version", "capability", "sentence"),
    [
        (
            "3.5.1",
            (9, 0),
            "the kernels need Triton 3.6 or newer, found 3.5.1: torch 2.10 brings one",
        ),
        ("3.6.0", (7, 5), "Triton needs sm_80 or newer, this GPU is sm_75"),
        ("3.6.0+git12", (8, 0), None),
        ("3.10.0", (12, 0), None),
    ],
)
def test_why_triton_does_not_serve_a_gpu(version, capability, sentence):
    with (
        mock.patch("importlib.metadata.version", lambda name: version),
        mock.patch.object(torch.cuda, "is_available", lambda: True),
        mock.patch.object(torch.cuda, "get_device_capability", lambda: capability),
    ):
        assert dispatch._why_no_triton("cuda") == sentence


def test_an_unknown_backend_is_refused():
    sentence = "there is no backend 'gpu'; the backends are cpu, triton, cuda, reference"
    with pytest.raises(ValueError, match=sentence):
        with glmkern.backend("gpu"):
            pass
    child = run_python("import glmkern; glmkern.backends()", GLMKERN_BACKEND="gpu")
    assert child.returncode != 0 and sentence in child.stderr


def test_the_environment_forces_a_backend():
    child = run_python(
        "import glmkern; print(glmkern.backends('cpu'))", GLMKERN_BACKEND="reference"
    )
    assert child.returncode == 0, child.stderr
    rows = [line.split() for line in child.stdout.splitlines()[1:]]
    assert rows and all((row[1] == "reference") == (row[-1] == "chosen") for row in rows)


def test_import_is_lazy():
    child = run_python(
        "import sys, glmkern; assert 'torch' not in sys.modules; "
        "from glmkern import ops; assert 'triton' not in sys.modules; "
        "assert sys.modules.keys().isdisjoint({'transformers', 'peft'})"
    )
    assert child.returncode == 0, child.stderr
    with pytest.raises(AttributeError, match="module 'glmkern' has no attribute 'nothing'"):
        _ = glmkern.nothing


def test_a_second_derivative_is_an_error():
    for op in (
        ops.swiglu,
        lambda x: ops.rms_norm(x, torch.ones(6)),
        lambda x: ops.linear_cross_entropy(x, torch.randn(9, 6), torch.tensor([1, 2])),
    ):
        x = torch.randn(2, 6, requires_grad=True)
        (first,) = torch.autograd.grad(op(x).square().sum(), x, create_graph=True)
        with pytest.raises(NotImplementedError, match="_bwd has no derivative"):
            torch.autograd.grad(first.sum(), x)


def test_autocast_does_not_reach_into_an_op():
    q, k, v = torch.randn(5, 4, 8), torch.randn(5, 2, 8), torch.randn(5, 2, 8)
    expected = ops.prefix_attention(q, k, v)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ops.prefix_attention(q, k, v), expected)


def test_backends_of_a_gpu_that_is_not_there():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    table = glmkern.backends("cuda:0")
    assert {table.rows["swiglu_fwd", name] for name in ("triton", "cuda")}.isdisjoint(
        {"chosen", "available"}
    )
