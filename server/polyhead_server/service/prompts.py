"""Text to token ids: prompts and chats, with what only looks like a control token kept as text. No gRPC, no torch."""

from __future__ import annotations

import copy
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from tokenizers import Tokenizer

from polyhead_core.control_tokens import ControlTokens
from polyhead_core.errors import InvalidRequest, PromptTooLong

ROLES = ("system", "user", "assistant")
SCORED_FIELDS = ("text", "token_ids")
"""Of a ScoreRequest: nothing is generated after these."""


@dataclass(frozen=True, kw_only=True)
class ChatMessage:
    role: str
    content: str


class PromptEncoder:
    """Encodes prompts for one backbone. Thread-safe: its tokenizers are its own and are never reconfigured.

    In a prompt control tokens are plain text unless the caller asks otherwise; in a chat only the template's own count.
    """

    def __init__(self, tokenizer: Any, *, vocab_size: int, max_model_len: int) -> None:
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len
        self._chat_tokenizer = copy.deepcopy(tokenizer)
        self._control = ControlTokens(tokenizer)
        longest_token_bytes = max((len(token.encode()) for token in self._control.parsing.get_vocab()), default=1)
        self.max_prompt_bytes = max_model_len * longest_token_bytes
        """A longer text cannot fit the context, whatever it says, and is refused before it is tokenised."""

    def encode_prompt(self, text: str, *, parse_special_tokens: bool, field: str = "prompt") -> tuple[int, ...]:
        """Token ids of a prompt, with what the tokenizer adds by default (a begin token, where it has one).

        Errors call it `field`, as the request does.
        """
        self._check_bytes(field, len(text.encode("utf-8")))
        if not text:
            raise _invalid(field, "", f"the {field} is empty: send at least one character")
        backend = self._control.parsing if parse_special_tokens else self._control.plain
        return self._check_count(field, tuple(backend.encode(text).ids))

    def check_token_ids(self, token_ids: Sequence[int], *, field: str = "prompt_token_ids") -> tuple[int, ...]:
        """The caller's own token ids, checked against context and vocabulary."""
        if len(token_ids) > self._max_model_len:
            raise _too_many_tokens(field, len(token_ids), self._max_model_len)
        if not token_ids:
            raise _invalid(field, "", f"{field} is empty: send at least one token id")
        for token_id in token_ids:
            if not 0 <= token_id < self._vocab_size:
                expected = f"0 to {self._vocab_size - 1}"
                raise _invalid(field, token_id, f"token id {token_id} is not in the vocabulary: expected {expected}")
        return tuple(token_ids)

    def encode_chat(self, messages: Sequence[ChatMessage]) -> tuple[int, ...]:
        """Token ids of a conversation up to where the assistant's next answer begins."""
        self._check_messages(messages)
        if not self._chat_tokenizer.chat_template:
            raise _invalid("messages", "", "the backbone has no chat template: use Generate")
        marked = [{"role": message.role, "content": self._control.mark(message.content)} for message in messages]
        try:
            rendered = self._chat_tokenizer.apply_chat_template(marked, add_generation_prompt=True, tokenize=False)
        except jinja2.TemplateError as error:
            raise _invalid("messages", "", f"the backbone's chat template refuses these messages: {error}") from error
        return self._check_count("messages", tuple(self._control.encode_marked(rendered)))

    def check_num_messages(self, num_messages: int) -> None:
        """Raises PromptTooLong for more messages than the context has tokens, before anything is done with them."""
        if num_messages > self._max_model_len:
            raise PromptTooLong(
                f"{num_messages} messages cannot fit the context of {self._max_model_len} tokens: each takes at"
                " least one: send fewer",
                details={"field": "messages", "num_messages": num_messages, "max_model_len": self._max_model_len},
            )

    def check_room(self, token_ids: Sequence[int], field: str) -> None:
        """Raises PromptTooLong unless at least one token can be generated after these."""
        if len(token_ids) >= self._max_model_len:
            raise _too_many_tokens(field, len(token_ids), self._max_model_len)

    def _check_messages(self, messages: Sequence[ChatMessage]) -> None:
        if not messages:
            raise _invalid("messages", "", "there are no messages: send at least one")
        self.check_num_messages(len(messages))
        for message in messages:
            if message.role not in ROLES:
                expected = ", ".join(ROLES)
                role = reprlib.repr(message.role)
                raise _invalid("messages.role", role, f"role {role} is unknown: expected {expected}")
        self._check_bytes("messages", sum(len(message.content.encode("utf-8")) for message in messages))

    def _check_bytes(self, field: str, num_bytes: int) -> None:
        if num_bytes > self.max_prompt_bytes:
            raise PromptTooLong(
                f"{field} of {num_bytes} bytes cannot fit the context of {self._max_model_len} tokens,"
                f" which take at most {self.max_prompt_bytes} bytes: shorten it",
                details={"field": field, "prompt_bytes": num_bytes, "max_prompt_bytes": self.max_prompt_bytes,
                         "max_model_len": self._max_model_len},
            )  # fmt: skip

    def _check_count(self, field: str, token_ids: tuple[int, ...]) -> tuple[int, ...]:
        if not token_ids:
            raise _invalid(field, "", "the prompt holds no token: send some text")
        if len(token_ids) > self._max_model_len:
            raise _too_many_tokens(field, len(token_ids), self._max_model_len)
        return token_ids


class TokenTexts:
    """What single tokens look like as text, remembered. Reading is safe from any thread."""

    def __init__(self, tokenizer: Any) -> None:
        self._backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        # Decoders drop the space before a text's first token, so each token is decoded behind this one.
        self._anchor = self._backend.encode("a", add_special_tokens=False).ids[-1:]
        self._anchor_chars = len(self._decode(self._anchor))
        self._texts: dict[int, str] = {}

    def text(self, token_id: int) -> str:
        known = self._texts.get(token_id)
        if known is None:
            known = self._decode([*self._anchor, token_id])[self._anchor_chars :]
            self._texts[token_id] = known
        return known

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._backend.decode(token_ids, skip_special_tokens=False)


def _invalid(field: str, given: object, message: str) -> InvalidRequest:
    return InvalidRequest(message, details={"field": field, "given": given})


def _too_many_tokens(field: str, num_tokens: int, max_model_len: int) -> PromptTooLong:
    shared = "" if field in SCORED_FIELDS else ", prompt and answer together"
    return PromptTooLong(
        f"{field} of {num_tokens} tokens is too long: the context holds {max_model_len} tokens{shared}",
        details={"field": field, "prompt_tokens": num_tokens, "max_model_len": max_model_len},
    )
