"""The worker's end of the conversation: one JSON object a line in, one out. Standard library only.

Commands, the same for every system; token ids are the backbone's, an adapter is a name or null:

| command | arguments | reply |
|---|---|---|
| `load` | the system's own | `{"versions": {...}, "settings": {...}}` |
| `register` | `adapters`: all, or none (Polyhead alone) | `{"registered_adapters": n}` |
| `decode` | `prompts`, `adapters`, `steps` | `{"tokens": n, "seconds": s}`: greedy steps in which every row runs |
| `prefill` | `prompts` | `{"tokens": n, "seconds": s}`: one after the other, each until its first token is known |
| `say` | `prompt`, `tokens`, `adapter` | `{"token_ids": [...]}`: one greedy answer |
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Reply = dict[str, Any]


@dataclass(frozen=True)
class RowTimes:
    """When each row's tokens were known: `times_s[row][k]` of token k, by one clock."""

    times_s: Sequence[Sequence[float]]

    def steady(self, steps: int) -> Reply:
        """Tokens and seconds of the `steps` steps that follow the one in which the last row got its first token.

        Between two tokens of the row that began last every other row gets as many, so that this row's times bound
        the window. Raises ValueError where a row ended too early to have run in all of it.
        """
        last = max(self.times_s, key=lambda times: times[0])
        if len(last) <= steps:
            raise ValueError(f"the last row has {len(last)} tokens: {steps} steps need {steps + 1}")
        began_s, ended_s = last[0], last[steps]
        # Half a step of tolerance: rows of one step are told one after the other.
        slack_s = (ended_s - began_s) / steps / 2
        if any(times[-1] < ended_s - slack_s for times in self.times_s):
            raise ValueError("a row ended before the window did: its steps had fewer rows")
        return {"tokens": steps * len(self.times_s), "seconds": ended_s - began_s}


def serve(handlers: Mapping[str, Callable[..., Reply]]) -> None:
    """Answers commands until the input ends. What a library prints goes to stderr: stdout is the conversation's."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        command = json.loads(line)
        try:
            reply = handlers[command.pop("command")](**command)
        except Exception as error:  # the process's edge: the parent decides what a failure means
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(reply) + "\n")
        answers.flush()
