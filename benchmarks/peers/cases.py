"""The rows of the CPU table: what is asked of whom, and the ratio to reach. Knows no system."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

_FIRST_ORDINARY_TOKEN = 256
"""Below it vocabularies keep their control tokens and single bytes."""


@dataclass(frozen=True, kw_only=True)
class Case:
    key: str
    title: str
    ours: str
    """The system on our side, by its name in `systems.py`."""
    peer: str
    target: float
    """Least ratio of our tokens/s to the peer's."""
    work: str = "decode"
    """`decode`: `rows` rows for `steps` steps; `prefill`: `rows` prompts, one after the other."""
    rows: int
    prompt_tokens: int = 64
    steps: int = 128
    """Contexts 64 to 192. A slow peer gets fewer steps around the same mean context, and so does our side."""
    our_adapters: bool = False
    """A different adapter in each row."""
    peer_adapters: bool = False

    def warm_up(self) -> Case:
        """The same shape of work, as little of it as will do."""
        return replace(self, rows=1) if self.work == "prefill" else replace(self, steps=4)

    def smoke(self) -> Case:
        """A small case of the same kind: does it run at all?"""
        return replace(self, rows=min(self.rows, 4), prompt_tokens=16, steps=4)

    def prompts(self, seed: int, repeat: int, vocab_size: int) -> list[list[int]]:
        """Random token ids, the same for both sides, different in every repeat: no prefix is ever shared."""
        rng = random.Random(f"{seed}/{self.key}/{repeat}")
        return [
            [rng.randrange(_FIRST_ORDINARY_TOKEN, vocab_size) for _ in range(self.prompt_tokens)]
            for _ in range(self.rows)
        ]


_AROUND_CONTEXT_128 = {"prompt_tokens": 112, "steps": 32}

CASES = (
    Case(key="decode-1", title="1 row, no adapter", ours="plain", peer="llamacpp", rows=1, target=1.5),
    Case(key="decode-8", title="8 rows, no adapter", ours="plain", peer="llamacpp", rows=8, target=2.5),
    Case(key="decode-32", title="32 rows, no adapter", ours="plain", peer="llamacpp", rows=32, target=4),
    Case(
        key="prefill-512", title="prefill of 512 tokens", ours="plain", peer="llamacpp", work="prefill", rows=4,
        prompt_tokens=512, target=2.5,
    ),
    Case(
        key="registered-1", title="1 row, 1,000 adapters registered / none", ours="thousand", peer="emptied", rows=1,
        target=0.99,
    ),
    Case(
        key="registered-32", title="32 rows, 1,000 adapters registered / none", ours="thousand", peer="emptied",
        rows=32, target=0.99,
    ),
    Case(
        key="rank8qv-none", title="32 rows, 32 rank-8 adapters on q and v / none", ours="rank8qv", peer="plain",
        rows=32, our_adapters=True, target=0.9,
    ),
    Case(
        key="rank16-none", title="32 rows, 32 rank-16 adapters on all linear layers / none", ours="rank16",
        peer="plain", rows=32, our_adapters=True, target=0.6,
    ),
    Case(
        key="rank16-vllm", title="32 rows, 32 rank-16 adapters on all linear layers", ours="rank16", peer="vllm",
        rows=32, our_adapters=True, peer_adapters=True, target=6, **_AROUND_CONTEXT_128,
    ),
    Case(
        key="rank16-peft", title="32 rows, 32 rank-16 adapters on all linear layers", ours="rank16", peer="peft",
        rows=32, our_adapters=True, peer_adapters=True, target=20, **_AROUND_CONTEXT_128,
    ),
)  # fmt: skip
"""In an order in which few systems are needed at once."""

PEER_TITLES = {
    "llamacpp": "llama.cpp Q8_0",
    "vllm": "vLLM CPU",
    "peft": "peft + transformers",
    "plain": "ourselves",
    "emptied": "ourselves",
}
