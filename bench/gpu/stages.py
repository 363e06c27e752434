"""The stages of `make gpu` in their order, the most telling first; their limits are one table."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.gpu.jobs import ROOT, Job, find_tool

# Worst known first; the model's stage times steps.
BENCHES = (
    "quant_linear",
    "prefix_attention",
    "linear_cross_entropy",
    "rope",
    "rms_norm",
    "bias_dropout",
    "swiglu",
)
ROUNDS = 5
# Names of tests, as pytest -k takes them: what runs on the GPU, and of that every op's kernels once
# at small sizes, as compute-sanitizer slows a kernel by ten to a hundred.
ON_GPU = "(triton or cuda or gpu) and not official_record"  # which needs recorded files
SANITIZED = "(triton or cuda) and (touches_nothing_outside or same_bits or no_rows)"
# A session of the profiler that ends may take the events of the next one along (kineto issue 1554).
PROFILED = {"TEARDOWN_CUPTI": "0"}
SWEEPS = ("gemv", "decode", "forward", "dq", "dkv")
TOOLS = ("memcheck", "racecheck", "synccheck")


@dataclass(frozen=True)
class Context:
    """Where the jobs of a run write, and on what they run: "cuda", or "cpu" in a rehearsal."""

    scratch: Path
    out: Path
    device: str

    @property
    def rows(self) -> Path:
        """The file that the jobs append their rows to, one JSON object a line."""
        return self.scratch / "rows.jsonl"


@dataclass(frozen=True)
class Stage:
    """Jobs of which `workers` run at once. `seconds` limits the stage, `job_seconds` each job;
    `rehearsed` says whether they can run without a GPU."""

    name: str
    workers: int
    seconds: int
    job_seconds: int
    rehearsed: bool
    jobs: Callable[[Context], Sequence[Job]]


def python(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", module, *arguments]


def build(context: Context) -> list[Job]:
    """The library for GPUs alone, for the chip that is there; and as instructions for Turing, which
    the driver compiles for it, to run those kernels here too."""
    import torch

    torch_dir = Path(torch.__file__).parent
    jobs = []
    for name, archs in (("_native_cuda", ""), ("_native_cuda_sm75", "75-virtual")):
        folder = ROOT / "build/gpu" / name
        commands = (
            f"cmake -G Ninja -S . -B {folder} -DTORCH_DIR={torch_dir} -DGLMKERN_CUDA=ON "
            f"&& cmake --build {folder} --target _native_cuda "
            f"&& cp {folder}/_native_cuda.so glmkern/{name}.so"
        )
        environment = {"GLMKERN_CUDA_ARCHS": archs} if archs else {}
        if nvcc := find_tool("nvcc"):
            environment["CUDACXX"] = nvcc
        jobs.append(Job(f"build {name}", ["bash", "-c", commands], environment))
    return jobs


def op_jobs(context: Context, mode: str, *options: str) -> list[Job]:
    """One for each op and backend: a sticky error of the GPU ends its process, and nothing else.
    The ops that take longest come first."""
    return [
        _op_job(context, mode, op, backend, *options)
        for backend in ("triton", "cuda")
        for op in BENCHES
    ]


def _op_job(context: Context, mode: str, op: str, backend: str, *options: str) -> Job:
    arguments = ("--op", op, "--backend", backend, "--rows", str(context.rows))
    return Job(
        f"{mode} {op} {backend}",
        python("tests.gpu.smoke", mode, *arguments, "--device", context.device, *options),
    )


def smoke(context: Context) -> list[Job]:
    jobs = op_jobs(context, "judge")
    if context.device == "cuda":
        for op in BENCHES:
            job = _op_job(context, "judge", op, "cuda")
            jobs.append(Job(f"{job.name} sm75", job.command, {"GLMKERN_CUDA_PATH": "sm75"}))
    return jobs


def times(context: Context) -> list[Job]:
    """Their processes start together and take turns on the GPU."""
    return op_jobs(context, "time", "--lock", str(context.scratch / "lock"))


def model(context: Context) -> list[Job]:
    """Graphs first: that they are right is what no CPU can show."""
    common = ("--rows", str(context.rows), "--device", context.device)
    timed = ("--tables", str(context.out / "profiles.txt"))
    jobs = [
        Job(f"judge {part}", python("tests.gpu.judge_model", part, *common))
        for part in ("graphs", "step", "text")
    ]
    jobs += [
        Job(f"model {part}", python("bench.gpu.model", part, *common, *timed), PROFILED)
        for part in ("step", "decode", "peer")
    ]
    return jobs


def benches(context: Context) -> list[Job]:
    options = ("--device", "cuda", "--rounds", str(ROUNDS), "--json")
    return [
        Job(
            f"bench {name}",
            python(f"bench.bench_{name}", *options, str(context.scratch / f"{name}.json")),
        )
        for name in BENCHES
    ]


def sweeps(context: Context) -> list[Job]:
    """Each compiles its tiles beside the others, and then takes its turn on the GPU."""
    common = ("--rows", str(context.rows), "--lock", str(context.scratch / "lock"))
    return [Job(f"sweep {name}", python("bench.gpu.sweep", name, *common)) for name in SWEEPS]


def counters(context: Context) -> list[Job]:
    common = ("--backend", "triton", "--rows", str(context.rows))
    return [
        Job(f"counters {op}", python("bench.gpu.counters", "--op", op, *common)) for op in BENCHES
    ]


def tests(context: Context) -> list[Job]:
    others = sorted(
        str(path.relative_to(ROOT)) for path in ROOT.glob("tests/*/test_*_on_triton.py")
    )
    # Most of the time goes into compiling kernels. A signal would not end a call that hangs.
    parallel = ("-n", "14", "--dist", "worksteal", "--timeout", "60", "--timeout-method", "thread")
    return [Job("tests", [*_pytest(), *parallel, "tests/gpu", "tests/ops", *others, "-k", ON_GPU])]


def memory_checks(context: Context) -> list[Job]:
    checker = find_tool("compute-sanitizer")
    # Libraries probe the driver with calls that fail, which are no memory errors.
    options = ("--report-api-errors", "no", "--error-exitcode", "1")
    return [
        Job(
            tool,
            [checker, "--tool", tool, *options, *_pytest(), "-x", "-k", SANITIZED, "tests/ops"],
            {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        )
        for tool in TOOLS
        if checker
    ]


def _pytest() -> list[str]:
    return python("pytest", "-q", "--tb=short", "-p", "no:cacheprovider")


STAGES = (
    #     name             workers  seconds  a job's  rehearsed
    Stage("build", 2, 90, 90, False, build),
    Stage("smoke", 9, 120, 110, True, smoke),
    Stage("times", 8, 90, 90, True, times),
    Stage("model", 1, 270, 60, True, model),
    Stage("tests", 1, 100, 100, False, tests),
    Stage("benches", 1, 120, 40, False, benches),
    Stage("sweeps", 5, 70, 70, False, sweeps),
    Stage("counters", 1, 120, 30, False, counters),
    Stage("memory checks", 3, 120, 120, False, memory_checks),
)
