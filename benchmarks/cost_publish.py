"""From 'adapter published' to 'first token': a folder moved into the adapters folder of a running server process, and
a client that asks for it by name at that moment, over gRPC on loopback."""

from __future__ import annotations

import random
import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cost_adapters import AdapterWriter, adapter_name
from server_process import ServerProcess

from polyhead_client import Client

PROMPT_TOKENS = 16
PAUSE_S = (0.6, 1.6)
"""Between two publications, drawn evenly: longer than the server's rate limit on scans that requests ask for (0.5 s),
and at no fixed phase of its own scans. Publications that follow each other faster may wait for that limit."""


@dataclass(frozen=True, kw_only=True)
class Publication:
    published_to_first_token_s: float
    """From before the move until the client has the first token."""
    again_to_first_token_s: float
    """The same adapter once more, another prompt: it is resident now."""


def publish_repeatedly(
    backbone: str,
    adapters: Path,
    writer: AdapterWriter,
    staging: Path,
    first_number: int,
    times: int,
    settings: list[str],
) -> dict[str, Any]:
    """Publishes `times` new adapters one after the other, and takes them away again at the end."""
    arguments = ["--backbone", backbone, "--adapters", str(adapters)]
    for setting in settings:
        arguments += ["--set", setting]
    numbers = range(first_number, first_number + times + 1)
    for number in numbers:
        writer.write(staging / adapter_name(number), number)
    registered = sum(1 for _ in adapters.iterdir())
    try:
        with ServerProcess(arguments) as server, Client(server.address) as client:
            vocab_size = client.wait_until_ready().backbone.vocab_size
            client.generate(_prompt(0, vocab_size), max_tokens=4)
            rng = random.Random(first_number)
            seen = []
            for number in numbers:
                time.sleep(rng.uniform(*PAUSE_S))
                seen.append(_publish(client, adapters, staging, number, vocab_size))
    finally:
        for number in numbers:
            for folder in (adapters, staging):
                shutil.rmtree(folder / adapter_name(number), ignore_errors=True)
    counted = seen[1:]  # code and connection are cold at the first
    return {
        "registered_adapters": registered,
        "publications": [vars(one) for one in counted],
        **_spread("published_to_first_token_s", [one.published_to_first_token_s for one in counted]),
        **_spread("again_to_first_token_s", [one.again_to_first_token_s for one in counted]),
    }


def _publish(client: Client, adapters: Path, staging: Path, number: int, vocab_size: int) -> Publication:
    name = adapter_name(number)
    began_s = time.perf_counter()
    (staging / name).rename(adapters / name)
    published_s = _first_token(client, name, _prompt(2 * number, vocab_size), began_s)
    again_s = _first_token(client, name, _prompt(2 * number + 1, vocab_size), time.perf_counter())
    return Publication(published_to_first_token_s=published_s, again_to_first_token_s=again_s)


def _first_token(client: Client, name: str, prompt: Sequence[int], began_s: float) -> float:
    with client.stream(prompt, adapter=name, max_tokens=2, ignore_eos=True) as stream:
        for chunk in stream:
            if chunk.token_ids:
                seconds = time.perf_counter() - began_s
                assert stream.adapter is not None, "the backbone answered in the adapter's place"
                assert stream.adapter.name == name, f"asked {name}, answered by {stream.adapter.name}"
                return seconds
    raise SystemExit(f"the server's answer with {name} had no token")


def _prompt(number: int, vocab_size: int) -> list[int]:
    """No two prompts share a first token, so no prefix is ever found in the cache."""
    return [256 + (number * 31 + place * 7919) % (vocab_size - 256) for place in range(PROMPT_TOKENS)]


def _spread(name: str, values: list[float]) -> dict[str, float]:
    return {f"{name}_median": statistics.median(values), f"{name}_min": min(values), f"{name}_max": max(values)}
