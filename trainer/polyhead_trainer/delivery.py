"""`trainer publish`: a finished adapter, copied into the folder that a server watches; complete or not at all."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from polyhead_client import Client, PolyheadClientError
from polyhead_core.adapter_directory import (
    CONFIG_FILE,
    check_adapter_name,
    content_hash,
    read_adapter_directory,
)
from polyhead_core.errors import AdapterMismatch, ConfigError
from polyhead_trainer.errors import OutputExists
from polyhead_trainer.storage import writing

SERVER_TIMEOUT_S = 10.0
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@dataclass(frozen=True, kw_only=True)
class Delivered:
    path: Path
    content_hash: str
    remarks: list[str]


def deliver(
    adapter: Path, folder: Path, *, name: str | None = None, overwrite: bool = False, server: str | None = None
) -> Delivered:
    """Copies all of `adapter` to `folder`/`name`; with `server` (host:port) after it said that its backbone is right.

    Raises AdapterRejected and its kin, InvalidRequest, OutputExists, ConfigError, StorageFailed.
    """
    files = read_adapter_directory(adapter.resolve())
    name = name or adapter.resolve().name
    check_adapter_name(name)
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no folder: expected the one that the server watches (its setting `adapters`)")
    target = folder / name
    if adapter.resolve() == target.resolve():
        raise ConfigError(f"{adapter} is already there")
    _check_target(target, overwrite)
    remarks = []
    if server is not None:
        remarks = check_server(server, files.backbone_fingerprint, files.quantization)
    with writing(target, "what was there is as it was"):
        _copy(adapter, target, files.content_hash, overwrite)
    return Delivered(path=target, content_hash=files.content_hash, remarks=remarks)


def _copy(adapter: Path, target: Path, identity: str, overwrite: bool) -> None:
    # A name with a dot in front is no adapter to a server.
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name[:100]}.", dir=target.parent))
    try:
        shutil.copytree(adapter, staging, symlinks=True, dirs_exist_ok=True)
        _make_readable(staging)
        if content_hash(staging) != identity:
            raise ConfigError(f"{adapter} changed while it was copied: publish it again once it has settled")
        _check_target(target, overwrite)
        put_in_place(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def check_server(server: str, fingerprint: str | None, quantization: str | None) -> list[str]:
    """Remarks on what fits loosely. Raises AdapterMismatch for another backbone, ConfigError where nobody answers."""
    try:
        with Client(server) as client:
            backbone = client.info(timeout_s=SERVER_TIMEOUT_S).backbone
    except PolyheadClientError as error:
        raise ConfigError(f"--server {server}: {error}") from error
    if fingerprint is None:
        return ["the adapter does not say which backbone it was trained on: nothing could be checked"]
    if fingerprint != backbone.fingerprint:
        raise AdapterMismatch(
            f"the adapter was trained on the backbone with fingerprint {fingerprint}, the server at {server} has "
            f"{backbone.fingerprint}: it would be refused there"
        )
    if quantization is not None and quantization != backbone.quantization:
        return [f"trained on {quantization}, served on {backbone.quantization}: answers can differ a little"]
    return []


def put_in_place(staging: Path, target: Path) -> None:
    """`target` is the old adapter or the new one at any moment; what was there is then at `staging`.

    Where the system cannot exchange two names in one step, an old one goes a moment before the new one comes.
    """
    if not target.exists():
        staging.rename(target)
    elif not exchange(staging, target):
        retired = Path(tempfile.mkdtemp(prefix=".", suffix=".old", dir=target.parent))
        target.rename(retired / "adapter")
        staging.rename(target)
        shutil.rmtree(retired)


def exchange(one: Path, other: Path) -> bool:
    """Linux's renameat2(2), which Python has no call for; False where system or file system have none."""
    if sys.platform != "linux":
        return False
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    return rename is not None and not rename(
        _AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), ctypes.c_uint(_RENAME_EXCHANGE)
    )


def _check_target(target: Path, overwrite: bool) -> None:
    if not os.path.lexists(target):
        return
    if not (target / CONFIG_FILE).is_file() or target.is_symlink():
        raise ConfigError(f"{target} is there and is no adapter's folder: it is not touched; choose another --name")
    if not overwrite:
        raise OutputExists(f"{target} is there; choose another --name, or replace it with --overwrite")


def _make_readable(directory: Path) -> None:
    """A server often runs as another user; safetensors writes files for their owner alone."""
    os.chmod(directory, 0o755)
    for path in directory.rglob("*"):
        if not path.is_symlink():
            os.chmod(path, 0o755 if path.is_dir() else 0o644)
