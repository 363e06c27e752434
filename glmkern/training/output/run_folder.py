"""The output folder of a run: checkpoints, state and results, none of them ever half-written."""

import json
import os
import secrets
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from glmkern.errors import InputError
from glmkern.files.atomic import write_text, writing
from glmkern.training.output.trainer_state import TrainerState

CHECKPOINT = "checkpoint-"
LOG = "trainer_log.jsonl"


class RunFolder:
    """`--output_dir`, with the files of the official run."""

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

    def checkpoint(self, step: int) -> Path:
        return self.path / f"{CHECKPOINT}{step}"

    def write_checkpoint(
        self, step: int, fill: Callable[[Path], None], best: Path | None = None
    ) -> Path:
        """Make checkpoint-<step> of what `fill` writes into the folder it is given.

        The folder gets its name when it is complete. Older checkpoints beyond --save_total_limit
        are deleted afterwards, but never `best`. Raises InputError where the disk is full.
        """
        final = self.checkpoint(step)
        partial = self._temporary(final)
        try:
            with writing(final):
                partial.mkdir()
                fill(partial)
                if final.exists():
                    self._delete(final)
                os.replace(partial, final)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        self.delete_older(final, best)
        return final

    def delete_older(self, newest: Path, best: Path | None = None) -> None:
        """Delete the oldest checkpoints beyond --save_total_limit, but not `newest` and `best`,
        which may lie in another folder."""
        if not self.save_total_limit or self.save_total_limit < 0:
            return
        needed = {path.resolve() for path in (newest, best) if path is not None}
        found = [path for path in self.path.glob(f"{CHECKPOINT}*") if path.is_dir()]
        others = [path for path in found if path.resolve() not in needed]
        others.sort(key=lambda path: path.stat().st_mtime_ns)
        kept = max(self.save_total_limit - (len(found) - len(others)), 0)
        for path in others[: max(len(others) - kept, 0)]:
            with suppress(OSError):
                self._delete(path)

    def remove_temporary_files(self) -> None:
        """Delete the files and folders that a killed run had begun to write or to delete."""
        for pattern in (f".{CHECKPOINT}*.tmp", f".{'[0-9a-f]' * 16}.tmp"):
            for path in self.path.glob(pattern):
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    with writing(self.path):
                        path.unlink(missing_ok=True)

    def shorten_log(self, lines: int) -> None:
        """Keep the first lines of trainer_log.jsonl, to which a resumed run appends."""
        log = self.path / LOG
        if log.exists():
            with writing(log):
                kept = log.read_text(encoding="utf-8").splitlines(keepends=True)[:lines]
            write_text(log, "".join(kept))

    def _delete(self, checkpoint: Path) -> None:
        """Rename, then delete: a kill must not leave half a checkpoint that looks complete."""
        doomed = self._temporary(checkpoint)
        os.replace(checkpoint, doomed)
        shutil.rmtree(doomed, ignore_errors=True)

    def _temporary(self, checkpoint: Path) -> Path:
        return self.path / f".{checkpoint.name}.{secrets.token_hex(4)}.tmp"


def _results(metrics: dict[str, float]) -> str:
    return json.dumps(metrics, indent=4, sort_keys=True)
