"""In int8 an answer is the same, bit for bit, whatever shares its batch, its chunks, its blocks and its cache."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from local_engine import LocalEngine, local_engine
from tiny import TARGETS, save_adapter, save_backbone

KIND = "llama"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    root = tmp_path_factory.mktemp("int8")
    backbone = save_backbone(KIND, root / "backbone")
    for seed, rank in enumerate((1, 4, 8, 17, 32, 64)):
        targets = [*TARGETS[KIND], "lm_head", "embed_tokens"] if seed % 2 else TARGETS[KIND][: seed + 1]
        save_adapter(
            backbone, root / "adapters" / f"a{seed}", seed=seed, r=rank, lora_alpha=rank, target_modules=targets
        )
    return backbone, root / "adapters", root / "cache"


def requests() -> list[tuple[list[int], str | None, dict[str, Any]]]:
    generator = torch.Generator().manual_seed(5)
    asked = []
    for number in range(24):
        length = int(torch.randint(1, 90, (1,), generator=generator))
        prompt = torch.randint(4, 288, (length,), generator=generator).tolist()
        if number % 3 == 0:
            prompt = [*range(4, 44), *prompt]  # a prefix that several share
        adapter = None if number % 4 == 0 else f"a{number % 6}"
        settings: dict[str, Any] = {"max_tokens": 20, "ignore_eos": True, "logprobs": 3}
        if number % 5 == 0:
            settings |= {"temperature": 0.9, "top_p": 0.9, "seed": number}
        asked.append((prompt, adapter, settings))
    return asked


def ask_all(engine: LocalEngine, *, together: bool) -> list[tuple[list[int], list[float]]]:
    """`together`: all before the engine starts."""
    answers = []
    for prompt, adapter, settings in requests():
        answers.append(engine.submit(prompt, adapter, **settings))
        if not together:
            assert answers[-1].finished
    if together:
        engine.start()
    return [(a.tokens(), [p.logprob for e in a.events[:-1] for p in e.logprobs]) for a in answers]


@pytest.fixture(scope="module")
def alone(served: tuple[Path, Path, Path]) -> Iterator[list[tuple[list[int], list[float]]]]:
    backbone, adapters, cache = served
    with local_engine(backbone, cache, adapters=adapters, prefix_caching=False) as engine:
        yield ask_all(engine, together=False)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="one batch"),
        pytest.param({"max_batch_tokens": 16}, id="small chunks"),
        pytest.param({"max_batch_rows": 3, "kv_block_size": 4}, id="few rows, small blocks"),
        pytest.param({"kv_cache_bytes": 24 * 16 * 3 * 2 * 2 * 16 * 2}, id="24 blocks: preemption"),
        pytest.param({"max_resident_adapters": 2}, id="six adapters in two slots"),
    ],
)
def test_answers_are_those_of_the_requests_alone(
    served: tuple[Path, Path, Path], alone: list[tuple[list[int], list[float]]], settings: dict[str, Any]
) -> None:
    backbone, adapters, cache = served
    with local_engine(backbone, cache, adapters=adapters, started=False, **settings) as engine:
        assert ask_all(engine, together=True) == alone
        if "kv_cache_bytes" in settings:
            assert engine.engine._scheduler.num_preemptions > 0, "the case did not test what it says"


def test_a_second_asking_is_answered_from_the_prefix_cache(served: tuple[Path, Path, Path]) -> None:
    backbone, adapters, cache = served
    prompt = list(range(4, 84))
    with local_engine(backbone, cache, adapters=adapters) as engine:
        first, again, other = (engine.submit(prompt, name, max_tokens=8) for name in ("a1", None, "a2"))
        assert [a.finished.usage.cached_prompt_tokens for a in (first, again, other)] == [0, 0, 0]
        second = engine.submit(prompt, "a1", max_tokens=8)
        assert second.finished.usage.cached_prompt_tokens == 64  # blocks of 16, the last token is always computed
        assert second.tokens() == first.tokens()


def test_several_continuations_share_the_prompt(served: tuple[Path, Path, Path]) -> None:
    backbone, adapters, cache = served
    with local_engine(backbone, cache, adapters=adapters) as engine:
        answer = engine.submit(list(range(4, 60)), "a3", n=4, temperature=1.5, seed=7, max_tokens=12, ignore_eos=True)
        texts = [tuple(answer.tokens(index)) for index in range(4)]
        assert len(set(texts)) == 4
        single = engine.submit(list(range(4, 60)), "a3", temperature=1.5, seed=9, max_tokens=12, ignore_eos=True)
        assert tuple(single.tokens()) == texts[2]
        assert answer.finished.usage.completion_tokens == 48
