"""`glmkern train`, `glmkern predict` and the bare flags of the official ptuning/main.py."""

from collections.abc import Sequence


def run(argv: Sequence[str], verb: str = "train", implied: Sequence[str] = ()) -> int:
    """Runs the official flow, which tells first what it is predicted to take.

    Args:
        verb: the name that --help shows.
        implied: the tasks that the verb stands for, such as "do_train".
    """
    from glmkern.training.flags.parser import parse

    try:
        arguments = parse(argv, f"glmkern {verb}")
    except SystemExit as help_was_printed:
        return int(help_was_printed.code or 0)
    for task in implied:
        setattr(arguments.training, task, True)
    if arguments.training.deterministic:
        from glmkern.environment import make_deterministic

        make_deterministic()  # before torch is loaded
    from glmkern.plan.run import forecast_run
    from glmkern.training.run import run as run_official

    run_official(arguments, forecast_run)
    return 0
