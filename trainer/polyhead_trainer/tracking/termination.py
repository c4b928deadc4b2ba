"""SIGTERM, which `kill` and schedulers send, as an exception: a run then ends as it does at Control-C, and tells so."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def unwinding_at_sigterm() -> Iterator[None]:
    """Inside, SIGTERM raises SystemExit with the status that a shell has for it, 143.

    Not where somebody handles it otherwise, nor outside of the main thread, to which Python gives signals.
    """
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _unwind)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _unwind(number: int, frame: object) -> None:
    raise SystemExit(128 + number)
