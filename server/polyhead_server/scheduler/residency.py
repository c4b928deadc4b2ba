"""What the scheduler asks of whoever keeps adapters in device memory: slots and pins, never weights."""

from __future__ import annotations

from typing import Protocol

from polyhead_core.errors import PolyheadError
from polyhead_server.request import AdapterVersion


class Residency(Protocol):
    """Called from the engine's thread alone; must not block."""

    def acquire(self, version: AdapterVersion) -> int | None:
        """Pins `version`, returns its slot; None: it is on its way (this call set it off) or there is no room now."""
        ...

    def release(self, version: AdapterVersion) -> None:
        """Takes back one pin."""
        ...

    def lacks_room(self, version: AdapterVersion) -> bool:
        """Whether `version` waits for others to let go of theirs; False while it is merely on its way."""
        ...

    def failure(self, version: AdapterVersion) -> PolyheadError | None:
        """Why `version` can never be resident; None while it may still come."""
        ...
