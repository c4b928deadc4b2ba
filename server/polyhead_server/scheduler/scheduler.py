"""Which tokens of which sequences the next forward pass computes. Owns the queue; knows no tensor.

Continuous batching in order of arrival: each step takes one token of every decoding sequence, then chunks of prefills,
then admits waiting sequences as far as rows, tokens, KV blocks and adapter slots go. For the engine's thread alone.
"""

from __future__ import annotations

import secrets
from bisect import bisect_left, insort
from collections import Counter, deque
from dataclasses import dataclass

from polyhead_core.errors import InvalidRequest, PolyheadError, PromptTooLong, QueueFull, RequestDeadlineExceeded
from polyhead_server.kvcache.block_manager import BlockManager
from polyhead_server.request import AdapterVersion, Request
from polyhead_server.scheduler.residency import Residency
from polyhead_server.scheduler.sequence import NO_SLOT, Sequence, Status
from polyhead_server.scheduler.step import Draft, ScheduledRow, Step


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    max_batch_rows: int
    """Most sequences in one step."""
    max_batch_tokens: int
    """Most tokens computed in one step."""
    max_queued_requests: int
    """Requests waiting for their first step beyond this are refused with QueueFull."""
    max_model_len: int
    """Most tokens of one sequence, prompt and output together."""
    max_adapter_wait_s: float
    """Once there has been no room for a sequence's adapter for so long, later ones are not admitted until it is in."""

    def __post_init__(self) -> None:
        for name in ("max_batch_rows", "max_batch_tokens", "max_queued_requests", "max_model_len"):
            assert getattr(self, name) >= 1, f"{name} = {getattr(self, name)}"
        assert self.max_adapter_wait_s >= 0, self.max_adapter_wait_s


@dataclass(eq=False, slots=True)
class _Group:
    """One request that has not ended."""

    request: Request
    sequences: list[Sequence]
    """The continuations that have not ended."""
    started: bool = False
    """One of them has been scheduled before."""
    prompt_computed: bool = False
    """The prompt's full blocks have been registered once."""


def _ordinal(sequence: Sequence) -> int:
    return sequence.ordinal


class Scheduler:
    """The queue and the running sequences. One step is: `schedule`, the engine's forward, `advance`, `append_token`."""

    def __init__(self, config: SchedulerConfig, blocks: BlockManager, residency: Residency) -> None:
        self.config = config
        self.num_preemptions = 0
        self._blocks = blocks
        self._residency = residency
        # A running sequence takes at least one token of each step, so more rows than tokens could not all go on.
        self._max_running = min(config.max_batch_rows, config.max_batch_tokens)
        self._groups: dict[str, _Group] = {}
        # Both in order of arrival; a preempted sequence so goes back in front of those that arrived after it.
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []
        self._next_ordinal = 0
        self._now_s = 0.0
        self._completions_s: deque[float] = deque(maxlen=64)

    # --- what comes in ---

    def add(self, request: Request) -> list[Sequence]:
        """Queues the n continuations of `request`, or raises PromptTooLong, InvalidRequest or QueueFull."""
        assert request.request_id not in self._groups, f"request {request.request_id} is alive already"
        max_total_tokens = self._checked_length(request)
        if self.num_waiting >= self.config.max_queued_requests:
            raise QueueFull(
                f"{self.num_waiting} requests are waiting, the most that are let in; try again later",
                details={"max_queued_requests": self.config.max_queued_requests},
                retry_after_s=self._retry_after_s(),
            )
        num_sequences = 1 if request.score_prompt else request.params.n
        adapter_hash = None if request.adapter is None else request.adapter.content_hash
        sequences = []
        for index in range(num_sequences):
            seed = secrets.randbits(64) if request.params.seed is None else (request.params.seed + index) % 2**64
            sequence = Sequence(
                request=request,
                index=index,
                ordinal=self._next_ordinal,
                seed=seed,
                max_total_tokens=max_total_tokens,
                table=self._blocks.new_table(request.tenant, adapter_hash),
                token_ids=list(request.prompt_token_ids),
                waiting_since_s=request.arrival_s,
            )
            self._next_ordinal += 1
            sequences.append(sequence)
        self._groups[request.request_id] = _Group(request, list(sequences))
        self._waiting.extend(sequences)
        return sequences

    def abort(self, request_id: str) -> bool:
        """Ends all continuations at once, with their blocks and pins; False if the request has ended before."""
        group = self._groups.get(request_id)
        if group is None:
            return False
        self._end(group)
        return True

    # --- one step ---

    def schedule(self, now_s: float) -> Step:
        """`now_s` is time.monotonic()'s. The rows' blocks are allocated and their adapters pinned when this returns."""
        self._now_s = now_s
        failed = self._expire()
        draft = Draft(self.config.max_batch_tokens)
        decodes = [sequence for sequence in self._running if sequence.num_uncomputed_tokens == 1]
        prefills = [sequence for sequence in self._running if sequence.num_uncomputed_tokens > 1]
        assert len(decodes) + len(prefills) == len(self._running), "a running sequence has nothing to compute"
        for sequence in (*decodes, *prefills):
            # It may have been preempted in favour of one before it.
            if sequence.status is Status.RUNNING and draft.budget and self._make_room(sequence, draft):
                draft.add(sequence)
        # Where blocks have just run out, a newcomer would only be preempted again.
        if not draft.preempted:
            failed += self._admit(draft)
        return Step(rows=tuple(draft.rows.values()), failed=tuple(failed))

    def advance(self, step: Step) -> list[ScheduledRow]:
        """To be called once the step's KV is written. Returns the rows that have reached the end of their known tokens.

        For each of them the caller either appends a token, finishes the sequence or aborts its request. Rows of
        sequences that were aborted since are left out.
        """
        at_end = []
        for row in step.rows:
            sequence = row.sequence
            if sequence.status is not Status.RUNNING:
                continue
            sequence.num_computed_tokens = row.start + row.num_tokens
            self._blocks.register(sequence.table, sequence.token_ids, sequence.num_computed_tokens)
            if sequence.num_computed_tokens >= sequence.num_prompt_tokens:
                self._groups[sequence.request.request_id].prompt_computed = True
            if row.reaches_end:
                at_end.append(row)
        return at_end

    def append_token(self, sequence: Sequence, token_id: int) -> None:
        assert sequence.status is Status.RUNNING
        assert sequence.num_uncomputed_tokens == 0
        assert not sequence.is_at_limit, "the sequence should have been finished"
        sequence.token_ids.append(token_id)

    def finish(self, sequence: Sequence) -> bool:
        """Ends one continuation; True if it was the last one of its request."""
        group = self._groups[sequence.request.request_id]
        self._retire(group, sequence)
        if group.sequences:
            return False
        self._completions_s.append(self._now_s)
        return True

    # --- what it looks like from outside ---

    @property
    def has_work(self) -> bool:
        return bool(self._groups)

    @property
    def num_waiting(self) -> int:
        """Requests of which nothing has been computed yet."""
        return sum(not group.started for group in self._groups.values())

    @property
    def num_running(self) -> int:
        """Requests of which something has been computed, those that are preempted at the moment included."""
        return sum(group.started for group in self._groups.values())

    @property
    def num_running_sequences(self) -> int:
        return len(self._running)

    def oldest_wait_s(self, now_s: float) -> float:
        return max((now_s - sequence.waiting_since_s for sequence in self._waiting), default=0.0)

    def pins(self) -> Counter[AdapterVersion]:
        """Pins that are held now, by version."""
        alive = (*self._running, *self._waiting)
        return Counter(s.request.adapter for s in alive if s.request.adapter is not None and s.slot != NO_SLOT)

    def check_integrity(self) -> None:
        """Between steps. Raises AssertionError where queue, blocks and pins contradict each other."""
        self._blocks.check_integrity(sequence.table for sequence in self._running)
        assert len(self._running) <= self._max_running
        for sequences, status in ((self._waiting, Status.WAITING), (self._running, Status.RUNNING)):
            ordinals = [sequence.ordinal for sequence in sequences]
            assert ordinals == sorted(set(ordinals)), "out of order"
            assert all(sequence.status is status for sequence in sequences)
        alive = {sequence.ordinal for group in self._groups.values() for sequence in group.sequences}
        assert alive == {sequence.ordinal for sequence in (*self._waiting, *self._running)}, "a sequence is lost"
        for request_id, group in self._groups.items():
            assert group.request.request_id == request_id
            assert group.sequences, "an ended request is kept"
        for sequence in self._waiting:
            assert not sequence.block_ids
            assert sequence.slot == NO_SLOT or sequence.num_preemptions
            assert sequence.num_computed_tokens == 0
        for sequence in self._running:
            assert (sequence.slot == NO_SLOT) == (sequence.request.adapter is None), "a pin is missing or too many"
            assert sequence.num_computed_tokens <= len(sequence.token_ids) <= sequence.max_total_tokens
            assert sequence.num_computed_tokens <= len(sequence.block_ids) * self._blocks.block_size

    # --- admission ---

    def _checked_length(self, request: Request) -> int:
        """Most tokens the sequence can come to."""
        num_prompt, limit = len(request.prompt_token_ids), self.config.max_model_len
        if num_prompt == 0:
            raise InvalidRequest("the prompt has no tokens: expected at least 1", details={"field": "prompt"})
        if num_prompt > limit - (not request.score_prompt):
            raise PromptTooLong(
                f"the prompt has {num_prompt} tokens, the context holds {limit}"
                + ("" if request.score_prompt else " with at least one of output"),
                details={"prompt_tokens": num_prompt, "max_model_len": limit},
            )
        total = num_prompt if request.score_prompt else min(num_prompt + request.params.max_tokens, limit)
        # The last generated token is never computed.
        num_blocks = self._blocks.blocks_for(total if request.score_prompt else total - 1)
        if num_blocks > self._blocks.num_blocks:
            raise InvalidRequest(
                f"{num_prompt} prompt tokens and up to {total - num_prompt} of output need {num_blocks} KV blocks of "
                f"{self._blocks.block_size} tokens, the whole cache has {self._blocks.num_blocks}: "
                "shorten the prompt or lower max_tokens",
                details={"needed_blocks": num_blocks, "num_blocks": self._blocks.num_blocks},
            )
        return total

    def _admit(self, draft: Draft) -> list[tuple[Request, PolyheadError]]:
        failures: dict[str, tuple[_Group, PolyheadError]] = {}
        blocked: set[str] = set()  # adapters found absent in this step
        index, held_back = 0, False
        while index < len(self._waiting) and len(self._running) < self._max_running and draft.budget:
            sequence = self._waiting[index]
            group = self._groups[sequence.request.request_id]
            waits = sequence.request.request_id in failures or self._awaits_shared_prompt(group, sequence)
            # A preempted one goes on even then: it may be its pin that others wait for.
            if waits or (held_back and sequence.slot == NO_SLOT):
                index += 1
                continue
            if not self._pin(sequence, blocked):
                error = self._residency.failure(sequence.request.adapter) if sequence.request.adapter else None
                if error is not None:
                    failures[sequence.request.request_id] = (group, error)
                else:
                    held_back = self._is_overdue(sequence)
                index += 1
                continue
            if not self._take_blocks(sequence):
                self._release_blocks(sequence)
                if not sequence.num_preemptions:
                    self._unpin(sequence)
                break
            self._start(group, sequence)
            draft.add(sequence)
        for group, _ in failures.values():
            self._end(group)
        return [(group.request, error) for group, error in failures.values()]

    def _awaits_shared_prompt(self, group: _Group, sequence: Sequence) -> bool:
        """True while another continuation computes the prompt that this one will find in the prefix cache.

        It waits for the earliest living sibling, which waits for nobody, so that there is no deadlock.
        """
        return (
            self._blocks.prefix_caching
            and not group.prompt_computed
            and sequence is not group.sequences[0]
            and sequence.num_prompt_tokens > self._blocks.block_size
        )

    def _pin(self, sequence: Sequence, blocked: set[str]) -> bool:
        version = sequence.request.adapter
        if version is None or sequence.slot != NO_SLOT:
            return True
        if version.content_hash in blocked:
            return False
        slot = self._residency.acquire(version)
        if slot is None:
            blocked.add(version.content_hash)
            return False
        sequence.slot = slot
        return True

    def _is_overdue(self, sequence: Sequence) -> bool:
        """True if there has been no room for a sequence's adapter for so long that those behind it are to wait too, so
        that those who run end and give their pins back. A slow disk holds back nobody."""
        assert sequence.request.adapter is not None
        if not self._residency.lacks_room(sequence.request.adapter):
            sequence.blocked_since_s = None
            return False
        if sequence.blocked_since_s is None:
            sequence.blocked_since_s = self._now_s
        return self._now_s - sequence.blocked_since_s > self.config.max_adapter_wait_s

    def _take_blocks(self, sequence: Sequence) -> bool:
        """Blocks for all known tokens at once, so that a prefill never stops half-way for want of blocks."""
        # A score wants the logits of every token, so that none may be skipped.
        if not sequence.request.score_prompt:
            sequence.num_computed_tokens = self._blocks.match_prefix(sequence.table, sequence.token_ids)
        num_missing = self._blocks.blocks_for(len(sequence.token_ids)) - len(sequence.block_ids)
        # One block is left for each running sequence: otherwise the newcomer would be preempted at once.
        if num_missing + len(self._running) > self._blocks.num_free:
            return False
        return self._blocks.allocate(sequence.table, len(sequence.token_ids))

    def _start(self, group: _Group, sequence: Sequence) -> None:
        self._waiting.remove(sequence)
        insort(self._running, sequence, key=_ordinal)
        sequence.status = Status.RUNNING
        sequence.blocked_since_s = None
        group.started = True
        if sequence.first_scheduled_s is None:
            sequence.first_scheduled_s = self._now_s
            sequence.num_cached_tokens = sequence.num_computed_tokens

    # --- the way out ---

    def _make_room(self, sequence: Sequence, draft: Draft) -> bool:
        """Blocks for all known tokens, by preempting the latest arrived; False if that was `sequence` itself.

        The earliest is preempted by nobody and fits alone (`_checked_length`), so that every step gets something done.
        """
        while not self._blocks.allocate(sequence.table, len(sequence.token_ids)):
            victim = self._running[-1]
            self._preempt(victim)
            draft.drop(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Its pin stays: it goes on with the version that it began with, even if that is replaced meanwhile."""
        assert len(self._running) > 1, "a single sequence outgrew the whole cache"
        self._running.remove(sequence)
        self._release_blocks(sequence)
        sequence.status = Status.WAITING
        sequence.waiting_since_s = self._now_s
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        insort(self._waiting, sequence, key=_ordinal)

    def _expire(self) -> list[tuple[Request, PolyheadError]]:
        failed: list[tuple[Request, PolyheadError]] = []
        for group in list(self._groups.values()):
            deadline_s = group.request.deadline_s
            if deadline_s is not None and self._now_s >= deadline_s:
                num_done = max(sequence.num_output_tokens for sequence in group.sequences)
                self._end(group)
                message = f"the deadline passed after {self._now_s - group.request.arrival_s:.3f} s"
                failed.append((group.request, RequestDeadlineExceeded(f"{message} and {num_done} output tokens")))
        return failed

    def _end(self, group: _Group) -> None:
        for sequence in list(group.sequences):
            self._retire(group, sequence)

    def _retire(self, group: _Group, sequence: Sequence) -> None:
        assert sequence.status is not Status.FINISHED, "a sequence ended twice"
        line = self._running if sequence.status is Status.RUNNING else self._waiting
        del line[bisect_left(line, sequence.ordinal, key=_ordinal)]
        self._release_blocks(sequence)
        self._unpin(sequence)
        sequence.status = Status.FINISHED
        group.sequences.remove(sequence)
        if not group.sequences:
            del self._groups[group.request.request_id]

    def _release_blocks(self, sequence: Sequence) -> None:
        self._blocks.release(sequence.table)
        sequence.num_computed_tokens = 0

    def _unpin(self, sequence: Sequence) -> None:
        if sequence.slot != NO_SLOT:
            assert sequence.request.adapter is not None
            self._residency.release(sequence.request.adapter)
            sequence.slot = NO_SLOT

    def _retry_after_s(self) -> float:
        """How long a tenth of the queue takes at the recent rate of completions; 1 s while none is known."""
        if len(self._completions_s) < 2 or self._now_s <= self._completions_s[0]:
            return 1.0
        rate = len(self._completions_s) / (self._now_s - self._completions_s[0])
        return min(max(0.1, self.config.max_queued_requests / 10 / rate), 60.0)
