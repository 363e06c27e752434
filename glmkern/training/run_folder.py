"""The output folder of a run: checkpoints, state and results, none of them ever half-written."""

import json
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

from glmkern.checkpoint.atomic import write_text
from glmkern.errors import InputError
from glmkern.training.state import TrainerState

CHECKPOINT = "checkpoint-"


class RunFolder:
    """`--output_dir`, laid out as the official run leaves it."""

    def __init__(self, path: str | Path, save_total_limit: int | None = None):
        self.path = Path(path)
        self.save_total_limit = save_total_limit

    def make(self) -> None:
        """Make the folder, which is done when training starts; InputError where that fails."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"cannot make --output_dir {self.path} ({error.strerror}); choose a folder you may "
                "write to"
            ) from error

    def write_state(self, state: TrainerState) -> None:
        write_text(self.path / "trainer_state.json", state.to_json())

    def write_results(self, split: str, metrics: dict[str, float]) -> None:
        """`<split>_results.json`, and the same numbers merged into all_results.json."""
        write_text(self.path / f"{split}_results.json", _results(metrics))
        merged = self.path / "all_results.json"
        try:
            earlier = json.loads(merged.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            earlier = {}
        write_text(merged, _results({**earlier, **metrics}))

    def write_checkpoint(self, step: int, fill: Callable[[Path], None]) -> Path:
        """Make checkpoint-<step> of what `fill` writes into the folder it is given.

        The folder gets its name when it is complete. Older checkpoints beyond --save_total_limit
        are deleted afterwards.
        """
        final = self.path / f"{CHECKPOINT}{step}"
        partial = self.path / f".{final.name}.{secrets.token_hex(4)}.tmp"
        partial.mkdir()
        try:
            fill(partial)
            if final.exists():
                shutil.rmtree(final)
            os.replace(partial, final)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        self._delete_older(final)
        return final

    def _delete_older(self, newest: Path) -> None:
        if not self.save_total_limit or self.save_total_limit < 0:
            return
        others = [path for path in self.path.glob(f"{CHECKPOINT}*") if path.is_dir()]
        others.remove(newest)
        others.sort(key=lambda path: path.stat().st_mtime_ns)
        for path in others[: len(others) - (self.save_total_limit - 1)]:
            shutil.rmtree(path, ignore_errors=True)


def _results(metrics: dict[str, float]) -> str:
    return json.dumps(metrics, indent=4, sort_keys=True)
