"""What the loops of the compiled Triton kernels do: instructions by kind, and the bound they imply.

    python -m bench.triton_loops                                every launch of bench/triton_cases
    python -m bench.triton_loops --op OP --sm 90 --launch fwd   those whose label has "fwd"
    python -m bench.triton_loops --json F                       writes F instead of printing

Needs no GPU: each launch is compiled as bench/triton_resources.py does it and disassembled by
`cuobjdump`; bench/sass.py says what is counted.
"""

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path

import triton

from bench import triton_cases
from bench.sass import Kernel, as_text, kernel_of
from bench.triton_cases import Launch
from bench.triton_resources import CHIPS, Chip, compile_for, cuobjdump


def kernels(
    ops: list[str], sms: list[int], pattern: str
) -> Iterator[tuple[str, Chip, Launch, Kernel]]:
    """Every launch on the chips whose label `pattern` is found in, compiled and taken apart."""
    for op in ops:
        for chip in CHIPS:
            for launch in triton_cases.launches_on(op, chip.block_kib) if chip.sm in sms else ():
                if re.search(pattern, launch.label):
                    sass = cuobjdump(compile_for(chip, launch), "-sass")
                    yield op, chip, launch, kernel_of(sass, launch.num_warps)


def main() -> None:
    sms = [chip.sm for chip in CHIPS]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", choices=triton_cases.modules(), help="one op's kernels only")
    parser.add_argument("--sm", type=int, nargs="+", choices=sms, default=sms)
    parser.add_argument("--launch", default="", help="regular expression that is in the label")
    parser.add_argument("--json", type=Path, help="write this file instead of printing")
    args = parser.parse_args()
    ops = [args.op] if args.op else list(triton_cases.modules())
    rows = []
    for op, chip, launch, kernel in kernels(ops, args.sm, args.launch):
        rows.append(
            {
                "op": op,
                "launch": launch.label,
                "sm": chip.sm,
                "whole": vars(kernel.whole),
                "loops": [vars(loop) for loop in kernel.loops],
            }
        )
        if args.json is None:
            print(
                f"\n{op}: {launch.label}, sm_{chip.sm}, {launch.num_warps} warps, "
                f"Triton {triton.__version__}"
            )
            print("\n".join(as_text(loop, chip.sm) for loop in kernel.loops))
    if args.json is not None:
        args.json.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
