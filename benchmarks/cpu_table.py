"""`make bench`: our engine against llama.cpp, vLLM and peft on the same cores, and against itself without adapters.

Every case alternates the two sides, the same prompts to both within one repeat, each system in a process of its own
that is held still while another is measured; what registered adapters cost is asked of one process, with them and
without. Decode: greedy, steps in which all rows run. Peers are installed once, into environments of their own
(`peers/install.py`); one that cannot run is reported as not measured, with the reason.
    python benchmarks/cpu_table.py [--quick] [--cases decode-1 rank16-vllm] [--out benchmarks/results/cpu_table.json]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from last_results import last_result
from machine import machine_facts, say_if_busy
from peers.cases import CASES, PEER_TITLES, Case
from peers.process import PeerFailed, Worker
from peers.report import print_report
from peers.systems import ADAPTERS_OF, REGISTERED, Setup, backbone_directory, start, worker_of
from transformers import AutoTokenizer

Row = dict[str, Any]

SANITY_QUESTION = "What is the capital of France? Answer in one sentence."
SANITY_WORD = "Paris"
SANITY_TOKENS = 24
MEASURE_TIMEOUT_S = 1200.0


class Systems:
    """Started when first asked for; one that failed keeps failing with the same reason."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._tokenizer = AutoTokenizer.from_pretrained(setup.backbone_directory)
        self._workers: dict[str, Worker] = {}
        self._failures: dict[str, PeerFailed] = {}
        self.facts: dict[str, Row] = {}
        """Of each worker."""

    @property
    def vocab_size(self) -> int:
        return len(self._tokenizer)

    def get(self, system: str) -> Worker:
        """Raises PeerFailed."""
        name = worker_of(system)
        if name in self._failures:
            raise self._failures[name]
        if name not in self._workers:
            say(f"starting {name}")
            try:
                worker = self._workers[name] = start(name, self._setup)
                self.facts[name] = {**worker.facts, "sanity": self._sanity(worker)}
            except PeerFailed as error:
                self._failures[name] = error
                raise
        return self._workers[name]

    def keep_only(self, systems: set[str]) -> None:
        for name in set(self._workers) - set(map(worker_of, systems)):
            self._workers.pop(name).close()

    def _sanity(self, worker: Worker) -> Row:
        """A greedy answer to a question that everyone can judge: is it the same model, and does it still work?"""
        chat = [{"role": "user", "content": SANITY_QUESTION}]
        text = self._tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        prompt = self._tokenizer(text, add_special_tokens=False).input_ids
        reply = worker.ask("say", MEASURE_TIMEOUT_S, prompt=prompt, tokens=SANITY_TOKENS, adapter=None)
        token_ids = reply["token_ids"]
        if self._tokenizer.eos_token_id in token_ids:
            token_ids = token_ids[: token_ids.index(self._tokenizer.eos_token_id)]
        answer = self._tokenizer.decode(token_ids)
        return {"text": answer, "ok": SANITY_WORD in answer}


def main() -> None:
    options = _options()
    # As Ctrl-C: workers are closed and the adapters' folder is removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    machine = machine_facts()
    say_if_busy(machine)
    began_s = time.monotonic()
    last = last_result("cpu_table", machine)
    cases = [case.smoke() if options.quick else case for case in CASES if case.key in options.cases]
    with tempfile.TemporaryDirectory(prefix="polyhead-bench-") as folder, contextlib.ExitStack() as stack:
        setup = Setup(
            folder=Path(folder),
            seed=options.seed,
            peer_dtype=options.peer_dtype,
            vllm_eager=options.vllm_eager,
            backbone_directory=backbone_directory(),
        )
        systems = Systems(setup)
        stack.callback(systems.keep_only, set())
        rows = []
        for place, case in enumerate(cases):
            systems.keep_only({name for later in cases[place:] for name in (later.ours, later.peer)})
            rows.append(_measure_or_say_why_not(case, systems, options))
        report = {
            "machine": machine,
            "options": {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()},
            "sanity_question": SANITY_QUESTION,
            "systems": systems.facts,
            "cases": rows,
            "wall_s": time.monotonic() - began_s,
        }
    print_report(report, last)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"written to {options.out} after {report['wall_s']:.0f} s")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    keys = [case.key for case in CASES]
    parser.add_argument("--cases", nargs="+", default=keys, choices=keys, metavar="CASE", help=f"of {', '.join(keys)}")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each side")
    parser.add_argument("--slow-repeats", type=int, default=3, help="the same, against vLLM and peft")
    parser.add_argument("--quick", action="store_true", help="one repeat of a few steps: does it work from end to end?")
    parser.add_argument("--peer-dtype", default=_native_dtype(), choices=("bfloat16", "float32"), help="vLLM's, peft's")
    parser.add_argument("--vllm-eager", action="store_true", help="vLLM without torch.compile")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results/cpu_table.json"))
    options = parser.parse_args()
    if options.quick:
        options.repeats = options.slow_repeats = 1
    return options


def _native_dtype() -> str:
    """bfloat16 where the processor multiplies it; elsewhere it is emulated, and float32 is what a peer runs best in."""
    return "bfloat16" if {"avx512_bf16", "amx_bf16"} & set(machine_facts()["isa"]) else "float32"


def _measure_or_say_why_not(case: Case, systems: Systems, options: argparse.Namespace) -> Row:
    row = {"key": case.key, "title": case.title, "peer": PEER_TITLES[case.peer], "target": case.target}
    # Our own side must run; its failure ends the benchmark.
    ours = systems.get(case.ours)
    try:
        peer = systems.get(case.peer)
        return {**row, **_measure(case, ours, peer, systems.vocab_size, options)}
    except PeerFailed as error:
        say(f"{case.key}: not measured: {error}")
        return {**row, "reason": str(error)}


def _measure(case: Case, ours: Worker, peer: Worker, vocab_size: int, options: argparse.Namespace) -> Row:
    """Warms both sides up, then A B A B, every other pair in reverse order, against drift."""
    repeats = options.slow_repeats if case.peer in ("vllm", "peft") else options.repeats
    sides = (_Side(case.ours, ours, case.our_adapters), _Side(case.peer, peer, case.peer_adapters))
    warm_up = case.warm_up()
    prompts = warm_up.prompts(options.seed, -1, vocab_size)
    configurations = {side.system: _ask(warm_up, side, prompts).get("configuration") for side in sides}
    rates: dict[str, list[float]] = {side.system: [] for side in sides}
    for repeat in range(repeats):
        prompts = case.prompts(options.seed, repeat, vocab_size)
        for side in sides if repeat % 2 == 0 else sides[::-1]:
            reply = _ask(case, side, prompts)
            rates[side.system].append(reply["tokens"] / reply["seconds"])
        say(f"{case.key}, repeat {repeat}: " + ", ".join(f"{name} {each[-1]:.1f}" for name, each in rates.items()))
    pairs = zip(rates[case.ours], rates[case.peer], strict=True)
    return {
        "ours": _summary(rates[case.ours]),
        "theirs": _summary(rates[case.peer]),
        "ratio": _summary([one / other for one, other in pairs]),
        "systems": [case.ours, case.peer],
        "prompt_tokens": case.prompt_tokens,
        "steps": case.steps if case.work == "decode" else None,
        "configurations": {name: found for name, found in configurations.items() if found},
    }


@dataclass(frozen=True)
class _Side:
    """One of the two that a case compares."""

    system: str
    worker: Worker
    with_adapters: bool
    """Whether its rows have adapters."""


def _ask(case: Case, side: _Side, prompts: list[list[int]]) -> Row:
    worker = side.worker
    if side.system in REGISTERED:
        worker.ask("register", MEASURE_TIMEOUT_S, adapters=REGISTERED[side.system])
    if case.work == "prefill":
        return worker.ask("prefill", MEASURE_TIMEOUT_S, prompts=prompts)
    adapters = ADAPTERS_OF[side.system].names[: case.rows] if side.with_adapters else [None] * case.rows
    return worker.ask("decode", MEASURE_TIMEOUT_S, prompts=prompts, adapters=adapters, steps=case.steps)


def _summary(values: Sequence[float]) -> Row:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "runs": list(values)}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
