"""A real polyhead-server process on loopback: started with settings, asked for its metrics, ended by SIGTERM."""

from __future__ import annotations

import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

IDLE = {
    "polyhead_requests_running": 0.0,
    "polyhead_requests_waiting": 0.0,
    "polyhead_kv_blocks_used": 0.0,
}


class RunningServer:
    """Everything it writes goes to `log`; leaving it fails the test if the server does not end with 0."""

    def __init__(
        self, log: Path, *, backbone: Path, cache: Path, adapters: Path | None = None, **settings: Any
    ) -> None:
        values = {"num_threads": 1, "kv_cache_bytes": 16 << 20, "check_integrity": "true", **settings}
        self.log = log
        self._command = [sys.executable, "-m", "polyhead_server.cli", "--backbone", str(backbone)]
        self._command += ["--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0", "--set", f"cache_dir={cache}"]
        self._command += ["--adapters", str(adapters)] if adapters is not None else []
        for key, value in values.items():
            self._command += ["--set", f"{key}={value}"]
        self.address = ""
        self._metrics_url = ""

    def __enter__(self) -> Self:
        self._file = self.log.open("w")
        self.process = subprocess.Popen(self._command, stdout=subprocess.PIPE, stderr=self._file, text=True)
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("metrics "):
                self._metrics_url = line.split()[1]
            if line.startswith("listening on "):
                self.address = line.split()[-1]
                return self
        raise AssertionError(f"the server ended with {self.process.wait()}: {self.log.read_text()[-2000:]}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.process.terminate()
        try:
            code = self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise
        finally:
            self._file.close()
        text = self.log.read_text()
        if error is None:
            assert code == 0, text[-2000:]
            assert "Traceback" not in text, text[-3000:]

    def metrics(self) -> dict[str, float]:
        """The metrics without labels."""
        with urllib.request.urlopen(self._metrics_url, timeout=10) as response:
            text = response.read().decode()
        return {name: float(value) for name, value in re.findall(r"^(polyhead_\w+) (\S+)$", text, re.MULTILINE)}

    def wait_until(self, condition: Callable[[dict[str, float]], bool], timeout_s: float = 20.0) -> dict[str, float]:
        """The metrics once `condition` holds of them; fails the test if it does not in time."""
        until_s = time.monotonic() + timeout_s
        while True:
            metrics = self.metrics()
            if condition(metrics):
                return metrics
            assert time.monotonic() < until_s, f"not within {timeout_s} s: {metrics}"
            time.sleep(0.02)

    def wait_until_idle(self) -> dict[str, float]:
        """Nothing runs or waits and every KV block is free."""
        return self.wait_until(lambda metrics: all(metrics[name] == value for name, value in IDLE.items()))
