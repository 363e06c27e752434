"""Files that are either the old ones or the new ones, whenever the process is killed."""

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from glmkern.errors import InputError


@contextmanager
def replaced(path: str | Path) -> Iterator[Path]:
    """Yield a temporary file beside `path` to write; leaving the block renames it over `path`.

    The data reach the disk before the name does, so a kill or a power cut leaves the old file or
    the new one, never a part. An exception in the block leaves the old file and no litter. Missing
    parent folders are made. Raises InputError where the folder cannot be written or is full.
    """
    path = Path(path)
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch(exist_ok=False)
        mode = stat.S_IMODE(temporary.stat().st_mode)
        yield temporary
        # safetensors creates its files readable by their owner alone; the user's umask decides.
        temporary.chmod(mode)
        _flush(temporary)
        os.replace(temporary, path)
        _flush(path.parent)
    except OSError as error:
        raise InputError(
            f"cannot write {path} ({error.strerror or error}); free some space or choose a folder "
            "you may write to"
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def write_text(path: str | Path, text: str) -> None:
    """Replace `path` by `text` in UTF-8, atomically."""
    with replaced(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_torch(path: str | Path, obj: Any) -> None:
    """Replace `path` by torch.save's zip format, atomically; same object, same bytes."""
    import torch

    # Through a file object: given a path, torch.save writes the temporary name into the archive.
    with replaced(path) as temporary, temporary.open("wb") as file:
        try:
            torch.save(obj, file)
        except RuntimeError as error:
            # A full disk reaches us as a RuntimeError raised while the OSError was handled.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def _flush(path: Path) -> None:
    folder = path.is_dir()
    if folder and os.name == "nt":
        return  # Windows opens no folder for that; its renames are journalled.
    descriptor = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
