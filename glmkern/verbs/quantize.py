"""`glmkern quantize SRC DST --bits 4|8`."""

import argparse
from collections.abc import Sequence

from glmkern.verbs import parse


def run(argv: Sequence[str]) -> int:
    """Writes a base with quantised linears as a folder of its own."""
    parser = argparse.ArgumentParser(
        prog="glmkern quantize",
        description="Write a base with the linears of its layers in 4 or 8 bits: the official codes"
        " and scales. Needs no GPU, and memory for one shard.",
    )
    parser.add_argument("source", help="folder, or cached name, of the base")
    parser.add_argument("target", help="new folder")
    parser.add_argument("--bits", type=int, choices=(4, 8), required=True)
    parser.add_argument(
        "--format",
        choices=("safetensors", "bin"),
        default="safetensors",
        help="bin is what the official code reads (default: %(default)s)",
    )
    args = parse(parser, argv)
    if isinstance(args, int):
        return args
    from glmkern.checkpoint import quantize_folder

    folder = quantize_folder(args.source, args.target, args.bits, args.format)
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{folder}: {args.bits} bits, {size / 1e9:.2f} GB")
    return 0
