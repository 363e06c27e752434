"""Files that are either the old ones or the new ones, whenever the process is killed."""

import os
import secrets
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from glmkern.errors import InputError


@contextmanager
def writing(what: str | Path) -> Iterator[None]:
    """Turn an OSError of the block into an InputError: `what` cannot be written, and the cure."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"cannot write {what} ({error.strerror or error}); free some space or choose a folder "
            "you may write to"
        ) from error


class NewFiles:
    """Files of one folder, written under temporary names and then renamed together.

    with NewFiles(folder) as new:
        temporary = new.temporary()
        ...                                      write it
        new.rename({temporary: "model.bin"})

    The data reach the disk before the names do. Leaving the block without renaming leaves no
    litter, nor a folder that was made for them. Missing parent folders are made. An OSError becomes
    an InputError that names `what`.
    """

    def __init__(self, folder: str | Path, what: str | Path | None = None):
        self.folder = Path(folder)
        self.what = what or folder
        self._temporary: dict[Path, int] = {}
        self._made_folder = False

    def __enter__(self) -> "NewFiles":
        return self

    def temporary(self) -> Path:
        """A new empty file to write."""
        path = self.folder / f".{secrets.token_hex(8)}.tmp"
        with writing(self.what):
            self._made_folder |= not self.folder.exists()
            self.folder.mkdir(parents=True, exist_ok=True)
            path.touch(exist_ok=False)
            # safetensors makes its files readable by their owner alone; the user's umask decides.
            self._temporary[path] = stat.S_IMODE(path.stat().st_mode)
        return path

    def rename(self, names: dict[Path, str], obsolete: Iterable[str] = ()) -> None:
        """Remove what matches the patterns `obsolete`, then name the files, in order."""
        with writing(self.what):
            for temporary in names:
                temporary.chmod(self._temporary[temporary])
                _flush(temporary)
            for pattern in obsolete:
                for old in self.folder.glob(pattern):
                    old.unlink()
            for temporary, name in names.items():
                os.replace(temporary, self.folder / name)
            _flush(self.folder)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for path in self._temporary:
            with suppress(OSError):
                path.unlink()
        if error is not None and self._made_folder:
            with suppress(OSError):  # it holds something after all
                self.folder.rmdir()
        if isinstance(error, OSError):
            with writing(self.what):
                raise error


@contextmanager
def replaced(path: str | Path) -> Iterator[Path]:
    """Yield a temporary file beside `path` to write; leaving the block renames it over `path`.

    A kill or a power cut leaves the old file or the new one, never a part. An exception in the
    block leaves the old file. Raises InputError where the folder cannot be written or is full.
    """
    path = Path(path)
    with NewFiles(path.parent, path) as new:
        temporary = new.temporary()
        yield temporary
        new.rename({temporary: path.name})


def write_text(path: str | Path, text: str) -> None:
    """Replace `path` by `text` in UTF-8, atomically."""
    with replaced(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def _flush(path: Path) -> None:
    folder = path.is_dir()
    if folder and os.name == "nt":
        return  # Windows opens no folder for that; its renames are journalled.
    descriptor = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
