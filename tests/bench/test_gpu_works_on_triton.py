"""What the benchmarks measure on a GPU, at small sizes: all implementations and peers of a piece of
work run, in the types of a GPU, and give the same results."""

import importlib
import itertools

import pytest
import torch

from bench import bench_quant_linear
from bench.harness import Work
from bench.oracles import relative_error
from bench.roofline import copy_probe, gemm_probe

# Each result is rounded to bfloat16 once or, by a peer, at every one of its steps.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.03, torch.float16: 0.004}
# By a module's own names; what it keeps by device is given for whichever the tests run on.
SMALL = {
    "rms_norm": dict(COPY_SHAPE=(5, 32), COPIES=1),
    "bias_dropout": dict(COPY_SHAPE=(5, 32), COPIES=1),
    "rope": dict(TOKENS=5, N=4, G=2),
    "swiglu": dict(SHAPE=(5, 24)),
    "prefix_attention": dict(
        HEADS=4, GROUPS=2, CHANNELS=16, PREFIX=3, LENGTHS=(9,), CACHES=((3, 7),)
    ),
    "linear_cross_entropy": dict(SEQUENCES=2, TOKENS=9, LABELLED=5, HIDDEN=12, VOCABULARY=31),
}
BY_DEVICE = {"COPY_SHAPE", "COPIES", "SHAPE", "LENGTHS", "CACHES", "SEQUENCES"}


def shrink(monkeypatch, module, name: str, device: str) -> None:
    for key, value in SMALL[name].items():
        by_device = key in BY_DEVICE or isinstance(getattr(module, key), dict)
        monkeypatch.setattr(module, key, {device: value} if by_device else value)
    for key in ("DTYPE", "DTYPES"):
        if hasattr(module, key):
            monkeypatch.setattr(module, key, {device: getattr(module, key)["cuda"]})


def check_equal_work(works: list[Work], ours: str) -> None:
    def key(work: Work) -> tuple[str, str]:
        return work.name, str(work.dtype)

    for (name, _), group in itertools.groupby(sorted(works, key=key), key):
        group = list(group)
        assert any(ours in work.implementation for work in group), name
        assert any(work.peer for work in group), name
        results = [tensors_of(work.call()) for work in group]
        if "p=0.1" in name:  # a peer draws its own random numbers
            continue
        expected = next(result for work, result in zip(group, results, strict=True) if work.peer)
        for work, result in zip(group, results, strict=True):
            for tensor in expected:
                assert any(same(tensor, mine, work.dtype) for mine in result), (
                    f"{name}: {work.implementation} gives another result than its peer"
                )


def tensors_of(result) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else list(result)


def same(expected: torch.Tensor, result: torch.Tensor, dtype: torch.dtype) -> bool:
    return (
        expected.shape == result.shape
        and relative_error(result.float(), expected.float()) < TOLERANCE[dtype]
    )


@pytest.mark.parametrize("name", SMALL)
def test_equal_work(name, triton_device, monkeypatch):
    module = importlib.import_module(f"bench.bench_{name}")
    shrink(monkeypatch, module, name, triton_device)
    check_equal_work(module.works(triton_device), "triton")


@pytest.mark.parametrize("dtype", bench_quant_linear.GPU_SHAPES, ids=str)
def test_quant_linear_equal_work(dtype, triton_device, monkeypatch):
    monkeypatch.setattr(bench_quant_linear, "GPU_SHAPES", {dtype: ((24, 40),)})
    monkeypatch.setattr(bench_quant_linear, "GPU_TOKENS", (1, 3, 70))
    works = bench_quant_linear.gpu_works(dtype, triton_device)
    check_equal_work(works, "chosen")
    assert {work.implementation.split(",")[0] for work in works} == {
        "triton gemv",
        "triton fused",
        "triton slab",
        "dequantise + torch",
        "torch",
    }


def test_probes(triton_device, monkeypatch):
    for key, value in dict(COPY_SHAPE=(5, 32), COPIES=1, GEMM_SIZE=8).items():
        monkeypatch.setattr(f"bench.roofline.{key}", {triton_device: value})
    copy_probe(triton_device).call()
    for dtype in TOLERANCE:
        gemm_probe(triton_device, dtype).call()
