"""The command line's verbs, a module each; `run(argv)` returns the exit status."""

import argparse
from collections.abc import Sequence


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace | int:
    """The parsed arguments, or the exit status where argparse has printed its help or refusal."""
    try:
        return parser.parse_args(argv)
    except SystemExit as ended:
        return int(ended.code or 0)
