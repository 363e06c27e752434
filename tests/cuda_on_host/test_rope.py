"""The CUDA kernel of rope on the CPU, beyond the tests that all backends share: 16-byte accesses
and single elements in every form, one tensor unaligned or strided at a time, heads of several
blocks."""

import pytest
import torch

from tests.cuda_on_host.cases import every_form_of_rope, qkv_inputs
from tests.cuda_on_host.sanitized import unaligned
from tests.ops.formulas import rotated
from tests.ops.numerics import HALF_AND_SINGLE, matches_fp64, poisoned_memory, same_bits
from tests.ops.test_rope import split_qkv, table

# tokens, heads, groups, channels, pairs, interleaved: 16 bytes at a time in every dtype
QKV_SHAPES = [
    (3, 32, 2, 128, 32, False),
    (2, 5, 5, 16, 8, True),
    (1, 9, 3, 24, 4, False),
    (1, 2, 1, 1104, 304, False),
]
TABLE_DTYPES = HALF_AND_SINGLE
TENSORS = ("qkv", "bias", "table", "keys", "values")


@pytest.mark.parametrize("table_dtype", TABLE_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("shape", QKV_SHAPES, ids=str)
def test_against_fp64(kernels, shape, dtype, table_dtype):
    tokens, heads, groups, channels, _, interleaved = shape
    _, _, *angles = qkv_inputs(shape, dtype, table_dtype)

    def formula(qkv, bias):
        wide = (qkv if qkv.dtype == torch.float64 else qkv.float()) + bias
        q, k, v = split_qkv(wide, heads, groups, interleaved)
        return tuple(x.to(qkv.dtype) for x in (rotated(q, *angles), rotated(k, *angles), v))

    def formula_of_backward(dq, dk, dv):
        parts = rotated(dq, *angles, inverse=True), rotated(dk, *angles, inverse=True), dv
        return (torch.stack(parts, 2) if interleaved else torch.cat(parts, 1)).flatten(1)

    matches_fp64(
        lambda *x: kernels.qkv_rope_fwd(*x, *angles, heads, groups, interleaved),
        formula,
        lambda: qkv_inputs(shape, dtype)[:2],
    )
    matches_fp64(
        lambda *x: kernels.qkv_rope_bwd(*x, *angles, interleaved),
        formula_of_backward,
        lambda: [torch.randn(tokens, n, channels).to(dtype) for n in (heads, groups, groups)],
    )


@pytest.mark.parametrize("table_dtype", TABLE_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("shape", QKV_SHAPES, ids=str)
def test_single_elements_give_the_same_bits(kernels, shape, dtype, table_dtype):
    inputs = qkv_inputs(shape, dtype, table_dtype)
    with poisoned_memory():
        wide, narrow = (
            every_form_of_rope(kernels, shape, inputs, p) for p in (torch.clone, unaligned)
        )
    assert all(map(same_bits, wide, narrow))


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
def test_strides(kernels, dtype):
    """Of tokens and heads, with 16-byte accesses and without."""
    angles = table(50, 8).float(), torch.randint(50, (5,))
    room = torch.randn(5, 6, 40).to(dtype)
    for x in (
        room[:, 1:5, :16],
        room[:, ::2, 8:24],
        room[:, :, 1:17],
        room.transpose(0, 1)[:5, :, :24],
        room[:, :1, :16].expand(5, 3, 16),
        torch.randn(5, 8, 17).to(dtype)[:, :4, :16],
        torch.randn(5, 67).to(dtype)[:, :64].unflatten(1, (4, 16)),
    ):
        expected = kernels.rope_bwd(x.contiguous(), *angles)
        assert same_bits(kernels.rope_bwd(x, *angles), expected)
        dqkv = kernels.qkv_rope_bwd(x, x[:, :2], x[:, 1:3], *angles, False)
        dq, dk, dv = dqkv.unflatten(1, (-1, x.shape[2])).split([x.shape[1], 2, 2], 1)
        assert same_bits(dq.contiguous(), expected)
        assert same_bits(dk.contiguous(), expected[:, :2].contiguous())
        assert same_bits(dv.contiguous(), x[:, 1:3].contiguous())


@pytest.mark.parametrize("odd", TENSORS)
def test_one_tensor_alone_is_unaligned(kernels, odd):
    qkv, bias, cos_sin, positions = qkv_inputs((2, 4, 2, 16, 4, False), torch.float16)
    angles = unaligned(cos_sin) if odd == "table" else cos_sin, positions
    q, k, v = kernels.qkv_rope_fwd(qkv, bias, *angles, 4, 2, False)
    caches = {
        name: torch.zeros(4, 32 + 3 * (name == odd)).half()[:, :32].unflatten(1, (2, 16))
        for name in ("keys", "values")
    }
    q_too = kernels.qkv_rope_cache_fwd(
        unaligned(qkv) if odd == "qkv" else qkv,
        unaligned(bias) if odd == "bias" else bias,
        *angles,
        *(4, 2, False),
        *caches.values(),
        torch.tensor([3, 2]),
    )
    assert same_bits(q_too, q)
    assert same_bits(caches["keys"][2:].flip(0), k)
    assert same_bits(caches["values"][2:].flip(0), v)


@pytest.mark.parametrize("place", [torch.Tensor.clone, unaligned])
def test_no_tokens(kernels, place):
    shape = (0, 4, 2, 16, 4, False)
    results = every_form_of_rope(kernels, shape, qkv_inputs(shape, torch.float16), place)
    assert [x.numel() for x in results[:-2]] == [0] * 7
    assert all(x.eq(0).all() for x in results[-2:])
