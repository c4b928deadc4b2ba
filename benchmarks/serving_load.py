"""Asking: a server process of its own, closed and open loops against it by the asyncio client, and what they saw."""

from __future__ import annotations

import asyncio
import random
import re
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from serving_workload import Ask

from polyhead_client import AsyncClient


class ServerProcess:
    """`with ServerProcess([...]) as server:` a polyhead-server on free loopback ports, stopped at the end."""

    def __init__(self, arguments: Sequence[str]) -> None:
        ports = ["--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0"]
        command = [sys.executable, "-m", "polyhead_server.cli", "--log-level", "warning", *ports, *arguments]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.facts: list[str] = []
        self.address = ""
        self._metrics_url = ""

    def __enter__(self) -> Self:
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
        self._process.wait(60)

    def sample(self) -> dict[str, float]:
        """The metrics without labels."""
        with urllib.request.urlopen(self._metrics_url, timeout=10) as response:
            text = response.read().decode()
        return {name: float(value) for name, value in re.findall(r"^(polyhead_\w+) (\S+)$", text, re.MULTILINE)}


@dataclass
class Seen:
    """What the clients of one run saw. Times to first token count from when a request was due."""

    wall_s: float = 0.0
    num_requests: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    ttft_s: list[float] = field(default_factory=list)
    itl_s: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        return {
            "wall_s": self.wall_s,
            "requests": self.num_requests,
            "requests_per_s": self.num_requests / self.wall_s,
            "prompt_tokens_per_s": self.prompt_tokens / self.wall_s,
            "output_tokens_per_s": self.output_tokens / self.wall_s,
            **{f"ttft_p{p}_s": percentile(self.ttft_s, p) for p in (50, 95, 99)},
            **{f"itl_p{p}_s": percentile(self.itl_s, p) for p in (50, 95, 99)},
        }


def percentile(values: Sequence[float], percent: int) -> float:
    if len(values) < 2:
        return values[0] if values else float("nan")
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


async def _ask(client: AsyncClient, ask: Ask, due_s: float, seen: Seen) -> tuple[int, ...]:
    stream = client.stream(ask.prompt, adapter=ask.adapter, max_tokens=ask.output_tokens, ignore_eos=True)
    last_s = None
    async with stream:
        async for chunk in stream:
            count = len(chunk.token_ids)
            if not count:
                continue
            now_s = time.monotonic()
            if last_s is None:
                seen.ttft_s.append(now_s - due_s)
                count -= 1
            else:
                # Tokens that came together share the time since the ones before them.
                seen.itl_s += [(now_s - last_s) / count] * count
            last_s = now_s
        answer = await stream.result()
    assert len(answer.token_ids) == ask.output_tokens, "the server stopped short"
    assert (answer.adapter.name if answer.adapter else None) == ask.adapter, "another adapter answered"
    seen.num_requests += 1
    seen.prompt_tokens += len(ask.prompt)
    seen.output_tokens += ask.output_tokens
    return answer.token_ids


async def closed_loop(address: str, asks: Sequence[Ask], concurrency: int) -> Seen:
    """`concurrency` callers, each sending its next request when its last one has ended."""
    seen = Seen()
    left = iter(asks)
    async with AsyncClient(address) as client:

        async def caller() -> None:
            for ask in left:
                await _ask(client, ask, time.monotonic(), seen)

        began_s = time.monotonic()
        await asyncio.gather(*(caller() for _ in range(concurrency)))
        seen.wall_s = time.monotonic() - began_s
    return seen


async def open_loop(address: str, asks: Sequence[Ask], rate_per_s: float, rng: random.Random) -> Seen:
    """Requests that arrive as a Poisson process, whether or not earlier ones have ended."""
    seen = Seen()
    async with AsyncClient(address) as client:
        began_s = due_s = time.monotonic()
        tasks = []
        for ask in asks:
            due_s += rng.expovariate(rate_per_s)
            await asyncio.sleep(max(0.0, due_s - time.monotonic()))
            tasks.append(asyncio.create_task(_ask(client, ask, due_s, seen)))
        await asyncio.gather(*tasks)
        seen.wall_s = time.monotonic() - began_s
    return seen


async def all_at_once(address: str, asks: Sequence[Ask]) -> tuple[float, list[tuple[int, ...]]]:
    """Seconds until the last of `asks`, sent together, has its answer; and the answers."""
    seen = Seen()
    async with AsyncClient(address) as client:
        began_s = time.monotonic()
        answers = await asyncio.gather(*(_ask(client, ask, began_s, seen) for ask in asks))
        return time.monotonic() - began_s, list(answers)
