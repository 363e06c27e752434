"""rope and the fused forms around query_key_value: numbers, layouts, errors."""

import pytest
import torch

from glmkern import ops
from tests.backends import slow
from tests.ops.formulas import rotated
from tests.ops.numerics import HALF_AND_SINGLE, matches_fp64, poisoned_memory, same_bits

OP = "rope_fwd"
library = torch.ops.glmkern
# tokens, heads, channels, pairs: one pair; all channels, half and all but one of them rotated;
# heads of several programs
SHAPES = [
    (1, 1, 2, 1),
    (3, 5, 12, 3),
    (3, 34, 128, 32),
    (7, 2, 10, 5),
    (4, 3, 83, 41),
    slow((17, 34, 128, 32)),
]
# dtype of x, of the table
DTYPES = [
    *((dtype, torch.float32) for dtype in HALF_AND_SINGLE),
    (torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.float16),
    slow(torch.float16, torch.float16),
    slow(torch.float16, torch.bfloat16),
    slow(torch.bfloat16, torch.float16),
    slow(torch.float32, torch.bfloat16),
]
# tokens, heads, groups, channels, pairs, interleaved
QKV_SHAPES = [
    (1, 1, 1, 2, 1, False),
    (5, 6, 2, 12, 3, False),
    (3, 32, 2, 128, 32, False),
    (5, 3, 3, 10, 2, True),
    (2, 11, 11, 83, 41, True),
    slow((17, 32, 2, 128, 32, False)),
    slow((4, 4, 4, 83, 41, True)),
]


def table(positions, pairs):
    angles = torch.rand(positions, pairs, dtype=torch.float64) * 100
    return torch.stack([angles.cos(), angles.sin()], -1)


@pytest.mark.parametrize(("dtype", "table_dtype"), DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_fp64(backend, shape, dtype, table_dtype):
    tokens, heads, channels, pairs = shape
    cos_sin, positions = table(50, pairs).to(table_dtype), torch.randint(50, (tokens,))
    matches_fp64(
        lambda x: ops.rope(x, cos_sin, positions),
        lambda x: rotated(x, cos_sin, positions),
        lambda: [torch.randn(tokens, heads, channels).to(dtype).requires_grad_()],
    )


def test_strided_heads(backend):
    cos_sin, positions = table(9, 4).float(), torch.arange(5)
    wide = torch.randn(5, 7, 16)
    for x in (
        wide[:, 2:6],
        wide[:, ::2],
        torch.randn(16, 7, 5).permute(2, 1, 0),
        torch.randn(7, 5, 16).transpose(0, 1),
        wide[:, :1].expand(5, 3, 16),
        wide[:, :, 3:15],
        torch.randn(5, 7, 32)[:, :, ::2],
    ):
        for op in (library.rope_fwd, library.rope_bwd):
            result = op(x, cos_sin, positions)
            assert result.is_contiguous()
            assert same_bits(result, op(x.contiguous(), cos_sin, positions))
    strided = torch.randn(9, 2, 8).transpose(1, 2), torch.arange(10)[::2]
    assert same_bits(ops.rope(wide, *strided), ops.rope(wide, *(t.contiguous() for t in strided)))


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
def test_channels_behind_the_pairs_are_copied(backend, dtype):
    """Whatever they hold: infinities and zeros with a sign too."""
    x = torch.randn(3, 2, 11).to(dtype)
    x[..., 6:] = torch.tensor([torch.inf, -0.0, 0.0, -torch.inf, 1.0]).to(dtype)
    angles = table(50, 3).float(), torch.randint(50, (3,))
    for op in (library.rope_fwd, library.rope_bwd):
        assert same_bits(op(x, *angles)[..., 6:].contiguous(), x[..., 6:].contiguous())
    for interleaved, (heads, groups) in ((False, (4, 1)), (True, (2, 2))):
        qkv = torch.randn(3, 66).to(dtype)
        qkv[:, -11:] = x[:, 0]
        parts = library.qkv_rope_fwd(qkv, None, *angles, heads, groups, interleaved)
        assert same_bits(parts[2][:, -1].contiguous(), x[:, 0].contiguous())
        back = library.qkv_rope_bwd(*parts, *angles, interleaved)
        assert same_bits(back[:, -11:].contiguous(), x[:, 0].contiguous())


def test_nothing_to_rotate(backend):
    x, positions = torch.randn(3, 2, 6), torch.arange(3)
    with poisoned_memory():
        assert same_bits(ops.rope(x, torch.zeros(4, 0, 2), positions), x)
    cos_sin = torch.zeros(4, 2, 2)
    assert ops.rope(x[:0], cos_sin, positions[:0]).shape == (0, 2, 6)
    assert ops.rope(x[:, :0], cos_sin, positions).shape == (3, 0, 6)
    qkv = x.flatten(1)[:0]
    q, k, v = library.qkv_rope_fwd(qkv, None, cos_sin[:, :1], positions[:0], 1, 1, False)
    assert q.shape == k.shape == v.shape == (0, 1, 4)
    assert library.qkv_rope_bwd(q, k, v, cos_sin[:, :1], positions[:0], False).shape == (0, 12)


def qkv_inputs(tokens, heads, groups, channels, pairs, dtype):
    """qkv in rows of a wider tensor, a bias, a table and positions."""
    width = (heads + 2 * groups) * channels
    qkv = torch.randn(tokens, width + 3).to(dtype)[:, :width]
    return (
        qkv,
        torch.randn(width).to(dtype),
        table(50, pairs).float(),
        torch.randint(50, (tokens,)),
    )


def split_qkv(qkv, heads, groups, interleaved):
    rows = qkv.unflatten(1, (heads + 2 * groups, -1))
    if interleaved:
        return rows[:, 0::3], rows[:, 1::3], rows[:, 2::3]
    return rows[:, :heads], rows[:, heads : heads + groups], rows[:, heads + groups :]


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("shape", QKV_SHAPES, ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
def test_qkv_rope_against_fp64(backend, shape, dtype, with_bias):
    *sizes, interleaved = shape
    heads, groups = sizes[1:3]
    _, _, cos_sin, positions = qkv_inputs(*sizes, dtype)

    def kernel(qkv, bias):
        return library.qkv_rope_fwd(qkv, bias, cos_sin, positions, heads, groups, interleaved)

    def formula(qkv, bias):
        wide = qkv if bias is None else (qkv if qkv.dtype == torch.float64 else qkv.float()) + bias
        q, k, v = split_qkv(wide, heads, groups, interleaved)
        return tuple(
            x.to(qkv.dtype)
            for x in (rotated(q, cos_sin, positions), rotated(k, cos_sin, positions), v)
        )

    def inputs():
        qkv, bias, _, _ = qkv_inputs(*sizes, dtype)
        return qkv, bias if with_bias else None

    matches_fp64(kernel, formula, inputs)


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("shape", QKV_SHAPES, ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
def test_qkv_rope_into_a_cache(backend, shape, dtype, with_bias):
    """The bits of qkv_rope_fwd, at the slots; all other entries stay."""
    *sizes, interleaved = shape
    tokens, heads, groups, channels, _ = sizes
    qkv, bias, *angles = qkv_inputs(*sizes, dtype)
    arguments = (qkv, bias if with_bias else None, *angles, heads, groups, interleaved)
    caches = torch.randn(2, 3 * tokens, groups + 1, channels).to(dtype)[:, :, :groups]
    slots = torch.randperm(3 * tokens)[:tokens]
    q, k, v = library.qkv_rope_fwd(*arguments)
    expected = caches.clone()
    expected[0, slots], expected[1, slots] = k, v
    with poisoned_memory():
        assert same_bits(library.qkv_rope_cache_fwd(*arguments, *caches, slots), q)
    assert same_bits(caches.contiguous(), expected.contiguous())


def test_qkv_rope_into_no_entries(backend):
    qkv, bias, *angles = qkv_inputs(1, 2, 1, 6, 2, torch.float32)
    angles = angles[0], angles[1][:0]
    caches = torch.randn(2, 4, 1, 6)
    before, slots = caches.clone(), torch.zeros(0, dtype=torch.int64)
    q = library.qkv_rope_cache_fwd(qkv[:0], bias, *angles, 2, 1, False, *caches, slots)
    assert q.shape == (0, 2, 6)
    assert same_bits(caches, before)


@pytest.mark.parametrize(("slots", "range_"), [([0, 4], "0 to 4"), ([-1, 2], "-1 to 2")])
def test_slots_outside_the_cache(backend, checked_values, slots, range_):
    qkv, bias, *angles = qkv_inputs(2, 2, 1, 6, 2, torch.float32)
    caches = torch.randn(2, 4, 1, 6)
    with pytest.raises(ValueError, match=f"^rope: slots run from {range_}, but the cache has 0 to"):
        library.qkv_rope_cache_fwd(qkv, bias, *angles, 2, 1, False, *caches, torch.tensor(slots))


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("shape", QKV_SHAPES, ids=str)
def test_qkv_rope_backward_against_fp64(backend, shape, dtype):
    *sizes, interleaved = shape
    tokens, heads, groups, channels, _ = sizes
    _, _, cos_sin, positions = qkv_inputs(*sizes, dtype)

    def kernel(dq, dk, dv):
        return library.qkv_rope_bwd(dq, dk, dv, cos_sin, positions, interleaved)

    def formula(dq, dk, dv):
        parts = (
            rotated(dq, cos_sin, positions, inverse=True),
            rotated(dk, cos_sin, positions, inverse=True),
            dv,
        )
        return (torch.stack(parts, 2) if interleaved else torch.cat(parts, 1)).flatten(1)

    matches_fp64(
        kernel,
        formula,
        lambda: [torch.randn(tokens, n, channels).to(dtype) for n in (heads, groups, groups)],
    )


@pytest.mark.parametrize("interleaved", [False, True])
def test_qkv_rope_returns_tensors_of_its_own(backend, interleaved):
    qkv, _, cos_sin, positions = qkv_inputs(3, 2, 2, 6, 2, torch.float32)
    for x in library.qkv_rope_fwd(qkv, None, cos_sin, positions, 2, 2, interleaved):
        assert x.is_contiguous()
        assert x.untyped_storage().data_ptr() != qkv.untyped_storage().data_ptr()


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradients_with_strides(backend, interleaved):
    angles = table(50, 2).float(), torch.randint(50, (3,))
    for layout in ((3, 6, 2), (6, 3, 2)):
        grads = [torch.randn(layout).movedim(layout.index(3), 0).transpose(1, 2) for _ in range(3)]
        assert grads[0].shape == (3, 2, 6)
        result = library.qkv_rope_bwd(*grads, *angles, interleaved)
        assert same_bits(
            result, library.qkv_rope_bwd(*(g.contiguous() for g in grads), *angles, interleaved)
        )
    wide = torch.randn(3, 9, 6)
    parts = wide[:, :4], wide[:, 4:6], wide[:, 7:]
    assert same_bits(
        library.qkv_rope_bwd(*parts, *angles, False),
        library.qkv_rope_bwd(*(g.contiguous() for g in parts), *angles, False),
    )


@pytest.mark.backends("cpu", "triton", "cuda")
@pytest.mark.parametrize(("groups", "interleaved"), [(2, False), (4, False), (4, True)])
def test_the_fused_form_has_the_bits_of_its_parts(backend, groups, interleaved):
    qkv, _, *angles = qkv_inputs(9, 4, groups, 20, 5, torch.float32)
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


@pytest.mark.backends("cpu", "triton", "cuda")
def test_a_float64_table_has_no_kernel(backend):
    arguments = torch.randn(3, 2, 6), table(9, 2), torch.arange(3)
    sentence = f"'{backend.name}' is forced, but cannot serve rope_fwd: float64 has no kernel"
    with pytest.raises(RuntimeError, match=sentence):
        ops.rope(*arguments)


def test_a_float64_table_is_the_reference_s():
    assert ops.rope(torch.randn(3, 2, 6), table(9, 2), torch.arange(3)).dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (dict(x=torch.zeros(3, 8)), r"x must be \[T, heads, C\]"),
        (dict(x=torch.zeros(3, 1, 8, dtype=torch.int32)), "x must be float32"),
        (dict(cos_sin=torch.zeros(9, 5, 2)), "2R <= 8, the channels of x"),
        (dict(positions=torch.zeros(2, dtype=torch.int64)), r"positions must be int64 \[3\]"),
        (dict(positions=torch.zeros(3, dtype=torch.int32)), r"positions must be int64 \[3\]"),
        (
            dict(positions=torch.tensor([0, 9, 1])),
            "^rope: positions run from 0 to 9, but the table holds positions 0 to 8$",
        ),
        (dict(positions=torch.tensor([0, -1, 1])), "positions run from -1 to 1"),
    ],
)
def test_errors(backend, checked_values, arguments, sentence):
    call = dict(x=torch.zeros(3, 1, 8), cos_sin=torch.zeros(9, 2, 2), positions=torch.arange(3))
    with pytest.raises(ValueError, match=sentence):
        ops.rope(**call | backend.on_device(arguments))


@pytest.mark.parametrize(
    "op", ["rope_fwd", "rope_bwd", "qkv_rope_fwd", "qkv_rope_cache_fwd", "qkv_rope_bwd"]
)
def test_every_form_checks_positions(backend, checked_values, op):
    x = torch.zeros(3, 2, 8)
    angles = torch.zeros(9, 2, 2), torch.tensor([0, 9, 1])
    qkv = (x.flatten(1).repeat(1, 3), None, *angles, 2, 2, False)
    arguments = {
        "qkv_rope_fwd": qkv,
        "qkv_rope_cache_fwd": (*qkv, x.clone(), x.clone(), torch.arange(3)),
        "qkv_rope_bwd": (x, x, x, *angles, False),
    }.get(op, (x, *angles))
    with pytest.raises(ValueError, match="^rope: positions run from 0 to 9, but the table holds"):
        getattr(library, op)(*arguments)
