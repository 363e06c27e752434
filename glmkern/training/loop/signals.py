"""Ctrl-C and SIGTERM as a request to stop when the step is done."""

import os
import signal
import threading
from types import FrameType

NOTICE = b"\nstopping when this step is done and saved; Ctrl-C again stops at once\n"


class StopRequest:
    """Within the block the first SIGINT or SIGTERM is kept in `signal`; a second SIGINT raises
    KeyboardInterrupt. Without effect outside the main thread, where Python has no signals.

    torchrun sends its processes the signals that the terminal has sent them already, and kills
    them after 30 seconds. Below torchrun a second SIGINT is therefore no second Ctrl-C.

    Attributes:
        signal: the number of the signal that came, or 0.
    """

    def __init__(self):
        self.signal = 0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, kind, error, traceback) -> None:
        for number, handler in self._previous.items():
            # None stands for a handler that was not installed from Python.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal == 0:
            self.signal = int(number)
            if os.environ.get("RANK", "0") == "0":
                # Not print: the signal may have come in the middle of one.
                os.write(2, NOTICE)
        elif number == signal.SIGINT and "TORCHELASTIC_RUN_ID" not in os.environ:
            raise KeyboardInterrupt
