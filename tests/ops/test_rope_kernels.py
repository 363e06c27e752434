"""What only a kernel of rope can get wrong: bits, memory, direct calls."""

from unittest import mock

import pytest
import torch

from glmkern import ops
from glmkern.triton_kernels import rope as kernels
from tests.ops.numerics import HALF_AND_SINGLE, poisoned_memory, same_bits
from tests.ops.test_rope import qkv_inputs, table

OP = "rope_fwd"
library = torch.ops.glmkern


def every_form(qkv, bias, cos_sin, positions, heads, groups):
    q, k, v = library.qkv_rope_fwd(qkv, bias, cos_sin, positions, heads, groups, False)
    return (
        q,
        k,
        v,
        library.qkv_rope_bwd(q, k, v, cos_sin, positions, False),
        library.rope_fwd(q, cos_sin, positions),
        library.rope_bwd(q, cos_sin, positions),
    )


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("shape", [(97, 6, 2, 36, 9), (70, 8, 1, 128, 32)], ids=str)
def test_the_same_bits_on_every_run_and_number_of_threads(backend, threads, shape, dtype):
    inputs = qkv_inputs(*shape, dtype)

    def run(count):
        threads(count)
        with poisoned_memory():
            return every_form(*inputs, *shape[1:3])

    first = run(1)
    for count in (1, 2, 3):
        assert all(map(same_bits, first, run(count)))


@pytest.mark.backends("triton", "cuda")
def test_same_bits_every_time(backend):
    inputs = qkv_inputs(7, 32, 2, 36, 9, torch.float32)
    with poisoned_memory():
        first, second = (every_form(*inputs, 32, 2) for _ in range(2))
    assert all(map(same_bits, first, second))


@pytest.mark.backends("cpu", "cuda")
@pytest.mark.parametrize(
    ("position", "wrong", "sentence"),
    [
        (0, torch.zeros(3, 2, 8), r"qkv must be \[T, \(heads \+ 2 groups\) \* C\]"),
        (0, torch.zeros(3, 35), "a row of qkv must hold heads \\+ 2 groups heads of one size"),
        (1, torch.zeros(24), "bias must have 32 elements, not 24"),
        (
            2,
            torch.zeros(9, 5, 2),
            r"cos_sin must be \[positions, R, 2\] with 2R <= 8, the channels",
        ),
        (3, torch.zeros(3), "positions has another dtype"),
        (5, 0, "heads and groups must be positive"),
        (6, True, "interleaved heads need as many groups as heads"),
    ],
)
def test_the_kernels_guard_direct_calls(backend, position, wrong, sentence):
    angles = torch.zeros(9, 2, 2), torch.arange(3)
    arguments = [torch.zeros(3, 32), torch.zeros(32), *angles, 2, 1, False]
    arguments[position] = wrong.to(backend.device) if torch.is_tensor(wrong) else wrong
    with pytest.raises(RuntimeError, match=f"^qkv_rope_fwd: {sentence}$"):
        backend.kernels.qkv_rope_fwd(*arguments)


@pytest.mark.backends("cpu", "cuda")
@pytest.mark.parametrize(
    ("position", "wrong", "sentence"),
    [
        (7, torch.zeros(5, 2, 8), r"keys and values must be \[entries, groups, C\] of qkv's dtype"),
        (8, torch.zeros(4, 1, 8), r"keys and values must be \[entries, groups, C\] of qkv's dtype"),
        (8, torch.zeros(5, 8, 1).mT, r"an entry of keys or values is not contiguous"),
        (7, torch.zeros(5, 1, 8).half(), "keys and values must be"),
        (9, torch.arange(4), "slots must have 3 elements, not 4"),
        (9, torch.zeros(3), "slots has another dtype"),
    ],
)
def test_the_kernels_guard_caches(backend, position, wrong, sentence):
    angles = torch.zeros(9, 2, 2), torch.arange(3)
    caches = torch.zeros(2, 5, 1, 8)
    arguments = [torch.zeros(3, 32), None, *angles, 2, 1, False, *caches, torch.arange(3)]
    arguments[position] = wrong.to(backend.device)
    with pytest.raises(RuntimeError, match=f"^qkv_rope_cache_fwd: {sentence}"):
        backend.kernels.qkv_rope_cache_fwd(*arguments)


@pytest.mark.backends("triton")
@pytest.mark.parametrize("shape", [(1, 1, 1, 2, 1), (3, 5, 5, 3, 1), (2, 9, 2, 20, 7)], ids=str)
def test_touches_nothing_outside(backend, shape, monkeypatch):
    """Inputs and table lie between NaNs, outputs between guards: no NaN comes in, no guard
    changes."""
    tokens, heads, groups, channels, pairs = shape
    in_row, margin, buffers = heads + 2 * groups, 4096, []

    def surrounded(fill, *size):
        buffers.append(torch.full((2 * margin + torch.Size(size).numel(),), fill))
        return buffers[-1][margin:-margin].view(size)

    x = surrounded(torch.nan, tokens, in_row, channels).normal_()
    bias = surrounded(torch.nan, in_row * channels).normal_()
    cos_sin = surrounded(torch.nan, 50, pairs, 2).copy_(table(50, pairs))
    angles = cos_sin, torch.arange(50 - tokens, 50)
    new_empty = torch.Tensor.new_empty  # the interpreter uses it too
    monkeypatch.setattr(
        torch.Tensor,
        "new_empty",
        lambda like, *size, **options: (
            surrounded(7.0, *size) if len(size) > 1 else new_empty(like, *size, **options)
        ),
    )
    results = [kernels.rope_fwd(x, *angles), kernels.rope_bwd(x, *angles)]
    for interleaved in (False, True) if heads == groups else (False,):
        parts = kernels.qkv_rope_fwd(x.flatten(1), bias, *angles, heads, groups, interleaved)
        results += [*parts, kernels.qkv_rope_bwd(*parts, *angles, interleaved)]
        caches = [surrounded(7.0, tokens, groups, channels) for _ in range(2)]
        qkv = (x.flatten(1), bias, *angles, heads, groups, interleaved)
        results += [*caches, kernels.qkv_rope_cache_fwd(*qkv, *caches, torch.arange(tokens))]
    assert all(t.isfinite().all() for t in results)
    assert len(buffers) == 3 + len(results)
    for buffer in buffers[3:]:
        assert (buffer[:margin] == 7.0).all()
        assert (buffer[-margin:] == 7.0).all()


@pytest.mark.backends("triton")
def test_forced_backend_runs_the_kernels(backend):
    x = torch.ones(2, 3, 8, requires_grad=True)
    angles = table(50, 2).float(), torch.randint(50, (2,))
    with mock.patch.object(kernels, "launch", wraps=kernels.launch) as launch:
        ops.rope(x, *angles).sum().backward()
        qkv = (x.detach().flatten(1), None, *angles, 1, 1, False)
        parts = library.qkv_rope_fwd(*qkv)
        library.qkv_rope_cache_fwd(*qkv, *torch.zeros(2, 3, 1, 8), torch.arange(2))
        library.qkv_rope_bwd(*parts, *angles, False)
    assert [call.args[0] for call in launch.call_args_list] == [
        kernels.rope_kernel,
        kernels.rope_kernel,
        kernels.qkv_rope_fwd_kernel,
        kernels.qkv_rope_fwd_kernel,
        kernels.qkv_rope_bwd_kernel,
    ]
