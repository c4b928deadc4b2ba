"""A new directory: complete or absent, never half written, never over something that is there."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from polyhead_trainer.errors import OutputExists
from polyhead_trainer.storage import FULL, writing


@contextmanager
def new_directory(output: Path) -> Iterator[Path]:
    """A folder to fill, beside `output`; it becomes `output` when the block ends, and goes when the block fails.

    Raises OutputExists and StorageFailed, before the block is entered, where `output` is there and not an empty folder,
    or cannot be made; StorageFailed also where the disk is full inside.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise OutputExists(f"{output} is there and not an empty folder: it is not touched; choose another output")
    kept = "nothing was written"
    with writing(output, kept):
        output.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        yield staging
        os.chmod(staging, 0o755)
        # Onto an empty folder this replaces it; onto one that was filled meanwhile it raises.
        staging.rename(output)
    except (OSError, SafetensorError) as error:
        if output.is_dir() and any(output.iterdir()):
            raise OutputExists(f"{output} was filled by something else meanwhile; choose another output") from error
        if isinstance(error, OSError) and error.errno not in FULL:
            raise  # it may have been reading
        with writing(output, kept):
            raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
