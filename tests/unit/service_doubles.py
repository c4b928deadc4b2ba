"""Doubles of engine, store and backbone for the service's tests, and a small real tokenizer. No model, no torch."""

from __future__ import annotations

import enum
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from polyhead_core.errors import AdapterRejected, Draining, PolyheadError, RequestCancelled, UnknownAdapter
from polyhead_server.config import ServerConfig
from polyhead_server.metrics import Metrics
from polyhead_server.request import (
    AdapterVersion,
    ChoiceFinish,
    EventSink,
    FailedEvent,
    FinishedEvent,
    FinishReason,
    Request,
    TokenLogprob,
    TokensEvent,
    Usage,
)
from polyhead_server.service.background import BackgroundService

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

Behaviour = Callable[[Request, EventSink, threading.Event], None]
"""Plays the engine for one request in a thread of its own; the event is set once the request is cancelled."""


@dataclass(frozen=True, kw_only=True)
class FakeStatus:
    num_running: int = 0
    num_waiting: int = 0
    kv_blocks_used: int = 3
    kv_blocks_total: int = 64
    draining: bool = False
    healthy: bool = True


def answer(*texts: str) -> Behaviour:
    """Says these texts on every continuation, one token each, then finishes."""

    def behave(request: Request, sink: EventSink, cancelled: threading.Event) -> None:
        for index in range(request.params.n):
            for number, text in enumerate(texts):
                sink(tokens(index, text, number, with_logprobs=request.params.logprobs is not None))
        sink(finished(request, len(texts)))

    return behave


def tokens(index: int, text: str, token_id: int, *, with_logprobs: bool = False) -> TokensEvent:
    logprob = TokenLogprob(token_id=token_id, logprob=-0.5, top=((token_id, -0.5), (7, -1.5)))
    return TokensEvent(index=index, text=text, token_ids=(token_id,), logprobs=(logprob,) if with_logprobs else ())


def finished(request: Request, num_tokens: int = 0) -> FinishedEvent:
    n = request.params.n
    usage = Usage(prompt_tokens=len(request.prompt_token_ids), completion_tokens=n * num_tokens, cached_prompt_tokens=1)
    choices = tuple(ChoiceFinish(index=index, reason=FinishReason.STOP, stop="END") for index in range(n))
    logprobs: tuple[TokenLogprob, ...] = ()
    if request.score_prompt:
        choices = ()
        logprobs = tuple(
            TokenLogprob(token_id=token_id, logprob=-1.0, top=((5, -0.25),) * request.score_top)
            for token_id in request.prompt_token_ids[1:]
        )
    return FinishedEvent(choices=choices, usage=usage, prompt_logprobs=logprobs)


def until_cancelled(request: Request, sink: EventSink, cancelled: threading.Event) -> None:
    """Says one token, then nothing more until it is cancelled."""
    sink(tokens(0, "first", 1))
    cancelled.wait(30)
    sink(FailedEvent(error=RequestCancelled("cancelled")))


def failing(error: PolyheadError) -> Behaviour:
    def behave(request: Request, sink: EventSink, cancelled: threading.Event) -> None:
        sink(tokens(0, "some", 1))
        sink(FailedEvent(error=error))

    return behave


class FakeEngine:
    max_model_len = 128
    kv_cache_bytes = 1 << 20

    def __init__(self) -> None:
        self.behave: Behaviour = answer("Hello", " there")
        self.refuse_with: Exception | None = None
        self.submitted: list[Request] = []
        self.cancelled: list[str] = []
        self.current = FakeStatus()
        self._cancel_events: dict[str, threading.Event] = {}
        self._threads: list[threading.Thread] = []

    def submit(self, request: Request, sink: EventSink) -> None:
        if self.current.draining:
            raise Draining("the server is shutting down", retry_after_s=1.0)
        if self.refuse_with is not None:
            raise self.refuse_with
        self.submitted.append(request)
        event = self._cancel_events[request.request_id] = threading.Event()
        thread = threading.Thread(target=self.behave, args=(request, sink, event), daemon=True)
        self._threads.append(thread)
        thread.start()

    def cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)
        self._cancel_events[request_id].set()

    def start(self) -> None:
        pass

    def drain(self, timeout_s: float) -> bool:
        self.current = replace(self.current, draining=True)
        until_s = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, until_s - time.monotonic()))
        all_finished = not any(thread.is_alive() for thread in self._threads)
        for event in self._cancel_events.values():
            event.set()
        return all_finished

    def stop(self) -> None:
        for event in self._cancel_events.values():
            event.set()

    def status(self) -> FakeStatus:
        return self.current

    def wait_for_cancel(self, timeout_s: float = 5.0) -> None:
        until_s = time.monotonic() + timeout_s
        while not self.cancelled:
            assert time.monotonic() < until_s, "engine.cancel was not called"
            time.sleep(0.01)


class Residency(enum.Enum):
    DISK = 1
    HOST = 2
    LOADING = 3
    DEVICE = 4


@dataclass(frozen=True, kw_only=True)
class FakeInfo:
    name: str
    content_hash: str = "ab" * 32
    peft_type: str = "LORA"
    max_rank: int = 8
    num_parameters: int = 1000
    file_bytes: int = 4000
    device_bytes: int = 0
    residency: Residency = Residency.DISK
    pinned: bool = False
    active_requests: int = 0
    error: str = ""


@dataclass(kw_only=True)
class FakeStore:
    known: dict[str, FakeInfo] = field(default_factory=lambda: {"french": FakeInfo(name="french")})
    on_disk: dict[str, FakeInfo] = field(default_factory=dict)
    """What the next refresh finds besides."""
    num_refreshes: int = 0
    refresh_s: float = 0.0
    has_room: bool = True
    """Else loads and unloads are for ever on their way."""
    num_attempts: int = 0
    pool_bytes: int = 1 << 20
    pool_used_bytes: int = 1 << 10

    def knows(self, name: str) -> bool:
        return name in self.known

    def resolve(self, name: str) -> AdapterVersion:
        info = self.get(name)
        if info.error:
            raise AdapterRejected(info.error, details={"adapter": name})
        return AdapterVersion(name=name, content_hash=info.content_hash)

    def refresh(self) -> None:
        self.num_refreshes += 1
        found = dict(self.on_disk)
        time.sleep(self.refresh_s)
        self.known |= found

    def list(self) -> list[FakeInfo]:
        return list(self.known.values())

    def get(self, name: str) -> FakeInfo:
        if name not in self.known:
            raise UnknownAdapter(f"there is no adapter {name!r}; near: french", details={"adapter": name})
        return self.known[name]

    def _change(self, name: str, **changes: Any) -> FakeInfo:
        self.known[name] = replace(self.get(name), **changes)
        return self.known[name]

    def try_load(self, name: str) -> FakeInfo | None:
        self.num_attempts += 1
        if self.has_room:
            return self._change(name, residency=Residency.DEVICE, device_bytes=4000)
        return None

    def try_unload(self, name: str) -> FakeInfo | None:
        self.num_attempts += 1
        if self.has_room:
            return self._change(name, residency=Residency.DISK, device_bytes=0)
        return None

    def pin(self, name: str, pinned: bool) -> FakeInfo:
        return self._change(name, pinned=pinned)

    def start(self) -> None:
        pass

    def stop(self) -> None:
        pass


@cache
def small_tokenizer() -> Any:
    """A byte-level BPE tokenizer with ChatML's control tokens, trained on one sentence."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the user asks the assistant and the system answers hello there"] * 4, trainer)
    tokenizer.add_tokens([AddedToken("<tool>", special=False)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


class FakeBackbone:
    source = "test"
    fingerprint = "cd" * 32
    architecture = "LlamaForCausalLM"
    quantization = "int8"
    dtype_name = "float32"
    num_parameters = 123
    num_bytes = 456

    def __init__(self) -> None:
        self.tokenizer = small_tokenizer()
        self.vocab_size = len(self.tokenizer)


@dataclass
class Harness:
    """Everything that a service is made of, with doubles where the work is done."""

    engine: FakeEngine = field(default_factory=FakeEngine)
    store: FakeStore = field(default_factory=FakeStore)
    backbone: FakeBackbone = field(default_factory=FakeBackbone)
    metrics: Metrics = field(default_factory=Metrics)
    config: ServerConfig = field(
        default_factory=lambda: ServerConfig(listen="127.0.0.1:0", max_n=4, max_logprobs=5, drain_timeout_s=5.0)
    )

    def parts(self) -> tuple[ServerConfig, FakeEngine, FakeStore, FakeBackbone, Metrics]:
        return self.config, self.engine, self.store, self.backbone, self.metrics

    def serve(self) -> BackgroundService:
        return BackgroundService(*self.parts())

    def sample(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(name, labels) or 0.0
