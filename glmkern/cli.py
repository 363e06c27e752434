"""The command line: `glmkern <verb> ...`, or bare official flags, which train and predict.

Nothing here imports torch before a verb needs it, so that help and mistakes are instant.
"""

import difflib
import importlib
import os
import sys
from collections.abc import Callable, Sequence

from glmkern import __version__
from glmkern.errors import InputError, Interrupted, TrainingError

USAGE = """\
usage: glmkern --do_train --flag value ...   the official ptuning/main.py command line
       glmkern flags.json                    the same flags from a file
       glmkern VERB ...

verbs:
  train     tune a prefix; the official flags, --do_train understood (train --help lists them)
  predict   answer a test file and score the answers; the official flags, --do_predict and
            --predict_with_generate understood
  demo      tune a prefix on the small base that comes with the package
  chat      talk to a base, with one prefix or several to switch between
  plan      memory and time of a training command, told before anything is loaded
  quantize  a base with its linears in 4 or 8 bits, as a folder of its own
  export    a prefix for the official code or PEFT, or a base for transformers
  backends  which implementation of each op runs on this machine, and why
  version   the version"""

LATER = ("bench", "doctor")
EXIT_FAILED_RUN, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit status: 0, 1 failed run, 2 bad input, 130 Ctrl-C,
    143 SIGTERM."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(argv)
    except InputError as error:
        return _fail(error, EXIT_BAD_INPUT)
    except TrainingError as error:
        return _fail(error, EXIT_FAILED_RUN)
    except Interrupted as stop:
        from glmkern.training.loop.resume import resume_command

        return _fail(f"{stop}; go on with: {resume_command(argv, os.environ)}", stop.status)
    except KeyboardInterrupt:
        return _fail("interrupted", EXIT_INTERRUPTED)


def _fail(message: object, status: int) -> int:
    print(f"glmkern: {message}", file=sys.stderr)
    return status


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0
    if argv[0] in ("-V", "--version"):
        return _version([])
    if argv[0].startswith("-") or argv[0].endswith(".json"):
        return _official(argv)
    verb, rest = argv[0], argv[1:]
    if verb in VERBS:
        return VERBS[verb](rest)
    if verb in LATER:
        raise InputError(f"{verb} is not in this release; there are {', '.join(VERBS)}")
    nearest = difflib.get_close_matches(verb, VERBS, n=1, cutoff=0.0)[0]
    raise InputError(f"there is no verb {verb!r}; the nearest is {nearest!r} (--help lists them)")


def _official(argv: list[str], verb: str = "train", implied: Sequence[str] = ()) -> int:
    from glmkern.verbs import train

    return train.run(argv, verb, implied)


def _train(argv: list[str]) -> int:
    return _official(argv or ["--help"], "train", ["do_train"])


def _predict(argv: list[str]) -> int:
    return _official(argv or ["--help"], "predict", ["do_predict", "predict_with_generate"])


def _module(name: str) -> Callable[[list[str]], int]:
    """The `run` of a verb's module, imported when the verb is used."""
    return lambda argv: importlib.import_module(name).run(argv)


def _backends(argv: list[str]) -> int:
    _take_no_arguments("backends", argv)
    from glmkern import backends

    print(backends())
    return 0


def _version(argv: list[str]) -> int:
    _take_no_arguments("version", argv)
    print(f"glmkern {__version__}")
    return 0


def _take_no_arguments(verb: str, argv: list[str]) -> None:
    if argv:
        raise InputError(f"{verb} takes no arguments, not {' '.join(argv)!r}")


VERBS: dict[str, Callable[[list[str]], int]] = {
    "train": _train,
    "predict": _predict,
    "demo": _module("glmkern.demo"),
    "chat": _module("glmkern.verbs.chat"),
    "plan": _module("glmkern.verbs.plan"),
    "quantize": _module("glmkern.verbs.quantize"),
    "export": _module("glmkern.verbs.export"),
    "backends": _backends,
    "version": _version,
}
