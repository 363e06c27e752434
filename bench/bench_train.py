"""One training step, forward and backward of the prefix, beside other software.

    python -m bench.bench_train                     prints the tables and writes bench/results/
    python -m bench.bench_train --workload int4     only these rows, to the screen
    python -m bench.bench_train --profile           where our step's time goes

Three workloads on one model (train_models.py), 4 rows each:

    float32         128 tokens a row, a label at every token; beside GlmForCausalLM + PEFT
    int4            the same over 4-bit linears; beside the two schemes of peers.py
    AdvertiseGen    prompts and responses as long as in the real data, labels on the responses:
                    ours packed, the peer padded as officially and padded to the longest row

Before anything is timed, loss and prefix gradient of all must be equal. Time is taken in
interleaved rounds of one process, peak memory in one process each.

The fraction is of the float32 matrix product rate, counting useful flops. A linear has 2 a weight
and token forward, and again backward. No weight gradient is due, and no token gradient below the
first layer's attention. Attention has 4 C a score, and 2.5 times that backward.
"""

import argparse
import ctypes
import gc
import json
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.harness import Work, add_arguments, results_path, run_and_report
from bench.train_models import (
    OFFICIAL_WITHOUT_CHECKPOINTING,
    OURS,
    PREFIX,
    WORKLOADS,
    check_equal_work,
    make_model,
)
from glmkern import ChatGLM, ChatGLMConfig
from glmkern.plan.work import RowLength, linear_weights, step_flops

# The official scheme without checkpointing, measured apart from this code on this model and rows.
OFFICIAL_SECONDS, OFFICIAL_GEMM_RATE = 3.34, 140e9
# Ops that are matrix products, or little beside.
PRODUCTS = {
    "mm",
    "addmm",
    "bmm",
    "baddbmm",
    "quant_linear_fwd",
    "quant_linear_bwd",
    "linear_cross_entropy_fwd",
}


def works(names: Sequence[str]) -> list[Work]:
    model = make_model()
    found = []
    for name in names:
        workload = WORKLOADS[name]
        steps = {each: workload.make_step(each, model) for each in workload.steps}
        check_equal_work(steps)
        shape = (len(workload.lengths), max(map(sum, workload.lengths)))
        found += [
            Work(
                name,
                each,
                shape,
                torch.float32,
                0,
                flops(model.config, workload.lengths),
                step.run,
                peer=each != OURS,
            )
            for each, step in steps.items()
        ]
    return found


def flops(config: ChatGLMConfig, lengths: Sequence[tuple[int, int]]) -> int:
    """Useful flops of one step over rows of (tokens of the prompt, tokens learned)."""
    # The first token of a row has nothing before it that could predict it.
    rows = [RowLength(sum(row), min(row[1], sum(row) - 1)) for row in lengths]
    return step_flops(config, rows, PREFIX)


def peak_memory(workload: str, implementation: str) -> dict[str, float]:
    """MiB resident in this process once the model is there, and at the peak of two steps."""
    # Every large tensor gets pages of its own and gives them back. By itself glibc would stop doing
    # so at the size of the first weight that is freed; holes between tensors would then count.
    ctypes.CDLL(None).mallopt(-3, 2**20)  # M_MMAP_THRESHOLD
    model = make_model()
    step = WORKLOADS[workload].make_step(implementation, model)
    del model
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # the dense weights' memory goes back to the system
    # Linux: from here on the high-water mark starts again.
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident_mib()
    step.run()
    step.run()
    return {"resident_mib": before, "peak_mib": _resident_mib()}


def _resident_mib() -> float:
    """The process's largest resident set since it began, or since clear_refs."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure_memory(workload: str, implementation: str) -> dict:
    """peak_memory in a process of its own."""
    command = [sys.executable, "-m", "bench.bench_train", "--memory", workload, implementation]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return {
        "implementation": f"{workload}: {implementation}",
        **json.loads(printed.splitlines()[-1]),
    }


def checks(run: dict, config: ChatGLMConfig) -> str:
    """What two rows together must show, from a run's results."""
    rows = {(row["name"], row["implementation"]): row for row in run["rows"]}
    peaks = {row["implementation"]: row["peak_mib"] for row in run["memory"]}
    official = rows["int4", OFFICIAL_WITHOUT_CHECKPOINTING]
    seconds = official["median_ms"] / 1e3
    rate = flops(config, WORKLOADS["int4"].lengths) / (seconds * official["fraction"])
    expected = OFFICIAL_SECONDS * OFFICIAL_GEMM_RATE / rate
    saved = (peaks[f"float32: {OURS}"] - peaks[f"int4: {OURS}"]) * 2**20
    ours = {name: rows[name, OURS]["median_ms"] for name in WORKLOADS}
    text = (
        f"{OFFICIAL_WITHOUT_CHECKPOINTING}: {seconds:.2f} s a step at {rate / 1e9:.0f} GFLOP/s,"
        f" {seconds / expected:.2f} of the {expected:.2f} s that {OFFICIAL_SECONDS} s at "
        f"{OFFICIAL_GEMM_RATE / 1e9:.0f} GFLOP/s amount to\n"
        f"int4 saves {saved / linear_weights(config):.2f} bytes a linear weight at the peak\n"
    )
    for (name, implementation), row in rows.items():
        if implementation != OURS:
            text += f"{name}: {row['median_ms'] / ours[name]:.2f}x as fast as {implementation}\n"
    return text


def profile(model: ChatGLM, workload: str, steps: int = 5) -> str:
    """The ops of our step: calls, own time, and the shares of the step without and with the ops
    that they call. Marked are products, and whatever else takes more than 3 %."""
    step = WORKLOADS[workload].make_step(OURS, model)
    step.run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for _ in range(steps):
            step.run()
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    text = (
        f"\n{workload}: {total / steps / 1e3:.0f} ms a step\n"
        f"{'op':44}{'calls':>7}{'own ms':>9}{'own %':>7}{'all %':>7}\n"
    )
    for event in events:
        own, inside = event.self_cpu_time_total / total, event.cpu_time_total / total
        if own < 1e-3 and not event.key.startswith("glmkern"):
            continue
        product = event.key.rpartition("::")[2] in PRODUCTS
        mark = " product" if product else " > 3 %" if own > 0.03 else ""
        milliseconds = event.self_cpu_time_total / steps / 1e3
        text += (
            f"{event.key[:43]:44}{event.count // steps:7}{milliseconds:9.1f}{100 * own:7.1f}"
            f"{100 * inside:7.1f}{mark}\n"
        )
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.set_defaults(device="cpu")
    add_arguments(parser)
    parser.add_argument("--workload", choices=WORKLOADS, help="only this one's times, printed")
    parser.add_argument("--profile", action="store_true", help="only profile our step")
    parser.add_argument("--memory", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.profile:
        model = make_model()
        print(*(profile(model, name) for name in ("float32", "int4")))
    elif args.memory:
        print(json.dumps(peak_memory(*args.memory)))
    elif args.workload:
        args.json = args.json or Path("/dev/null")
        run_and_report("train", lambda device: works([args.workload]), args)
    else:
        memory = [
            measure_memory(name, implementation)
            for name, workload in WORKLOADS.items()
            for implementation in workload.steps
        ]
        run_and_report("train", lambda device: works(list(WORKLOADS)), args, memory=memory)
        results = json.loads((args.json or results_path("train")).read_text())
        print(checks(results["cpu"], make_model().config))


if __name__ == "__main__":
    main()
