"""All that needs a GPU, in one command, in stages: the most telling comes first.

    make gpu [OUT=folder]    or: python3 -m bench.gpu [--out folder] [--only stage ...]
                                 [--deadline seconds]

Uses the Python it runs in and what is installed there, fetches nothing, and builds for the GPU that
is there. stages.py lists the stages and their limits; `--deadline` cuts from the end. Every op runs
in a process of its own. gpu.json and gpu.md (default folder bench/results) are written after every
job, so that a run cut short keeps its results so far; gpu.log has all output. Exit code 2 without a
GPU, 1 where something is wrong.
"""

import argparse
import importlib.util
import signal
import sys
import time
from pathlib import Path

RESULTS = Path(__file__).resolve().parents[1] / "results"
TOTAL_SECONDS = 540


def why_no_gpu() -> str | None:
    if importlib.util.find_spec("torch") is None:
        return f"torch is not installed in {sys.executable}"
    import torch

    return None if torch.cuda.is_available() else "torch sees no GPU"


def main() -> int:
    start = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the files")
    parser.add_argument("--only", nargs="*", metavar="STAGE", help="these stages, by name")
    parser.add_argument("--deadline", type=float, default=TOTAL_SECONDS, help="seconds in all")
    parser.add_argument(
        "--rehearse", action="store_true", help="small sizes, on emulated kernels; needs no GPU"
    )
    args = parser.parse_args()
    if not args.rehearse and (reason := why_no_gpu()):
        print(f"make gpu needs a GPU: {reason}", file=sys.stderr)
        return 2
    from bench.gpu.run import find_stages, run  # they need torch

    try:
        stages = find_stages(args.only)
    except ValueError as error:
        parser.error(str(error))
    # What a shell runs in the background ignores it, and so would the jobs.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    seconds = args.deadline - (time.monotonic() - start)  # loading torch is part of it
    return run(stages, args.out, "cpu" if args.rehearse else "cuda", seconds)


if __name__ == "__main__":
    sys.exit(main())
