"""docs/flags.md, made from the tables: `python -m glmkern.training.flags.docs > docs/flags.md`."""

from dataclasses import Field
from typing import Any

from glmkern.training.flags.arguments import SECTIONS, honoured
from glmkern.training.flags.tables import ACCEPTED, ALIASES, REFUSED, Flag

INTRODUCTION = """\
# Flags

The command line is that of the official `ptuning/main.py`: its ModelArguments and
DataTrainingArguments, and the Seq2SeqTrainingArguments of transformers 4.30.2, with the official
names and defaults. Every official flag is in one of the three tables below. A flag in none of them
ends the command with exit status 2 and the nearest name.

Spellings: `--flag`, `--flag True`, `--flag False`, `--no_flag`, `--key value`, `--key=value`, and
dashes for underscores. A `.json` file in place of the flags holds them as one object; flags behind
it go before what it says.

Steps are counted as transformers 4.30.2 counts them: an epoch has max(ceil(rows / batch) //
accumulation, 1) steps, and the micro-batches left over are carried into the next epoch. 243 rows
at batch 4, accumulation 4 and 100 epochs are 1,500 steps, and the last one is logged at epoch
98.36. A run is one process on one device, however many GPUs are visible; torchrun starts one with
several ([training.md](training.md)).
"""


def flags_markdown() -> str:
    """The three tables and the second spellings."""
    parts = [INTRODUCTION, "## Honoured\n"]
    own = {each.name for each in honoured().values() if each.metadata["own"]}
    for section in SECTIONS:
        fields = [each for each in honoured().values() if each.name in section.__annotations__]
        parts.append(f"### {section.__name__}\n\n{section.__doc__}\n")
        rows = [_honoured_row(each, own) for each in fields]
        parts.append(_table(("flag", "default", "meaning"), rows))
    parts.append("`*` is not an official flag.\n")
    parts.append(
        "## Accepted without effect\n\nA value other than the default is answered with "
        "a note, and the run goes on.\n"
    )
    parts.append(_table(("flag", "official default", "why"), _other_rows(ACCEPTED)))
    parts.append(
        "## Refused\n\nGiving the official default is fine; anything else ends the "
        "command with exit status 2.\n"
    )
    parts.append(_table(("flag", "official default", "why"), _other_rows(REFUSED)))
    parts.append("## Second spellings\n")
    parts.append(
        _table(("spelling", "flag"), [(f"`--{a}`", f"`--{b}`") for a, b in sorted(ALIASES.items())])
    )
    return "\n".join(parts)


def _honoured_row(each: Field, own: set[str]) -> tuple[str, ...]:
    meaning, choices = each.metadata["help"], each.metadata["choices"]
    if choices:
        meaning += f" ({', '.join(choices)})"
    mark = " `*`" if each.name in own else ""
    return f"`--{each.name}`{mark}", _default(each.default), meaning


def _other_rows(table: dict[str, Flag]) -> list[tuple[str, ...]]:
    return [(f"`--{name}`", _default(flag.default), flag.reason) for name, flag in table.items()]


def _default(value: Any) -> str:
    return f'`"{value}"`' if value == "" else f"`{value}`"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


if __name__ == "__main__":
    print(flags_markdown(), end="")
