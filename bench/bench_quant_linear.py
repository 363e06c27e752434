"""Linears over 4-bit weights, forward and backward, beside float32 sgemm and bitsandbytes.

    python -m bench.bench_quant_linear            prints a table and writes bench/results/
    python -m bench.bench_quant_linear --quick    two shapes, four numbers of tokens, to the screen
    python -m bench.bench_quant_linear --device cuda    on a GPU, the default where there is one

The shapes N x K are the four linears of a ChatGLM2-6B layer; M tokens, float32 activations.

    of sgemm    T of torch's product with the same weight in float32 / T, same direction
    of read     where M = 1: (N K / 2) bytes / T, as a fraction of the read bandwidth
    vs bnb      T of bitsandbytes / T, same direction and precision
    vs bf16     the same with bfloat16 activations, where bitsandbytes has a fused product: only
                forward, for inference, on chips with AVX512_BF16

All ratios are taken within a round, medians of the rounds. bitsandbytes has no format with a scale
a row; its nearest is NF4 with a scale for 64 columns. Its float32 path dequantises and multiplies.
Fused products take another copy of their weight at every call, more copies than the caches hold: in
a model the weights of other layers lie in between. float32 weights are larger than the caches.

On a GPU the columns are those of bench/harness.py, in bfloat16, one shape in float16 as well: every
variant of the Triton kernels (the one that they choose says so); the whole weight dequantised by
our kernel and then torch's product, which is the peer; torch's product with a weight that is ready.
The bytes are those of the packed weight, x and y; of the ready weight where that is used.
"""

import argparse
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

import glmkern
from bench.clock import paired_ratio, seconds_per_round
from bench.harness import Work, add_arguments, measure, results_path, run_as_markdown
from bench.roofline import machine
from glmkern import ops

SHAPES = ((4608, 4096), (4096, 4096), (27392, 4096), (4096, 13696))
TOKENS = (1, 16, 64, 192, 512, 1024)
GPU_TOKENS = (1, 16, 64, 192, 512, 1024, 4096)
GPU_SHAPES = {torch.bfloat16: SHAPES, torch.float16: SHAPES[:1]}
QUICK_SHAPES, QUICK_TOKENS = SHAPES[:2], (1, 16, 192, 512)
ROUNDS = 9


# Calls of one token take a millisecond and vary most; those of many take seconds and vary least.
def rounds_of(tokens: int, rounds: int) -> int:
    return 5 * rounds if tokens == 1 else rounds if tokens <= 64 else -(-rounds // 2)


# More than any last-level cache of a machine with few cores.
COPIES_BYTES = 2**28
BLOCK = 64  # columns of one NF4 scale

kernels = torch.ops.glmkern


@dataclass(frozen=True)
class Row:
    """One line of the table; times in milliseconds, ratios None where they do not apply."""

    direction: str
    N: int
    K: int
    M: int
    backend: str
    median_ms: float
    sgemm_ms: float
    of_sgemm: float
    of_read: float | None
    vs_bnb: float
    vs_bf16: float | None


def read_probe() -> tuple[int, Callable]:
    """(bytes, a call that reads them): the sum of int64s, as fast as anything torch has."""
    numbers = torch.ones(COPIES_BYTES // 8, dtype=torch.int64)
    return numbers.nbytes, numbers.sum


def measure_shape(N: int, K: int, tokens: Sequence[int], rounds: int) -> list[Row]:
    """Both directions of one weight at every number of tokens."""
    import bitsandbytes  # here: a machine with a GPU need not have it
    from bitsandbytes import functional as bnb

    torch.manual_seed(0)
    weight = torch.randn(N, K) / K**0.5
    copies = -(-COPIES_BYTES // (N * K // 2))
    int4 = _copies(ops.quantize(weight, 4), copies)
    nf4 = bnb.quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4")
    bf16 = _bf16_copies(weight, copies)
    rows = []
    for M in tokens:
        x, dy = torch.randn(M, K), torch.randn(M, N)
        read_bytes, read = read_probe()
        calls = {
            "ours fwd": lambda x=x: kernels.quant_linear_fwd(x, *next(int4), None),
            "ours bwd": lambda dy=dy: kernels.quant_linear_bwd(dy, *next(int4)),
            "sgemm fwd": lambda x=x: x @ weight.T,
            "sgemm bwd": lambda dy=dy: dy @ weight,
            "bnb fwd": lambda x=x: bitsandbytes.matmul_4bit(x, *nf4),
            "bnb bwd": _bnb_backward(x, dy, nf4),
            "read": read,
        }
        if bf16 is not None:
            half = x.bfloat16()
            calls["bf16 fwd"] = lambda x=half: bitsandbytes.matmul_4bit(x, *next(bf16))
            calls["ours bf16"] = lambda x=half: kernels.quant_linear_fwd(x, *next(int4), None)
        if M > 1:
            del calls["read"]
        measured = seconds_per_round(list(calls.values()), "cpu", rounds_of(M, rounds))
        seconds = dict(zip(calls, measured, strict=True))
        if M == 1:
            # Seconds that reading the packed weight would take.
            seconds["read"] = [t * (N * K // 2) / read_bytes for t in seconds["read"]]
        rows += [_row(direction, N, K, M, seconds) for direction in ("fwd", "bwd")]
    return rows


def _copies(weight: tuple, number: int) -> itertools.cycle:
    """An endless turn through `number` copies of a quantised weight's tensors."""
    return itertools.cycle(
        [tuple(x.clone() if isinstance(x, Tensor) else x for x in weight) for _ in range(number)]
    )


def _bf16_copies(weight: Tensor, number: int) -> itertools.cycle | None:
    """The weight in the fused path's own layout, or None where there is no such path."""
    from bitsandbytes import functional as bnb

    if not bnb.has_avx512bf16():
        return None
    packed = bnb.quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4")
    return _copies(bnb._convert_weight_packed_for_cpu(*packed), number)


def _bnb_backward(x: Tensor, dy: Tensor, nf4: tuple) -> Callable:
    """The gradient of x alone; the forward pass is outside."""
    import bitsandbytes

    leaf = x.clone().requires_grad_()
    y = bitsandbytes.matmul_4bit(leaf, *nf4)
    return lambda: torch.autograd.grad(y, leaf, dy, retain_graph=True)


def _row(direction: str, N: int, K: int, M: int, seconds: dict[str, list[float]]) -> Row:
    ours, sgemm = seconds[f"ours {direction}"], seconds[f"sgemm {direction}"]

    def ratio(name: str, mine: str = f"ours {direction}") -> float | None:
        return round(paired_ratio(seconds[name], seconds[mine]), 2) if name in seconds else None

    return Row(
        direction,
        N,
        K,
        M,
        chosen_backend(f"quant_linear_{direction}"),
        round(median(ours) * 1e3, 3),
        round(median(sgemm) * 1e3, 3),
        ratio(f"sgemm {direction}"),
        ratio("read"),
        ratio(f"bnb {direction}"),
        ratio(f"bf16 {direction}", "ours bf16"),
    )


def chosen_backend(op: str) -> str:
    return next(
        name
        for (row_op, name), state in glmkern.backends("cpu").rows.items()
        if row_op == op and state == "chosen"
    )


def gpu_works(dtype: torch.dtype, device: str = "cuda") -> list[Work]:
    """Both directions of every shape at every number of tokens."""
    return [work for N, K in GPU_SHAPES[dtype] for work in _gpu_works(N, K, dtype, device)]


def _gpu_works(N: int, K: int, dtype: torch.dtype, device: str) -> Iterator[Work]:
    # here, for there may be no Triton where there is no GPU
    from glmkern.triton_kernels import quant_linear as triton_kernels

    torch.manual_seed(0)
    int4 = ops.quantize((torch.randn(N, K, device=device) / K**0.5).to(dtype), 4)
    ready = ops.dequantize(int4, dtype)
    whole = torch.empty_like(ready)

    def dequantized() -> Tensor:
        triton_kernels.write_weight(*int4, whole)
        return whole

    for M, direction in itertools.product(GPU_TOKENS, ("fwd", "bwd")):
        x = torch.randn(M, K if direction == "fwd" else N, device=device).to(dtype)
        function = getattr(triton_kernels, f"quant_linear_{direction}")
        args = (x, *int4, None) if direction == "fwd" else (x, *int4)
        chosen = triton_kernels.choose(direction, M, dtype, 4)

        def product(weight: Tensor, x=x, forward=direction == "fwd") -> Tensor:
            return x @ (weight.T if forward else weight)

        calls = {
            f"triton {variant}{', chosen' * (variant == chosen)}": partial(
                function, *args, variant=variant
            )
            for variant in _variants(M)
        }
        calls["dequantise + torch"] = lambda product=product: product(dequantized())
        calls["torch, ready weight"] = partial(product, ready)
        for name, call in calls.items():
            weight_bytes = ready.nbytes if "ready" in name else N * K // 2 + int4.scale.nbytes
            yield Work(
                f"{direction}, {M} tokens, {N} x {K}",
                name,
                (M, N, K),
                dtype,
                weight_bytes + M * (N + K) * dtype.itemsize,
                2 * M * N * K,
                call,
                peer=name == "dequantise + torch",
            )


def _variants(M: int) -> tuple[str, ...]:
    """Those that can serve so many tokens, and are not out of the question."""
    return ("gemv", "fused") if M <= 8 else ("fused", "slab")


def gpu_run(rounds: int) -> dict:
    rows = [row for dtype in GPU_SHAPES for row in measure(gpu_works(dtype), "cuda", rounds)]
    return {"machine": machine("cuda"), "rounds": rounds, "rows": [asdict(row) for row in rows]}


def gpu_as_markdown(run: dict | None) -> str:
    return "\n## On a GPU\n\n" + (run_as_markdown(run) if run else "not measured on a GPU\n")


def as_markdown(run: dict) -> str:
    import bitsandbytes

    described = ", ".join(f"{key} {value}" for key, value in run["machine"].items())
    columns = list(Row.__dataclass_fields__)
    lines = [columns, ["---"] * len(columns)]
    lines += [
        ["-" if row[name] is None else str(row[name]) for name in columns] for row in run["rows"]
    ]
    return (
        "# quant_linear\n\nMade by `python -m bench.bench_quant_linear`, which says what the "
        f"columns mean.\n\n## On a CPU\n\n{described}, bitsandbytes "
        f"{bitsandbytes.__version__}; medians of {run['rounds']} interleaved rounds, more "
        "for one token and fewer for many\n\n"
        + "".join(f"| {' | '.join(line)} |\n" for line in lines)
    )


def cpu_run(quick: bool, rounds: int) -> dict:
    shapes, tokens = (QUICK_SHAPES, QUICK_TOKENS) if quick else (SHAPES, TOKENS)
    rows = [row for shape in shapes for row in measure_shape(*shape, tokens, rounds)]
    return {"machine": machine("cpu"), "rounds": rounds, "rows": [asdict(row) for row in rows]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    add_arguments(parser)
    parser.set_defaults(rounds=ROUNDS)
    parser.add_argument("--quick", action="store_true", help="fewer shapes, printed only; on a CPU")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.device == "cuda":
        run = gpu_run(args.rounds)
        text = gpu_as_markdown(run)
    else:
        run = cpu_run(args.quick, args.rounds)
        text = as_markdown(run)
    path = args.json or (None if args.quick else results_path("quant_linear"))
    if path is not None:
        write(path, args.device, run, with_table=args.json is None)
    print(text)


def write(path: Path, device: str, run: dict, with_table: bool) -> None:
    """The run, beside what the file holds of the other kind of device. The table of a CPU names the
    bitsandbytes that is installed, so that a run on a GPU keeps the one there is."""
    results = json.loads(path.read_text()) if path.is_file() else {"cpu": None, "cuda": None}
    results[device] = run
    path.write_text(json.dumps(results, indent=1) + "\n")
    if with_table:
        table = path.with_suffix(".md")
        if device == "cpu":
            text = as_markdown(run)
        else:
            text = table.read_text().split("\n## On a GPU")[0] if table.is_file() else ""
        table.write_text(text + gpu_as_markdown(results["cuda"]))


if __name__ == "__main__":
    main()
