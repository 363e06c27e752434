"""What only a kernel of bias_dropout_add can get wrong: bits, counters, tiles, memory, direct
calls."""

import math
import os
import subprocess
from pathlib import Path
from unittest import mock

import pytest
import torch

from glmkern import ops
from glmkern.ops.philox import keep_mask, philox4x32
from glmkern.triton_kernels import bias_dropout as kernels
from tests.conftest import REPOSITORY
from tests.ops.numerics import HALF_AND_SINGLE, matches_fp64, poisoned_memory, same_bits
from tests.ops.test_bias_dropout import SEED, expected_mask, sequences

OP = "bias_dropout_add_fwd"
PHILOX = "cpu/kernels/philox.h"
library = torch.ops.glmkern


@pytest.fixture
def seed(backend):
    return torch.tensor(SEED)


PROGRAM = """
#include "{header}"
#include <cstdio>
#include <initializer_list>
using namespace glmkern::CPU_ISA;
int main() {{
  const int64_t seed[2] = {{{seed}, {offset}}};
  float factors[70];
  for (const int64_t first : {{{firsts}}}) {{
    for (const int64_t n : {{1, 4, 31, 70}}) {{
      for (float& factor : factors) factor = -1.0f;
      Dropout(seed, 0.5).factors({sequence}, first, n, factors);
      for (const float factor : factors) std::putchar(factor < 0 ? '-' : factor > 0 ? '2' : '0');
    }}
  }}
}}
"""


@pytest.mark.parametrize("flags", [[], ["-march=native"]], ids=["default", "native"])
def test_indices_that_need_all_their_bits(tmp_path, flags):
    """philox.h alone: elements that only a tensor of many gigabytes has."""
    firsts = [0, 2**31 - 32, 2**33 - 4, 2**33 + 4, 2**34 - 8, 2**36]
    seed, sequence = torch.tensor([2**40 + 3, -5]), 2**32 - 1
    source, program = tmp_path / "main.cpp", tmp_path / "main"
    source.write_text(
        PROGRAM.format(
            header=PHILOX,
            seed=seed[0].item(),
            offset=seed[1].item(),
            sequence=sequence,
            firsts=", ".join(f"{i}LL" for i in firsts),
        )
    )
    compile_program(source, program, "-DCPU_ISA=DEFAULT", *flags)
    result = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    expected = ""
    for first in firsts:
        lanes = philox4x32(seed, first // 4 + torch.arange(18), torch.tensor([sequence]))
        factors = "".join("2" if word >= 2**31 else "0" for word in lanes.flatten().tolist())
        expected += "".join(factors[:n].ljust(70, "-") for n in (1, 4, 31, 70))
    assert result == expected


def compile_program(source: Path, program: Path, *flags: str) -> None:
    compiler = os.environ.get("CXX", "c++")
    include = f"-I{REPOSITORY / 'csrc'}"
    command = [compiler, "-std=c++17", "-O1", *flags, include, source, "-o", program]
    subprocess.run(command, check=True)


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("shape", [(700, 65), (63, 4099), (3, 4096)], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_the_same_bits_on_every_run_and_number_of_threads(backend, threads, seed, shape, dtype, p):
    x, residual, upstream = (torch.randn(shape).to(dtype).requires_grad_() for _ in range(3))
    bias = torch.randn(shape[1:]).to(dtype).requires_grad_()

    def run(count):
        threads(count)
        with poisoned_memory():
            y = ops.bias_dropout_add(x, bias, residual, p, seed)
            wanted = (x, bias) if p > 0 else (x,)  # with p = 0 the sum over the rows is PyTorch's
            return y, *torch.autograd.grad(y, wanted, upstream)

    first = run(1)
    for count in (1, 2, 3):
        assert all(map(same_bits, first, run(count)))


@pytest.mark.backends("triton", "cuda")
def test_same_bits_every_time(backend, seed):
    x, residual = torch.randn(40, 1030), torch.randn(40, 1030)
    drop = (0.3, seed, *sequences([33, 7]))
    with poisoned_memory():
        first, second = (
            (
                library.bias_dropout_add_fwd(x, x[0], residual, *drop),
                *library.bias_dropout_add_bwd(x, *drop, True),
            )
            for _ in range(2)
        )
    assert all(map(same_bits, first, second))


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_a_large_output_has_the_bits_of_its_pieces(backend, seed, p):
    """Outputs beyond the caches are stored past them, by other instructions."""
    x, residual, bias = torch.randn(1100, 4096), torch.randn(1100, 4096), torch.randn(4096)
    whole_batch = torch.arange(0, 1101, 100, dtype=torch.int32)

    def both(x, residual, cu_seqlens, ids):
        drop = (p, seed, cu_seqlens, ids)
        y = library.bias_dropout_add_fwd(x, bias, residual, *drop)
        return (y, library.bias_dropout_add_bwd(x, *drop, False)[0]) if p > 0 else (y,)

    with poisoned_memory():
        whole = both(x, residual, whole_batch, torch.arange(11))
        parts = [
            both(a, b, whole_batch[:2], torch.tensor([i]))
            for i, (a, b) in enumerate(zip(x.split(100), residual.split(100), strict=True))
        ]
    assert all(
        same_bits(w, torch.cat(pieces))
        for w, pieces in zip(whole, zip(*parts, strict=True), strict=True)
    )


@pytest.mark.backends("cpu", "cuda")
@pytest.mark.parametrize(
    ("position", "wrong", "sentence"),
    [
        (0, torch.zeros(8, 3).t(), "dy is not contiguous"),
        (0, torch.zeros(3, 0), "dy needs a last dimension that is not empty"),
        (2, torch.zeros(3, dtype=torch.int64), "seed must have 2 elements, not 3"),
        (3, torch.zeros(2, dtype=torch.int64), "cu_seqlens has another dtype"),
        (4, torch.zeros(2, dtype=torch.int64), "cu_seqlens must have 3 elements, not 2"),
    ],
)
def test_the_kernels_guard_direct_calls(backend, seed, position, wrong, sentence):
    cu_seqlens = torch.tensor([0, 3], dtype=torch.int32)
    arguments = [torch.zeros(3, 8), 0.5, seed, cu_seqlens, torch.tensor([0]), True]
    arguments[position] = wrong.to(backend.device)
    with pytest.raises(RuntimeError, match=f"^bias_dropout_add_bwd: {sentence}$"):
        backend.kernels.bias_dropout_add_bwd(*arguments)


@pytest.mark.backends("triton")
@pytest.mark.parametrize("count", [2, 5, 8, 9])
def test_more_sequences_than_are_compared_at_a_time(backend, seed, count, monkeypatch):
    monkeypatch.setattr(kernels, "MAX_ENDS", 4)
    lengths = torch.randint(1, 5, (count,)).tolist()
    cu_seqlens, ids = sequences(lengths)
    ones = torch.ones(sum(lengths), 12)
    dx, _ = kernels.bias_dropout_add_bwd(ones, 0.5, seed, cu_seqlens, ids, False)
    assert torch.equal(dx != 0, expected_mask(seed, lengths, ids, 12, 0.5))


@pytest.mark.backends("triton")
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("shape", [(71, 17), (71, 20), (9, 1028)], ids=str)
def test_partials_of_many_rows(backend, seed, shape, dtype, monkeypatch):
    """A program that sums the bias gradient of several tiles, the last program of fewer."""
    monkeypatch.setattr(kernels, "MAX_PARTIALS", 4)
    keep = keep_mask(seed, torch.tensor([0]), math.prod(shape), 0.3).view(shape)
    residual = torch.randn(shape).to(dtype)

    def formula(x, bias):
        return (x + bias) * keep / (1 - 0.3) + residual

    matches_fp64(
        lambda x, b: ops.bias_dropout_add(x, b, residual, 0.3, seed),
        formula,
        lambda: [torch.randn(s).to(dtype).requires_grad_() for s in (shape, shape[1:])],
    )


@pytest.mark.backends("triton")
def test_frozen_bias(backend, seed):
    """Without a bias gradient there is none, and dx is the same."""
    dy = torch.randn(37, 100)
    drop = (dy, 0.3, seed, *sequences([30, 7]))
    with poisoned_memory():
        dx, dbias = kernels.bias_dropout_add_bwd(*drop, False)
        dx_too, _ = kernels.bias_dropout_add_bwd(*drop, True)
    assert dbias.shape == (0,)
    assert same_bits(dx, dx_too)


@pytest.mark.backends("triton")
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("shape", [(1, 1), (9, 17), (3, 1100)], ids=str)
def test_touches_nothing_outside(backend, seed, shape, p, monkeypatch):
    """Inputs lie between NaNs, outputs between guards: no NaN comes in, no guard changes."""
    M, H = shape
    margin, buffers = 8 * H + 2048, []

    def surrounded(fill):
        buffers.append(torch.full((2 * margin + M * H,), fill))
        return buffers[-1][margin:-margin].view(M, H)

    x, residual, dy, bias = (surrounded(torch.nan).copy_(torch.randn(shape)) for _ in range(4))
    cu_seqlens, ids = sequences([M])
    monkeypatch.setattr(torch, "empty_like", lambda like: surrounded(7.0))
    outputs = [kernels.bias_dropout_add_fwd(x, bias[0], residual, p, seed, cu_seqlens, ids)]
    if p > 0:
        outputs += kernels.bias_dropout_add_bwd(dy, p, seed, cu_seqlens, ids, True)
    assert all(t.isfinite().all() for t in outputs)
    assert len(buffers) > 4
    for buffer in buffers[4:]:
        assert (buffer[:margin] == 7.0).all()
        assert (buffer[-margin:] == 7.0).all()


@pytest.mark.backends("triton")
def test_forced_backend_runs_the_kernels(backend, seed):
    x = torch.ones(2, 8, requires_grad=True)
    with mock.patch.object(kernels, "launch", wraps=kernels.launch) as launch:
        ops.bias_dropout_add(x, None, x.detach(), 0.5, seed).sum().backward()
    assert [call.args[0] for call in launch.call_args_list] == [
        kernels.bias_dropout_add_fwd_kernel,
        kernels.bias_dropout_add_bwd_kernel,
    ]
