"""The adapter store: what a name means, and bringing weights disk -> host cache -> device pool off the step path.

The engine's thread calls `acquire`, `release`, `failure` and `publish`; none of them waits for a disk or a copy.
Everything is keyed by content hash: two names with the same content share one residency.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from polyhead_core.errors import (
    AdapterInUse,
    AdapterTooLarge,
    ConfigError,
    PolyheadError,
)
from polyhead_core.kernels.tables import UNIT, AdapterTables
from polyhead_server.adapters.base import BackboneView
from polyhead_server.adapters.registry import read_adapter
from polyhead_server.config import ServerConfig
from polyhead_server.request import AdapterVersion
from polyhead_server.store.backbone_view import BackboneLike, view_backbone
from polyhead_server.store.catalog import AdapterFacts, Catalog, CatalogEntry
from polyhead_server.store.device_cache import DeviceCache, StoreMetrics
from polyhead_server.store.host_cache import HostCache
from polyhead_server.store.load_book import LoadBook
from polyhead_server.store.loader import AdapterLoader
from polyhead_server.store.packing import PackedAdapter, pack
from polyhead_server.store.page_allocator import CHUNK_UNITS
from polyhead_server.store.pool import AdapterPool
from polyhead_server.store.residency import Residency


@dataclass(frozen=True, kw_only=True)
class AdapterInfo:
    name: str
    content_hash: str
    """Empty for a folder that is refused."""
    peft_type: str
    max_rank: int
    num_parameters: int
    file_bytes: int
    device_bytes: int
    """What it takes of the device pool, from the moment that its load has found room; 0: nothing."""
    residency: Residency
    pinned: bool
    active_requests: int
    error: str
    """Why the folder's present content is refused; empty if it is not."""


class AdapterStore:
    """Thread-safe."""

    def __init__(
        self,
        backbone: BackboneView,
        *,
        folder: Path | None,
        metrics: StoreMetrics,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
        pool_bytes: int = ServerConfig.adapter_pool_bytes,
        num_slots: int = ServerConfig.max_resident_adapters,
        host_cache_bytes: int = ServerConfig.host_cache_bytes,
        max_rank: int = ServerConfig.max_adapter_rank,
        max_file_bytes: int = ServerConfig.max_adapter_file_bytes,
        scan_interval_s: float = ServerConfig.adapter_scan_interval_s,
    ) -> None:
        self._backbone = backbone
        self._metrics = metrics
        self._max_rank = max_rank
        self._max_file_bytes = max_file_bytes
        self._scan_interval_s = scan_interval_s
        num_units = pool_bytes // (UNIT * dtype.itemsize)
        pool = AdapterPool(
            backbone.sites,
            num_units=num_units,
            num_slots=num_slots,
            max_rank=max_rank,
            dtype=dtype,
            device=device or torch.device("cpu"),
        )
        self._pool = pool
        self._cache = DeviceCache(pool, num_slots, metrics)
        self._host = HostCache(host_cache_bytes)
        self._catalog = Catalog(folder, self._admit, self._on_catalog_change, max_file_bytes=max_file_bytes)
        self._pinned_names: set[str] = set()
        self._book = LoadBook()
        # Caches, book and pinned names only under this lock; it is never held over a disk read or a copy.
        self._lock = threading.Lock()
        self._loader = AdapterLoader(
            lock=self._lock,
            catalog=self._catalog,
            read=self._read,
            host=self._host,
            device=self._cache,
            book=self._book,
            metrics=metrics,
        )

    @classmethod
    def for_backbone(cls, config: ServerConfig, backbone: BackboneLike, metrics: StoreMetrics) -> AdapterStore:
        """Raises ConfigError if the adapters folder is no folder that can be read."""
        folder = Path(config.adapters) if config.adapters else None
        if folder is not None and not (folder.is_dir() and os.access(folder, os.R_OK | os.X_OK)):
            raise ConfigError(
                f"adapters = {config.adapters!r} is not usable: expected an existing folder that can be read"
            )
        exact = backbone.quantization == "none" and backbone.dtype == torch.float32
        automatic = torch.float32 if exact else torch.bfloat16
        named = {"auto": automatic, "float32": torch.float32, "bfloat16": torch.bfloat16}
        return cls(
            view_backbone(backbone),
            folder=folder,
            metrics=metrics,
            dtype=named[config.adapter_dtype],
            device=backbone.device,
            pool_bytes=config.adapter_pool_bytes,
            num_slots=config.max_resident_adapters,
            host_cache_bytes=config.host_cache_bytes,
            max_rank=config.max_adapter_rank,
            max_file_bytes=config.max_adapter_file_bytes,
            scan_interval_s=config.adapter_scan_interval_s,
        )

    # --- life ---

    def start(self) -> None:
        """Scans the folder, then keeps watching it and loads in threads of its own."""
        self._loader.start()
        self._catalog.start(self._scan_interval_s)

    def stop(self) -> None:
        self._catalog.stop()
        self._loader.stop()

    def refresh(self) -> None:
        """Looks at the adapters folder again. Blocks."""
        self._catalog.refresh()

    def set_wakeup(self, callback: Callable[[], None]) -> None:
        """`callback` is called, from other threads, whenever a load has ended or room may have come free: `acquire` may
        have a new answer. No lock is held over it."""
        self._loader.wakeup = callback

    # --- for the engine ---

    @property
    def tables(self) -> AdapterTables:
        return self._pool.tables

    def acquire(self, version: AdapterVersion) -> int | None:
        """Pins `version` and returns its slot; None: its load is under way (begun by this call if need be), or there
        is no room now. Does not block."""
        with self._lock:
            resident = self._cache.residents.get(version.content_hash)
            if resident is not None and resident.visible:
                return self._cache.residents.pin(version.content_hash)
            if resident is not None:
                resident.awaited = True
            else:
                self._loader.want(version, awaited=True)
            return None

    def release(self, version: AdapterVersion) -> None:
        """Takes back one pin."""
        with self._lock:
            if self._cache.residents.unpin(version.content_hash):
                self._room_came_free()

    def failure(self, version: AdapterVersion) -> PolyheadError | None:
        """Why the last load of this very version failed; forgotten after a moment, or when its folder is back."""
        with self._lock:
            return self._book.failure(version.content_hash)

    def lacks_room(self, version: AdapterVersion) -> bool:
        """Whether `version` waits for others to let go of the pool; False while it is merely being read."""
        with self._lock:
            return self._book.lacks_room(version.content_hash)

    def publish(self) -> None:
        """Called between two steps: finished loads become visible in the tables."""
        with self._lock:
            self._cache.publish()

    # --- for the service ---

    def resolve(self, name: str) -> AdapterVersion:
        """The version that a name means now. In memory. Raises UnknownAdapter, or AdapterRejected with the reason."""
        entry = self._catalog.entry(name)
        if entry.facts is None:
            assert entry.error is not None
            raise _fresh(entry.error)
        return AdapterVersion(name=name, content_hash=entry.facts.content_hash)

    def knows(self, name: str) -> bool:
        """Whether there is such a folder, usable or not, as far as the last scan knows."""
        return name in self._catalog.entries

    def list(self) -> Sequence[AdapterInfo]:
        entries = self._catalog.entries
        with self._lock:
            return [self._info(entries[name]) for name in sorted(entries)]

    def get(self, name: str) -> AdapterInfo:
        entry = self._catalog.entry(name)
        with self._lock:
            return self._info(entry)

    def try_load(self, name: str) -> AdapterInfo | None:
        """The adapter once its weights are in the device pool; None: on its way, or there is no room now: ask again.

        Does not block. Raises what the load raised.
        """
        version = self.resolve(name)
        with self._lock:
            if not self._is_on_device(version.content_hash):
                error = self._book.failure(version.content_hash)
                if error is not None:
                    raise _fresh(error)
                if self._cache.residents.get(version.content_hash) is None:
                    self._loader.want(version, awaited=False)
                return None
        return self.get(name)

    def try_unload(self, name: str) -> AdapterInfo | None:
        """Gives up its device and host memory; it stays known. None: it is being loaded: ask again.

        Does not block. Raises AdapterInUse while it is in use or pinned.
        """
        version = self.resolve(name)
        with self._lock:
            if version.content_hash in self._book:
                return None
            resident = self._cache.residents.get(version.content_hash)
            if resident is not None and resident.request_pins:
                raise AdapterInUse(
                    f"adapter {name!r} is in use by {resident.request_pins} requests; unload it when they have ended",
                    details={"adapter": name, "active_requests": resident.request_pins},
                )
            if version.content_hash in self._pinned_hashes():
                raise AdapterInUse(f"adapter {name!r} is pinned; take the pin off first", details={"adapter": name})
            if resident is not None:
                self._cache.give_up(version.content_hash)
                self._room_came_free()
            self._host.drop(version.content_hash)
        self._loader.wakeup()
        return self.get(name)

    def pin(self, name: str, pinned: bool) -> AdapterInfo:
        """Keeps what the name means, now and later, in the device pool, and begins to load it; or lets it go again."""
        if pinned:
            self.resolve(name)
        else:  # a pin comes off a refused folder too
            self._catalog.entry(name)
        with self._lock:
            (self._pinned_names.add if pinned else self._pinned_names.discard)(name)
            self._apply_pins()
        self._loader.wakeup()
        return self.get(name)

    # --- figures ---

    @property
    def pool_bytes(self) -> int:
        return self._cache.num_units * self._pool.unit_bytes

    @property
    def pool_used_bytes(self) -> int:
        return self._cache.allocator.used_units * self._pool.unit_bytes

    @property
    def pool_pages(self) -> int:
        """Units of the arena."""
        return self._cache.num_units

    @property
    def pool_pages_used(self) -> int:
        return self._cache.allocator.used_units

    @property
    def num_pins(self) -> int:
        """Pins of requests, over all adapters."""
        with self._lock:
            return self._cache.residents.num_pins

    def check_integrity(self) -> None:
        self._catalog.check_integrity()
        with self._lock:
            self._cache.check_integrity()
            self._host.check_integrity()
            for resident in self._cache.residents:
                assert resident.state is Residency.DEVICE or resident.content_hash in self._book

    # --- the catalog's side ---

    def _admit(self, path: Path) -> AdapterFacts:
        packed = self._read(path)
        if not self._cache.could_ever_fit(packed.sizes):
            raise AdapterTooLarge(
                f"adapter {path.name!r} takes {packed.num_bytes} bytes, in slabs of "
                f"{CHUNK_UNITS * self._pool.unit_bytes}, and the adapter pool has {self.pool_bytes} in all; raise "
                "adapter_pool_bytes",
                details={"adapter": path.name, "bytes": packed.num_bytes, "pool_bytes": self.pool_bytes},
            )
        with self._lock:
            self._host.put(packed)
        return AdapterFacts(
            content_hash=packed.content_hash,
            peft_type=packed.peft_type,
            max_rank=packed.max_rank,
            num_parameters=packed.num_parameters,
            file_bytes=packed.file_bytes,
            num_units=packed.num_units,
        )

    def _read(self, path: Path) -> PackedAdapter:
        adapter = read_adapter(path, self._backbone, max_rank=self._max_rank, max_file_bytes=self._max_file_bytes)
        return pack(adapter, self._pool.dtype, pin_memory=self._pool.device.type == "cuda")

    def _on_catalog_change(self, name: str, entry: CatalogEntry | None) -> None:
        with self._lock:
            if entry is not None and entry.facts is not None:
                self._book.forget_failure(entry.facts.content_hash)
            if name in self._pinned_names:
                self._pin_what_is_there(name, entry)

    # --- under the lock ---

    def _pinned_hashes(self) -> set[str]:
        entries = (self._catalog.entries.get(name) for name in self._pinned_names)
        return {entry.facts.content_hash for entry in entries if entry is not None and entry.facts is not None}

    def _pin_what_is_there(self, name: str, entry: CatalogEntry | None) -> None:
        """The pin is the name's: it goes over to a new content, and ends with the folder."""
        if entry is None:
            self._pinned_names.discard(name)
        self._apply_pins()

    def _apply_pins(self) -> None:
        self._cache.residents.set_user_pinned(self._pinned_hashes())
        self._book.pins_changed()
        self._room_came_free()

    def _room_came_free(self) -> None:
        self._book.room_came_free()
        for name in self._pinned_names:
            self._load_pinned(name)

    def _load_pinned(self, name: str) -> None:
        entry = self._catalog.entries.get(name)
        if entry is not None and entry.facts is not None:
            version = AdapterVersion(name=name, content_hash=entry.facts.content_hash)
            if self._cache.residents.get(version.content_hash) is None:
                self._loader.want(version, awaited=False)

    def _is_on_device(self, content_hash: str) -> bool:
        resident = self._cache.residents.get(content_hash)
        return resident is not None and resident.state is Residency.DEVICE

    def _info(self, entry: CatalogEntry) -> AdapterInfo:
        facts = entry.facts
        resident = self._cache.residents.get(facts.content_hash) if facts is not None else None
        return AdapterInfo(
            name=entry.name,
            content_hash=facts.content_hash if facts else "",
            peft_type=facts.peft_type if facts else "",
            max_rank=facts.max_rank if facts else 0,
            num_parameters=facts.num_parameters if facts else 0,
            file_bytes=facts.file_bytes if facts else 0,
            device_bytes=resident.num_units * self._pool.unit_bytes if resident is not None else 0,
            residency=self._residency(facts),
            pinned=entry.name in self._pinned_names,
            active_requests=resident.request_pins if resident is not None else 0,
            error=entry.error.message if entry.error else "",
        )

    def _residency(self, facts: AdapterFacts | None) -> Residency:
        if facts is None:
            return Residency.DISK
        resident = self._cache.residents.get(facts.content_hash)
        if resident is not None:
            return resident.state
        if facts.content_hash in self._book:
            return Residency.LOADING
        return Residency.HOST if facts.content_hash in self._host else Residency.DISK


def _fresh(error: PolyheadError) -> PolyheadError:
    """A copy to raise: an exception that is raised in many threads gathers their tracebacks."""
    return type(error)(error.message, details=error.details, retry_after_s=error.retry_after_s)
