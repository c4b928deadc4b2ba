"""Fixtures that several folders share."""

from __future__ import annotations

from pathlib import Path

import pytest

from polyhead_core.backbone import resolve_source


@pytest.fixture(scope="session")
def default_directory() -> Path:
    """The default backbone's Hugging Face directory; fetched and converted on first use, then cached."""
    return resolve_source("default")
