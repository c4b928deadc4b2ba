"""A polyhead-server of one's own: started on free loopback ports, asked for its metrics, stopped by SIGTERM."""

from __future__ import annotations

import re
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from types import TracebackType
from typing import Self


class ServerProcess:
    """`with ServerProcess([...]) as server:`; leaving it raises SystemExit unless the server ends with 0."""

    def __init__(self, arguments: Sequence[str], drain_timeout_s: float = 60.0) -> None:
        ports = ["--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0"]
        self._command = [sys.executable, "-m", "polyhead_server.cli", "--log-level", "warning", *ports, *arguments]
        self._drain_timeout_s = drain_timeout_s
        self.facts: list[str] = []
        """What it says of itself before it listens."""
        self.address = ""
        self._metrics_url = ""

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("metrics "):
                self._metrics_url = line.split()[1]
            elif line.startswith("listening on "):
                self.address = line.split()[-1]
                return self
            else:
                self.facts.append(line.strip())
        raise SystemExit(f"the server ended before it listened, with code {self._process.wait()}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._process.terminate()
        try:
            code = self._process.wait(self._drain_timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise SystemExit(f"the server did not drain within {self._drain_timeout_s:.0f} s of SIGTERM") from None
        if code != 0 and error is None:
            raise SystemExit(f"the server ended with code {code} after SIGTERM, expected 0")

    def sample(self) -> dict[str, float]:
        """The metrics without labels."""
        with urllib.request.urlopen(self._metrics_url, timeout=10) as response:
            text = response.read().decode()
        return {name: float(value) for name, value in re.findall(r"^(polyhead_\w+) (\S+)$", text, re.MULTILINE)}
