"""The two kinds of failure a user meets, each told in one sentence with its cure."""


class InputError(Exception):
    """A file, folder or command line of the user's is wrong; the command exits with 2."""

    def __init__(self, message: str):
        # It may quote names from a hostile file: no line breaks, nothing that steers a terminal.
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in message))


class TrainingError(RuntimeError):
    """A run failed after it had started, for example by a NaN loss; the command exits with 1."""
