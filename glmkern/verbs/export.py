"""`glmkern export SOURCE TARGET --format bin|safetensors|peft|glm`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from glmkern.errors import InputError
from glmkern.verbs import parse

FORMATS = {
    "bin": "official prefix",
    "safetensors": "prefix in safetensors",
    "peft": "PEFT adapter (keys rotated)",
    "glm": "native GlmForCausalLM",
}


def run(argv: Sequence[str]) -> int:
    """Writes a prefix, or a base, in a format that other programs read."""
    parser = argparse.ArgumentParser(
        prog="glmkern export",
        description="Write a prefix as the official pytorch_model.bin, as safetensors or as a PEFT "
        "adapter, or a base as transformers' native GlmForCausalLM. Needs no GPU.",
    )
    parser.add_argument(
        "source",
        help="checkpoint-N folder, prefix file or PEFT adapter; for glm the folder, or cached name,"
        " of a base",
    )
    parser.add_argument("target", help="new folder")
    parser.add_argument("--format", choices=FORMATS, required=True)
    parser.add_argument(
        "--fold",
        action="store_true",
        help="write the flat prefix that one with a projection amounts to; peft always does",
    )
    parser.add_argument(
        "--base",
        help="base the prefix was trained on, where no config.json is beside the prefix; a native"
        " folder is named in the adapter",
    )
    parser.add_argument(
        "--dequantize", action="store_true", help="glm: write a quantised base as dense weights"
    )
    args = parse(parser, argv)
    if isinstance(args, int):
        return args
    if args.format == "glm" and (args.fold or args.base):
        raise InputError("--fold and --base belong to prefixes; leave them out for --format glm")
    if args.format != "glm" and args.dequantize:
        raise InputError(f"--dequantize belongs to --format glm, not to {args.format}")
    if args.format == "glm":
        from glmkern.checkpoint import export_glm

        folder, what = export_glm(args.source, args.target, args.dequantize), FORMATS["glm"]
    else:
        from glmkern.checkpoint import export_prefix

        folder, tokens, folded = export_prefix(
            args.source, args.target, args.format, args.fold, args.base
        )
        projection = ", projection folded into a flat prefix" if folded else ""
        what = f"{FORMATS[args.format]} of {tokens} tokens{projection}"
    print(f"{folder}: {what}, {_megabytes(folder):,.2f} MB")
    return 0


def _megabytes(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.iterdir()) / 1e6
