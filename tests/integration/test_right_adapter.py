"""The right adapter under pressure: 64 adapters, room for 8, 200 concurrent streams, cancellations and deadlines."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from polyhead_client import AsyncClient, Cancelled, Client, DeadlineExceeded
from polyhead_core.adapter_directory import content_hash
from running_server import RunningServer
from tiny import TARGETS, save_adapter, save_backbone

NUM_ADAPTERS = 64
NUM_REQUESTS = 200
KIND = "llama-untied"
RANKS = (1, 2, 4, 8, 11, 16, 32, 64)


@dataclass(frozen=True)
class Ask:
    prompt: tuple[int, ...]
    adapter: str | None
    sampling: dict[str, Any]
    fate: str
    """`whole`, `cancel` (after `patience` chunks) or `deadline` (of `patience` x 4 ms)."""
    patience: int


@dataclass(frozen=True)
class Outcome:
    tokens: tuple[int, ...]
    content_hash: str | None
    ended: str
    """`whole`, or how it was cut short."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pressure")
    backbone = save_backbone(KIND, root / "backbone")
    for number in range(NUM_ADAPTERS):
        rank = RANKS[number % len(RANKS)]
        targets = [*TARGETS[KIND], "lm_head"] if number % 3 else TARGETS[KIND][: 1 + number % 7]
        settings = {"r": rank, "lora_alpha": 8, "target_modules": targets, "use_rslora": number % 2 == 0}
        save_adapter(backbone, root / "adapters" / f"a{number}", seed=number, **settings)
    return {"backbone": backbone, "adapters": root / "adapters", "cache": root / "cache"}


def draw_asks(seed: int, count: int) -> list[Ask]:
    generator = torch.Generator().manual_seed(seed)

    def below(limit: int) -> int:
        return int(torch.randint(limit, (1,), generator=generator))

    asks = []
    for number in range(count):
        prompt = tuple(4 + below(284) for _ in range(1 + below(60)))
        sampling: dict[str, Any] = {"max_tokens": 4 + below(16), "ignore_eos": True}
        if number % 4 == 0:
            sampling |= {"temperature": 0.8, "top_k": 20, "seed": number}
        fate = ("whole", "whole", "whole", "cancel", "deadline")[below(5)]
        adapter = None if number % 10 == 0 else f"a{below(NUM_ADAPTERS)}"
        asks.append(Ask(prompt, adapter, sampling, fate, 1 + below(5)))
    return asks


async def ask_one(client: AsyncClient, ask: Ask) -> Outcome:
    tokens: list[int] = []
    ended = "whole"
    timeout_s = ask.patience * 0.004 if ask.fate == "deadline" else 120.0
    stream = client.stream(ask.prompt, adapter=ask.adapter, timeout_s=timeout_s, **ask.sampling)
    try:
        num_chunks = 0
        async for chunk in stream:
            tokens.extend(chunk.token_ids)
            num_chunks += 1
            if ask.fate == "cancel" and num_chunks == ask.patience:
                await stream.close()
    except (Cancelled, DeadlineExceeded) as error:
        ended = type(error).__name__
    return Outcome(tuple(tokens), stream.adapter.content_hash if stream.adapter else None, ended)


async def ask_together(address: str, asks: Sequence[Ask]) -> list[Outcome]:
    async with AsyncClient(address) as client:
        return await asyncio.gather(*(ask_one(client, ask) for ask in asks))


def ask_alone(address: str, asks: Sequence[Ask]) -> list[tuple[int, ...]]:
    with Client(address) as client:
        return [client.generate(ask.prompt, adapter=ask.adapter, **ask.sampling).token_ids for ask in asks]


def check_outcomes(
    asks: Sequence[Ask], outcomes: Sequence[Outcome], alone: Sequence[Sequence[int]], adapters: Path
) -> None:
    hashes = {path.name: content_hash(path) for path in adapters.iterdir()}
    for ask, outcome, expected in zip(asks, outcomes, alone, strict=True):
        if outcome.ended == "whole":
            assert outcome.tokens == tuple(expected), ask
        else:
            assert ask.fate != "whole", (ask, outcome)
            assert outcome.tokens == tuple(expected)[: len(outcome.tokens)], ask
        if outcome.tokens:
            assert outcome.content_hash == (None if ask.adapter is None else hashes[ask.adapter]), ask
    ends = [outcome.ended for outcome in outcomes]
    assert ends.count("whole") > len(asks) / 2
    assert {"DeadlineExceeded", "Cancelled"} <= set(ends)


@pytest.fixture(scope="module")
def alone(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, ...]]:
    log = tmp_path_factory.mktemp("log") / "alone.log"
    with RunningServer(log, **folders, prefix_caching="false") as server:
        return ask_alone(server.address, draw_asks(1, NUM_REQUESTS))


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"max_resident_adapters": 8, "max_adapter_wait_s": 0.5}, id="8 slots for 64 adapters"),
        pytest.param({"adapter_pool_bytes": 2_400_000, "kv_cache_bytes": 900_000}, id="few pool pages, few KV blocks"),
    ],
)
def test_every_answer_is_the_one_of_its_adapter_alone(
    folders: dict[str, Path], alone: list[tuple[int, ...]], settings: dict[str, Any], tmp_path: Path
) -> None:
    asks = draw_asks(1, NUM_REQUESTS)
    with RunningServer(tmp_path / "server.log", **folders, **settings) as server:
        outcomes = asyncio.run(ask_together(server.address, asks))
        check_outcomes(asks, outcomes, alone, folders["adapters"])
        metrics = server.wait_until_idle()
        assert metrics["polyhead_mixed_adapter_steps_total"] > 10
        assert metrics["polyhead_adapter_evictions_total"] > 10
        with Client(server.address) as client:
            known = client.adapters()
            assert sum(adapter.active_requests for adapter in known) == 0
            for adapter in known:
                client.unload(adapter.name)
            assert client.info().adapter_pool_used_bytes == 0
