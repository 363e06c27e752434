"""The Triton rope and the fused forms around query_key_value: against float64, strides, and what
only a kernel can get wrong."""

from unittest import mock

import pytest
import torch

from glmkern import ops
from glmkern.triton_kernels import rope as kernels
from tests.ops.formulas import rotated
from tests.ops.numerics import HALF_AND_SINGLE, matches_fp64, poisoned_memory, same_bits

library = torch.ops.glmkern
# tokens, heads, channels, pairs: one pair; all channels, half and all but one of them rotated;
# heads of several programs
SHAPES = [(1, 1, 2, 1), (3, 5, 12, 3), (3, 34, 128, 32), (7, 2, 10, 5), (4, 3, 83, 41)]
# tokens, heads, groups, channels, pairs, interleaved
QKV_SHAPES = [
    (1, 1, 1, 2, 1, False),
    (5, 6, 2, 12, 3, False),
    (3, 32, 2, 128, 32, False),
    (5, 3, 3, 10, 2, True),
    (2, 11, 11, 83, 41, True),
]


def table(pairs, dtype, device):
    angles = torch.rand(50, pairs, dtype=torch.float64) * 100
    return torch.stack([angles.cos(), angles.sin()], -1).to(device, dtype)


def random_positions(tokens, device):
    return torch.randint(50, (tokens,)).to(device)


@pytest.mark.parametrize(
    ("dtype", "table_dtype"),
    [
        *((dtype, torch.float32) for dtype in HALF_AND_SINGLE),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float16),
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_fp64(shape, dtype, table_dtype, device):
    tokens, heads, channels, pairs = shape
    cos_sin, positions = table(pairs, table_dtype, device), random_positions(tokens, device)
    matches_fp64(
        lambda x: ops.rope(x, cos_sin, positions),
        lambda x: rotated(x, cos_sin, positions),
        lambda: [torch.randn(tokens, heads, channels).to(device, dtype).requires_grad_()],
    )


def test_strided_heads(device):
    cos_sin, positions = table(4, torch.float32, device), torch.arange(5, device=device)
    wide = torch.randn(5, 7, 16, device=device)
    for x in (
        wide[:, 2:6],
        wide[:, ::2],
        torch.randn(16, 7, 5, device=device).permute(2, 1, 0),
        torch.randn(7, 5, 16, device=device).transpose(0, 1),
        wide[:, :1].expand(5, 3, 16),
        wide[:, :, 3:15],
        torch.randn(5, 7, 32, device=device)[:, :, ::2],
    ):
        for op in (library.rope_fwd, library.rope_bwd):
            result = op(x, cos_sin, positions)
            assert result.is_contiguous()
            assert same_bits(result, op(x.contiguous(), cos_sin, positions))
    strided = (
        torch.randn(9, 2, 8, device=device).transpose(1, 2),
        torch.arange(10, device=device)[::2],
    )
    assert same_bits(ops.rope(wide, *strided), ops.rope(wide, *(t.contiguous() for t in strided)))


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
def test_channels_behind_the_pairs_are_copied(dtype, device):
    """Whatever they hold: infinities and zeros with a sign too."""
    x = torch.randn(3, 2, 11).to(device, dtype)
    x[..., 6:] = torch.tensor([torch.inf, -0.0, 0.0, -torch.inf, 1.0], device=device).to(dtype)
    angles = table(3, torch.float32, device), random_positions(3, device)
    for op in (library.rope_fwd, library.rope_bwd):
        assert same_bits(op(x, *angles)[..., 6:].contiguous(), x[..., 6:].contiguous())
    for interleaved, (heads, groups) in ((False, (4, 1)), (True, (2, 2))):
        qkv = torch.randn(3, 66).to(device, dtype)
        qkv[:, -11:] = x[:, 0]
        parts = library.qkv_rope_fwd(qkv, None, *angles, heads, groups, interleaved)
        assert same_bits(parts[2][:, -1].contiguous(), x[:, 0].contiguous())
        back = library.qkv_rope_bwd(*parts, *angles, interleaved)
        assert same_bits(back[:, -11:].contiguous(), x[:, 0].contiguous())


def test_nothing_to_rotate(device):
    x = torch.randn(3, 2, 6, device=device)
    positions = torch.arange(3, device=device)
    with poisoned_memory():
        assert same_bits(ops.rope(x, torch.zeros(4, 0, 2, device=device), positions), x)
    cos_sin = torch.zeros(4, 2, 2, device=device)
    assert ops.rope(x[:0], cos_sin, positions[:0]).shape == (0, 2, 6)
    assert ops.rope(x[:, :0], cos_sin, positions).shape == (3, 0, 6)
    qkv = x.flatten(1)[:0]
    q, k, v = library.qkv_rope_fwd(qkv, None, cos_sin[:, :1], positions[:0], 1, 1, False)
    assert q.shape == k.shape == v.shape == (0, 1, 4)
    assert library.qkv_rope_bwd(q, k, v, cos_sin[:, :1], positions[:0], False).shape == (0, 12)


def qkv_inputs(tokens, heads, groups, channels, dtype, device):
    """qkv in rows of a wider tensor, and a bias."""
    width = (heads + 2 * groups) * channels
    qkv = torch.randn(tokens, width + 3).to(device, dtype)[:, :width]
    return qkv, torch.randn(width).to(device, dtype)


def split_qkv(qkv, heads, groups, interleaved):
    rows = qkv.unflatten(1, (heads + 2 * groups, -1))
    if interleaved:
        return rows[:, 0::3], rows[:, 1::3], rows[:, 2::3]
    return rows[:, :heads], rows[:, heads : heads + groups], rows[:, heads + groups :]


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("shape", QKV_SHAPES, ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
def test_qkv_rope_against_fp64(shape, dtype, with_bias, device):
    tokens, heads, groups, channels, pairs, interleaved = shape
    angles = table(pairs, torch.float32, device), random_positions(tokens, device)

    def kernel(qkv, bias):
        return library.qkv_rope_fwd(qkv, bias, *angles, heads, groups, interleaved)

    def formula(qkv, bias):
        wide = qkv if bias is None else (qkv if qkv.dtype == torch.float64 else qkv.float()) + bias
        q, k, v = split_qkv(wide, heads, groups, interleaved)
        return tuple(x.to(qkv.dtype) for x in (rotated(q, *angles), rotated(k, *angles), v))

    def inputs():
        qkv, bias = qkv_inputs(tokens, heads, groups, channels, dtype, device)
        return qkv, bias if with_bias else None

    matches_fp64(kernel, formula, inputs)


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("shape", QKV_SHAPES, ids=str)
def test_qkv_rope_backward_against_fp64(shape, dtype, device):
    tokens, heads, groups, channels, pairs, interleaved = shape
    angles = table(pairs, torch.float32, device), random_positions(tokens, device)

    def kernel(dq, dk, dv):
        return library.qkv_rope_bwd(dq, dk, dv, *angles, interleaved)

    def formula(dq, dk, dv):
        parts = rotated(dq, *angles, inverse=True), rotated(dk, *angles, inverse=True), dv
        return (torch.stack(parts, 2) if interleaved else torch.cat(parts, 1)).flatten(1)

    matches_fp64(
        kernel,
        formula,
        lambda: [
            torch.randn(tokens, n, channels).to(device, dtype) for n in (heads, groups, groups)
        ],
    )


@pytest.mark.parametrize(("groups", "interleaved"), [(2, False), (4, False), (4, True)])
def test_the_fused_form_has_the_bits_of_its_parts(groups, interleaved, device):
    qkv, _ = qkv_inputs(9, 4, groups, 20, torch.float32, device)
    angles = table(5, torch.float32, device), random_positions(9, device)
    fused = library.qkv_rope_fwd(qkv, None, *angles, 4, groups, interleaved)
    q, k, v = split_qkv(qkv, 4, groups, interleaved)
    parts = library.rope_fwd(q, *angles), library.rope_fwd(k, *angles), v.contiguous()
    assert all(map(same_bits, fused, parts))
    assert all(x.is_contiguous() for x in fused)
    dqkv = library.qkv_rope_bwd(*fused, *angles, interleaved)
    dq, dk, dv = (x.contiguous() for x in split_qkv(dqkv, 4, groups, interleaved))
    assert same_bits(dq, library.rope_bwd(fused[0], *angles))
    assert same_bits(dk, library.rope_bwd(fused[1], *angles))
    assert same_bits(dv, fused[2])


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradients_with_strides(interleaved, device):
    angles = table(2, torch.float32, device), random_positions(3, device)
    for layout in ((3, 6, 2), (6, 3, 2)):
        grads = [
            torch.randn(layout, device=device).movedim(layout.index(3), 0).transpose(1, 2)
            for _ in range(3)
        ]
        assert grads[0].shape == (3, 2, 6)
        result = library.qkv_rope_bwd(*grads, *angles, interleaved)
        assert same_bits(
            result, library.qkv_rope_bwd(*(g.contiguous() for g in grads), *angles, interleaved)
        )
    wide = torch.randn(3, 9, 6, device=device)
    parts = wide[:, :4], wide[:, 4:6], wide[:, 7:]
    assert same_bits(
        library.qkv_rope_bwd(*parts, *angles, False),
        library.qkv_rope_bwd(*(g.contiguous() for g in parts), *angles, False),
    )


def test_same_bits_every_time(device):
    qkv, bias = qkv_inputs(7, 32, 2, 36, torch.float32, device)
    angles = table(9, torch.float32, device), random_positions(7, device)
    runs = []
    for _ in range(2):
        with poisoned_memory():
            parts = library.qkv_rope_fwd(qkv, bias, *angles, 32, 2, False)
            runs.append(
                [
                    *parts,
                    library.qkv_rope_bwd(*parts, *angles, False),
                    library.rope_fwd(parts[0], *angles),
                    library.rope_bwd(parts[0], *angles),
                ]
            )
    assert all(map(same_bits, *runs))


@pytest.mark.parametrize("shape", [(1, 1, 1, 2, 1), (3, 5, 5, 3, 1), (2, 9, 2, 20, 7)], ids=str)
def test_touches_nothing_outside(shape, device, monkeypatch):
    """Inputs and table lie between NaNs, outputs between guards: no NaN comes in, no guard
    changes."""
    tokens, heads, groups, channels, pairs = shape
    in_row, margin, buffers = heads + 2 * groups, 4096, []

    def surrounded(fill, *size):
        buffers.append(torch.full((2 * margin + torch.Size(size).numel(),), fill, device=device))
        return buffers[-1][margin:-margin].view(size)

    x = surrounded(torch.nan, tokens, in_row, channels).normal_()
    bias = surrounded(torch.nan, in_row * channels).normal_()
    cos_sin = surrounded(torch.nan, 50, pairs, 2).copy_(table(pairs, torch.float32, device))
    angles = cos_sin, torch.arange(50 - tokens, 50, device=device)
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
    assert all(t.isfinite().all() for t in results)
    assert len(buffers) == 3 + len(results)
    for buffer in buffers[3:]:
        assert (buffer[:margin] == 7.0).all()
        assert (buffer[-margin:] == 7.0).all()


def test_positions_are_checked_where_reading_them_is_free(device, monkeypatch):
    monkeypatch.setenv("GLMKERN_CHECK", "1")
    x = torch.zeros(3, 2, 8, device=device)
    angles = torch.zeros(9, 2, 2, device=device), torch.tensor([0, 9, 1], device=device)
    for name, arguments in {
        "rope_fwd": (x, *angles),
        "rope_bwd": (x, *angles),
        "qkv_rope_fwd": (x.flatten(1).repeat(1, 3), None, *angles, 2, 2, False),
        "qkv_rope_bwd": (x, x, x, *angles, False),
    }.items():
        with pytest.raises(ValueError, match="^rope: positions run from 0 to 9, but the table"):
            getattr(library, name)(*arguments)


def test_forced_backend_runs_the_kernels(device):
    x = torch.ones(2, 3, 8, device=device, requires_grad=True)
    angles = table(2, torch.float32, device), random_positions(2, device)
    with mock.patch.object(kernels, "launch", wraps=kernels.launch) as launch:
        ops.rope(x, *angles).sum().backward()
        parts = library.qkv_rope_fwd(x.detach().flatten(1), None, *angles, 1, 1, False)
        library.qkv_rope_bwd(*parts, *angles, False)
    assert [call.args[0] for call in launch.call_args_list] == [
        kernels.rope_kernel,
        kernels.rope_kernel,
        kernels.qkv_rope_fwd_kernel,
        kernels.qkv_rope_bwd_kernel,
    ]


def test_forced_backend_refuses_float64(device):
    x, angles = (
        torch.ones(2, 3, 8, device=device),
        (table(2, torch.float64, device), random_positions(2, device)),
    )
    with pytest.raises(RuntimeError, match="'triton' is forced, but cannot serve rope_fwd"):
        ops.rope(x, *angles)
