"""The two kinds of failure a user meets, each told in one sentence with its cure."""


class InputError(Exception):
    """A file, folder or command line of the user's is wrong; the command exits with 2."""


class TrainingError(RuntimeError):
    """A run failed after it had started, for example by a NaN loss; the command exits with 1."""
