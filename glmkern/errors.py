"""How a command ends early: each failure is told in one sentence with its cure."""


class InputError(Exception):
    """A file, folder or command line of the user's is wrong; the command exits with 2."""

    def __init__(self, message: str):
        # It may quote names from a hostile file: no line breaks, nothing that steers a terminal.
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in message))


class TrainingError(RuntimeError):
    """A run failed after it had started, for example by a NaN loss; the command exits with 1."""


class Interrupted(Exception):
    """A run stopped because a signal asked for it, its state saved.

    Attributes:
        status: what the command exits with, 128 and the signal's number.
    """

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.status = 128 + signal
