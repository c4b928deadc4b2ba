"""The adapters folder: every sub-folder with an adapter_config.json is an adapter of that name. Polled, never trusted.

What a name means changes only here. A folder whose content changed to something that cannot be served keeps its
error; the version before it is not served under the name any more.
"""

from __future__ import annotations

import difflib
import logging
import os
import threading
import time
from bisect import bisect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from polyhead_core.adapter_directory import CONFIG_FILE, WEIGHTS_FILE, check_adapter_name, content_hash
from polyhead_core.errors import AdapterRejected, InvalidRequest, UnknownAdapter

logger = logging.getLogger(__name__)

SETTLE_S = 2.0
"""A file younger than this when it was read is hashed once more: a second write may have left equal time stamps."""

PASSING_RETRY_S = 10.0
"""How soon a folder is read again that could not be read for a reason that may pass, such as a disk's."""

COMPARED_NAMES = 100
"""In search of the nearest to a mistaken one."""

SCAN_SHARE = 0.0025
"""Of the time, at most, for looking whether files have changed: it is taken from the engine."""

Signature = tuple[tuple[int, ...] | None, ...]


@dataclass(frozen=True, kw_only=True)
class AdapterFacts:
    """What is known of an accepted adapter without its weights."""

    content_hash: str
    peft_type: str
    max_rank: int
    num_parameters: int
    file_bytes: int
    num_units: int
    """Units of the arena that it takes."""


@dataclass(frozen=True, kw_only=True)
class CatalogEntry:
    name: str
    path: Path
    signature: Signature
    facts: AdapterFacts | None
    """None: refused."""
    error: AdapterRejected | None
    recheck_at_s: float | None
    """time.monotonic() from which on its content is to be compared once more."""


class Catalog:
    """Thread-safe. `entries` is replaced as a whole, so that readers need no lock and never wait for a disk."""

    def __init__(
        self,
        folder: Path | None,
        admit: Callable[[Path], AdapterFacts],
        on_change: Callable[[str, CatalogEntry | None], None],
        *,
        max_file_bytes: int,
    ) -> None:
        self.folder = folder
        self.entries: Mapping[str, CatalogEntry] = {}
        self._admit = admit
        self._on_change = on_change
        self._max_file_bytes = max_file_bytes
        self._scanning = threading.Lock()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._scan_s = 0.0
        """How long the last look at all files took, without reading any."""
        self._said: dict[str, str] = {}
        """What was last said of a folder that is no adapter, by name; "": of the adapters folder itself."""

    def start(self, interval_s: float) -> None:
        """Scans once, then every `interval_s`, or less often where that would take more than SCAN_SHARE of the time."""
        self.refresh()
        self._thread = threading.Thread(target=self._poll, args=(interval_s,), name="adapter-scan", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()

    def refresh(self) -> None:
        """Looks at the whole folder now. Blocks; at most one scan runs at a time."""
        with self._scanning:
            before = dict(self.entries)
            began_s = time.monotonic()
            try:
                found = dict(self._folders(before))
            except OSError as error:  # a disk's trouble says nothing of the adapters: what is known stays
                self._say_once("", f"the adapters folder cannot be read: {error}; its adapters are as last seen")
                return
            self._scan_s = time.monotonic() - began_s
            for name in before.keys() - found.keys():
                self._replace(name, None)
            for name, signature in found.items():
                entry = self._look(name, signature, before.get(name))
                if entry is not before.get(name):
                    # One by one: a large adapter does not hold back the small ones.
                    self._replace(name, entry)

    def entry(self, name: str) -> CatalogEntry:
        """As the last scan found it, usable or not. Raises UnknownAdapter, InvalidRequest."""
        entry = self.entries.get(name)
        if entry is None:
            check_adapter_name(name)
            near = difflib.get_close_matches(name, _neighbours(name, self.entries), n=3)
            hint = f"; the nearest names are {', '.join(near)}" if near else ""
            raise UnknownAdapter(f"there is no adapter {name!r}{hint}", details={"adapter": name})
        return entry

    def folders_of(self, content_hash: str) -> list[Path]:
        """The folders that hold this very content, as far as the last scan knows."""
        entries = self.entries.values()
        return [e.path for e in entries if e.facts is not None and e.facts.content_hash == content_hash]

    def check_integrity(self) -> None:
        for name, entry in self.entries.items():
            assert entry.name == name
            assert (entry.facts is None) != (entry.error is None), "an adapter is either accepted or refused"

    def _poll(self, interval_s: float) -> None:
        while not self._stopping.wait(min(max(interval_s, self._scan_s / SCAN_SHARE), threading.TIMEOUT_MAX)):
            try:
                self.refresh()
            except Exception:
                logger.exception("the adapters folder could not be scanned; trying again in %s s", interval_s)

    def _replace(self, name: str, entry: CatalogEntry | None) -> None:
        entries = dict(self.entries)
        entries.pop(name, None)
        self.entries = entries if entry is None else {**entries, name: entry}
        self._on_change(name, entry)

    def _folders(self, known: Mapping[str, CatalogEntry]) -> Iterator[tuple[str, Signature]]:
        """What the folder holds, by names that can be used. With a thousand adapters this is what a scan costs, each
        second and beside the engine: two calls of the system for each, and no Path."""
        if self.folder is None:
            return
        try:
            names = sorted(os.listdir(self.folder))
        except (FileNotFoundError, NotADirectoryError):
            return
        self._said = {name: said for name, said in self._said.items() if name in names}
        for name in names:
            if name.startswith("."):
                continue
            signature = _signature(os.path.join(self.folder, name))
            if signature is None:
                continue
            if name not in known:
                try:
                    check_adapter_name(name)
                except InvalidRequest as error:
                    self._say_once(name, f"a folder is left out: {error.message}")
                    continue
            yield name, signature

    def _say_once(self, name: str, text: str) -> None:
        """Not at each scan."""
        if self._said.get(name) != text:
            self._said[name] = text
            logger.warning("%s", text)

    def _look(self, name: str, signature: Signature, known: CatalogEntry | None) -> CatalogEntry:
        if known is not None and known.signature == signature and not self._has_changed_unseen(known):
            due = known.recheck_at_s is not None and time.monotonic() >= known.recheck_at_s
            return _settled(known) if due else known
        # The signature is older than what is read next: a change in between shows as a new signature at the next scan.
        assert self.folder is not None
        path = self.folder / name
        facts, error = self._read(name, path, known)
        return CatalogEntry(
            name=name,
            path=path,
            signature=signature,
            facts=facts,
            error=error,
            recheck_at_s=_recheck_at_s(signature, error),
        )

    def _has_changed_unseen(self, known: CatalogEntry) -> bool:
        if known.recheck_at_s is None or time.monotonic() < known.recheck_at_s:
            return False
        if known.facts is None:
            return True
        try:
            return content_hash(known.path, max_file_bytes=self._max_file_bytes) != known.facts.content_hash
        except AdapterRejected:
            return True

    def _read(
        self, name: str, path: Path, known: CatalogEntry | None
    ) -> tuple[AdapterFacts | None, AdapterRejected | None]:
        try:
            facts = self._admit(path)
        except AdapterRejected as error:
            is_news = known is None or known.error is None or known.error.message != error.message
            logger.log(logging.WARNING if is_news else logging.DEBUG, "refused: %s", error.message)
            return None, error
        except Exception as cause:
            # An edge: whatever a hostile folder brings out, the other adapters are still to be looked at.
            logger.exception("adapter %r could not be read", name)
            message = f"adapter {name!r} could not be read because of an internal error; the server's log has it"
            refusal = AdapterRejected(message, details={"adapter": name})
            refusal.__cause__ = cause
            return None, refusal
        logger.info("adapter %r is %s, rank %d", name, facts.content_hash[:12], facts.max_rank)
        return facts, None


def _neighbours(name: str, names: Iterable[str]) -> list[str]:
    """Those about `name` in the alphabet: comparing a mistaken name with all of them would cost others time."""
    ordered = sorted(names)
    place = bisect(ordered, name)
    return ordered[max(0, place - COMPARED_NAMES // 2) : place + COMPARED_NAMES // 2]


def _recheck_at_s(signature: Signature, error: AdapterRejected | None) -> float | None:
    if _is_young(signature):
        return time.monotonic() + SETTLE_S
    if error is not None and isinstance(error.__cause__, OSError | MemoryError):  # it was not the content that failed
        return time.monotonic() + PASSING_RETRY_S
    return None


def _settled(entry: CatalogEntry) -> CatalogEntry:
    return CatalogEntry(**{**vars(entry), "recheck_at_s": None})


def _signature(path: str) -> Signature | None:
    """Changes with either of an adapter's two files; None: it has no configuration, and is no adapter."""
    config = _stat(f"{path}/{CONFIG_FILE}")
    if config is None and not os.path.lexists(f"{path}/{CONFIG_FILE}"):
        return None
    return (config, _stat(f"{path}/{WEIGHTS_FILE}"))


def _stat(path: str) -> tuple[int, ...] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def _is_young(signature: Signature) -> bool:
    stamps = [stamp for stat in signature if stat is not None for stamp in stat[3:]]
    return bool(stamps) and time.time() - max(stamps) / 1e9 < SETTLE_S
