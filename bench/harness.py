"""How a benchmark measures and reports.

A benchmark lists `Work`s: the same piece of work by each implementation and peer. `measure` runs
them in interleaved rounds (clock.py), the roofline's probes among them. Ratios are taken within a
round: whatever else the machine does then hits both sides. `main` is the command line of an op.

    fraction   T_roof / T, T_roof from the probes of the same round; median over the rounds
    vs peer    T of the fastest peer / T in the same round; median over the rounds
"""

import argparse
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

import glmkern
from bench.clock import ROUNDS, keep_freed_memory, paired_ratio, seconds_per_round
from bench.roofline import Probe, copy_probe, gemm_probe, machine

RESULTS = Path(__file__).with_name("results")


@dataclass(frozen=True)
class Work:
    """One implementation of a piece of work."""

    name: str  # works of one name and dtype do the same
    implementation: str  # a backend of glmkern, or the peer's function
    shape: tuple[int, ...]
    dtype: torch.dtype
    bytes: int  # that have to pass through memory: inputs once, results once
    flops: int
    call: Callable[[], object]
    peer: bool = False

    def __str__(self) -> str:
        return f"{self.name}-{self.implementation}"


@dataclass(frozen=True)
class Row:
    """One line of the results table; times in milliseconds."""

    name: str
    implementation: str
    shape: str
    dtype: str
    median_ms: float
    fastest_ms: float
    gb_per_s: float
    fraction: float
    vs_peer: float | None


def available_backends(op: str, device: str) -> list[str]:
    """The backends that can serve `op` ("rms_norm_fwd", say) here; on a GPU without the reference,
    which no user of one runs and which may take seconds."""
    states = glmkern.backends(device).rows
    return [
        name
        for (row_op, name), state in states.items()
        if row_op == op
        and state in ("available", "chosen")
        and (device, name) != ("cuda", "reference")
    ]


def forced(backend: str, function: Callable, *args) -> Callable:
    """A call of `function(*args)` by one backend of glmkern."""

    def call():
        with glmkern.backend(backend):
            return function(*args)

    return call


def measure(works: Sequence[Work], device: str, rounds: int = ROUNDS) -> list[Row]:
    """A row for each work. On a GPU one that raises is left out and said: the others count."""
    if device == "cuda":
        works = [work for work in works if _runs(work)]
    probes = [copy_probe(device)]
    if any(work.flops for work in works):
        probes.append(gemm_probe(device, works[0].dtype))
    times = seconds_per_round([x.call for x in (*probes, *works)], device, rounds)
    roof, times = times[: len(probes)], times[len(probes) :]
    return [
        _row(work, t, _roof_seconds(work, probes, roof), _fastest_peer(work, works, times))
        for work, t in zip(works, times, strict=True)
    ]


def _runs(work: Work) -> bool:
    try:
        work.call()
        torch.cuda.synchronize()
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        print(f"{work} {work.dtype} is left out: {type(error).__name__}: {first}", flush=True)
        return False
    return True


def _fastest_peer(
    work: Work, works: Sequence[Work], times: Sequence[list[float]]
) -> list[float] | None:
    """The times of the peer that does the same in the least time."""
    return min(
        (
            t
            for other, t in zip(works, times, strict=True)
            if other.peer and (other.name, other.dtype) == (work.name, work.dtype)
        ),
        key=median,
        default=None,
    )


def _roof_seconds(
    work: Work, probes: Sequence[Probe], roof: Sequence[Sequence[float]]
) -> list[float]:
    """T_roof of the work in every round."""
    limits = [
        [work.bytes / p.bytes * t if p.bytes else work.flops / p.flops * t for t in seconds]
        for p, seconds in zip(probes, roof, strict=True)
    ]
    return [max(together) for together in zip(*limits, strict=True)]


def _row(work: Work, seconds: list[float], roof: list[float], peer: list[float] | None) -> Row:
    return Row(
        work.name,
        work.implementation,
        " x ".join(map(str, work.shape)),
        str(work.dtype).removeprefix("torch."),
        round(median(seconds) * 1e3, 4),
        round(min(seconds) * 1e3, 4),
        round(work.bytes / median(seconds) / 1e9, 1),
        round(paired_ratio(roof, seconds), 3),
        None if peer is None or work.peer else round(paired_ratio(peer, seconds), 2),
    )


def pytest_generate_tests(metafunc) -> None:
    """For an op's benchmark to import, with test_speed: its works as pytest-benchmark's tests."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    metafunc.parametrize("work", metafunc.module.works(device), ids=str)


def test_speed(benchmark, work: Work) -> None:
    benchmark.group = work.name
    benchmark.extra_info.update(
        shape=work.shape, dtype=str(work.dtype), bytes=work.bytes, flops=work.flops
    )
    benchmark(work.call)


def main(op: str, works: Callable[[str], list[Work]], doc: str) -> None:
    """The command line of an op's benchmark."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    add_arguments(parser)
    run_and_report(op, works, parser.parse_args())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="interleaved rounds")
    parser.add_argument("--threads", type=int, help="CPU threads, default: torch's choice")
    parser.add_argument("--json", type=Path, help="write only this file, not bench/results")


def run_and_report(
    name: str, works: Callable[[str], list[Work]], args: argparse.Namespace, **more: object
) -> None:
    """Measures, prints the table and writes it with `more` to bench/results/<name>.json and .md.

    The results of the other kind of device stay in the files.
    """
    if args.threads:
        torch.set_num_threads(args.threads)
    keep_freed_memory()
    rows = measure(works(args.device), args.device, args.rounds)
    run = {
        "machine": machine(args.device),
        "rounds": args.rounds,
        "rows": [vars(row) for row in rows],
        **more,
    }
    path = args.json or results_path(name)
    results = json.loads(path.read_text()) if path.is_file() else {"cpu": None, "cuda": None}
    results[args.device] = run
    path.write_text(json.dumps(results, indent=1) + "\n")
    text = as_markdown(name, results)
    if args.json is None:
        path.with_suffix(".md").write_text(text)
    print(text)


def results_path(name: str) -> Path:
    """bench/results/<name>.json. A forced instruction set has files of its own, <name>_<isa>.json;
    its products are to be compared with products limited in the same way:

        GLMKERN_CPU_ISA=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 python -m bench.bench_<name>
    """
    isa = os.environ.get("GLMKERN_CPU_ISA")
    return RESULTS / (f"{name}_{isa}.json" if isa else f"{name}.json")


def as_markdown(op: str, results: dict) -> str:
    """The results of both kinds of machine; a kind without any says so."""
    text = (
        f"# {op}\n\nMade by `python -m bench.bench_{op}`; what the columns mean: "
        "bench/harness.py.\n"
    )
    for device, title in (("cpu", "On a CPU"), ("cuda", "On a GPU")):
        text += f"\n## {title}\n\n"
        text += (
            run_as_markdown(results[device])
            if results[device]
            else "not measured on a GPU\n"
            if device == "cuda"
            else "not measured on a CPU\n"
        )
    return text


def run_as_markdown(run: dict) -> str:
    described = ", ".join(f"{key} {value}" for key, value in run["machine"].items())
    text = f"{described}; medians of {run['rounds']} interleaved rounds\n\n" + _table(
        ("work", "implementation", "shape", "type", "median ms", "GB/s", "fraction", "vs peer"),
        [
            (
                row["name"],
                row["implementation"],
                row["shape"],
                row["dtype"],
                f"{row['median_ms']:.3f}",
                f"{row['gb_per_s']:.1f}" if row["gb_per_s"] else "-",
                f"{row['fraction']:.2f}",
                "-" if row["vs_peer"] is None else f"{row['vs_peer']:.2f}",
            )
            for row in run["rows"]
        ],
    )
    if "memory" in run:
        text += "\n" + _table(
            ("implementation", "MiB resident before", "MiB at the peak", "MiB of the step"),
            [
                (
                    row["implementation"],
                    f"{row['resident_mib']:.0f}",
                    f"{row['peak_mib']:.0f}",
                    f"{row['peak_mib'] - row['resident_mib']:.0f}",
                )
                for row in run["memory"]
            ],
        )
    return text


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
