"""Kernels run on the current stream and on their tensors' device; `make gpu` calls these tests."""

import pytest
import torch

import glmkern
from glmkern import ops

BUSY_CYCLES = 200_000_000  # a tenth of a second: long after the host has asked for all


def calls(x: torch.Tensor):
    """An op of each kind of launch, by a function of x [4, 256]."""
    weight = torch.ones(256, device=x.device)
    qweight = ops.quantize(torch.eye(256, device=x.device), 8)
    return {
        ("rms_norm", "triton"): lambda: ops.rms_norm(x, weight),
        ("rms_norm", "cuda"): lambda: ops.rms_norm(x, weight),
        ("swiglu", "triton"): lambda: ops.swiglu(x),
        ("quant_linear", "triton"): lambda: ops.quant_linear(x, qweight),
    }


def expected(x: torch.Tensor, name: str) -> torch.Tensor:
    with glmkern.backend("reference"):
        return calls(x)[name, "triton"]()


CASES = [
    ("rms_norm", "triton"),
    ("rms_norm", "cuda"),
    ("swiglu", "triton"),
    ("quant_linear", "triton"),
]


@pytest.mark.parametrize(("name", "backend"), CASES)
def test_on_the_current_stream(name, backend):
    """Its input is written on that stream, after a long wait: on another it would read zeros."""
    x = torch.zeros(4, 256, device="cuda")
    values = torch.randn(4, 256, device="cuda")
    call = calls(x)[name, backend]
    with glmkern.backend(backend):
        call()  # compiled
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(BUSY_CYCLES)
            x.copy_(values)
            y = call()
        torch.cuda.synchronize()
    torch.testing.assert_close(y, expected(values, name), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("name", "backend"), CASES)
def test_in_a_graph(name, backend):
    x = torch.randn(4, 256, device="cuda")
    call = calls(x)[name, backend]
    with glmkern.backend(backend):
        call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = call()
    for _ in range(2):
        x.normal_()
        graph.replay()
        torch.cuda.synchronize()
        torch.testing.assert_close(y, expected(x, name), rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="needs a second GPU (tests/ops/test_launch.py fakes one)"
)
@pytest.mark.parametrize(("name", "backend"), CASES)
def test_on_another_device(name, backend):
    x = torch.randn(4, 256, device="cuda:1")
    with glmkern.backend(backend):
        y = calls(x)[name, backend]()
    assert y.device == x.device
    torch.testing.assert_close(y, expected(x, name), rtol=1e-3, atol=1e-3)
