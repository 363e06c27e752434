"""gpu.md from what gpu.json holds: the verdicts first, then the numbers."""

import json
from collections.abc import Iterable, Iterator, Sequence

from bench.gpu.rows import RIGHT
from bench.harness import RESULTS, run_as_markdown

PASSED = "passed"
# Jobs that fail where they find something wrong, and say in rows what it is.
WITH_ROWS = ("judge ", "time ", "model ")
LAST_LINE = 90
Lines = Iterable[Sequence[str]]


def is_good(report: dict) -> bool:
    """Whether every job passed and nothing was found wrong."""
    jobs = all(job["outcome"] == PASSED for job in report["jobs"])
    return jobs and all(row.get("verdict", RIGHT) == RIGHT for row in report["rows"])


def as_markdown(report: dict) -> str:
    machine = ", ".join(f"{key} {value}" for key, value in report["machine"].items())
    rows, benches = report["rows"], report["benches"]
    predicted = predictions(report["machine"].get("gpu", ""))
    sections = [
        f"# On a GPU\n\nMade by `make gpu`. {machine}\n",
        _section(
            "Verdicts",
            ("op", "backend", "pass", "verdict", "largest error", ""),
            [
                *verdicts([row for row in rows if "pass" in row and "verdict" in row]),
                *of_the_model([row for row in rows if "part" in row and "verdict" in row]),
                *unfinished(report["jobs"]),
                *slower(benches),
            ],
            "The largest error is in units of what tests/ops/numerics.py allows.",
        ),
        _section("The model", ("part", "what", "found"), model_lines(rows, predicted)),
        _section(
            "Times",
            ("op", "backend", "pass", "shape", "type", "ms", "predicted", "GB/s", "TFLOP/s"),
            times([row for row in rows if "ms" in row and "pass" in row], predicted),
            "Of cold calls; bytes are those of all arguments and results. Predicted before any "
            "measurement by `python -m bench.model_gpu`, in float16.",
        ),
        _section("Other tiles", ("sweep", "shape", "tile", "us", ""), swept(rows)),
        _section("Counters", ("op", "kernel", "by Nsight Compute"), counters(rows)),
        _section("Jobs", ("job", "outcome", "seconds", "last line"), jobs(report["jobs"])),
    ]
    sections += [f"## {name}\n\n{run_as_markdown(run)}" for name, run in benches.items()]
    return "\n".join(section for section in sections if section)


def verdicts(rows: Sequence[dict]) -> Iterator[Sequence[str]]:
    """One line for each op, backend and pass, and one more for each case that is not right."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["op"], row["backend"], row["pass"]), []).append(row)
    for key, group in groups.items():
        bad = [row for row in group if row["verdict"] != RIGHT]
        kinds = "**" + ", ".join(sorted({row["verdict"] for row in bad})) + "**" if bad else RIGHT
        worst = max((row.get("ratio") or 0 for row in group), default=0)
        cases = f"{len(bad)} of {len(group)} cases" if bad else f"{len(group)} cases"
        yield *key, kinds, f"{worst:.2f}", cases
        for row in bad:
            ratio = "-" if row.get("ratio") is None else f"{row['ratio']:.2f}"
            case = f"{row['dtype']} {row['shape']}"
            yield "", "", case, row["verdict"], ratio, row.get("note", "")


def of_the_model(rows: Sequence[dict]) -> Iterator[Sequence[str]]:
    """Of a step, a text and a graph; and what crashed while it was to be timed."""
    for row in rows:
        verdict = RIGHT if row["verdict"] == RIGHT else f"**{row['verdict']}**"
        ratio = f"{row['ratio']:.2f}" if "ratio" in row else ""
        yield "model", row["part"], row["what"], verdict, ratio, row.get("note", "")


def unfinished(jobs: Sequence[dict]) -> Iterator[Sequence[str]]:
    """What did not run to its end, and failed builds, tests and memory checks."""
    for job in jobs:
        said_so = job["outcome"] == "failed with 1" and "Error" not in job["last_line"]
        if job["outcome"] != PASSED and not (said_so and job["job"].startswith(WITH_ROWS)):
            yield job["job"], "", "", f"**{job['outcome']}**", "", job["last_line"][:LAST_LINE]


def slower(benches: dict) -> Iterator[Sequence[str]]:
    """Our choice among a bench's implementations where a peer is faster."""
    for name, run in benches.items():
        for row in run["rows"]:
            chosen = row["implementation"] == "triton" or "chosen" in row["implementation"]
            if chosen and row["vs_peer"] is not None and row["vs_peer"] < 1:
                what = f"{row['name']}, {row['shape']}, {row['dtype']}"
                yield name, row["implementation"], what, "slower", "", f"{row['vs_peer']} of a peer"


def predictions(gpu: str) -> dict[tuple[str, str, str], float]:
    """Of the committed ones those for a GPU of this name: milliseconds by op, pass and shape."""
    path = RESULTS / "model_gpu.json"
    rows = json.loads(path.read_text()) if path.is_file() else []
    words = gpu.replace("-", " ").split()
    found = {}
    for row in rows:
        for name, ms in row["ms"].items():
            if all(word in words for word in name.split()[:2] if not word.endswith("GB")):
                found[row["op"], row["direction"], row["shape"]] = ms
    return found


def model_lines(
    rows: Sequence[dict], predicted: dict[tuple[str, str, str], float]
) -> Iterator[Sequence[str]]:
    """What was found, after it what was predicted of a step and of a token."""
    for row in rows:
        if "part" in row:
            found = ", ".join(f"{k} {v}" for k, v in row.items() if k not in ("part", "what"))
            yield row["part"], row["what"], found
    for (op, _, shape), ms in predicted.items():
        if op.startswith(("step", "token")):
            yield "predicted", f"{op}, {shape}", f"{ms:g} ms"


def times(
    rows: Sequence[dict], predicted: dict[tuple[str, str, str], float]
) -> Iterator[Sequence[str]]:
    for row in rows:
        ms = predicted.get((row["op"], row["pass"], row["shape"]))
        if row["dtype"] != "float16" or row["backend"] != "triton":
            ms = None
        yield (
            *(row[key] for key in ("op", "backend", "pass", "shape", "dtype")),
            f"{row['ms']:.4f}",
            "-" if ms is None else f"{ms:g}",
            f"{row['gb_per_s']:.0f}",
            f"{row['tflops']:.1f}" if row["tflops"] else "-",
        )


def swept(rows: Sequence[dict]) -> Iterator[Sequence[str]]:
    for row in rows:
        if "sweep" in row:
            time = f"{row['us']:.2f}" if "us" in row else row["note"]
            yield row["sweep"], row["shape"], row["tile"], time, "ours" if row["ours"] else ""


def counters(rows: Sequence[dict]) -> Iterator[Sequence[str]]:
    for row in rows:
        if "counters" in row:
            found = ", ".join(f"{name} {value}" for name, value in row["counters"].items())
            yield row["op"], row["kernel"], found


def jobs(jobs: Sequence[dict]) -> Iterator[Sequence[str]]:
    for job in jobs:
        yield job["job"], job["outcome"], f"{job['seconds']:.1f}", job["last_line"][:LAST_LINE]


def _section(title: str, head: Sequence[str], lines: Lines, text: str = "") -> str:
    """Nothing where there are no lines."""
    lines = list(lines)
    if not lines:
        return ""
    cells = [head, ["---"] * len(head), *lines]
    clean = ([str(cell).replace("|", "/") for cell in line] for line in cells)
    table = "".join(f"| {' | '.join(line)} |\n" for line in clean)
    return f"## {title}\n\n" + (f"{text}\n\n" if text else "") + table
