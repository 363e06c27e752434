"""rope and the fused forms around query_key_value, reference and C++: numbers, strides,
registration, determinism, errors."""

import pytest
import torch

import glmkern
from glmkern import ops
from tests.ops.formulas import rotated
from tests.ops.numerics import HALF_AND_SINGLE, matches_fp64, poisoned_memory, same_bits

OP = "rope_fwd"
library = torch.ops.glmkern


def table(positions, pairs):
    angles = torch.rand(positions, pairs, dtype=torch.float64) * 100
    return torch.stack([angles.cos(), angles.sin()], -1)


@pytest.mark.parametrize("table_dtype", HALF_AND_SINGLE, ids=lambda dtype: f"table-{dtype}")
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize(
    ("tokens", "heads", "channels", "pairs"),
    [(1, 1, 2, 1), (3, 5, 12, 3), (17, 34, 128, 32), (7, 2, 10, 5), (4, 3, 83, 41)],
)
def test_against_fp64(backend, tokens, heads, channels, pairs, dtype, table_dtype):
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
    ):
        for op in (library.rope_fwd, library.rope_bwd):
            expected = op(x.contiguous(), cos_sin, positions)
            assert same_bits(op(x, cos_sin, positions), expected)
    strided = torch.randn(9, 2, 8).transpose(1, 2), torch.arange(10)[::2]
    assert same_bits(ops.rope(wide, *strided), ops.rope(wide, *(t.contiguous() for t in strided)))


def test_nothing_to_rotate(backend):
    x = torch.randn(3, 2, 6)
    with poisoned_memory():
        assert same_bits(ops.rope(x, torch.zeros(4, 0, 2), torch.arange(3)), x)
    assert ops.rope(x[:0], torch.zeros(4, 2, 2), torch.arange(0)).shape == (0, 2, 6)


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


QKV_SHAPES = [
    (1, 1, 1, 2, 1, False),
    (5, 6, 2, 12, 3, False),
    (17, 32, 2, 128, 32, False),
    (5, 3, 3, 10, 2, True),
    (4, 4, 4, 83, 41, True),
]


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
    parts = library.qkv_rope_fwd(qkv, None, cos_sin, positions, 2, 2, interleaved)
    for x in parts:
        assert x.is_contiguous()
        assert x.untyped_storage().data_ptr() != qkv.untyped_storage().data_ptr()
    dq, dk, dv = (torch.randn(3, 6, 2).transpose(1, 2) for _ in range(3))
    result = library.qkv_rope_bwd(dq, dk, dv, cos_sin, positions, interleaved)
    assert same_bits(
        result,
        library.qkv_rope_bwd(
            dq.contiguous(), dk.contiguous(), dv.contiguous(), cos_sin, positions, interleaved
        ),
    )


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("shape", [(97, 6, 2, 36, 9), (70, 8, 1, 128, 32)], ids=str)
def test_the_same_bits_on_every_run_and_number_of_threads(threads, shape, dtype):
    inputs = qkv_inputs(*shape, dtype)

    def run(count):
        threads(count)
        with poisoned_memory(), glmkern.backend("cpu"):
            q, k, v = library.qkv_rope_fwd(*inputs, *shape[1:3], False)
            return (
                q,
                k,
                v,
                library.qkv_rope_bwd(q, k, v, *inputs[2:], False),
                library.rope_fwd(q, *inputs[2:]),
                library.rope_bwd(q, *inputs[2:]),
            )

    first = run(1)
    for count in (1, 2, 3):
        assert all(map(same_bits, first, run(count)))


def test_the_fused_form_has_the_bits_of_its_parts():
    qkv, _, cos_sin, positions = qkv_inputs(9, 4, 2, 20, 5, torch.float32)
    with glmkern.backend("cpu"):
        q, k, v = library.qkv_rope_fwd(qkv, None, cos_sin, positions, 4, 2, False)
        heads = qkv.unflatten(1, (8, 20))
        qk = library.rope_fwd(heads[:, :6], cos_sin, positions)
        assert same_bits(torch.cat([q, k], 1), qk)
        assert same_bits(v, heads[:, 6:].contiguous())
        dqkv = library.qkv_rope_bwd(q, k, v, cos_sin, positions, False)
        assert same_bits(
            dqkv, torch.cat([library.rope_bwd(qk, cos_sin, positions), v], 1).flatten(1)
        )


def test_a_float64_table_is_the_reference_s():
    arguments = torch.randn(3, 2, 6), table(9, 2), torch.arange(3)
    with (
        pytest.raises(RuntimeError, match="cannot serve rope_fwd: float64 has no kernel"),
        glmkern.backend("cpu"),
    ):
        ops.rope(*arguments)
    assert ops.rope(*arguments).dtype == torch.float32


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
def test_errors(backend, arguments, sentence):
    call = dict(x=torch.zeros(3, 1, 8), cos_sin=torch.zeros(9, 2, 2), positions=torch.arange(3))
    with pytest.raises(ValueError, match=sentence):
        ops.rope(**{**call, **arguments})


@pytest.mark.parametrize("op", ["rope_fwd", "rope_bwd", "qkv_rope_fwd", "qkv_rope_bwd"])
def test_every_form_checks_positions(backend, op):
    x = torch.zeros(3, 2, 8)
    angles = torch.zeros(9, 2, 2), torch.tensor([0, 9, 1])
    arguments = {
        "qkv_rope_fwd": (x.flatten(1).repeat(1, 3), None, *angles, 2, 2, False),
        "qkv_rope_bwd": (x, x, x, *angles, False),
    }.get(op, (x, *angles))
    with pytest.raises(ValueError, match="^rope: positions run from 0 to 9, but the table holds"):
        getattr(library, op)(*arguments)


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
def test_the_kernels_guard_direct_calls(position, wrong, sentence):
    glmkern.backends("cpu")
    arguments = [
        torch.zeros(3, 32),
        torch.zeros(32),
        torch.zeros(9, 2, 2),
        torch.arange(3),
        2,
        1,
        False,
    ]
    arguments[position] = wrong
    with pytest.raises(RuntimeError, match=f"^qkv_rope_fwd: {sentence}$"):
        torch.ops.glmkern_cpu.qkv_rope_fwd(*arguments)
