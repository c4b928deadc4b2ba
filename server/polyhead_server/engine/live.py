"""A request in the engine's hands, from tokens to events: keeps its text, its times and its sink."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import Any

from polyhead_core.errors import PolyheadError
from polyhead_server.engine.detokenizer import IncrementalDetokenizer
from polyhead_server.engine.sampler import Sampled, SamplerRow
from polyhead_server.metrics import Metrics
from polyhead_server.request import (
    ChoiceFinish,
    Event,
    EventSink,
    FailedEvent,
    FinishedEvent,
    FinishReason,
    Request,
    TokenLogprob,
    TokensEvent,
    Usage,
)
from polyhead_server.scheduler.sequence import Sequence

_OUTCOMES = {"RequestCancelled": "cancelled", "RequestDeadlineExceeded": "deadline", "Draining": "drained"}


class LiveSequence:
    """One continuation: its sampler row and its text."""

    def __init__(self, sequence: Sequence, decoder: Any, eos_token_ids: SequenceOf[int]) -> None:
        params = sequence.request.params
        self.sequence = sequence
        self.sampler_row = SamplerRow(
            params=params,
            token_ids=sequence.token_ids,
            num_prompt_tokens=sequence.num_prompt_tokens,
            seed=sequence.seed,
            eos_token_ids=eos_token_ids,
        )
        self._detokenizer = IncrementalDetokenizer(decoder, params.stop, sequence.request.prompt_token_ids)
        self.last_token_s: float | None = None

    @property
    def may_end_by_text(self) -> bool:
        """Only its text says whether it goes on; of others `ends_with` knows."""
        return bool(self.sequence.request.params.stop)

    def ends_with(self, token_id: int) -> bool:
        """Whether a token that was just appended is the last one, whatever the text."""
        return token_id in self.sampler_row.end_token_ids or self.sequence.is_at_limit

    def accept(self, sampled: Sampled) -> tuple[TokensEvent, ChoiceFinish | None]:
        """The event of the token that was appended last, and how the continuation ends if it does. An end token has no
        text; it counts as a token of the completion."""
        is_end = sampled.token_id in self.sampler_row.end_token_ids
        text = "" if is_end else self._detokenizer.feed([sampled.token_id])
        finish: ChoiceFinish | None = None
        index = self.sequence.index
        if self._detokenizer.stop is not None:
            finish = ChoiceFinish(index=index, reason=FinishReason.STOP, stop=self._detokenizer.stop)
        elif self.ends_with(sampled.token_id):
            text += self._detokenizer.flush()
            # What was held back may, at the very end, still hold a stop string.
            met = self._detokenizer.stop
            reason = FinishReason.STOP if is_end or met is not None else FinishReason.LENGTH
            finish = ChoiceFinish(index=index, reason=reason, stop=met)
        logprobs = () if sampled.logprob is None else (sampled.logprob,)
        return TokensEvent(index=index, text=text, token_ids=(sampled.token_id,), logprobs=logprobs), finish


class LiveRequest:
    """Sends events to the sink; ends it exactly once."""

    def __init__(
        self, request: Request, sequences: SequenceOf[Sequence], sink: EventSink, decoder: Any, eos: SequenceOf[int]
    ) -> None:
        self.request = request
        self.sequences = {sequence.index: LiveSequence(sequence, decoder, eos) for sequence in sequences}
        self._first = sequences[0]
        self._sink = sink
        self._finished: list[ChoiceFinish] = []
        self._prompt_logprobs: list[TokenLogprob] = []
        self._num_completion_tokens = 0
        self._ended = False

    @property
    def adapter_name(self) -> str:
        return "" if self.request.adapter is None else self.request.adapter.name

    def add_prompt_logprobs(self, start: int, logprobs: SequenceOf[TokenLogprob]) -> None:
        """Scores of the tokens after position `start`; a preempted prompt comes a second time from 0."""
        self._prompt_logprobs[start:] = logprobs

    def tokens(self, event: TokensEvent, now_s: float, metrics: Metrics) -> None:
        live = self.sequences[event.index]
        self._num_completion_tokens += len(event.token_ids)
        if live.last_token_s is None:
            metrics.first_token(now_s - self.request.arrival_s)
        else:
            metrics.inter_token(now_s - live.last_token_s)
        live.last_token_s = now_s
        self._send(event)

    def choice_finished(self, finish: ChoiceFinish) -> None:
        self._finished.append(finish)

    def finish(self, metrics: Metrics) -> None:
        choices = tuple(sorted(self._finished, key=lambda choice: choice.index))
        self._end(
            FinishedEvent(choices=choices, usage=self._usage(), prompt_logprobs=tuple(self._prompt_logprobs)),
            "finished",
            metrics,
        )

    def fail(self, error: PolyheadError, metrics: Metrics) -> None:
        self._end(FailedEvent(error=error), _OUTCOMES.get(type(error).__name__, "failed"), metrics)

    def _usage(self) -> Usage:
        return Usage(
            prompt_tokens=len(self.request.prompt_token_ids),
            completion_tokens=self._num_completion_tokens,
            cached_prompt_tokens=self._first.num_cached_tokens,
        )

    def _end(self, event: Event, outcome: str, metrics: Metrics) -> None:
        assert not self._ended, f"request {self.request.request_id} ended twice"
        self._ended = True
        usage = self._usage()
        metrics.request_ended(outcome, self.adapter_name, usage.prompt_tokens, usage.completion_tokens)
        self._send(event)

    def _send(self, event: Event) -> None:
        self._sink(event)
