"""The engine: one thread that schedules, computes and delivers, step by step, and the thread-safe door to it.

The lock guards the scheduler and the live requests. It is held while a step is decided and while its results are
delivered, never while the backbone computes, so that submitting and cancelling wait for neither.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from polyhead_core.backbone import DTYPES, Backbone
from polyhead_core.errors import Draining, EngineFailure, PolyheadError, RequestCancelled
from polyhead_server.config import ServerConfig
from polyhead_server.engine.batch import BatchRow
from polyhead_server.engine.live import LiveRequest
from polyhead_server.engine.logprobs import token_logprobs
from polyhead_server.engine.runner import Runner
from polyhead_server.engine.sampler import Sampled, sample
from polyhead_server.engine.stopwatch import Stopwatch
from polyhead_server.engine.work import Work, named_failure
from polyhead_server.kvcache.block_manager import BlockManager
from polyhead_server.metrics import Metrics, StepFigures
from polyhead_server.request import EventSink, Request
from polyhead_server.scheduler.scheduler import Scheduler, SchedulerConfig
from polyhead_server.scheduler.step import ScheduledRow, Step
from polyhead_server.store.store import AdapterStore

logger = logging.getLogger(__name__)

_BLOCKED_POLL_S = 0.02
"""How often a queue that waits for adapters looks for deadlines; a finished load wakes it at once."""
_IDLE_POLL_S = 1.0


@dataclass(frozen=True, kw_only=True)
class EngineStatus:
    num_running: int
    num_waiting: int
    kv_blocks_used: int
    kv_blocks_total: int
    draining: bool
    healthy: bool


class Engine:
    """Continuous batching over one backbone and the adapters of one store."""

    def __init__(self, config: ServerConfig, backbone: Backbone, store: AdapterStore, metrics: Metrics) -> None:
        self.max_model_len = min(config.max_model_len, backbone.max_position_embeddings)
        self._config = config
        self._store = store
        self._metrics = metrics
        self._runner = Runner(
            backbone,
            block_size=config.kv_block_size,
            kv_cache_bytes=config.kv_cache_bytes,
            kv_dtype=None if config.kv_dtype == "auto" else DTYPES[config.kv_dtype],
            fuse=config.fuse_layers,
            record=config.cuda_graphs,
        )
        self._runner.warm_up(
            config.max_batch_rows,
            store.tables,
            max_tokens=config.max_batch_tokens,
            max_context=self.max_model_len,
        )
        self._eos_token_ids = backbone.eos_token_ids
        self._decoder = backbone.tokenizer.backend_tokenizer
        self._blocks = BlockManager(self._runner.kv.num_blocks, config.kv_block_size, config.prefix_caching)
        limits = SchedulerConfig(
            max_batch_rows=config.max_batch_rows,
            max_batch_tokens=config.max_batch_tokens,
            max_queued_requests=config.max_queued_requests,
            max_model_len=self.max_model_len,
            max_adapter_wait_s=config.max_adapter_wait_s,
        )
        self._scheduler = Scheduler(limits, self._blocks, store)
        self._state_told = (-1, -1, -1, 0)
        """Requests waiting and running, KV blocks used and preemptions, as the metrics have them."""
        self._live: dict[str, LiveRequest] = {}
        self._undelivered: list[Work] = []
        """Rows of the last step that have a token which is booked and not handed out yet."""
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="polyhead-engine", daemon=True)
        self._draining = False
        self._stopping = False
        self._healthy = True
        store.set_wakeup(self._wake.set)

    # --- the door, for any thread ---

    @property
    def num_fused_layers(self) -> int:
        return self._runner.num_fused_layers

    @property
    def kv_cache_bytes(self) -> int:
        return self._runner.kv.num_bytes

    def start(self) -> None:
        self._thread.start()

    def take_layer_seconds(self) -> dict[str, float]:
        """Seconds spent in each phase of the fused layers since the last call; empty where no layer is fused."""
        return {} if self._runner.fused is None else self._runner.fused.take_phase_seconds()

    def submit(self, request: Request, sink: EventSink) -> None:
        """Admits a request; its events go to `sink`. Raises QueueFull, Draining, InvalidRequest, EngineFailure."""
        with self._lock:
            if self._draining or self._stopping:
                raise Draining("the server is shutting down and takes no new requests: try another one")
            if not self._healthy:
                raise EngineFailure("the engine has stopped after an internal error: the server must be restarted")
            sequences = self._scheduler.add(request)
            live = LiveRequest(request, sequences, sink, self._decoder, self._eos_token_ids)
            self._live[request.request_id] = live
        self._wake.set()

    def cancel(self, request_id: str) -> None:
        """Ends a request at once, with its blocks and pins; nothing happens if it has ended."""
        with self._lock:
            if self._scheduler.abort(request_id):
                self._live.pop(request_id).fail(RequestCancelled("the request was cancelled"), self._metrics)
        self._wake.set()

    def drain(self, timeout_s: float) -> bool:
        """Takes no new requests, waits for the live ones, fails those left after `timeout_s`; True if none was."""
        with self._lock:
            self._draining = True
        deadline_s = time.monotonic() + timeout_s
        while self._healthy and time.monotonic() < deadline_s:
            with self._lock:
                if not self._live:
                    return True
            time.sleep(0.01)
        with self._lock:
            left = list(self._live)
            self._abort(left, Draining(f"the server shut down; the request had not ended after {timeout_s:g} s"))
        return not left

    def stop(self) -> None:
        """Ends the thread; requests that are still live fail with Draining."""
        with self._lock:
            self._stopping = True
        self._wake.set()
        if self._thread.ident is not None:
            self._thread.join()
        with self._lock:
            self._abort(list(self._live), Draining("the server shut down"))

    def status(self) -> EngineStatus:
        with self._lock:
            return EngineStatus(
                num_running=self._scheduler.num_running,
                num_waiting=self._scheduler.num_waiting,
                kv_blocks_used=self._blocks.num_used,
                kv_blocks_total=self._blocks.num_blocks,
                draining=self._draining,
                healthy=self._healthy,
            )

    def check_integrity(self) -> None:
        """Raises AssertionError where scheduler, blocks, store and live requests contradict each other."""
        with self._lock:
            self._check_integrity()

    # --- the thread ---

    def _run(self) -> None:
        if self._config.num_threads:
            torch.set_num_threads(self._config.num_threads)
        try:
            while not self._stopping:
                self._turn()
            with self._lock:
                self._hand_out()
        except Exception as error:  # the thread's edge: whatever it is, every request still gets its answer
            logger.exception("the engine's thread died")
            with self._lock:
                self._healthy = False
                failure = EngineFailure(f"the engine stopped after an internal error ({type(error).__name__})")
                for live in self._live.values():
                    live.fail(failure, self._metrics)
                self._live.clear()

    def _turn(self) -> None:
        watch = Stopwatch()
        # Cleared before looking: what arrives after the look sets it again.
        self._wake.clear()
        with self._lock:
            self._store.publish()
            step = self._scheduler.schedule(time.monotonic())
            if step.failed or not step.rows:
                self._hand_out()
            for request, error in step.failed:
                self._live.pop(request.request_id).fail(error, self._metrics)
            self._observe_queue(step)
            work = [self._plan(row) for row in step.rows]
            has_work = self._scheduler.has_work
            if not work and self._config.check_integrity:
                self._check_integrity()
        if not work:
            self._wake.wait(_BLOCKED_POLL_S if has_work else _IDLE_POLL_S)
            return
        watch.lap("schedule")
        try:
            logits_LV = self._forward(work, watch)
        except Exception as error:  # one step's edge: its requests fail, all others go on
            self._fail_step(work, error)
            return
        if self._undelivered:  # while the device computes
            with self._lock:
                self._hand_out()
            watch.lap("deliver")
        try:
            self._sample_or_score(work, logits_LV)
        except Exception as error:  # as above
            self._fail_step(work, error)
            return
        watch.lap("sample")
        with self._lock:
            self._undelivered = self._settle(step, work)
            if not self._runner.returns_early:
                self._hand_out()
            if self._config.check_integrity:
                self._check_integrity()
        watch.lap("deliver")
        self._observe_step(step, watch)

    def _plan(self, row: ScheduledRow) -> Work:
        """Copies what the computation needs: an abort may take the sequence's blocks away while it runs."""
        sequence = row.sequence
        scores = sequence.request.score_prompt
        batch_row = BatchRow(
            token_ids=row.token_ids,
            start=row.start,
            block_ids=tuple(sequence.block_ids),
            slot=sequence.slot,
            num_logits=row.num_tokens if scores else int(row.samples),
        )
        # A score's targets are the tokens after each of the row's; the prompt's last token has none after it.
        targets = sequence.token_ids[row.start + 1 : row.start + row.num_tokens + 1] if scores else []
        return Work(row=row, batch_row=batch_row, live=self._live[sequence.request.request_id], targets=targets)

    def _fail_step(self, work: Sequence[Work], error: Exception) -> None:
        logger.error("a step failed", exc_info=error)
        failure = EngineFailure(f"the step failed with an internal error ({type(error).__name__})")
        with self._lock:
            self._hand_out()
            self._abort({one.live.request.request_id for one in work}, failure)
        self._runner.check_device()

    def _forward(self, work: Sequence[Work], watch: Stopwatch) -> torch.Tensor:
        """The logits that the rows want. Works on copies: the lock is not held."""
        batch = self._runner.prepare([one.batch_row for one in work], self._store.tables)
        watch.lap("prepare")
        logits_LV = self._runner.forward(batch)
        watch.lap("forward")
        return logits_LV

    def _sample_or_score(self, work: Sequence[Work], logits_LV: torch.Tensor) -> None:
        """Fills in each row's token or scores."""
        sampling = [one for one in work if one.row.samples]
        if len(sampling) == len(logits_LV):  # nothing but the next token of each row is wanted
            self._sample(sampling, logits_LV)
        else:
            pieces = logits_LV.split([one.batch_row.num_logits for one in work])
            if sampling:
                wanted = [piece for one, piece in zip(work, pieces, strict=True) if one.row.samples]
                self._sample(sampling, torch.cat(wanted))
            for one, piece in zip(work, pieces, strict=True):
                if one.targets:
                    self._score(one, piece[: len(one.targets)])

    def _sample(self, work: Sequence[Work], logits_LV: torch.Tensor) -> None:
        rows = [one.live.sequences[one.row.sequence.index].sampler_row for one in work]
        for one, result in zip(work, sample(logits_LV, rows), strict=True):
            if isinstance(result, EngineFailure):
                one.failure = named_failure(result, one)
            else:
                one.sampled = result

    def _score(self, one: Work, logits_LV: torch.Tensor) -> None:
        try:
            one.scores = token_logprobs(logits_LV, one.targets, one.live.request.score_top)
        except EngineFailure as error:
            one.failure = named_failure(error, one)

    def _settle(self, step: Step, work: Sequence[Work]) -> list[Work]:
        """Books what was computed; the rows whose tokens are to be handed out. Afterwards the next step can begin."""
        now_s = time.monotonic()
        at_end = {id(row) for row in self._scheduler.advance(step)}
        undelivered = []
        for one in work:
            request_id = one.live.request.request_id
            if self._live.get(request_id) is not one.live:  # it ended while it was computed
                continue
            if one.failure is not None:
                self._abort([request_id], one.failure)
                continue
            one.live.add_prompt_logprobs(one.row.start, one.scores)
            if id(one.row) not in at_end:
                continue
            if one.sampled is None:  # a score
                if self._scheduler.finish(one.row.sequence):
                    self._end(one.live)
                continue
            one.sampled_s = now_s
            self._append_token(one, one.sampled)
            undelivered.append(one)
        return undelivered

    def _append_token(self, one: Work, sampled: Sampled) -> None:
        sequence = one.row.sequence
        live = one.live.sequences[sequence.index]
        self._scheduler.append_token(sequence, sampled.token_id)
        if live.may_end_by_text:
            one.accepted = live.accept(sampled)
            ends = one.accepted[1] is not None
        else:
            ends = live.ends_with(sampled.token_id)
        one.ends_request = ends and self._scheduler.finish(sequence)

    def _hand_out(self) -> None:
        undelivered, self._undelivered = self._undelivered, []
        for one in undelivered:
            if self._live.get(one.live.request.request_id) is not one.live:  # it ended meanwhile
                continue
            assert one.sampled is not None
            event, finish = one.accepted or one.live.sequences[one.row.sequence.index].accept(one.sampled)
            one.live.tokens(event, one.sampled_s, self._metrics)
            if finish is not None:
                one.live.choice_finished(finish)
            if one.ends_request:
                self._end(one.live)

    def _end(self, live: LiveRequest) -> None:
        del self._live[live.request.request_id]
        live.finish(self._metrics)

    def _abort(self, request_ids: Iterable[str], error: PolyheadError) -> None:
        for request_id in request_ids:
            if self._scheduler.abort(request_id):
                self._live.pop(request_id).fail(error, self._metrics)

    # --- what it looks like from outside ---

    def _observe_queue(self, step: Step) -> None:
        scheduler, blocks = self._scheduler, self._blocks
        state = (scheduler.num_waiting, scheduler.num_running, blocks.num_used, scheduler.num_preemptions)
        if state != self._state_told:
            self._metrics.queue(state[0], state[1])
            self._metrics.kv_blocks(blocks.num_used, blocks.num_blocks)
            self._metrics.preempted(scheduler.num_preemptions - self._state_told[3])
            self._state_told = state
        for row in step.rows:
            sequence = row.sequence
            is_first = row.start == sequence.num_cached_tokens and sequence.num_output_tokens == 0
            if is_first and sequence.num_preemptions == 0 and sequence.first_scheduled_s is not None:
                self._metrics.queue_time(max(0.0, sequence.first_scheduled_s - sequence.request.arrival_s))

    def _observe_step(self, step: Step, watch: Stopwatch) -> None:
        decodes = sum(row.is_decode for row in step.rows)
        self._metrics.step(
            StepFigures(
                rows=len(step.rows),
                distinct_adapters=len({row.sequence.adapter_hash for row in step.rows}),
                prefill_tokens=step.num_tokens - decodes,
                decode_tokens=decodes,
                phase_seconds=watch.laps,
            )
        )

    def _check_integrity(self) -> None:
        self._scheduler.check_integrity()
        self._store.check_integrity()
        pins = sum(self._scheduler.pins().values())
        assert pins == self._store.num_pins, f"the scheduler holds {pins} pins, the store counts {self._store.num_pins}"
