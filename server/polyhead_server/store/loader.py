"""The threads that bring adapters disk -> host cache -> device pool, off the step path."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path

from polyhead_core.errors import AdapterRejected, EngineFailure, PolyheadError, QueueFull, UnknownAdapter
from polyhead_server.request import AdapterVersion
from polyhead_server.store.catalog import Catalog
from polyhead_server.store.device_cache import DeviceCache, StoreMetrics
from polyhead_server.store.host_cache import HostCache
from polyhead_server.store.load_book import ROOM_RETRY_S, LoadBook
from polyhead_server.store.packing import PackedAdapter

logger = logging.getLogger(__name__)

NUM_LOADERS = 2
"""A slow disk behind one adapter does not hold back the next."""


class AdapterLoader:
    """Shares caches and book with the store, under the store's lock; never holds it over a disk read or a copy."""

    def __init__(
        self,
        *,
        lock: threading.Lock,
        catalog: Catalog,
        read: Callable[[Path], PackedAdapter],
        host: HostCache,
        device: DeviceCache,
        book: LoadBook,
        metrics: StoreMetrics,
    ) -> None:
        self._lock = lock
        self._catalog = catalog
        self._read = read
        self._host = host
        self._device = device
        self._book = book
        self._metrics = metrics
        self._queue: queue.SimpleQueue[AdapterVersion | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._stopping = False
        self.wakeup: Callable[[], None] = _nobody_waits

    def start(self) -> None:
        for index in range(NUM_LOADERS):
            thread = threading.Thread(target=self._run, name=f"adapter-load-{index}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def stop(self) -> None:
        """Lets the loads that have begun end; those still queued are given up."""
        self._stopping = True
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()
        self._threads.clear()

    def want(self, version: AdapterVersion, *, awaited: bool) -> None:
        """Queues a load if the book says that it is time. Under the lock."""
        if self._book.begin(version.content_hash, awaited=awaited):
            self._queue.put(version)

    def _run(self) -> None:
        while (version := self._next()) is not None:
            try:
                if not self._stopping:
                    self._load(version)
            except PolyheadError as error:
                self._fail(version, error)
            except Exception as error:
                logger.exception("loading adapter %r failed", version.name)
                self._fail(version, EngineFailure(f"loading adapter {version.name!r} failed: {error}"))
            self._end(version)

    def _next(self) -> AdapterVersion | None:
        while True:
            with self._lock:
                timeout_s = ROOM_RETRY_S if self._book.has_blocked else None
            try:
                return self._queue.get(timeout=timeout_s)
            except queue.Empty:
                # Room may have come free by time alone, and an engine with nothing else to do would never ask again.
                with self._lock:
                    self._book.tell_blocked()
                self.wakeup()

    def _load(self, version: AdapterVersion) -> None:
        started_s = time.monotonic()
        content_hash = version.content_hash
        with self._lock:
            packed = self._host.get(content_hash)
        if packed is None:
            packed = self._read_version(version)
        with self._lock:
            self._host.put(packed)
            resident = self._device.make_room(packed, awaited=self._book.is_awaited(content_hash))
            if resident is None:
                if self._device.user_pins_bar(packed):
                    raise no_room_error(version.name)
                self._book.found_no_room(content_hash)
                return
            self._book.found_room(content_hash)
        try:
            row = self._device.write(packed, resident)
        except BaseException:
            with self._lock:
                self._device.give_up(content_hash)
            raise
        with self._lock:
            self._device.finish(content_hash, row)
        self._metrics.adapter_loaded(time.monotonic() - started_s)

    def _read_version(self, version: AdapterVersion) -> PackedAdapter:
        for path in self._catalog.folders_of(version.content_hash):
            try:
                packed = self._read(path)
            except AdapterRejected as error:
                logger.info("adapter %r has changed since it was looked at: %s", version.name, error.message)
                continue
            if packed.content_hash == version.content_hash:
                return packed
        details = {"adapter": version.name, "content_hash": version.content_hash}
        asked_for = f"the version asked for ({version.content_hash[:12]}) was loaded"
        if version.name in self._catalog.entries:
            raise AdapterRejected(
                f"adapter {version.name!r} was replaced before {asked_for}; ask again for the one that is there now",
                details=details,
            )
        raise UnknownAdapter(f"adapter {version.name!r} was deleted before {asked_for}", details=details)

    def _fail(self, version: AdapterVersion, error: PolyheadError) -> None:
        self._metrics.adapter_load_failed()
        with self._lock:
            self._book.fail(version.content_hash, error)

    def _end(self, version: AdapterVersion) -> None:
        with self._lock:
            resident = self._device.residents.get(version.content_hash)
            if resident is not None:
                resident.awaited |= self._book.is_awaited(version.content_hash)
            self._book.end(version.content_hash)
        self.wakeup()


def _nobody_waits() -> None:
    """Until an engine registers, nobody needs to be told that a load has ended."""


def no_room_error(name: str) -> QueueFull:
    return QueueFull(
        f"there is no room for adapter {name!r} beside the pinned ones in the adapter pool; unpin an adapter, raise "
        "adapter_pool_bytes or max_resident_adapters, or try again later",
        details={"adapter": name},
        retry_after_s=1.0,
    )
