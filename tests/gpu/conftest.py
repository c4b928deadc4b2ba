"""Where the interpreter of the installed Triton cannot work."""

from __future__ import annotations

from importlib import metadata, util

import pytest
import torch
from packaging.version import Version


@pytest.fixture(autouse=True)
def working_interpreter() -> None:
    """Without a device the interpreter runs the kernels; that of Triton before 3.7 asks numpy for a number in an array
    of one, which numpy refuses since 2.4."""
    if torch.cuda.is_available() or util.find_spec("triton") is None:
        return
    triton, numpy = (Version(metadata.version(name)) for name in ("triton", "numpy"))
    if triton < Version("3.7") and numpy >= Version("2.4"):
        pytest.skip(f"the interpreter of triton {triton} needs numpy<2.4, here is {numpy}")
