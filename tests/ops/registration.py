"""What every registered op must pass besides its numbers, on every backend: inputs for
torch.library.opcheck, and calls for torch.compile."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from glmkern import ops

kernels = torch.ops.glmkern
SEED = (0x1234_5678_9ABC, 77)
IGNORE_INDEX = -100


def random(device: str, *shape: int, grad: bool = False) -> Tensor:
    return torch.randn(shape, device=device, requires_grad=grad)


def integers(device: str, *values: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


def angles(device: str) -> Tensor:
    """A rotary table of 9 positions and 2 pairs."""
    turns = torch.rand(9, 2, device=device) * 100
    return torch.stack([turns.cos(), turns.sin()], -1)


def rms_norm_fwd(device: str) -> Iterator[tuple]:
    yield random(device, 2, 3, 10, grad=True), random(device, 10, grad=True), 1e-5


def add_rms_norm_fwd(device: str) -> Iterator[tuple]:
    x, residual = (random(device, 2, 3, 10, grad=True) for _ in range(2))
    yield x, residual, random(device, 10, grad=True), 1e-5


def rms_norm_bwd(device: str) -> Iterator[tuple]:
    dy, x, dresidual = (random(device, 2, 3, 10) for _ in range(3))
    weight, rstd = random(device, 10), torch.rand(2, 3, device=device)
    yield dy, x, weight, rstd, None, True
    yield dy, x, weight, rstd, dresidual, False


def bias_dropout_add_fwd(device: str) -> Iterator[tuple]:
    for p in (0.0, 0.5):
        x, bias, residual = (random(device, *s, grad=True) for s in ((4, 6), (6,), (4, 6)))
        yield x, bias, residual, p, integers(device, *SEED), *one_sequence(device, 4)


def bias_dropout_add_bwd(device: str) -> Iterator[tuple]:
    for bias_grad in (True, False):
        yield (
            random(device, 4, 6),
            0.5,
            integers(device, *SEED),
            *one_sequence(device, 4),
            bias_grad,
        )


def one_sequence(device: str, tokens: int) -> tuple[Tensor, Tensor]:
    """cu_seqlens and sequence_ids."""
    return integers(device, 0, tokens, dtype=torch.int32), integers(device, 0)


def rope_fwd(device: str) -> Iterator[tuple]:
    yield random(device, 3, 2, 6, grad=True), angles(device), integers(device, 8, 0, 3)


def rope_bwd(device: str) -> Iterator[tuple]:
    yield random(device, 3, 2, 6), angles(device), integers(device, 8, 0, 3)


def qkv_rope_fwd(device: str) -> Iterator[tuple]:
    for bias in (None, random(device, 24)):
        yield random(device, 3, 24), bias, angles(device), integers(device, 8, 0, 3), 2, 1, False


def qkv_rope_cache_fwd(device: str) -> Iterator[tuple]:
    caches = [random(device, 7, 1, 6) for _ in range(2)]
    arguments = (random(device, 3, 24), random(device, 24), angles(device))
    yield *arguments, integers(device, 8, 0, 3), 2, 1, False, *caches, integers(device, 6, 1, 2)


def qkv_rope_bwd(device: str) -> Iterator[tuple]:
    x, table, positions = random(device, 3, 2, 6), angles(device), integers(device, 8, 0, 3)
    yield x, x[:, :1], x[:, 1:], table, positions, False
    yield x, x, x, table, positions, True


def swiglu_fwd(device: str) -> Iterator[tuple]:
    yield (random(device, 3, 8, grad=True),)


def swiglu_bwd(device: str) -> Iterator[tuple]:
    yield random(device, 3, 4), random(device, 3, 8)


def attention_inputs(device: str, grad: bool) -> tuple[Tensor, ...]:
    """q, k, v of sequences of 3 and 2 tokens and a prefix of 3."""
    heads = ((5, 4), (5, 2), (5, 2), (3, 2), (3, 2))
    return tuple(random(device, *shape, 6, grad=grad) for shape in heads)


def attention_sequences(device: str) -> tuple[Tensor, ...]:
    return (
        integers(device, 0, 3, 5, dtype=torch.int32),
        integers(device, 0, 1),
        integers(device, *SEED),
    )


def prefix_attention_fwd(device: str) -> Iterator[tuple]:
    for p in (0.0, 0.25):
        yield *attention_inputs(device, grad=True), *attention_sequences(device), 0.5, p


def prefix_attention_bwd(device: str) -> Iterator[tuple]:
    inputs, sequences = attention_inputs(device, grad=False), attention_sequences(device)
    out, lse = kernels.prefix_attention_fwd(*inputs, *sequences, 0.5, 0.25)
    for token_grad, prefix_grad in ((True, True), (False, True), (True, False)):
        yield (
            torch.randn_like(out),
            *inputs,
            out,
            lse,
            *sequences,
            0.5,
            0.25,
            token_grad,
            prefix_grad,
        )


def prefix_attention_decode_fwd(device: str) -> Iterator[tuple]:
    *_, prefix_k, prefix_v = attention_inputs(device, grad=False)
    caches = random(device, 2, 2, 5, 2, 6)
    yield (
        random(device, 2, 3, 4, 6),
        *caches,
        integers(device, 5, 4),
        prefix_k,
        prefix_v,
        integers(device, 3, 1),
        0.5,
    )


def quant_linear_fwd(device: str) -> Iterator[tuple]:
    x, bias = random(device, 3, 8, grad=True), random(device, 5, grad=True)
    for bits in (4, 8):
        yield x, *ops.quantize(random(device, 5, 8), bits), bias
    yield x, random(device, 5, 8).half(), None, 16, bias


def quant_linear_swiglu_fwd(device: str) -> Iterator[tuple]:
    x, bias = random(device, 3, 8), random(device, 6)
    for bits in (4, 8):
        yield x, *ops.quantize(random(device, 6, 8), bits), bias
    yield x, random(device, 6, 8).half(), None, 16, None


def quant_linear_bwd(device: str) -> Iterator[tuple]:
    for bits in (4, 8):
        yield random(device, 3, 5), *ops.quantize(random(device, 5, 8), bits)


def linear_cross_entropy_fwd(device: str) -> Iterator[tuple]:
    labels, token_weight = integers(device, 1, IGNORE_INDEX, 4, 0), torch.rand(4, device=device)
    for smoothing in (0.0, 0.1):
        yield (
            random(device, 4, 3, grad=True),
            random(device, 5, 3),
            None,
            32,
            labels,
            token_weight,
            IGNORE_INDEX,
            smoothing,
            True,
        )


def linear_cross_entropy_bwd(device: str) -> Iterator[tuple]:
    for dtype in (torch.float32, torch.bfloat16):
        yield random(device), random(device, 4, 3), dtype


# By the op's name: a function of the device that gives its arguments, some cases of them.
ARGUMENTS: dict[str, Callable[[str], Iterator[tuple]]] = {
    case.__name__: case
    for case in (
        rms_norm_fwd,
        add_rms_norm_fwd,
        rms_norm_bwd,
        bias_dropout_add_fwd,
        bias_dropout_add_bwd,
        rope_fwd,
        rope_bwd,
        qkv_rope_fwd,
        qkv_rope_cache_fwd,
        qkv_rope_bwd,
        swiglu_fwd,
        swiglu_bwd,
        prefix_attention_fwd,
        prefix_attention_bwd,
        prefix_attention_decode_fwd,
        quant_linear_fwd,
        quant_linear_swiglu_fwd,
        quant_linear_bwd,
        linear_cross_entropy_fwd,
        linear_cross_entropy_bwd,
    )
}


def compiled_calls(device: str) -> dict[str, tuple[Callable, Callable[[int], list[Tensor]]]]:
    """By the public op's name: a call of it, and what gives its tensors for a number of tokens."""

    def grad(*shape: int) -> Tensor:
        return random(device, *shape, grad=True)

    weight, bias, seed, table = grad(6), grad(6), integers(device, *SEED), angles(device)
    qweight, output_layer = ops.quantize(random(device, 5, 6)), random(device, 7, 6)
    *_, prefix_k, prefix_v = attention_inputs(device, grad=False)
    return {
        "rms_norm": (ops.rms_norm, lambda n: [grad(n, 6), weight]),
        "add_rms_norm": (
            lambda *inputs: sum(ops.add_rms_norm(*inputs)),
            lambda n: [grad(n, 6), grad(n, 6), weight],
        ),
        "bias_dropout_add": (
            lambda x, b, r: ops.bias_dropout_add(x, b, r, 0.5, seed),
            lambda n: [grad(n, 6), bias, grad(n, 6)],
        ),
        "rope": (
            lambda x, positions: ops.rope(x, table, positions),
            lambda n: [grad(n, 2, 6), torch.arange(n, device=device)],
        ),
        "swiglu": (ops.swiglu, lambda n: [grad(n, 8)]),
        "prefix_attention": (
            lambda q, k, v: ops.prefix_attention(q, k, v, prefix_k, prefix_v),
            lambda n: [grad(n, 4, 6), grad(n, 2, 6), grad(n, 2, 6)],
        ),
        "quant_linear": (
            lambda x, b: ops.quant_linear(x, qweight, b),
            lambda n: [grad(n, 6), grad(5)],
        ),
        "linear_cross_entropy": (
            lambda hidden, labels: ops.linear_cross_entropy(hidden, output_layer, labels),
            lambda n: [grad(n, 6), torch.randint(7, (n,), device=device)],
        ),
    }


def check_registration(op: torch._ops.OpOverload, inputs: Sequence) -> None:
    """torch.library.opcheck, with whatever requires a gradient in `inputs`."""
    torch.library.opcheck(op, tuple(inputs))


def check_layouts(function: Callable, inputs: Sequence, refused: tuple = ()) -> None:
    """A tensor whose numbers do not lie side by side gives the same result, or an error of a type
    in `refused` that says so."""
    inputs = [x.detach() if isinstance(x, Tensor) else x for x in inputs]
    expected = function(*inputs)
    for i, x in enumerate(inputs):
        if not isinstance(x, Tensor) or x.numel() < 2:
            continue
        apart = torch.stack([x, torch.full_like(x, 77)], -1)[..., 0]
        try:
            result = function(*inputs[:i], apart, *inputs[i + 1 :])
        except refused as error:
            assert "is not contiguous" in str(error)
        else:
            torch.testing.assert_close(result, expected, rtol=0, atol=0)


def check_compiles(function: Callable, batches: Sequence[Sequence[Tensor]]) -> None:
    """`function` compiles without a graph break, and gives the eager results and gradients at
    every batch of inputs."""
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for inputs in batches:
        results = []
        for f in (function, compiled):
            leaves = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
            y = f(*leaves)
            wanted = [x for x in leaves if x.requires_grad]
            results.append([y, *torch.autograd.grad(y, wanted, torch.ones_like(y))])
        for eager, traced in zip(*results, strict=True):
            torch.testing.assert_close(traced, eager, rtol=0, atol=0)
    torch._dynamo.reset()
