"""An adapter on disk: PEFT's two files, read once, hashed and parsed from the same bytes. Knows no adapter type.

Whatever lies in such a folder is taken for hostile: nothing is unpickled, nothing outside the folder is followed,
no size is believed. Files are read into memory and not mapped, so that a file cut short under us is an error
message and not a SIGBUS.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from polyhead_core.errors import AdapterFormatError, AdapterTooLarge, InvalidRequest

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
FINGERPRINT_KEY = "polyhead.backbone_fingerprint"
"""Header metadata: the fingerprint of the backbone that the adapter was trained on."""
QUANTIZATION_KEY = "polyhead.quantization"
"""Header metadata: the quantisation of that backbone."""

MAX_CONFIG_BYTES = 1 << 20
MAX_HEADER_BYTES = 16 << 20
DEFAULT_MAX_FILE_BYTES = 2 << 30
_MAX_NAME_BYTES = 255
_PICKLED_NAMES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth", "adapter_model.ckpt")
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_CONVERT_HINT = (
    "a pickle can run code when it is opened, so it never is; "
    "load it with peft on a machine that trusts it and save it again with safe_serialization=True"
)


@dataclass(frozen=True, kw_only=True)
class AdapterDirectory:
    """One adapter as its folder held it at one moment."""

    name: str
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    content_hash: str
    file_bytes: int
    """Bytes of both files."""

    @property
    def backbone_fingerprint(self) -> str | None:
        return self.metadata.get(FINGERPRINT_KEY)

    @property
    def quantization(self) -> str | None:
        return self.metadata.get(QUANTIZATION_KEY)


@dataclass(frozen=True)
class _RawFiles:
    config: bytes
    weights: bytes
    weights_mode: int

    def content_hash(self) -> str:
        digest = hashlib.sha256()
        for data in (self.config, self.weights):
            # With its length in front, no byte can move from one file to the other unnoticed.
            digest.update(len(data).to_bytes(8, "little"))
            digest.update(data)
        return digest.hexdigest()


def check_adapter_name(name: str) -> None:
    """Raises InvalidRequest unless `name` can name one folder: no path, nothing hidden, nothing unprintable."""
    problem = _name_problem(name)
    if problem is not None:
        shown = name if len(name) <= 80 else name[:80] + "..."
        raise InvalidRequest(
            f"adapter name {shown!r} is not usable: {problem}; expected the name of a folder in the adapters folder",
            details={"field": "adapter", "given": ascii(shown), "problem": problem},
        )


def _name_problem(name: str) -> str | None:
    if not name:
        return "it is empty"
    if "/" in name or "\\" in name:
        return "it holds a path separator"
    if name.startswith("."):
        return "it starts with a dot"
    if not name.isprintable():
        return "it holds a control or unprintable character"
    try:
        num_bytes = len(name.encode("utf-8"))
    except UnicodeEncodeError:
        return "it is not valid Unicode"
    return f"it has {num_bytes} bytes, at most {_MAX_NAME_BYTES} are allowed" if num_bytes > _MAX_NAME_BYTES else None


def read_adapter_directory(directory: Path, *, max_file_bytes: int = DEFAULT_MAX_FILE_BYTES) -> AdapterDirectory:
    """Reads and parses both files of `directory`.

    Raises AdapterFormatError (missing, pickled, truncated or unreadable files, links out of the folder) and
    AdapterTooLarge (a file of more than `max_file_bytes`, which is then not read at all).
    """
    raw = _read_files(directory, max_file_bytes)
    config = _parse_config(directory.name, raw.config)
    header = _parse_header(directory.name, raw.weights)
    return AdapterDirectory(
        name=directory.name,
        config=config,
        tensors=_parse_tensors(directory.name, raw.weights),
        metadata=dict(header.get("__metadata__") or {}),
        content_hash=raw.content_hash(),
        file_bytes=len(raw.config) + len(raw.weights),
    )


def content_hash(directory: Path, *, max_file_bytes: int = DEFAULT_MAX_FILE_BYTES) -> str:
    """SHA-256 (hexadecimal) over configuration and weights, each after its length; other files do not count."""
    return _read_files(directory, max_file_bytes).content_hash()


def stamp_backbone(
    directory: Path, *, fingerprint: str, quantization: str, max_file_bytes: int = DEFAULT_MAX_FILE_BYTES
) -> str:
    """Records in the weights' header which backbone the adapter was made on; returns the new content hash.

    Tensors and other metadata stay as they are, the file is replaced in one step, and the same call twice
    leaves the same bytes.
    """
    raw = _read_files(directory, max_file_bytes)
    header = _parse_header(directory.name, raw.weights)
    _parse_tensors(directory.name, raw.weights)
    stamps = {FINGERPRINT_KEY: fingerprint, QUANTIZATION_KEY: quantization}
    weights = _with_metadata(raw.weights, header, stamps)
    _replace_file(directory / WEIGHTS_FILE, weights, raw.weights_mode)
    return _RawFiles(raw.config, weights, raw.weights_mode).content_hash()


def _with_metadata(weights: bytes, header: dict[str, Any], stamps: Mapping[str, str]) -> bytes:
    # Written by hand because the library orders metadata at random, which would give equal adapters unequal hashes.
    metadata = {"format": "pt", **(header.get("__metadata__") or {}), **stamps}
    entries = {key: value for key, value in header.items() if key != "__metadata__"}
    text = json.dumps({"__metadata__": dict(sorted(metadata.items())), **entries}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    data_start = 8 + int.from_bytes(weights[:8], "little")
    return len(text).to_bytes(8, "little") + text + weights[data_start:]


def _replace_file(path: Path, data: bytes, mode: int) -> None:
    descriptor, temporary = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _read_files(directory: Path, max_file_bytes: int) -> _RawFiles:
    try:
        with contextlib.ExitStack() as opened:
            # All names are looked up in this one descriptor: a folder swapped in under the same name is not seen.
            folder = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            opened.callback(os.close, folder)
            return _read_files_in(folder, directory.name, max_file_bytes, opened)
    except OSError as error:
        raise AdapterFormatError(
            f"adapter folder {directory.name!r} cannot be read: {error.strerror}; expected a folder with "
            f"{CONFIG_FILE} and {WEIGHTS_FILE}",
            details={"adapter": directory.name},
        ) from error


def _read_files_in(folder: int, adapter: str, max_file_bytes: int, opened: contextlib.ExitStack) -> _RawFiles:
    files = []
    for file_name in (CONFIG_FILE, WEIGHTS_FILE):
        files.append(_open_inside(folder, adapter, file_name))
        opened.callback(os.close, files[-1])
    config_file, weights_file = files
    # Both are open before either is read, and both are looked at again after both are read.
    before = _identity(config_file), _identity(weights_file)
    config = _read(config_file, adapter, CONFIG_FILE, min(MAX_CONFIG_BYTES, max_file_bytes))
    weights = _read(weights_file, adapter, WEIGHTS_FILE, max_file_bytes)
    after = _identity(config_file), _identity(weights_file)
    named = _named_identity(folder, CONFIG_FILE), _named_identity(folder, WEIGHTS_FILE)
    if not before == after == named:
        _refuse(adapter, "its files changed while they were read; they are read again once they have settled")
    return _RawFiles(config, weights, stat.S_IMODE(os.fstat(weights_file).st_mode))


def _open_inside(folder: int, adapter: str, file_name: str) -> int:
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # O_NONBLOCK: a pipe must not hold us up
    try:
        target = _link_target(folder, file_name)
        if target is not None and _name_problem(target) is not None:
            _refuse(
                adapter,
                f"{file_name} is a link to {target!r}, out of its folder; expected a file, or a link to one beside it",
                file=file_name,
            )
        descriptor = os.open(target or file_name, flags, dir_fd=folder)
    except FileNotFoundError:
        _refuse_missing(folder, adapter, file_name)
    except OSError as error:
        _refuse(adapter, f"{file_name} cannot be opened: {error.strerror}", file=file_name)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        _refuse(adapter, f"{file_name} is not a regular file", file=file_name)
    return descriptor


def _link_target(folder: int, file_name: str) -> str | None:
    if stat.S_ISLNK(os.stat(file_name, dir_fd=folder, follow_symlinks=False).st_mode):
        return os.readlink(file_name, dir_fd=folder)
    return None


def _refuse_missing(folder: int, adapter: str, file_name: str) -> NoReturn:
    names = set(os.listdir(folder))
    pickled = next((name for name in _PICKLED_NAMES if name in names), None)
    if file_name == WEIGHTS_FILE and pickled is not None:
        _refuse(adapter, f"its weights are in {pickled}; expected {WEIGHTS_FILE}: {_CONVERT_HINT}", file=pickled)
    _refuse(
        adapter,
        f"{file_name} is missing; expected a folder with {CONFIG_FILE} and {WEIGHTS_FILE}, as peft's save_pretrained "
        "writes it",
        file=file_name,
    )


def _identity(descriptor: int) -> tuple[int, ...]:
    return _stat_identity(os.fstat(descriptor))


def _named_identity(folder: int, file_name: str) -> tuple[int, ...] | None:
    try:
        return _stat_identity(os.stat(file_name, dir_fd=folder))
    except FileNotFoundError:
        return None


def _stat_identity(status: os.stat_result) -> tuple[int, ...]:
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def _read(descriptor: int, adapter: str, file_name: str, max_bytes: int) -> bytes:
    size = os.fstat(descriptor).st_size
    if size > max_bytes:
        raise AdapterTooLarge(
            f"adapter {adapter!r}: {file_name} has {size} bytes, at most {max_bytes} are read",
            details={"adapter": adapter, "file": file_name, "bytes": size, "max_bytes": max_bytes},
        )
    with os.fdopen(os.dup(descriptor), "rb") as file:
        return file.read(size)


def _parse_config(adapter: str, data: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs):
            raise ValueError("the same key twice")
        return values

    def no_constant(text: str) -> NoReturn:
        raise ValueError(f"{text} is not a number that JSON knows")

    try:
        config = json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=no_constant)
    except (ValueError, RecursionError) as error:
        _refuse(adapter, f"{CONFIG_FILE} is not UTF-8 JSON: {error}", file=CONFIG_FILE)
    if not isinstance(config, dict):
        _refuse(adapter, f"{CONFIG_FILE} holds a JSON {type(config).__name__}, expected an object", file=CONFIG_FILE)
    return config


def _parse_header(adapter: str, data: bytes) -> dict[str, Any]:
    """The header's JSON. Only sizes are judged here; the library then checks every tensor's type, shape and place."""
    if data.startswith(_PICKLE_STARTS) and int.from_bytes(data[:8], "little") > len(data):
        _refuse(adapter, f"{WEIGHTS_FILE} is a pickle by another name: {_CONVERT_HINT}", file=WEIGHTS_FILE)
    header_bytes = int.from_bytes(data[:8], "little")
    if len(data) < 8 or header_bytes > len(data) - 8:
        _refuse(
            adapter,
            f"{WEIGHTS_FILE} is truncated or not a safetensors file: it has {len(data)} bytes and announces a header "
            f"of {header_bytes}; save or copy it again",
            file=WEIGHTS_FILE,
        )
    if header_bytes > MAX_HEADER_BYTES:
        _refuse(
            adapter,
            f"{WEIGHTS_FILE} has a header of {header_bytes} bytes, at most {MAX_HEADER_BYTES} are read",
            file=WEIGHTS_FILE,
        )
    try:
        header = json.loads(data[8 : 8 + header_bytes].decode("utf-8"))
    except (ValueError, RecursionError) as error:
        _refuse(adapter, f"{WEIGHTS_FILE} is no safetensors file: its header is not JSON: {error}", file=WEIGHTS_FILE)
    if not isinstance(header, dict):
        _refuse(adapter, f"{WEIGHTS_FILE} is no safetensors file: its header is not a JSON object", file=WEIGHTS_FILE)
    return header


def _parse_tensors(adapter: str, data: bytes) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(data)
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        # Besides its own error the library lets out what torch says to a type it has no name for.
        _refuse(
            adapter,
            f"{WEIGHTS_FILE} is damaged or not a safetensors file: {error}; save or copy it again",
            file=WEIGHTS_FILE,
        )


def _refuse(adapter: str, problem: str, *, file: str = "") -> NoReturn:
    details = {"adapter": adapter, **({"file": file} if file else {})}
    raise AdapterFormatError(f"adapter {adapter!r}: {problem}", details=details)
