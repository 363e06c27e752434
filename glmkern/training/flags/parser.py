"""From a command line, or a .json file in its place, to `Arguments`.

Spellings: `--flag`, `--flag True`, `--flag False`, `--no_flag`, `--key value`, `--key=value`,
dashes for underscores, the aliases of `tables.py`. Every mistake is an InputError of one sentence.
"""

import argparse
import dataclasses
import difflib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, NoReturn, get_args

from glmkern.errors import InputError
from glmkern.training.flags.arguments import SECTIONS, Arguments, build, canonical, honoured
from glmkern.training.flags.tables import ACCEPTED, ALIASES, REFUSED

TRUE = ("true", "t", "yes", "y", "1")
FALSE = ("false", "f", "no", "n", "0")
NOTHING = ("", "none", "null")


def parse(argv: Sequence[str], prog: str = "glmkern train") -> Arguments:
    """The arguments of a command line. A `.json` file in first place is read as a configuration,
    and the flags after it override it.

    Raises InputError for a name in no table (with the nearest one), a refused flag and a value of
    the wrong kind. `-h` and `--help` print the honoured flags and raise SystemExit(0).
    """
    given = {}
    if argv and argv[0].endswith(".json"):
        given, argv = _read_json(Path(argv[0])), argv[1:]
    namespace, rest = _parser(prog).parse_known_args([_normalized(token) for token in argv])
    for token in rest:
        _refuse_unknown(token)
    return _resolve({**given, **vars(namespace)})


def _normalized(token: str) -> str:
    """`--max-steps=3` as `--max_steps=3`; values keep their dashes."""
    if not token.startswith("--"):
        return token
    name, equals, value = token.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; --help lists the flags")


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=prog,
        usage=f"{prog} --flag value ...   or   {prog} flags.json [--flag value ...]",
        description="Trains a prefix (P-tuning v2), evaluates and predicts, with the flags of the "
        "official ptuning/main.py.",
        epilog="docs/flags.md lists every official flag, also those accepted without effect.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=100),
    )
    for section in SECTIONS:
        group = parser.add_argument_group(section.__doc__.rstrip("."))
        for each in dataclasses.fields(section):
            _add_honoured(group, each)
    for name, flag in {**ACCEPTED, **REFUSED}.items():
        parser.add_argument(*_spellings(name), dest=name, nargs="*", help=argparse.SUPPRESS)
        if isinstance(flag.default, bool):
            _add_negation(parser, name)
    return parser


def _add_honoured(group: argparse._ArgumentGroup, each: dataclasses.Field) -> None:
    text = each.metadata["help"]
    if each.default not in (None, ""):
        text += f" (default {each.default})"
    if _base(each.type) is bool:
        group.add_argument(
            *_spellings(each.name), dest=each.name, nargs="?", const=True, metavar="BOOL", help=text
        )
        _add_negation(group, each.name)
    elif _base(each.type) is tuple:
        group.add_argument(
            *_spellings(each.name), dest=each.name, nargs="+", metavar="NAME", help=text
        )
    else:
        choices = each.metadata["choices"]
        metavar = "{" + ",".join(choices) + "}" if choices else _base(each.type).__name__.upper()
        group.add_argument(*_spellings(each.name), dest=each.name, metavar=metavar, help=text)


def _add_negation(group: Any, name: str) -> None:
    group.add_argument(
        f"--no_{name}", dest=name, action="store_const", const=False, help=argparse.SUPPRESS
    )


def _spellings(name: str) -> list[str]:
    return [f"--{each}" for each in (name, *(a for a in ALIASES if ALIASES[a] == name))]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; name a .json file of flags") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error}); correct it") from error
    if not isinstance(values, dict):
        raise InputError(
            f"{path} holds a JSON {type(values).__name__}; flags go into an object, such as "
            '{"do_train": true}'
        )
    known = honoured().keys() | ACCEPTED.keys() | REFUSED.keys()
    for name in values:
        if canonical(name) not in known:
            _refuse_unknown(f"--{name}")
    # A dumped configuration spells "not given" as null, or as an empty list or object.
    return {canonical(name): value for name, value in values.items() if value not in (None, [], {})}


def _refuse_unknown(token: str) -> NoReturn:
    if not token.startswith("-"):
        raise InputError(f"{token!r} does not belong to a flag; every value follows its --flag")
    name = canonical(token.partition("=")[0].lstrip("-"))
    known = [*honoured(), *ACCEPTED, *REFUSED, *ALIASES]
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
    raise InputError(f"there is no flag --{name}; the nearest is --{nearest}")


def _resolve(given: dict[str, Any]) -> Arguments:
    """Convert the honoured values, note those without effect, refuse the rest."""
    fields, values, notes = honoured(), {}, []
    for name, value in given.items():
        if name in fields:
            values[name] = _convert(fields[name], value)
            continue
        value = _plain(value)
        flag = REFUSED.get(name) or ACCEPTED[name]
        if _is_default(value, flag.default):
            continue
        if name in REFUSED:
            shown = "" if value is True else f" {value}"
            raise InputError(f"--{name}{shown} is refused: {flag.reason}")
        notes.append(f"--{name} has no effect: {flag.reason}")
    return build(values, tuple(notes))


def _plain(value: Any) -> Any:
    """What a flag with any number of values was given: none is True, one is itself."""
    if isinstance(value, list) and len(value) < 2:
        return value[0] if value else True
    return value


def _is_default(value: Any, default: Any) -> bool:
    text = str(value).lower()
    if default is None:
        return text in NOTHING
    if isinstance(default, bool):
        return text in (TRUE if default else FALSE)
    if isinstance(default, str):
        return text == default.lower() or (default == "" and text in NOTHING)
    try:
        return float(value) == default
    except (TypeError, ValueError):
        return False


def _convert(each: dataclasses.Field, value: Any) -> Any:
    read = _READERS[_base(each.type)]
    try:
        value = read(value)
    except (TypeError, ValueError):
        raise InputError(f"--{each.name} takes {_KINDS[read]}, not {value!r}") from None
    choices = each.metadata["choices"]
    if choices and value not in choices:
        raise InputError(f"--{each.name} {value} is not available; choose {_listed(choices)}")
    return value


def _listed(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}"


def _base(annotation: Any) -> type:
    """`int` of `int` and of `int | None`."""
    return next((each for each in get_args(annotation) if each is not NoneType), annotation)


def _read_bool(value: Any) -> bool:
    text = str(value).lower()
    if text not in TRUE + FALSE:
        raise ValueError
    return text in TRUE


def _read_int(value: Any) -> int:
    if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
        raise ValueError
    return int(value)


def _read_float(value: Any) -> float:
    if isinstance(value, bool) or not math.isfinite(float(value)):
        raise ValueError
    return float(value)


def _read_str(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError
    return str(value)


def _read_names(value: Any) -> tuple[str, ...]:
    words = value if isinstance(value, (list, tuple)) else [value]
    return tuple(name for word in words for name in _read_str(word).lower().split(","))


_READERS: dict[type, Callable] = {
    bool: _read_bool,
    int: _read_int,
    float: _read_float,
    str: _read_str,
    tuple: _read_names,
}
_KINDS: dict[Callable, str] = {
    _read_bool: "True or False",
    _read_int: "a whole number",
    _read_float: "a finite number",
    _read_str: "a text",
    _read_names: "names",
}
