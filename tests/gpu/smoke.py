"""Is every op right on this GPU, and how long does it take? Results are written as they come.

    python -m tests.gpu.smoke judge --op swiglu --backend triton --rows rows.jsonl

    judge    both passes of an op's cases in float16, bfloat16 and float32: against the reference
             in float64 on the same GPU, by the rule of tests/ops/numerics.py, in memory filled
             with NaN, and twice for the same bits
    time     the same cases, a median of cold calls
    count    one call of each pass in float16 for ncu, which looks only at these

One JSON object a line:

    {"op", "backend", "pass", "shape", "dtype", "verdict": "right" | "wrong" | "crashed",
     "ratio": error / allowed error, "note"}                             judged
    {..., "ms", "gb_per_s", "tflops"}                                    timed
"""

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

import glmkern
from bench.clock import seconds_per_round
from bench.gpu.cases import CHATGLM2_6B, OPS, REHEARSAL, Case, Sizes, as_tuple, moderate
from bench.gpu.rows import RIGHT, WRONG, alone, failure, plain, write_rows
from tests.backends import Backend, available
from tests.gpu.formulas import formula_of
from tests.ops.numerics import FORWARD, GRADIENT, max_error, poisoned_memory, same_bits, ulp_of_max

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
ROUNDS = 5
# PyTorch's error of so few numbers may be small by luck: the largest of several draws counts.
FEW, DRAWS = 100, 5


def judged(name: str, backend: str, sizes: Sizes, device: str) -> Iterator[dict]:
    yield from rows_of_cases(name, backend, sizes, device, judge)


def timed(name: str, backend: str, sizes: Sizes, device: str) -> Iterator[dict]:
    yield from rows_of_cases(name, backend, sizes, device, time)


def rows_of_cases(
    name: str,
    backend: str,
    sizes: Sizes,
    device: str,
    measure: Callable[[Case, Callable[[], Case], str], Iterator[dict]],
) -> Iterator[dict]:
    """What `measure` finds, case by case; a row says so where one raises, or is stopped."""
    family = os.environ.get("GLMKERN_CUDA_PATH")
    shown = f"{backend}, {family}" if family else backend
    for dtype in DTYPES:
        for label, make in OPS[name](sizes, dtype, device):
            print(f"{name}, {backend}, {plain(dtype)}: {label}", flush=True)
            row = {"op": name, "backend": shown, "dtype": plain(dtype), "shape": label}
            try:
                case = make()
                row |= {"op": case.op, "shape": case.shape}
                yield from (row | found for found in measure(case, make, backend))
            except KeyboardInterrupt as error:
                yield row | {"pass": "both", "shape": label} | failure(error)
                return
            except Exception as error:
                yield row | {"pass": "both"} | failure(error)
                if device == "cuda" and is_lost():
                    return


def judge(case: Case, make: Callable[[], Case], backend: str) -> Iterator[dict]:
    """The verdict on each pass; `make` draws other numbers for it."""
    with glmkern.backend(backend), poisoned_memory():
        results = call(case.forward, case.args)
        again = call(case.forward, case.args)
    exact_case = case.in_precision(torch.float64)
    exact = call_reference(exact_case.forward, exact_case.args)
    leaves, theirs = same_precision(case)
    small = [i for i in range(case.compared) if exact[i].numel() < FEW]
    more = [errors_of_pytorch(make()) for _ in range(DRAWS)] if small else []
    errors = [
        max([max_error(theirs[i], exact[i]), *(draw[i] for draw in more if i in small)])
        for i in range(case.compared)
    ]
    yield {"pass": "forward"} | verdict(results, again, exact, errors, FORWARD)
    if case.backward is None:
        return
    up = [moderate(x.shape, x.dtype, x.device.type) for x in results[: case.compared]]
    with glmkern.backend(backend), poisoned_memory():
        gradients = call(case.backward, case.backward_args(case.args, results, up))
        again = call(case.backward, case.backward_args(case.args, results, up))
    exact_args = exact_case.backward_args(exact_case.args, exact, [x.double() for x in up])
    exact = call_reference(case.backward, exact_args)
    if not leaves:
        theirs = call_reference(case.backward, case.backward_args(case.args, theirs, up))
    else:
        theirs = torch.autograd.grad(theirs, leaves, up)
    errors = [max_error(a, b) for a, b in zip(theirs, exact, strict=True)]
    yield {"pass": "backward"} | verdict(gradients, again, exact, errors, GRADIENT)


def errors_of_pytorch(case: Case) -> list[float]:
    """The error of each of the forward's results by plain PyTorch in the case's own precision."""
    exact = case.in_precision(torch.float64)
    exact = call_reference(exact.forward, exact.args)
    theirs = same_precision(case)[1]
    return [max_error(theirs[i], exact[i]) for i in range(case.compared)]


def same_precision(case: Case) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """Plain PyTorch in the case's own precision: the leaves of its graph, if it has one, and its
    results."""
    formula = formula_of(case)
    if formula is None:
        return [], call_reference(case.forward, case.args)
    leaves = [x.detach().requires_grad_() for x in case.args[: case.leaves]]
    with torch.device(case.args[0].device):
        return leaves, as_tuple(formula(*leaves, *case.args[case.leaves :]))


def verdict(
    results: Sequence[Tensor],
    again: Sequence[Tensor],
    exact: Sequence[Tensor],
    errors: Sequence[float],
    factor: float,
) -> dict:
    """The largest error in units of the allowed one; `errors` are PyTorch's."""
    worst, notes = 0.0, []
    for i, error in enumerate(errors):
        ours = results[i].detach()
        if not (math.isfinite(error) and bool(exact[i].isfinite().all())):
            notes.append(f"PyTorch's own result {i} is not finite: not judged")
        elif missing := int((~ours.isfinite()).sum()):
            notes.append(f"{missing} of {ours.numel()} elements of result {i} are not finite")
        elif ours.numel() > 0:
            allowed = factor * error + ulp_of_max(exact[i], ours.dtype)
            worst = max(worst, max_error(ours, exact[i]) / allowed)
    if not all(same_bits(a, b) for a, b in zip(results, again, strict=True)):
        notes.append("other bits at the second call")
    return {
        "verdict": RIGHT if worst <= 1 and not notes else WRONG,
        "ratio": round(worst, 3),
        "note": "; ".join(notes),
    }


def time(case: Case, make: Callable[[], Case], backend: str) -> Iterator[dict]:
    """Milliseconds of each pass; the backward's are of its op alone."""
    if not case.timed:
        return
    device = case.args[0].device.type
    with glmkern.backend(backend):
        passes = passes_of(case)
        calls = [lambda x=x: x.op(*x.args) for x in passes]
        measured = seconds_per_round(calls, device, ROUNDS)
    for one, seconds in zip(passes, measured, strict=True):
        moved = sum(x.nbytes for x in (*one.args, *one.results) if isinstance(x, Tensor))
        best = median(seconds)
        yield {
            "pass": one.name,
            "ms": round(best * 1e3, 4),
            "gb_per_s": round(moved / best / 1e9, 1),
            "tflops": round(one.flops / best / 1e12, 2),
        }


class Pass(NamedTuple):
    """One direction of a case, called once."""

    name: str
    op: Callable[..., Any]
    args: tuple[Any, ...]
    results: Sequence[Tensor]
    flops: int


def passes_of(case: Case) -> list[Pass]:
    results = call(case.forward, case.args)
    passes = [Pass("forward", case.forward, case.args, results[: case.compared], case.flops)]
    if case.backward is not None:
        args = case.args_of_backward(results)
        gradients = call(case.backward, args)
        passes.append(Pass("backward", case.backward, args, gradients, case.backward_flops))
    return passes


def counted(name: str, backend: str, sizes: Sizes, device: str) -> Iterator[dict]:
    """Shows each pass to ncu once, warm; it yields nothing."""
    step = {"step": sizes.batches["step"]}
    for label, make in OPS[name](replace(sizes, batches=step), torch.float16, device):
        if not label.startswith(COUNTED.get(name, "")):
            continue
        print(f"{name}, {backend}: {label}", flush=True)
        with glmkern.backend(backend):
            passes = passes_of(make())
            torch.cuda.profiler.start()
            for one in passes:
                call(one.op, one.args)
            torch.cuda.profiler.stop()
    yield from ()


def call(op: Any, args: Sequence[Any]) -> tuple[Tensor, ...]:
    """The results; an error of the GPU is this call's, not a later one's."""
    results = as_tuple(op(*args))
    if results[0].is_cuda:
        torch.cuda.synchronize()
    return results


def call_reference(op: Any, args: Sequence[Any]) -> tuple[Tensor, ...]:
    with glmkern.backend("reference"):
        return as_tuple(op(*args))


def is_lost() -> bool:
    """Whether every later call of this process to the GPU fails."""
    try:
        torch.cuda.synchronize()
        return torch.ones(1, device="cuda").item() != 1
    except RuntimeError:
        return True


# Of the ops with many cases those that ncu looks at, by the beginning of their labels.
COUNTED: dict[str, tuple[str, ...]] = {
    "quant_linear": ("1 x 27392", "64 x 27392"),
    "prefix_attention": ("step", "decode (16"),
    "linear_cross_entropy": ("2080",),
}
MODES = {"judge": judged, "time": timed, "count": counted}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mode", choices=MODES)
    parser.add_argument("--op", choices=OPS, required=True)
    parser.add_argument("--backend", choices=("triton", "cuda", "reference"), required=True)
    parser.add_argument("--rows", type=Path, required=True, help="the file that lines go to")
    parser.add_argument("--lock", type=Path, help="a file: of all that name it, one runs at a time")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    sizes = CHATGLM2_6B if args.device == "cuda" else REHEARSAL
    if args.device == "cuda":
        torch.zeros(1, device="cuda")  # before its turn comes
    with available(Backend(args.backend, args.device)), alone(args.lock):
        rows = MODES[args.mode](args.op, args.backend, sizes, args.device)
        return int(write_rows(args.rows, rows) > 0)


if __name__ == "__main__":
    sys.exit(main())
