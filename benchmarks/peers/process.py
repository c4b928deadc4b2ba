"""The parent's end: a worker process, started once, asked many times, held still while others are measured."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

WORKERS = Path(__file__).parent


class PeerFailed(Exception):
    """A system could not be installed, started or measured; the text says why. The table shows it as `not measured`."""


class Worker:
    """One system in a process group of its own, so that it can be stopped with everything that it starts.

    Between its commands it is held by SIGSTOP: threads that spin or poll would take the cores from the one measured.
    """

    def __init__(
        self, name: str, python: Path, script: str, log: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        """`environment` is added to this process's own, or takes out of it what it gives as an empty text."""
        self.name = name
        self.facts: dict[str, Any] = {}
        """What its `load` said of versions and settings."""
        self._log_path = log
        self._log = log.open("w", encoding="utf-8")
        self._process = subprocess.Popen(
            [str(python), str(WORKERS / script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={key: value for key, value in {**os.environ, **(environment or {})}.items() if value},
            process_group=0,  # not a new session: if this process dies, the kernel then ends stopped workers (SIGHUP)
        )
        self._replies: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._listen, name=f"{name}-replies", daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def load(self, timeout_s: float, **arguments: Any) -> None:
        self.facts = self.ask("load", timeout_s, **arguments)

    def ask(self, command: str, timeout_s: float, **arguments: Any) -> dict[str, Any]:
        """Raises PeerFailed with the worker's own error, or the end of its log where it died or did not answer."""
        assert self._process.stdin is not None
        with self._awake():
            try:
                self._process.stdin.write(json.dumps({"command": command, **arguments}) + "\n")
                self._process.stdin.flush()
                line = self._replies.get(timeout=timeout_s)
            except (BrokenPipeError, queue.Empty) as error:
                what = "ended" if isinstance(error, BrokenPipeError) else f"did not answer within {timeout_s:.0f} s"
                raise PeerFailed(f"{self.name} {what} at {command}: {self._end_of_log()}") from error
        if not line:
            raise PeerFailed(f"{self.name} ended at {command} with code {self._process.wait()}: {self._end_of_log()}")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise PeerFailed(f"{self.name} failed at {command}: {reply['error']}")
        return reply

    def close(self, timeout_s: float = 20.0) -> None:
        """Lets it end by itself, then ends its whole group."""
        self._signal(signal.SIGCONT)
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout_s)
        self._signal(signal.SIGKILL)
        self._process.wait()
        self._log.close()

    @contextlib.contextmanager
    def _awake(self) -> Iterator[None]:
        self._signal(signal.SIGCONT)
        try:
            yield
        finally:
            self._signal(signal.SIGSTOP)

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._replies.put(line)
        self._replies.put("")

    def _end_of_log(self, num_lines: int = 4) -> str:
        lines: Sequence[str] = self._log_path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return " | ".join(lines[-num_lines:])
