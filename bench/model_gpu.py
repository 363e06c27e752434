"""What every op, a training step and a decoded token should take on a GPU, from counts alone.

    python -m bench.model_gpu                     six GPUs; writes bench/results/model_gpu.json, .md
    python -m bench.model_gpu --gpu "RTX 4090"    one, printed

Every launch is the one that Triton's backend makes on that GPU (fake_gpu.py); attention in CUDA C++
is counted by tests/cuda_on_host/attention_model.py. A launch's time is the longest of

    bytes      of its arguments, at SHARE of the data sheet's bandwidth; what a launch has just
               written for the next one, a slab of weights or a split's sums, at the L2 cache's
    tensor     the products of its tiles, padding included, at the data sheet's rate times what the
               compiled loop lets the tensor cores do (sass.py): the mean of all overlapped
               and all in turn; of torch's products SHARE_OF_TORCH
    issue      instructions of its compiled code, for kernels without tensor cores
    latency    turns of a loop that loads, waits and computes, one after the other

plus START. A step or token takes the sum of its launches, or the time in which Python makes them,
HOST a launch; a CUDA graph is made by nobody. The figures marked as assumptions are; `make gpu`
prints what was predicted beside what it measures.
"""

import argparse
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch

from bench.bench_full_size import chatglm2_6b
from bench.fake_gpu import DEVICE, LAUNCH, Call, Event, fake_gpu
from bench.gpu.cases import CHATGLM2_6B, OPS, Case, as_tuple
from bench.launches import events_of_pack, events_of_token
from bench.sass import Kernel, kernel_of
from bench.train_models import ADVERTISEGEN_ROWS
from bench.triton_resources import CHIPS, Chip, compile_for, cuobjdump, usage_of
from glmkern.plan.machines import GPUS, DataSheet

RESULTS = Path(__file__).with_name("results")
DTYPE = torch.float16
# Assumptions: of bandwidth, and of torch's products; seconds that a launch takes beside its work,
# that Python takes for one, and from a load to its use; the L2 cache's bandwidth beside memory's.
SHARE, SHARE_OF_TORCH = 0.9, 0.7
START, HOST, LATENCY = 2e-6, 17e-6, 0.7e-6
L2_SPEED = 2.5
# Where there is no compiled code to look at: of the tensor cores' rate, and blocks that share a
# multiprocessor.
ASSUMED_FRACTION, ASSUMED_BLOCKS = 0.5, 4


@dataclass(frozen=True)
class Gpu:
    """A data sheet's figures, and those of the chip's white paper."""

    sheet: DataSheet
    multiprocessors: int
    boost_ghz: float
    l2_mib: int
    shared_kib: int  # of a block

    @property
    def has_triton(self) -> bool:
        return self.sheet.capability >= 80

    @property
    def chip(self) -> Chip:
        """What its code is compiled for."""
        return next(chip for chip in CHIPS if chip.sm == self.sheet.capability)

    def as_chip(self) -> dict[str, int]:
        """What fake_gpu takes."""
        return {"shared_kib": self.shared_kib, "l2_bytes": self.l2_mib * 2**20}

    @property
    def cycles(self) -> float:
        """Of all multiprocessors, a second."""
        return self.multiprocessors * self.boost_ghz * 1e9


NAMED = {
    gpu.sheet.name: gpu
    for gpu in (
        Gpu(GPUS["T4"], 40, 1.59, 4, 64),
        Gpu(GPUS["RTX 3060 12GB"], 28, 1.78, 3, 99),
        Gpu(GPUS["RTX 4090"], 128, 2.52, 72, 99),
        Gpu(GPUS["A100 80GB"], 108, 1.41, 40, 163),
        Gpu(GPUS["H100"], 132, 1.83, 50, 227),
        Gpu(GPUS["H200"], 132, 1.83, 50, 227),
    )
}


@dataclass(frozen=True)
class Predicted:
    """Seconds of a piece of work, and which limit most of them are due to."""

    seconds: float
    bound: str


# -- one launch -----------------------------------------------------------------------------------


def predict_launch(event: Event, gpu: Gpu) -> Predicted:
    limits = {"bytes": _memory_seconds(event, gpu)}
    if event.flops:
        limits["tensor"] = event.flops / (gpu.sheet.half * 1e12 * SHARE_OF_TORCH)
    if event.call is not None:
        limits |= _kernel_limits(event.call, gpu)
    bound = max(limits, key=lambda name: limits[name])
    return Predicted(limits[bound] + START, bound if limits[bound] > START else "start")


def _memory_seconds(event: Event, gpu: Gpu) -> float:
    bandwidth = gpu.sheet.bandwidth * 1e9 * SHARE
    in_cache = sum(event.call[name].nbytes for name in _IN_L2.get(event.name, ()))
    tables = sum(event.call[name].nbytes for name in _TABLES.get(event.name, ()))
    read = event.bytes - in_cache - tables
    if event.name == "mm" and event.bytes > 0:  # its weight is the slab that was written before
        read, in_cache = 0, event.bytes
    return read / bandwidth + in_cache / (bandwidth * L2_SPEED)


# Arguments that the launch before has written, or that the next one reads, and fit the L2 cache.
_IN_L2 = {"dequantize": ("w",), "sum_splits": ("partials",)}
# Tables of which a launch reads a few rows.
_TABLES = {"qkv_rope_fwd": ("cos_sin",), "qkv_rope_bwd": ("cos_sin",), "rope": ("cos_sin",)}


def _kernel_limits(call: Call, gpu: Gpu) -> dict[str, float]:
    name = call.kernel.__name__.removesuffix("_kernel")
    limits = {}
    if name in _PRODUCTS:
        flops = _PRODUCTS[name](call)
        if flops:
            fraction = _tensor_fraction(_key(call), gpu) if gpu.has_triton else ASSUMED_FRACTION
            limits["tensor"] = flops / (gpu.sheet.half * 1e12 * fraction)
    elif name in _TURNS:
        programs, turns = math.prod(call.grid), _TURNS[name](call)
        if gpu.has_triton:
            cycles = _issue_cycles(_key(call), gpu)
            limits["issue"] = programs * turns * cycles / gpu.cycles
        blocks = _resident_blocks(_key(call), gpu) if gpu.has_triton else ASSUMED_BLOCKS
        waves = math.ceil(programs / (gpu.multiprocessors * blocks))
        limits["latency"] = waves * turns * LATENCY
    return limits


def _fused_fwd(call: Call) -> float:
    tile = 2 * call["BM"] * call["BN"] * 2 * call["BJ"]
    return math.prod(call.grid) * call["blocks"] * tile


def _attention(products: int, tokens: bool, prefix: bool) -> Callable[[Call], float]:
    """Flops of so many products a score of each kind. Sequences are taken as equally long, and
    half of a tile on the diagonal as wasted."""

    def flops(call: Call) -> float:
        q, sequences = call["q"], call["cu_seqlens"].numel() - 1
        rows, keys = q.shape[0] * q.shape[1], 0.0
        if tokens:
            keys += q.shape[0] / sequences / 2 + call["BN"] / 2
        if prefix:
            keys += call["P"]
        return 2 * products * call["C"] * rows * keys

    return flops


_PRODUCTS: dict[str, Callable[[Call], float]] = {
    "fused_fwd": _fused_fwd,
    "fused_bwd": _fused_fwd,  # the weight's tile is the same, summed over its other side
    "prefix_attention_fwd": _attention(2, tokens=True, prefix=True),
    "prefix_attention_bwd_dq": _attention(3, tokens=True, prefix=True),
    "prefix_attention_bwd_dkv": _attention(4, tokens=True, prefix=False),
    "prefix_attention_bwd_dprefix": _attention(4, tokens=False, prefix=True),
}
# Turns of the loop of a program, for kernels that load, wait and compute.
_TURNS: dict[str, Callable[[Call], float]] = {
    "gemv_fwd": lambda call: math.ceil(call["W"] / call["BW"]),
    "gemv_bwd": lambda call: call["blocks"],
    "prefix_attention_decode": lambda call: 2.0,
}


# -- compiled code --------------------------------------------------------------------------------

_CALLS: dict[tuple, Call] = {}  # by what decides their code


def _key(call: Call) -> tuple:
    _CALLS[call.specialisation] = call
    return call.specialisation


@cache
def _compiled(key: tuple, chip: Chip) -> tuple[Kernel, int]:
    """The kernel's code on a chip, and how many of its blocks a multiprocessor holds; needs Triton,
    no GPU."""
    launch = _CALLS[key].to_compile()
    kernel = kernel_of(cuobjdump(compile_for(chip, launch), "-sass"), launch.num_warps)
    occupancy = usage_of(launch, chip).occupancy
    return kernel, max(1, round(occupancy * chip.warps / launch.num_warps))


def _resident_blocks(key: tuple, gpu: Gpu) -> int:
    return _compiled(key, gpu.chip)[1]


def _tensor_fraction(key: tuple, gpu: Gpu) -> float:
    """Of the tensor cores' rate, in the loop with the most products."""
    kernel, _ = _compiled(key, gpu.chip)
    loop = max(
        [*kernel.loops, kernel.whole], key=lambda loop: (loop is not kernel.whole, loop.fmas)
    )
    if not loop.fmas:
        loop = kernel.whole
    return sum(loop.fractions(gpu.sheet.capability)) / 2 if loop.fmas else ASSUMED_FRACTION


def _issue_cycles(key: tuple, gpu: Gpu) -> float:
    """Of one turn of the longest loop, for the whole block."""
    kernel, _ = _compiled(key, gpu.chip)
    loop = max(kernel.loops, key=lambda loop: loop.instructions, default=kernel.whole)
    cycles = loop.cycles(gpu.sheet.capability)
    return max(cycles[unit] for unit in ("issue", "fma", "alu", "mufu"))


# -- pieces of work -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One line; ms by GPU, and which limit most of them are due to. `op`, `direction` and `shape`
    are those of make gpu's rows."""

    op: str
    direction: str
    shape: str
    launches: int
    ms: dict[str, float]
    bound: dict[str, str]


def predict_ops(gpus: Sequence[Gpu]) -> list[Row]:
    rows: dict[tuple[str, str, str], Row] = {}
    for gpu in gpus:
        for make in OPS.values():
            for _, case_of in make(CHATGLM2_6B, DTYPE, DEVICE):
                case = case_of()
                if not case.timed:
                    continue
                for direction, events in events_of(case, gpu).items():
                    _add(rows, (case.op, direction, case.shape), events, gpu, host=False)
    return list(rows.values())


def events_of(case: Case, gpu: Gpu) -> dict[str, list[Event]]:
    """What each pass launches; the backward's is that of its op alone."""
    found = {}
    with fake_gpu(max(case.labelled, 1), **gpu.as_chip()) as fake:
        with fake.recording() as events:
            results = case.forward(*case.args)
        found["forward"] = events
        if case.backward is not None:
            args = case.args_of_backward(as_tuple(results))
            with fake.recording() as events:
                case.backward(*args)
            found["backward"] = events
    return found


def predict_model(gpus: Sequence[Gpu]) -> list[Row]:
    """A step of 16 rows packed, a row of it alone, a token of 1 and of 16 rows."""
    rows: dict[tuple[str, str, str], Row] = {}
    config = chatglm2_6b()
    for gpu in gpus:
        chip = gpu.as_chip()
        for name, lengths in (
            ("step, 16 rows in one pack", ADVERTISEGEN_ROWS * 4),
            ("step, one row alone", ADVERTISEGEN_ROWS[:1]),
        ):
            events = events_of_pack(config, lengths, **chip)
            shape = f"{sum(map(sum, lengths))} tokens"
            _add(rows, (name, "both", shape), events, gpu, host=True)
        for batch in (1, 16):
            events = events_of_token(config, batch, **chip)
            for name, host in (("token, CUDA graph", False), ("token, launched one by one", True)):
                _add(rows, (name, "forward", f"{batch} rows"), events, gpu, host)
    return list(rows.values())


def _add(
    rows: dict[tuple[str, str, str], Row],
    key: tuple[str, str, str],
    events: Sequence[Event],
    gpu: Gpu,
    host: bool,
) -> None:
    """The prediction for one GPU, in the row of its work."""
    launched = [event for event in events if event.kind == LAUNCH]
    by_bound: Counter[str] = Counter()
    for event in launched:
        predicted = predict_launch(event, gpu)
        by_bound[predicted.bound] += predicted.seconds
    seconds, bound = by_bound.total(), max(by_bound, key=lambda name: by_bound[name])
    if host and len(launched) * HOST > seconds:
        seconds, bound = len(launched) * HOST, "host"
    row = rows.setdefault(key, Row(*key, len(launched), {}, {}))
    row.ms[gpu.sheet.name] = float(f"{seconds * 1e3:.3g}")
    row.bound[gpu.sheet.name] = bound


def as_markdown(rows: Sequence[Row], gpus: Sequence[Gpu]) -> str:
    names = [gpu.sheet.name for gpu in gpus]
    lines = [("", "pass", "shape", *names), ["---"] * (3 + len(names))]
    lines += [
        (row.op, row.direction, row.shape, *(f"{row.ms[n]:g} {row.bound[n]}" for n in names))
        for row in rows
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


TEXT = """# Predictions for GPUs

Made by `python -m bench.model_gpu` without a GPU, which says how; **nothing here was measured**.
Milliseconds in float16, and what most of them are due to. A T4 has no Triton: its products are
taken at half of the data sheet's rate, as if the kernels ran there.

"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", choices=NAMED, help="print this one's, write nothing")
    args = parser.parse_args()
    gpus = [NAMED[args.gpu]] if args.gpu else list(NAMED.values())
    ops, model = predict_ops(gpus), predict_model(gpus)
    text = f"{TEXT}## ChatGLM2-6B in 4 bits\n\n{as_markdown(model, gpus)}"
    text += f"\n## Ops\n\n{as_markdown(ops, gpus)}"
    print(text)
    if args.gpu is None:
        path = RESULTS / "model_gpu.json"
        path.write_text(json.dumps([asdict(row) for row in (*model, *ops)], indent=1) + "\n")
        path.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
