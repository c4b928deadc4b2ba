"""Fixtures that several folders share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # One test per core, the processes that it starts included; what wants more threads says so.
    os.environ["OMP_NUM_THREADS"] = "1"

import torch

if not torch.cuda.is_available():
    # Triton's kernels then run in its interpreter, which must be chosen before anything imports triton.
    os.environ["TRITON_INTERPRET"] = "1"

from polyhead_core.backbone import resolve_source


@pytest.fixture(scope="session")
def default_directory() -> Path:
    """The default backbone's Hugging Face directory; fetched and converted on first use, then cached."""
    return resolve_source("default")
