"""Where the interpreter of the installed Triton cannot work."""

from __future__ import annotations

import importlib
import importlib.util

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def working_interpreter() -> None:
    """Without a device the interpreter runs the kernels; that of Triton before 3.7 asks numpy for a number in an array
    of one, which numpy refuses since 2.4."""
    if torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        return
    triton = importlib.import_module("triton")
    if _version(triton.__version__) < (3, 7) and _version(np.__version__) >= (2, 4):
        pytest.skip(f"the interpreter of triton {triton.__version__} needs numpy<2.4, here is {np.__version__}")


def _version(text: str) -> tuple[int, int]:
    major, minor, *_ = text.split(".")
    return int(major), int(minor)
