"""What the owner of a run does at certain points of the training loop."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


def do_nothing(*args: object) -> None:
    pass


@dataclass(frozen=True)
class Hooks:
    """Callbacks of the training loop; with several ranks the first one alone calls them.

    Attributes:
        write_companions: called with a new checkpoint folder before it gets its name; writes what
            else belongs there, such as configuration and tokenizer.
        evaluate: returns the metrics of one evaluation, their names beginning with "eval_"; called
            when --evaluation_strategy says so, after the log and before the save of a step.
        on_save: called with every new checkpoint folder and its step.
        on_step: called with the number of every step taken.
    """

    write_companions: Callable[[Path], None] = do_nothing
    evaluate: Callable[[], dict[str, float]] | None = None
    on_save: Callable[[Path, int], None] = do_nothing
    on_step: Callable[[int], None] = do_nothing
