"""One run at a time into one output: two would take each other's checkpoints apart. Knows paths alone."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from polyhead_trainer.errors import OutputBusy
from polyhead_trainer.storage import writing


@contextmanager
def only_run_into(output: Path) -> Iterator[None]:
    """Raises OutputBusy where another process is inside for `output`, StorageFailed.

    The lock is the kernel's, on a file beside `output`: it ends with the process, however that ends, and the next run
    takes over a file that is left. File systems without locks do not keep anybody out.
    """
    file = output.with_name(f".{output.name}.lock")
    is_new = not output.parent.exists()
    with writing(output, "nothing was trained yet"):
        output.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _locked(file, output)
    try:
        yield
    finally:
        with suppress(OSError):
            file.unlink()
        os.close(descriptor)
        if is_new:
            with suppress(OSError):  # something is in it
                output.parent.rmdir()


def _locked(file: Path, output: Path) -> int:
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise OutputBusy(
                f"another process is training into {output} right now: let it end, or choose another output"
            ) from error
        except OSError:  # no locks here
            return descriptor
        if _is_at(descriptor, file):
            return descriptor
        os.close(descriptor)  # who held it has just taken its name away


def _is_at(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False
