"""The calls that `make gpu` judges and times and that model_gpu predicts: every op, both passes, at
ChatGLM2-6B's shapes.

A `Case` is one op at one shape, drawn in one precision. Shapes are those of a training step of 16
rows of AdvertiseGen, a ragged batch, and decoding; a rehearsal on a CPU takes smaller ones.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.train_models import ADVERTISEGEN_ROWS
from glmkern import ops
from glmkern.ops.quant_linear import StoredWeight, as_stored

EPS = 1e-5
RATE = 0.1
SEED = (-0x1234_5678_9ABC_DEF0, 2**62 + 2**33 + 1)
IGNORE_INDEX = -100


@dataclass(frozen=True)
class Sizes:
    """A model's sizes, and the batches to run: `batches` by name, lengths of packed sequences."""

    hidden: int
    ffn: int
    heads: int
    groups: int
    channels: int
    prefix: int
    vocabulary: int
    batches: dict[str, Sequence[int]]
    few_tokens: Sequence[int]  # of the quantised linear, beside those of the batches
    caches: Sequence[tuple[int, int, int]]  # rows, tokens, new ones of them
    labelled: float  # share of tokens with a label


CHATGLM2_6B = Sizes(
    hidden=4096,
    ffn=13696,
    heads=32,
    groups=2,
    channels=128,
    prefix=128,
    vocabulary=65024,
    batches={
        "step": [prompt + learned for prompt, learned in ADVERTISEGEN_ROWS * 4],
        "ragged": [1, 129, 37],
    },
    few_tokens=(1, 16, 64),
    caches=((1, 1024, 1), (16, 512, 1), (3, 192, 5)),
    labelled=0.6,
)
REHEARSAL = Sizes(
    hidden=64,
    ffn=48,
    heads=4,
    groups=2,
    channels=16,
    prefix=5,
    vocabulary=150,
    batches={"step": [7, 9], "ragged": [1, 5]},
    few_tokens=(1,),
    caches=((2, 16, 1),),
    labelled=0.6,
)


@dataclass(frozen=True)
class Case:
    """An op's forward and backward on arguments drawn once.

    `forward` and `backward` are ops of torch.ops.glmkern. `backward_args(args, results, upstream)`
    builds the backward's arguments; `compared` of the forward's results meet a gradient.
    The backward's results are the gradients of the first `leaves` arguments, where that is said;
    `lengths` are those of the packed sequences, `labelled` the rows with a label. Only those cases
    are `timed` whose work is known without the values drawn.
    """

    op: str
    shape: str
    args: tuple[Any, ...]
    forward: Callable[..., Any]
    backward: Callable[..., Any] | None = None
    backward_args: Callable[..., tuple[Any, ...]] | None = None
    compared: int = 1
    leaves: int = 0
    lengths: tuple[int, ...] = ()
    labelled: int = 0
    timed: bool = True
    flops: int = 0  # of the forward; the backward's are `backward_flops`
    backward_flops: int = 0

    def in_precision(self, dtype: torch.dtype) -> "Case":
        """The same numbers, every floating one in `dtype`."""
        return replace(self, args=tuple(in_precision(x, dtype) for x in self.args))

    def args_of_backward(self, results: Sequence[Tensor]) -> tuple[Any, ...]:
        """For the forward's results, with upstream gradients that are drawn."""
        up = [moderate(x.shape, x.dtype, x.device.type) for x in results[: self.compared]]
        return self.backward_args(self.args, results, up)


def in_precision(x: Any, dtype: torch.dtype) -> Any:
    return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x


def as_tuple(results: Any) -> tuple[Tensor, ...]:
    """An op's results, however many."""
    return (results,) if isinstance(results, Tensor) else tuple(results)


# (sizes, dtype, device) -> the cases of one op; nothing is drawn before a case is asked for.
Makers = Iterator[tuple[str, Callable[[], Case]]]

kernels = torch.ops.glmkern


def moderate(shape: Sequence[int], dtype: torch.dtype, device: str) -> Tensor:
    """Of either sign, magnitudes from 0.5 to 2: no outlier decides a largest error."""
    sign = torch.randn(shape, device=device).sign()
    return (sign * (torch.rand(shape, device=device) * 1.5 + 0.5)).to(dtype)


def dense(rows: int, columns: int, dtype: torch.dtype, device: str) -> Tensor:
    """A random weight of gain 1."""
    return (torch.randn(rows, columns, device=device) / columns**0.5).to(dtype)


def quantized(rows: int, columns: int, bits: int, device: str) -> StoredWeight:
    """Its codes, with scales in float16; on a device without data, of their size alone."""
    if device == "meta":
        packed = torch.empty(rows, columns * bits // 8, dtype=torch.int8, device=device)
        return StoredWeight(packed, torch.empty(rows, dtype=torch.float16, device=device), bits)
    return as_stored(ops.quantize(dense(rows, columns, torch.float16, device), bits))


def _sequences(lengths: Sequence[int], device: str) -> tuple[Tensor, Tensor]:
    ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
    return ends, torch.arange(len(lengths), device=device) + 3


def _seed(device: str) -> Tensor:
    return torch.tensor(SEED, device=device)


def rms_norm(sizes: Sizes, dtype: torch.dtype, device: str) -> Makers:
    def plain(tokens: int) -> Case:
        x, weight = (moderate(s, dtype, device) for s in ((tokens, sizes.hidden), (sizes.hidden,)))
        return Case(
            "rms_norm",
            f"{tokens} x {sizes.hidden}",
            (x, weight, EPS),
            kernels.rms_norm_fwd,
            kernels.rms_norm_bwd,
            lambda args, results, up: (up[0], args[0], args[1], results[1], None, True),
        )

    def added(tokens: int) -> Case:
        x = moderate((tokens, sizes.hidden), dtype, device)
        residual = x.sign() * moderate(x.shape, dtype, device).abs()
        return Case(
            "add_rms_norm",
            f"{tokens} x {sizes.hidden}",
            (x, residual, moderate((sizes.hidden,), dtype, device), EPS),
            kernels.add_rms_norm_fwd,
            kernels.rms_norm_bwd,
            lambda args, results, up: (up[0], results[1], args[2], results[2], up[1], False),
            compared=2,
        )

    for lengths in sizes.batches.values():
        yield f"{sum(lengths)} tokens", partial(plain, sum(lengths))
        yield f"{sum(lengths)} tokens, added", partial(added, sum(lengths))


def bias_dropout(sizes: Sizes, dtype: torch.dtype, device: str) -> Makers:
    def make(lengths: Sequence[int]) -> Case:
        shape = (sum(lengths), sizes.hidden)
        x, bias, residual = (moderate(s, dtype, device) for s in (shape, shape[1:], shape))
        sequences = (_seed(device), *_sequences(lengths, device))
        return Case(
            "bias_dropout_add",
            f"{shape[0]} x {shape[1]}",
            (x, bias, residual, RATE, *sequences),
            kernels.bias_dropout_add_fwd,
            kernels.bias_dropout_add_bwd,
            lambda args, results, up: (up[0], RATE, *sequences, True),
        )

    for lengths in sizes.batches.values():
        yield f"{sum(lengths)} tokens", partial(make, lengths)


def _angles(sizes: Sizes, lengths: Sequence[int], device: str) -> tuple[Tensor, Tensor]:
    positions = torch.cat([torch.arange(n) for n in lengths]).to(device)
    angles = torch.rand(max(lengths), sizes.channels // 4, device=device) * 6
    return torch.stack([angles.cos(), angles.sin()], -1), positions


def rope(sizes: Sizes, dtype: torch.dtype, device: str) -> Makers:
    def plain(lengths: Sequence[int]) -> Case:
        angles = _angles(sizes, lengths, device)
        x = moderate((sum(lengths), sizes.heads, sizes.channels), dtype, device)
        return Case(
            "rope",
            " x ".join(map(str, x.shape)),
            (x, *angles),
            kernels.rope_fwd,
            kernels.rope_bwd,
            lambda args, results, up: (up[0], *args[1:]),
        )

    def qkv(lengths: Sequence[int], interleaved: bool) -> Case:
        groups = sizes.heads if interleaved else sizes.groups
        width = (sizes.heads + 2 * groups) * sizes.channels
        angles = _angles(sizes, lengths, device)
        args = (moderate((sum(lengths), width), dtype, device), moderate((width,), dtype, device))
        return Case(
            "qkv_rope" + ", interleaved" * interleaved,
            f"{sum(lengths)} x {width}",
            (*args, *angles, sizes.heads, groups, interleaved),
            kernels.qkv_rope_fwd,
            kernels.qkv_rope_bwd,
            lambda args, results, up: (*up, args[2], args[3], interleaved),
            compared=3,
        )

    for lengths in sizes.batches.values():
        yield f"rope of {sum(lengths)} tokens", partial(plain, lengths)
        yield f"qkv of {sum(lengths)} tokens", partial(qkv, lengths, False)
    yield "qkv, interleaved", partial(qkv, lengths, True)


def swiglu(sizes: Sizes, dtype: torch.dtype, device: str) -> Makers:
    def make(tokens: int) -> Case:
        return Case(
            "swiglu",
            f"{tokens} x {2 * sizes.ffn}",
            (moderate((tokens, 2 * sizes.ffn), dtype, device),),
            kernels.swiglu_fwd,
            kernels.swiglu_bwd,
            lambda args, results, up: (up[0], args[0]),
        )

    for lengths in sizes.batches.values():
        yield f"{sum(lengths)} tokens", partial(make, sum(lengths))


def quant_linear(sizes: Sizes, dtype: torch.dtype, device: str) -> Makers:
    def make(tokens: int, rows: int, columns: int, bits: int) -> Case:
        stored = quantized(rows, columns, bits, device)
        x, bias = (moderate(s, dtype, device) for s in ((tokens, columns), (rows,)))
        return Case(
            f"quant_linear, {bits} bits",
            f"{tokens} x {rows} x {columns}",
            (x, *stored, bias),
            kernels.quant_linear_fwd,
            kernels.quant_linear_bwd,
            lambda args, results, up: (up[0], *args[1:4]),
            flops=2 * tokens * rows * columns,
            backward_flops=2 * tokens * rows * columns,
        )

    width = (sizes.heads + 2 * sizes.groups) * sizes.channels
    shapes = ((width, sizes.hidden), (2 * sizes.ffn, sizes.hidden), (sizes.hidden, sizes.ffn))
    tokens = [*sizes.few_tokens, *(sum(x) for x in sizes.batches.values())]
    for (rows, columns), m in itertools.product(shapes, tokens):
        yield f"{m} x {rows} x {columns}", partial(make, m, rows, columns, 4)

    def with_swiglu(tokens: int) -> Case:
        stored = quantized(2 * sizes.ffn, sizes.hidden, 4, device)
        return Case(
            "quant_linear_swiglu",
            f"{tokens} x {2 * sizes.ffn} x {sizes.hidden}",
            (moderate((tokens, sizes.hidden), dtype, device), *stored, None),
            kernels.quant_linear_swiglu_fwd,
            flops=2 * tokens * 2 * sizes.ffn * sizes.hidden,
        )

    for m in (*sizes.few_tokens, tokens[-1]):
        yield f"{m} tokens, swiglu", partial(with_swiglu, m)
    for m in tokens:
        yield f"{m} x {width} x {sizes.hidden}, 8 bits", partial(make, m, width, sizes.hidden, 8)


def prefix_attention(sizes: Sizes, dtype: torch.dtype, device: str) -> Makers:
    n, g, c, p = sizes.heads, sizes.groups, sizes.channels, sizes.prefix

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, c, device=device).to(dtype)

    def make(lengths: Sequence[int], rate: float) -> Case:
        t = sum(lengths)
        tensors = (draw(t, n), draw(t, g), draw(t, g), draw(p, g), draw(p, g))
        run = (*_sequences(lengths, device), _seed(device) if rate else None, c**-0.5, rate)
        scores = sum(x * (x + 1) // 2 + x * p for x in lengths)
        return Case(
            "prefix_attention" + ", dropout" * (rate > 0),
            f"{len(lengths)} sequences, {t} tokens",
            (*tensors, *run),
            kernels.prefix_attention_fwd,
            kernels.prefix_attention_bwd,
            lambda args, results, up: (up[0], *args[:5], *results, *args[5:], True, True),
            leaves=5,
            lengths=tuple(lengths),
            flops=4 * c * n * scores,
            backward_flops=10 * c * n * scores,
        )

    def decode(rows: int, room: int, new: int, ragged: bool) -> Case:
        q, caches = draw(rows, new, n), [draw(rows, room, g) for _ in range(2)]
        lens = torch.full((rows,), room, device=device)
        if ragged:
            lens = torch.randint(new, room + 1, (rows,), device=device)
        queries = torch.full_like(lens, new)
        return Case(
            "prefix_attention_decode",
            f"{rows} rows, {new} new, room {room}" + ", ragged" * ragged,
            (q, *caches, lens, draw(p, g), draw(p, g), queries, c**-0.5),
            kernels.prefix_attention_decode_fwd,
            flops=4 * c * n * rows * new * (room + p),
            timed=not ragged,
        )

    for name, lengths in sizes.batches.items():
        yield name, partial(make, lengths, 0.0)
        yield f"{name}, dropout", partial(make, lengths, RATE)
    yield "one long sequence", partial(make, [sum(sizes.batches["step"]) // 2], 0.0)
    for cache in sizes.caches:
        yield f"decode {cache}", partial(decode, *cache, False)
        yield f"ragged decode {cache}", partial(decode, *cache, True)


def linear_cross_entropy(sizes: Sizes, dtype: torch.dtype, device: str) -> Makers:
    def make(tokens: int, bits: int, some: bool = False) -> Case:
        """Of the labelled tokens alone, as in training; with `some`, of all tokens."""
        labelled = max(1, round(sizes.labelled * tokens))
        tokens = tokens if some else labelled
        hidden = torch.randn(tokens, sizes.hidden, device=device).to(dtype)
        stored = (
            quantized(sizes.vocabulary, sizes.hidden, bits, device)
            if bits == 8
            else as_stored(dense(sizes.vocabulary, sizes.hidden, dtype, device))
        )
        labels = torch.randint(sizes.vocabulary, (tokens,), device=device)
        if some:
            order = torch.randperm(tokens, device=device)
            labels.index_fill_(0, order[labelled:], IGNORE_INDEX)
        flops = 4 * labelled * sizes.hidden * sizes.vocabulary
        row_weight = torch.rand(tokens, device=device) / tokens
        return Case(
            f"linear_cross_entropy, {bits} bits",
            f"{tokens} x {sizes.hidden} x {sizes.vocabulary}" + ", some labelled" * some,
            (hidden, *stored, labels, row_weight, IGNORE_INDEX if some else None, 0.0, True),
            kernels.linear_cross_entropy_fwd,
            compared=2,
            flops=flops,
            labelled=labelled,
            timed=not some,
        )

    for lengths in sizes.batches.values():
        yield f"{sum(lengths)} tokens", partial(make, sum(lengths), 8 * dtype.itemsize)
    yield "some labelled", partial(make, sum(lengths), 8 * dtype.itemsize, True)
    yield "8 bits", partial(make, sum(lengths), 8)


OPS: dict[str, Callable[[Sizes, torch.dtype, str], Makers]] = {
    "rms_norm": rms_norm,
    "bias_dropout": bias_dropout,
    "rope": rope,
    "swiglu": swiglu,
    "quant_linear": quant_linear,
    "prefix_attention": prefix_attention,
    "linear_cross_entropy": linear_cross_entropy,
}
