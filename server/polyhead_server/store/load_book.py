"""Which loads are under way, which failed, and which found no room: when to try (again). No torch, no threads."""

from __future__ import annotations

import time

from polyhead_core.errors import PolyheadError

FAILURE_KEPT_S = 1.0
"""How long a failed load stays failed, so that all who wait for it hear of it; then it may be tried again."""
ROOM_RETRY_S = 0.1
"""How soon a load that found no room is tried again though nobody has let go of an adapter."""


class LoadBook:
    """Everything is by content hash. Not thread-safe: its owner has the lock."""

    def __init__(self) -> None:
        self._under_way: dict[str, bool] = {}
        """True: a request waits for it."""
        self._failures: dict[str, tuple[PolyheadError, float]] = {}
        self._no_room: dict[str, tuple[int, float]] = {}
        """Which room was too small, and when."""
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
        self._no_room.pop(content_hash, None)
        self._under_way[content_hash] = awaited
        return True

    def is_awaited(self, content_hash: str) -> bool:
        return self._under_way[content_hash]

    def end(self, content_hash: str) -> None:
        del self._under_way[content_hash]

    def fail(self, content_hash: str, error: PolyheadError) -> None:
        now_s = time.monotonic()
        self._failures = {h: f for h, f in self._failures.items() if now_s - f[1] <= FAILURE_KEPT_S}
        self._failures[content_hash] = (error, now_s)

    def failure(self, content_hash: str) -> PolyheadError | None:
        error, failed_at_s = self._failures.get(content_hash, (None, 0.0))
        return error if time.monotonic() - failed_at_s <= FAILURE_KEPT_S else None

    def forget_failure(self, content_hash: str) -> None:
        self._failures.pop(content_hash, None)

    def found_no_room(self, content_hash: str) -> None:
        self._no_room[content_hash] = (self._room_version, time.monotonic())

    @property
    def has_blocked(self) -> bool:
        """Some load has found no room and was not tried again."""
        return bool(self._no_room)

    def forget_blocked(self) -> None:
        """Those that may be tried again are from now on as if they had never been tried."""
        self._no_room = {h: tried for h, tried in self._no_room.items() if self._is_hopeless(h)}

    def room_came_free(self) -> None:
        self._room_version += 1

    def _is_hopeless(self, content_hash: str) -> bool:
        room_version, tried_at_s = self._no_room.get(content_hash, (-1, 0.0))
        return room_version == self._room_version and time.monotonic() - tried_at_s < ROOM_RETRY_S
