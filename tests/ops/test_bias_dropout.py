"""bias_dropout_add, reference and C++: numbers, mask, registration, determinism, errors."""

import math
import os
import subprocess
from pathlib import Path

import pytest
import torch

import glmkern
from glmkern import ops
from glmkern.ops.philox import keep_mask, philox4x32
from tests.ops.numerics import HALF_AND_SINGLE, matches_fp64, poisoned_memory, same_bits

OP = "bias_dropout_add_fwd"
ROOT = Path(__file__).parents[2]
SEED = torch.tensor([0x1234_5678_9ABC, 77])
SHAPES = [(5,), (1, 1), (3, 17), (63, 64), (2, 5, 100), (7, 4099), (6, 30)]
bwd = torch.ops.glmkern.bias_dropout_add_bwd


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_against_fp64(backend, shape, dtype, with_bias, p):
    keep = keep_mask(SEED, torch.tensor([0]), math.prod(shape), p).view(shape)

    def inputs():
        x, residual = (torch.randn(shape).to(dtype).requires_grad_() for _ in range(2))
        bias = torch.randn(shape[-1]).to(dtype).requires_grad_() if with_bias else None
        return x, bias, residual

    def formula(x, bias, residual):
        y = x if bias is None else x + bias
        return (y * keep / (1 - p) if p else y) + residual

    matches_fp64(lambda x, b, r: ops.bias_dropout_add(x, b, r, p, SEED), formula, inputs)


@pytest.mark.parametrize("p", [1e-12, 0.1, 0.5, 0.999, 1 - 1e-12])
@pytest.mark.parametrize("hidden", [1, 2, 3, 36, 57, 1031])
def test_the_mask_is_the_contract_s(backend, hidden, p):
    """Rows that start amid a counter, seeds and ids that need all their bits."""
    lengths = [3, 1, 9]
    ids = torch.tensor([2**31 + 5, 0, 2**32 - 1])
    seed = torch.tensor([-0x1234_5678_9ABC_DEF0, 2**62 + 2**33 + 1])
    cu_seqlens = torch.tensor([0, 3, 4, 13], dtype=torch.int32)
    with poisoned_memory():
        dx = bwd(torch.ones(13, hidden), p, seed, cu_seqlens, ids, False)[0]
    keep = torch.cat(
        [
            keep_mask(seed, ids[b : b + 1], n * hidden, p).view(n, hidden)
            for b, n in enumerate(lengths)
        ]
    )
    assert same_bits(dx, keep.float() / (1 - p))


PROGRAM = """
#include "cpu/kernels/philox.h"
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
            seed=seed[0].item(),
            offset=seed[1].item(),
            sequence=sequence,
            firsts=", ".join(f"{i}LL" for i in firsts),
        )
    )
    subprocess.run(
        [
            os.environ.get("CXX", "c++"),
            "-std=c++17",
            "-O1",
            "-DCPU_ISA=DEFAULT",
            *flags,
            f"-I{ROOT / 'csrc'}",
            source,
            "-o",
            program,
        ],
        check=True,
    )
    result = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    expected = ""
    for first in firsts:
        lanes = philox4x32(seed, first // 4 + torch.arange(18), torch.tensor([sequence]))
        factors = "".join("2" if word >= 2**31 else "0" for word in lanes.flatten().tolist())
        expected += "".join(factors[:n].ljust(70, "-") for n in (1, 4, 31, 70))
    assert result == expected


def test_packing_does_not_change_a_mask(backend):
    rows = [torch.randn(n, 9) for n in (4, 1, 6)]
    alone = [
        ops.bias_dropout_add(
            x,
            None,
            torch.zeros_like(x),
            0.4,
            SEED,
            cu_seqlens=torch.tensor([0, len(x)], dtype=torch.int32),
            sequence_ids=torch.tensor([i]),
        )
        for i, x in enumerate(rows)
    ]
    order = [2, 0, 1]
    packed = torch.cat([rows[i] for i in order])
    cu_seqlens = torch.tensor([0, 6, 10, 11], dtype=torch.int32)
    together = ops.bias_dropout_add(
        packed,
        None,
        torch.zeros_like(packed),
        0.4,
        SEED,
        cu_seqlens=cu_seqlens,
        sequence_ids=torch.tensor(order),
    )
    assert same_bits(together, torch.cat([alone[i] for i in order]))


def test_backward_draws_the_forward_mask(backend):
    x = torch.ones(50, 33, requires_grad=True)
    y = ops.bias_dropout_add(x, None, torch.zeros_like(x), 0.5, SEED)
    y.sum().backward()
    assert same_bits(x.grad, y.detach())


def test_evaluation_drops_nothing(backend):
    x = torch.randn(3, 5)
    assert same_bits(ops.bias_dropout_add(x, None, x, 0.9, None, training=False), x + x)


def test_no_rows(backend):
    x, bias = torch.randn(2, 0, 6, requires_grad=True), torch.randn(6, requires_grad=True)
    y = ops.bias_dropout_add(x, bias, x.detach(), 0.0, None)
    assert y.shape == (2, 0, 6)
    assert same_bits(torch.autograd.grad(y.sum(), bias)[0], torch.zeros(6))


def test_inputs_with_strides(backend):
    x, residual, bias = torch.randn(10, 6), torch.randn(10, 6), torch.randn(20)
    seeds = torch.stack([SEED, SEED + 1], 1)
    expected = ops.bias_dropout_add(
        x.t().contiguous(), bias[::2].contiguous(), residual.t().contiguous(), 0.3, SEED
    )
    result = ops.bias_dropout_add(x.t(), bias[::2], residual.t(), 0.3, seeds[:, 0])
    assert same_bits(result, expected)


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("shape", [(700, 65), (63, 4099), (3, 4096)], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_the_same_bits_on_every_run_and_number_of_threads(threads, shape, dtype, p):
    x, residual, upstream = (torch.randn(shape).to(dtype).requires_grad_() for _ in range(3))
    bias = torch.randn(shape[1:]).to(dtype).requires_grad_()

    def run(count):
        threads(count)
        with poisoned_memory(), glmkern.backend("cpu"):
            y = ops.bias_dropout_add(x, bias, residual, p, SEED)
            wanted = (x, bias) if p > 0 else (x,)  # with p = 0 the sum over the rows is PyTorch's
            return y, *torch.autograd.grad(y, wanted, upstream)

    first = run(1)
    for count in (1, 2, 3):
        assert all(map(same_bits, first, run(count)))


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_a_large_output_has_the_bits_of_its_pieces(p):
    """Outputs beyond the caches are stored past them, by other instructions."""
    x, residual, bias = torch.randn(1100, 4096), torch.randn(1100, 4096), torch.randn(4096)
    whole_batch = torch.arange(0, 1101, 100, dtype=torch.int32)

    def both(x, residual, cu_seqlens, ids):
        drop = (p, SEED, cu_seqlens, ids)
        y = torch.ops.glmkern.bias_dropout_add_fwd(x, bias, residual, *drop)
        return (y, bwd(x, *drop, False)[0]) if p > 0 else (y,)

    with glmkern.backend("cpu"), poisoned_memory():
        whole = both(x, residual, whole_batch, torch.arange(11))
        parts = [
            both(a, b, whole_batch[:2], torch.tensor([i]))
            for i, (a, b) in enumerate(zip(x.split(100), residual.split(100), strict=True))
        ]
    assert all(
        same_bits(w, torch.cat(pieces))
        for w, pieces in zip(whole, zip(*parts, strict=True), strict=True)
    )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (dict(residual=torch.zeros(2, 4)), "residual must have x's shape"),
        (
            dict(x=torch.zeros(3, 0), residual=torch.zeros(3, 0)),
            "a last dimension that is not empty",
        ),
        (dict(bias=torch.zeros(2)), r"bias must have shape \[3\]"),
        (dict(bias=torch.zeros(3, dtype=torch.float64)), "bias is float64 but x is float32"),
        (dict(p=1.0), r"must be in \[0, 1\), not 1.0"),
        (dict(seed=None), "dropout needs seed"),
        (dict(cu_seqlens=torch.tensor([0, 2])), "cu_seqlens must be an int32 tensor"),
        (
            dict(cu_seqlens=torch.tensor([0, 0, 2], dtype=torch.int32)),
            r"^bias_dropout_add: sequence 0 is empty \(cu_seqlens goes from 0 to 0\); leave it out",
        ),
        (dict(cu_seqlens=torch.tensor([0, 3, 2], dtype=torch.int32)), "sequence 1 is empty"),
        (
            dict(cu_seqlens=torch.tensor([0, 3], dtype=torch.int32)),
            "from 0 to the number of tokens, 2, not from 0 to 3$",
        ),
        (dict(cu_seqlens=torch.tensor([1, 2], dtype=torch.int32)), "not from 1 to 2$"),
        (dict(sequence_ids=torch.tensor([0, 1])), r"sequence_ids must be an int64 tensor \[1\]"),
    ],
)
def test_errors(backend, arguments, sentence):
    call = dict(x=torch.zeros(2, 3), bias=None, residual=torch.zeros(2, 3), p=0.5, seed=SEED)
    with pytest.raises(ValueError, match=sentence):
        ops.bias_dropout_add(**{**call, **arguments})


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
def test_the_kernels_guard_direct_calls(position, wrong, sentence):
    glmkern.backends("cpu")
    arguments = [
        torch.zeros(3, 8),
        0.5,
        SEED,
        torch.tensor([0, 3], dtype=torch.int32),
        torch.tensor([0]),
        True,
    ]
    arguments[position] = wrong
    with pytest.raises(RuntimeError, match=f"^bias_dropout_add_bwd: {sentence}$"):
        torch.ops.glmkern_cpu.bias_dropout_add_bwd(*arguments)
