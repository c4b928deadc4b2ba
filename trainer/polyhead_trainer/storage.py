"""What goes wrong at the disk, as one error that says what to do. Libraries report a full disk in four ways."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

from polyhead_trainer.errors import StorageFailed

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def writing(path: Path, kept: str) -> Iterator[None]:
    """Raises StorageFailed for what fails at the disk inside; `kept` says what is still there."""
    try:
        yield
    except (OSError, SafetensorError, CheckpointException) as error:
        cause = _os_error(error)
        problem = str(error) if cause is None else cause.strerror or str(cause)
        number = cause.errno if cause is not None else None
        advice = "free some space" if number in FULL or "os error" in problem.lower() else "mend this"
        raise StorageFailed(f"cannot write {path}: {problem}; {advice}, then continue; {kept}") from error


def _os_error(error: BaseException | None) -> OSError | None:
    """The first OSError behind `error`; torch.distributed.checkpoint keeps one per rank."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError):
            return error
        if isinstance(error, CheckpointException):
            for failure in error.failures.values():
                found = _os_error(failure[0])
                if found is not None:
                    return found
        error = error.__cause__ or error.__context__
    return None


def sync_directory(directory: Path) -> None:
    """Makes names in `directory` last through a crash of the machine."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(file: Path, text: str) -> None:
    with file.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
