"""What a full or unwritable cache raises, as one error that says what to do. Knows nothing of what is kept there."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from polyhead_core.errors import BackboneError

_UNWRITABLE = {
    getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EROFS", "EACCES", "EPERM", "ENOTDIR", "EEXIST")
}  # fmt: skip


@contextlib.contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Raises BackboneError where a block that writes below `folder` cannot; its other errors pass."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno not in _UNWRITABLE and not _cannot_be_made(folder, error):
            raise
        raise BackboneError(
            f"cannot write {folder}: {error}; make room or give permission there, or keep the cache elsewhere: "
            "set cache_dir, or POLYHEAD_CACHE in the environment"
        ) from error


def _cannot_be_made(folder: Path, error: OSError) -> bool:
    """Where the system makes no folders, as below /proc; a file that is missing elsewhere may have been read."""
    missing = Path(error.filename) if error.errno == errno.ENOENT and error.filename is not None else None
    return missing in (folder, *folder.parents)
