"""A training step of ChatGLM2-6B over 4-bit weights on a GPU, beside the official scheme.

    python -m bench.bench_step    prints the tables and writes bench/results/

The step of the official train.sh: a row at a time, accumulated over 16, each as long as
AdvertiseGen's (train_models.py); a prefix of 128, float16 with a loss scale, random weights, no
dropout. Before anything is timed, loss and prefix gradient of all must be equal.

    glmkern                      all rows in one pack; also twice and four times as many
    glmkern, a row at a time     without packing
    dequantise + torch           our step; a linear is a dequantised weight and torch's product
    official scheme              what the official script asks of a GPU, by our own kernels: a
                                 micro-batch a row, padded to 193 tokens, every block recomputed, a
                                 linear dequantised at every use, its weight's gradient computed.
                                 The official code also expands keys and values to all heads and
                                 gives every token logits, so it is slower than this.

The fraction is of the float16 matrix product rate, counting useful flops as bench_train does.
Memory is what torch has allocated: the model, and at the peak of a step.
"""

import argparse
import copy
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.bench_full_size import chatglm2_6b
from bench.bench_train import flops
from bench.harness import Work, add_arguments, run_and_report
from bench.train_models import (
    ADVERTISEGEN_ROWS,
    OFFICIAL,
    OFFICIAL_WIDTH,
    OURS,
    PREFIX,
    Step,
    check_equal_work,
    make_rows,
)
from glmkern import ChatGLM, ChatGLMConfig, dispatch, ops
from glmkern.checkpoint import expected_shapes, quantize_stream
from glmkern.model.computation import Computation
from glmkern.model.modules import FrozenLinear
from glmkern.model.packing import IGNORE_INDEX, PackedBatch, pack_rows
from glmkern.training.data.rows import Row

ROUNDS = 7
ROW_BY_ROW = f"{OURS}, a row at a time"
DEQUANTISED = "dequantise + torch"
# Sets of four rows in a step.
SETS = (4, 8, 16)
LOSS_SCALE = 2.0**10
# Of loss and gradient. Half precision's roundings grow through 28 layers of random weights; a row
# that were left out would change a gradient by a quarter.
TOLERANCE = {torch.float16: 0.1, torch.float32: 1e-5}


class DequantizedLinear(nn.Module):
    """A quantised FrozenLinear by way of a dense weight, made again for every product."""

    def __init__(self, linear: FrozenLinear):
        super().__init__()
        self.qweight, self.bias = linear.matrix, linear.bias

    def project(self, x: Tensor, with_bias: bool = True) -> Tensor:
        return F.linear(x, self.dense(x.dtype), self.bias if with_bias else None)

    def project_back(self, dy: Tensor) -> Tensor:
        return dy @ self.dense(dy.dtype)

    def dense(self, dtype: torch.dtype) -> Tensor:
        if not self.qweight.packed.is_cuda:
            return ops.dequantize(self.qweight, dtype)
        from glmkern.triton_kernels.quant_linear import write_weight

        packed, scale, bits = self.qweight
        weight = packed.new_empty(len(packed), packed.shape[1] * 8 // bits, dtype=dtype)
        write_weight(packed, scale, bits, weight)
        return weight


class OfficialLinear(DequantizedLinear):
    """It keeps its input and computes the weight's gradient, for nobody."""

    def project(self, x: Tensor, with_bias: bool = True) -> Tensor:
        self.x = x
        return super().project(x, with_bias)

    def project_back(self, dy: Tensor) -> Tensor:
        self.weight_gradient = dy.T @ self.x
        return super().project_back(dy)


def with_linears(model: ChatGLM, kind: type[DequantizedLinear]) -> ChatGLM:
    """A model that shares `model`'s weights; the layers' linears are of `kind`."""
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, shared)
    for layer in twin.transformer.encoder.layers:
        for parent in (layer.self_attention, layer.mlp):
            for name, child in list(parent.named_children()):
                if isinstance(child, FrozenLinear):
                    setattr(parent, name, kind(child))
    return twin


def make_model(config: ChatGLMConfig, dtype: torch.dtype, device: str) -> ChatGLM:
    """With random weights of 4 bits in the layers, in training mode."""
    return _make_model(config, dtype, device, lambda dense: quantize_stream(dense, 4))


def make_dense_model(config: ChatGLMConfig, dtype: torch.dtype, device: str) -> ChatGLM:
    """With random dense weights, in training mode."""
    return _make_model(config, dtype, device, lambda dense: dense)


def _make_model(
    config: ChatGLMConfig, dtype: torch.dtype, device: str, stored: Callable[[Iterable], Iterable]
) -> ChatGLM:
    model = ChatGLM(config, pre_seq_len=PREFIX, computation=Computation(prefix_dropout=0.0))
    torch.manual_seed(0)
    dense = (
        (
            name,
            torch.ones(shape, dtype=dtype, device=device)
            if "layernorm" in name
            else torch.randn(shape, dtype=dtype, device=device) / config.hidden_size**0.5,
        )
        for name, shape in expected_shapes(config).items()
    )
    model.load_base(stored(dense), dtype, device)
    return model.train()


def padded_row(row: Row) -> Row:
    """As the official script pads it."""
    missing = OFFICIAL_WIDTH - len(row.input_ids)
    return Row([*row.input_ids, *[0] * missing], [*row.labels, *[IGNORE_INDEX] * missing])


def make_step(model: ChatGLM, batches: Sequence[PackedBatch]) -> Step:
    """Accumulates the batches' gradients; `run` gives the step's loss."""
    prefix = model.prefix_encoder.embedding.weight
    scale = LOSS_SCALE if model.dtype == torch.float16 else 1.0

    def run() -> Tensor:
        prefix.grad = None
        total = torch.zeros((), device=model.device)
        for batch in batches:
            loss = model.loss(batch)
            (loss * scale).backward()
            total += loss.detach()
        return total

    return Step(run, lambda: prefix.grad / scale)


def make_steps(
    model: ChatGLM, lengths: Sequence[tuple[int, int]], names: Sequence[str]
) -> dict[str, Step]:
    """By implementation, of the same rows; each row counts as much as any other."""
    rows = make_rows(lengths, model.config.padded_vocab_size)
    # a row's first token has nothing before it that could predict it
    weights = [
        1 / (len(rows) * sum(label != IGNORE_INDEX for label in row.labels[1:])) for row in rows
    ]

    def packed() -> list[PackedBatch]:
        return [pack_rows(rows, token_weight_per_row=weights)]

    def one_by_one(change: Callable[[Row], Row] = lambda row: row) -> list[PackedBatch]:
        return [
            pack_rows([change(row)], token_weight_per_row=[weight])
            for row, weight in zip(rows, weights, strict=True)
        ]

    def official() -> Step:
        twin = with_linears(model, OfficialLinear)
        twin.computation = replace(twin.computation, recompute="layer")
        return make_step(twin, one_by_one(padded_row))

    makers = {
        OURS: lambda: make_step(model, packed()),
        ROW_BY_ROW: lambda: make_step(model, one_by_one()),
        DEQUANTISED: lambda: make_step(with_linears(model, DequantizedLinear), packed()),
        OFFICIAL: official,
    }
    return {name: makers[name]() for name in names}


def works(model: ChatGLM) -> list[Work]:
    found = []
    for sets in SETS:
        lengths = ADVERTISEGEN_ROWS * sets
        names = (
            (OURS, ROW_BY_ROW, DEQUANTISED, OFFICIAL) if sets == SETS[0] else (OURS, DEQUANTISED)
        )
        steps = make_steps(model, lengths, names)
        check_equal_work(steps, TOLERANCE[model.dtype])
        shape = (len(lengths), sum(map(sum, lengths)))
        found += [
            Work(
                f"step of {len(lengths)} rows",
                name,
                shape,
                model.dtype,
                0,
                flops(model.config, lengths),
                step.run,
                peer=name in (DEQUANTISED, OFFICIAL),
            )
            for name, step in steps.items()
        ]
    return found


def memory(model: ChatGLM) -> list[dict]:
    """MiB that torch has allocated for the model, and at the peak of our steps."""
    rows = []
    for sets, name in ((SETS[0], ROW_BY_ROW), *((sets, OURS) for sets in SETS)):
        (step,) = make_steps(model, ADVERTISEGEN_ROWS * sets, [name]).values()
        model.prefix_encoder.embedding.weight.grad = None
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step.run()
        rows.append(
            {
                "implementation": f"step of {4 * sets} rows: {name}",
                "resident_mib": before / 2**20,
                "peak_mib": torch.cuda.max_memory_allocated() / 2**20,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda",), default="cuda")
    add_arguments(parser)
    parser.set_defaults(rounds=ROUNDS)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench_step needs a GPU, and torch sees none; bench_full_size measures a CPU")
    if reason := dispatch.why_unavailable("triton", "cuda"):
        sys.exit(f"bench_step needs the Triton kernels: {reason}")
    model = make_model(chatglm2_6b(), torch.float16, "cuda")
    run_and_report("step", lambda device: works(model), args, memory=memory(model))


if __name__ == "__main__":
    main()
