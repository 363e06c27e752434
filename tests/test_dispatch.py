"""Which implementation serves an op: the table, forcing one, and what an import costs."""

import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch._subclasses import FakeTensorMode

import glmkern
from glmkern import dispatch, ops
from glmkern.ops import bias_dropout, checks, sequences


@pytest.fixture(autouse=True)
def _no_cuda_on_host(monkeypatch):
    """Other tests of this process may run CUDA kernels on the host."""
    monkeypatch.delenv("GLMKERN_CUDA_ON_HOST", raising=False)
    dispatch.why_unavailable.cache_clear()
    yield
    dispatch.why_unavailable.cache_clear()


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
        ("3.6.0", (7, 5), "the kernels need sm_80 or newer, this GPU is sm_75"),
        ("3.6.0+git12", (8, 0), None),
        ("3.10.0", (12, 0), None),
    ],
)
def test_why_triton_does_not_serve_a_gpu(version, capability, sentence):
    with (
        mock.patch("importlib.metadata.version", lambda name: version),
        mock.patch.object(torch.cuda, "is_available", lambda: True),
        mock.patch.object(dispatch, "capability", lambda device: capability),
    ):
        assert dispatch._why_no_triton(torch.device("cuda:0")) == sentence


@pytest.fixture
def two_gpus(monkeypatch):
    """A machine with an sm_75 and an sm_90, as far as dispatch asks."""
    old, new = torch.device("cuda:0"), torch.device("cuda:1")
    capability = {old: (7, 5), new: (9, 0)}.__getitem__
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(dispatch, "capability", capability)
    monkeypatch.setattr(checks, "capability", capability)
    return old, new


def test_each_gpu_has_its_own_capability(two_gpus):
    old, new = two_gpus
    reasons = [dispatch.why_unavailable("triton", gpu) for gpu in (new, old, new)]
    assert reasons == [None, "the kernels need sm_80 or newer, this GPU is sm_75", None]


def test_the_cuda_kernels_need_sm_75(two_gpus, monkeypatch):
    old, _ = two_gpus
    monkeypatch.setattr(dispatch.native, "load_library", lambda name: None)
    assert dispatch.why_unavailable("cuda", old) is None
    dispatch.why_unavailable.cache_clear()
    monkeypatch.setattr(dispatch, "capability", lambda device: (7, 0))
    sentence = "the kernels need sm_75 or newer, this GPU is sm_70"
    assert dispatch.why_unavailable("cuda", old) == sentence
    dispatch.why_unavailable.cache_clear()


@pytest.mark.parametrize(
    ("capability", "dtype", "channels", "first"),
    [
        ((8, 0), torch.float16, 128, "cuda"),
        ((8, 9), torch.bfloat16, 64, "cuda"),
        ((8, 6), torch.float32, 128, "triton"),
        ((8, 6), torch.float16, 144, "triton"),
        ((9, 0), torch.float16, 128, "triton"),
        ((12, 0), torch.float16, 128, "triton"),
    ],
)
def test_which_attention_comes_first(two_gpus, monkeypatch, capability, dtype, channels, first):
    gpu, _ = two_gpus
    module = sys.modules["glmkern.ops.prefix_attention"]  # the package has the op by that name
    monkeypatch.setattr(module, "capability", lambda device: capability)
    with FakeTensorMode():
        q = torch.empty(4, 6, channels, dtype=dtype, device=gpu)
    names = {
        op: dispatch.order_of(dispatch.OPS[op], gpu, (q, q))
        for op in ("prefix_attention_fwd", "prefix_attention_bwd", "prefix_attention_decode_fwd")
    }
    others = {"cuda": ("triton", "reference"), "triton": ("cuda", "reference")}[first]
    assert names["prefix_attention_fwd"] == names["prefix_attention_bwd"] == (first, *others)
    assert names["prefix_attention_decode_fwd"] == ("triton", "cuda", "reference")
    with glmkern.backend("triton"):
        assert dispatch.order_of(dispatch.OPS["prefix_attention_fwd"], gpu, (q, q)) == ("triton",)


def test_the_cuda_kernels_take_bfloat16_from_sm_80_on(two_gpus):
    sentence = "bfloat16 needs sm_80 or newer, this GPU is sm_75"
    supports = {name: op.supports["cuda"] for name, op in dispatch.OPS.items()}
    for gpu, expected in zip(two_gpus, (sentence, None), strict=True):
        with FakeTensorMode():
            half, bfloat16, single = (
                torch.empty(4, 6, dtype=dtype, device=gpu)
                for dtype in (torch.float16, torch.bfloat16, torch.float32)
            )
            assert supports["swiglu_fwd"](bfloat16) == expected
            assert supports["quant_linear_fwd"](single, bfloat16, None, 16, None) == expected
            bwd = supports["linear_cross_entropy_bwd"]
            assert bwd(single, single, torch.bfloat16) == expected
            assert supports["swiglu_fwd"](half) is None
            assert bwd(single, single, torch.float16) is None
    assert supports["swiglu_fwd"](torch.empty(4, 6, dtype=torch.bfloat16)) is None
    float64 = torch.empty(4, 6, dtype=torch.float64)
    assert {predicate(float64, float64, float64, float64) for predicate in supports.values()} == {
        "float64 has no kernel",
        "a float64 weight has no kernel",
    }


@pytest.mark.parametrize(
    ("name", "device", "environment", "expected"),
    [
        ("cpu", "cpu", "1", False),
        ("reference", "cpu", "", True),
        ("triton", "cpu", "", True),
        ("cuda", "cpu", "", True),
        ("triton", "cuda", "", False),
        ("triton", "cuda", "1", True),
        ("reference", "cuda", "", None),
        ("reference", "cuda", "1", True),
    ],
)
def test_where_values_may_be_read(name, device, environment, expected, monkeypatch):
    monkeypatch.setenv("GLMKERN_CHECK", environment)
    for op, reads in {"prefix_attention_fwd": True, "rope_fwd": False}.items():
        result = dispatch._may_read_values(dispatch.OPS[op], name, torch.device(device))
        assert result == (reads if expected is None else expected)


@pytest.mark.parametrize(("name", "calls"), [("reference", 1), ("cpu", 0)])
def test_values_are_checked_once(name, calls):
    x, seed = torch.randn(3, 4), torch.tensor([1, 2])
    with (
        glmkern.backend(name),
        mock.patch.object(bias_dropout, "check_spans", wraps=sequences.check_spans) as check,
    ):
        ops.bias_dropout_add(x, None, x, 0.5, seed)
        assert check.call_count == calls
        with pytest.raises(ValueError, match="bias_dropout_add: sequence 0 is empty"):
            ends = torch.tensor([0, 0, 3], dtype=torch.int32)
            ops.bias_dropout_add(x, None, x, 0.5, seed, cu_seqlens=ends)


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


def test_cuda_kernels_on_the_host():
    """A library that registers glmkern_cuda's ops for CPU tensors; here, Python does in its place,
    and the native library is one that loads."""
    child = run_python(
        """if True:
        import glmkern, torch
        from glmkern import ops
        x = torch.randn(2, 6)
        expected = ops.swiglu(x)
        library = torch.library.Library("glmkern_cuda", "IMPL")
        library.impl("swiglu_fwd", lambda x: torch.full((2, 3), 7.0), "CPU")
        rows = glmkern.backends("cpu").rows
        assert rows["swiglu_fwd", "cuda"] == "available"
        assert rows["rope_fwd", "cuda"] == "rope has no cuda kernel yet"
        assert torch.equal(ops.swiglu(x), expected)
        with glmkern.backend("cuda"):
            assert (ops.swiglu(x) == 7).all()
        """,
        GLMKERN_CUDA_ON_HOST=str(Path(glmkern.__file__).with_name("_native.so")),
    )
    assert child.returncode == 0, child.stderr


def test_a_library_for_the_host_that_is_not_there(tmp_path):
    path = tmp_path / "nothing.so"
    child = run_python(
        "import glmkern; print(glmkern.backends('cpu').rows['swiglu_fwd', 'cuda'])",
        GLMKERN_CUDA_ON_HOST=str(path),
    )
    assert child.stdout.strip() == f"there is no file {path}", child.stderr


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
