"""Which loads are under way, which failed, and which found no room: when to try (again). No torch, no threads."""

from __future__ import annotations

import time
from dataclasses import dataclass

from polyhead_core.errors import PolyheadError, QueueFull

FAILURE_KEPT_S = 1.0
"""How long a failed load stays failed, so that all who wait for it hear of it; then it may be tried again."""
ROOM_RETRY_S = 0.1
"""How soon a load that found no room is tried again though nobody has let go of an adapter."""
NO_ROOM_KEPT_S = 10.0
"""How long an adapter counts as waiting for room though nobody has had it tried again."""


@dataclass(kw_only=True)
class _NoRoom:
    """Of a load's last try."""

    room_version: int
    """Which room was too small."""
    tried_at_s: float
    told: bool = False
    """Whoever waits for it has been told to ask again."""


class LoadBook:
    """Everything is by content hash. Not thread-safe: its owner has the lock."""

    def __init__(self) -> None:
        self._under_way: dict[str, bool] = {}
        """True: a request waits for it."""
        self._failures: dict[str, tuple[PolyheadError, float]] = {}
        self._no_room: dict[str, _NoRoom] = {}
        self._room_version = 0
        """Goes up whenever room may have come free."""

    def __contains__(self, content_hash: str) -> bool:
        return content_hash in self._under_way

    def begin(self, content_hash: str, *, awaited: bool) -> bool:
        """Whether a load is to be queued now: not while one is under way, has just failed or has just found no room."""
        if content_hash in self._under_way:
            self._under_way[content_hash] |= awaited
            return False
        if self.failure(content_hash) is not None or self._is_hopeless(content_hash):
            return False
        self._under_way[content_hash] = awaited
        return True

    def is_awaited(self, content_hash: str) -> bool:
        return self._under_way[content_hash]

    def end(self, content_hash: str) -> None:
        del self._under_way[content_hash]

    def fail(self, content_hash: str, error: PolyheadError) -> None:
        now_s = time.monotonic()
        self._no_room.pop(content_hash, None)
        self._failures = {h: f for h, f in self._failures.items() if now_s - f[1] <= FAILURE_KEPT_S}
        self._failures[content_hash] = (error, now_s)

    def failure(self, content_hash: str) -> PolyheadError | None:
        error, failed_at_s = self._failures.get(content_hash, (None, 0.0))
        return error if time.monotonic() - failed_at_s <= FAILURE_KEPT_S else None

    def forget_failure(self, content_hash: str) -> None:
        self._failures.pop(content_hash, None)

    def found_no_room(self, content_hash: str) -> None:
        self._no_room[content_hash] = _NoRoom(room_version=self._room_version, tried_at_s=time.monotonic())

    def found_room(self, content_hash: str) -> None:
        self._no_room.pop(content_hash, None)

    def lacks_room(self, content_hash: str) -> bool:
        """Whether its load waits for others to let go, a new try under way included; False while it is merely read."""
        tried = self._no_room.get(content_hash)
        return tried is not None and time.monotonic() - tried.tried_at_s <= NO_ROOM_KEPT_S

    @property
    def has_blocked(self) -> bool:
        """Some load has found no room, and nobody has been told yet to have it tried again."""
        return any(not tried.told and h not in self._under_way for h, tried in self._no_room.items())

    def tell_blocked(self) -> None:
        """Those who wait for what may be tried again are being told."""
        self._no_room = {h: tried for h, tried in self._no_room.items() if h in self._under_way or self.lacks_room(h)}
        for content_hash, tried in self._no_room.items():
            tried.told |= not self._is_hopeless(content_hash)

    def room_came_free(self) -> None:
        self._room_version += 1

    def pins_changed(self) -> None:
        """Those that were refused because of what users had pinned may be tried again."""
        self._failures = {h: f for h, f in self._failures.items() if not isinstance(f[0], QueueFull)}

    def _is_hopeless(self, content_hash: str) -> bool:
        tried = self._no_room.get(content_hash)
        if tried is None or tried.room_version != self._room_version:
            return False
        return time.monotonic() - tried.tried_at_s < ROOM_RETRY_S
