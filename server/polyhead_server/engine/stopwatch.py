"""Where a step's time goes: seconds between laps, by name."""

from __future__ import annotations

import time


class Stopwatch:
    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last_s = time.perf_counter()

    def lap(self, name: str) -> None:
        """Books the time since the last lap under `name`."""
        now_s = time.perf_counter()
        self.laps[name] = self.laps.get(name, 0.0) + now_s - self._last_s
        self._last_s = now_s
