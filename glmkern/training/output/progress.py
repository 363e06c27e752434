"""What a run shows while it goes: a bar, the official log lines, trainer_log.jsonl."""

import datetime
import json
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch
from tqdm import tqdm

from glmkern.files.atomic import writing
from glmkern.training.output.trainer_state import TrainerState

GIB = 2**30
# A logged number, and what LLaMA-Factory's tools call it in trainer_log.jsonl.
FILE_NAMES = {"loss": "loss", "eval_loss": "eval_loss", "learning_rate": "lr"}


class Progress:
    """The bar (stderr), the lines above it (stdout) and the log file of one run.

    The bar shows loss, learning rate, tokens per second, peak memory and the time left. `log_file`
    has one JSON object a log, under the names that LLaMA-Factory's tools read. A resumed run counts
    from the `steps`, `tokens` and `lines` of the log file that it had before.
    """

    def __init__(
        self,
        max_steps: int,
        device: torch.device,
        *,
        show_bar: bool = True,
        log_file: Path | None = None,
        steps: int = 0,
        tokens: int = 0,
        lines: int = 0,
    ):
        self.device = device
        self.tokens, self.lines = tokens, lines
        self._earlier_steps, self._earlier_tokens = steps, tokens
        self._start = time.monotonic()
        self._bar = tqdm(
            total=max_steps,
            initial=steps,
            disable=not show_bar,
            unit="step",
            dynamic_ncols=True,
            mininterval=0.1 if sys.stderr.isatty() else 10,
        )
        self._log_file = log_file
        self._log = None  # opened with the first line: a run that fails before leaves no file

    def step(self, loss: float, learning_rate: float, tokens: int) -> None:
        """Count one optimiser step over `tokens` tokens."""
        self.tokens += tokens
        self._bar.set_postfix_str(
            f"loss {loss:.4f}, lr {learning_rate:.3g}, {self._tokens_per_second():,.0f} tok/s, "
            f"{peak_memory(self.device) / GIB:.2f} GiB",
            refresh=False,
        )
        self._bar.update()

    def write(self, line: str) -> None:
        """Print a line without disturbing the bar."""
        write_line(line)

    def log(self, logs: dict[str, float], state: TrainerState) -> None:
        """Print the official log line, and append it to the log file where it has a loss: that of
        a window of steps ("loss") or of an evaluation ("eval_loss").

        Raises InputError where the file cannot be written."""
        self.write(str(logs))
        losses = {FILE_NAMES[name]: logs[name] for name in FILE_NAMES if name in logs}
        if self._log_file is None or not losses.keys() & {"loss", "eval_loss"}:
            return
        elapsed = time.monotonic() - self._start
        steps = max(state.global_step - self._earlier_steps, 1)
        remaining = elapsed / steps * (state.max_steps - state.global_step)
        on_gpu = self.device.type == "cuda"
        memory = {
            "vram_allocated" if on_gpu else "ram_allocated": round(
                peak_memory(self.device) / GIB, 2
            )
        }
        line = (
            json.dumps(
                {
                    "current_steps": state.global_step,
                    "total_steps": state.max_steps,
                    **losses,
                    "epoch": logs["epoch"],
                    "percentage": round(100 * state.global_step / state.max_steps, 2),
                    "elapsed_time": _clock(elapsed),
                    "remaining_time": _clock(remaining),
                    "throughput": round(self._tokens_per_second(), 2),
                    "total_tokens": self.tokens,
                    **memory,
                }
            )
            + "\n"
        )
        with writing(self._log_file):
            if self._log is None:
                self._log = self._log_file.open("a" if self.lines else "w", encoding="utf-8")
            self._log.write(line)
            self._log.flush()
        self.lines += 1

    def close(self) -> None:
        self._bar.close()
        if self._log is not None:
            with suppress(OSError):  # of a line that `log` failed to write, and told so
                self._log.close()

    def _tokens_per_second(self) -> float:
        tokens = self.tokens - self._earlier_tokens
        return tokens / max(time.monotonic() - self._start, 1e-9)


def _clock(seconds: float) -> str:
    """h:mm:ss, with days where there are; no more than a timedelta holds."""
    longest = datetime.timedelta.max.total_seconds()
    return str(datetime.timedelta(seconds=int(min(seconds, longest - 1))))


def write_line(line: str) -> None:
    """Print a line above whatever bar there is."""
    tqdm.write(line, file=sys.stdout)


def peak_memory(device: torch.device) -> int:
    """Bytes: the most the GPU's allocator held, or the process's largest resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, else kilobytes
