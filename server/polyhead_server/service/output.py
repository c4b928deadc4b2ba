"""One request's way from the engine's thread to the event loop. Owns what the engine has said and nobody has read."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Sequence

from polyhead_server.request import Event, FailedEvent, FinishedEvent, TokensEvent

# A chunk's tokens with 20 log-probabilities each stay well below the 4 MiB that gRPC clients accept by default.
MAX_CHUNK_TOKENS = 512


class OutputStream:
    """Unread output of one request, merged per continuation, so that it is never more than the request's own tokens.

    `put` is the engine's sink: it takes a lock for the length of a list append and never waits for a reader.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._lock = threading.Lock()
        self._unread: dict[int, list[TokensEvent]] = {}
        self._end: FinishedEvent | FailedEvent | None = None
        self._wake_sent = False
        self._readable = asyncio.Event()

    @property
    def has_ended(self) -> bool:
        """Whether the terminal event has come, read or not."""
        with self._lock:
            return self._end is not None

    def put(self, event: Event) -> None:
        """Called from any thread."""
        with self._lock:
            if isinstance(event, TokensEvent):
                self._unread.setdefault(event.index, []).append(event)
            else:
                self._end = event
            if self._wake_sent:
                return
            self._wake_sent = True
        # A closed loop raises: then there is no reader left to wake, and the engine's thread must not suffer for it.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._readable.set)

    async def read(self) -> tuple[list[TokensEvent], FinishedEvent | FailedEvent | None]:
        """Waits for output; returns all there is, at least one event. The terminal event comes once, last."""
        await self._readable.wait()
        with self._lock:
            unread, self._unread = self._unread, {}
            self._wake_sent = False
            self._readable.clear()
            end = self._end
        chunks = [chunk for index in sorted(unread) for chunk in _merged(unread[index])]
        return chunks, end


def _merged(events: Sequence[TokensEvent]) -> list[TokensEvent]:
    """One continuation's events in as few as MAX_CHUNK_TOKENS allows."""
    groups: list[list[TokensEvent]] = []
    num_tokens = 0
    for event in events:
        num_tokens += len(event.token_ids)
        if not groups or num_tokens > MAX_CHUNK_TOKENS:
            groups.append([])
            num_tokens = len(event.token_ids)
        groups[-1].append(event)
    return [group[0] if len(group) == 1 else _joined(group) for group in groups]


def _joined(group: Sequence[TokensEvent]) -> TokensEvent:
    return TokensEvent(
        index=group[0].index,
        text="".join(event.text for event in group),
        token_ids=tuple(token_id for event in group for token_id in event.token_ids),
        logprobs=tuple(logprob for event in group for logprob in event.logprobs),
    )
