"""Streaming text against the tokenizer's own decode, and stop strings against a search in the whole text."""

from __future__ import annotations

import random
import time

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from polyhead_server.engine.detokenizer import IncrementalDetokenizer
from polyhead_server.engine.live import LiveSequence
from polyhead_server.engine.sampler import Sampled
from polyhead_server.engine.stop_strings import StopMatcher
from polyhead_server.kvcache.block_manager import BlockTable
from polyhead_server.request import Request, SamplingParams
from polyhead_server.scheduler.sequence import Sequence

TEXTS = [
    "Hello world, this is plain text.",
    "Emoji 😀😀 and 👩‍👩‍👧 families, flags 🇩🇪🇫🇷!",
    "wörld ünïcode ﬁ 𝔘𝔫𝔦 日本語 한국어 عربي",
    "  leading,\n\n newlines\t and   spaces  ",
    "a\ufffdb \ufffd",
    "",
]


@pytest.fixture(scope="module")
def byte_level() -> Tokenizer:
    """Byte-level BPE whose merges do not cover the emoji, so that one takes up to four tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["hello world this is text the and of", "hello world ünï"] * 5, trainer)
    return tokenizer


@pytest.fixture(scope="module")
def byte_fallback() -> Tokenizer:
    """The form of Llama 2 and Gemma: words with a leading mark, and bytes for whatever else."""
    words = ["<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁hello", "▁world", "lo", "!"]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[], byte_fallback=True))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def pieces_of(tokenizer: Tokenizer, ids: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], str | None]:
    detokenizer = IncrementalDetokenizer(tokenizer, stop)
    pieces = [detokenizer.feed([token_id]) for token_id in ids]
    pieces.append(detokenizer.flush())
    return pieces, detokenizer.stop


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_whole_characters_and_add_up(byte_level: Tokenizer, text: str) -> None:
    ids = byte_level.encode(text).ids
    pieces, _ = pieces_of(byte_level, ids)
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)
    for end in range(len(ids)):
        given = "".join(pieces[:end])
        assert text.startswith(given), "a piece was taken back"


def test_an_emoji_of_several_tokens_comes_at_once(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("😀").ids
    assert len(ids) > 1
    pieces, _ = pieces_of(byte_level, ids)
    assert pieces == [""] * (len(ids) - 1) + ["😀", ""]


def test_incomplete_text_comes_out_at_the_end(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("ab😀").ids[:-1]
    pieces, _ = pieces_of(byte_level, ids)
    assert "".join(pieces) == byte_level.decode(ids) == "ab\ufffd"
    assert "\ufffd" not in "".join(pieces[:-1])


def test_invalid_text_in_the_middle(byte_level: Tokenizer) -> None:
    first = byte_level.encode("😀").ids[0]
    ids = [first, first, *byte_level.encode(" hello").ids]
    pieces, _ = pieces_of(byte_level, ids)
    assert "".join(pieces) == byte_level.decode(ids)


def test_special_tokens_are_skipped(byte_level: Tokenizer) -> None:
    start, end = byte_level.token_to_id("<s>"), byte_level.token_to_id("</s>")
    emoji = byte_level.encode("😀").ids
    ids = [start, end, *byte_level.encode("hello").ids, start, *emoji, end, emoji[0], start, *emoji[1:], *[end] * 50]
    pieces, _ = pieces_of(byte_level, ids)
    assert "".join(pieces) == byte_level.decode(ids) == "hello😀😀"


@pytest.mark.parametrize("seed", range(8))
def test_random_tokens_add_up_to_the_tokenizers_decode(byte_level: Tokenizer, seed: int) -> None:
    rng = random.Random(seed)
    alphabet = rng.sample(range(byte_level.get_vocab_size()), rng.choice([3, 20, 200]))
    for length in (1, 5, 40, 500):
        ids = [rng.choice(alphabet) for _ in range(length)]
        pieces, _ = pieces_of(byte_level, ids)
        assert "".join(pieces) == byte_level.decode(ids)


@pytest.mark.parametrize("token_text", ["ð", "Ģ", "â"])
def test_endless_invalid_text_takes_linear_time_and_is_not_kept_back(byte_level: Tokenizer, token_text: str) -> None:
    ids = [byte_level.token_to_id(token_text)] * 4000
    started_s = time.perf_counter()
    pieces, _ = pieces_of(byte_level, ids)
    assert time.perf_counter() - started_s < 5.0
    assert "".join(pieces) == byte_level.decode(ids)
    assert max(len(piece) for piece in pieces) < 200


def test_byte_fallback(byte_fallback: Tokenizer) -> None:
    word = byte_fallback.token_to_id
    emoji = [word(f"<0x{byte:02X}>") for byte in "😀".encode()]
    ids = [
        word("<s>"),
        word("▁hello"),
        *emoji,
        *emoji,
        word("▁"),
        word("▁world"),
        word("!"),
        *[word("lo")] * 40,
        *emoji,
    ]
    pieces, _ = pieces_of(byte_fallback, ids)
    assert "".join(pieces) == byte_fallback.decode(ids) == "hello😀😀  world!" + "lo" * 40 + "😀"
    assert not any("\ufffd" in piece for piece in pieces)
    pieces, _ = pieces_of(byte_fallback, [word("▁hello"), *emoji[:2], word("lo"), *emoji[:1]])
    assert "".join(pieces) == "hello\ufffd\ufffdlo\ufffd"
    pieces, _ = pieces_of(byte_fallback, [word("▁"), word("▁hello")])
    assert "".join(pieces) == " hello"


@pytest.fixture(scope="module")
def metaspace() -> Tokenizer:
    """The form of SentencePiece's own decoder: it drops the space before a text's first word."""
    words = ["<s>", "</s>", "▁", "▁Once", "▁upon", "▁a", "▁time", "s"]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


@pytest.mark.parametrize(
    ("prompt", "answer", "expected"),
    [
        ("<s> ▁Once ▁upon", "▁a ▁time", " a time"),
        ("▁Once", "s ▁upon", "s upon"),
        ("▁Once <s> </s>", "▁a ▁time", " a time"),  # special tokens are skipped and give no context
        ("▁Once ▁", "▁a s", " as"),
        ("<s>", "▁Once ▁upon", "Once upon"),  # here the answer is the text's beginning
        ("", "▁Once ▁upon", "Once upon"),
    ],
)
def test_an_answers_first_space_is_kept(metaspace: Tokenizer, prompt: str, answer: str, expected: str) -> None:
    prompt_ids, ids = ([metaspace.token_to_id(word) for word in words.split()] for words in (prompt, answer))
    detokenizer = IncrementalDetokenizer(metaspace, (), prompt_ids)
    assert "".join([detokenizer.feed([token_id]) for token_id in ids] + [detokenizer.flush()]) == expected
    assert metaspace.decode(prompt_ids + ids) == metaspace.decode(prompt_ids) + expected
    detokenizer = IncrementalDetokenizer(metaspace, (), prompt_ids)
    given = detokenizer.feed(ids * 30) + detokenizer.flush()
    assert metaspace.decode(prompt_ids) + given == metaspace.decode(prompt_ids + ids * 30)


def test_a_prompt_gives_none_of_its_text(byte_level: Tokenizer, byte_fallback: Tokenizer) -> None:
    emoji = byte_level.encode("😀").ids
    for prompt in (byte_level.encode("hello 😀").ids, emoji[:-1], [byte_level.token_to_id("<s>")]):
        detokenizer = IncrementalDetokenizer(byte_level, (), prompt)
        assert detokenizer.feed(byte_level.encode(TEXTS[1]).ids) + detokenizer.flush() == TEXTS[1]
    parts = [byte_fallback.token_to_id(f"<0x{byte:02X}>") for byte in "😀".encode()]
    detokenizer = IncrementalDetokenizer(byte_fallback, (), parts * 3)
    assert detokenizer.feed([*parts, byte_fallback.token_to_id("▁hello")]) + detokenizer.flush() == "😀 hello"


def test_an_engines_answer_continues_its_prompt(metaspace: Tokenizer) -> None:
    prompt = tuple(metaspace.token_to_id(word) for word in ("▁Once", "▁upon"))
    request = Request(
        request_id="r",
        tenant="default",
        prompt_token_ids=prompt,
        params=SamplingParams(max_tokens=2),
        adapter=None,
        arrival_s=0.0,
        deadline_s=None,
    )
    sequence = Sequence(
        request=request,
        index=0,
        ordinal=0,
        seed=0,
        max_total_tokens=4,
        table=BlockTable(root=b""),
        token_ids=list(prompt),
    )
    live = LiveSequence(sequence, metaspace, eos_token_ids=())
    texts = []
    for word in ("▁a", "▁time"):
        sequence.token_ids.append(metaspace.token_to_id(word))
        event, _ = live.accept(Sampled(metaspace.token_to_id(word)))
        texts.append(event.text)
    assert texts == [" a", " time"]


def test_feeding_several_tokens_at_once(byte_level: Tokenizer) -> None:
    ids = byte_level.encode(TEXTS[1]).ids
    detokenizer = IncrementalDetokenizer(byte_level)
    assert detokenizer.feed(ids[:7]) + detokenizer.feed(ids[7:]) + detokenizer.flush() == TEXTS[1]


# --- stop strings ---


def cut_by_search(text: str, stop: tuple[str, ...]) -> tuple[str, str | None]:
    """The definition: the stop string whose first occurrence ends first, the longest of those."""
    ends = [(text.find(s) + len(s), -len(s), s) for s in stop if s in text]
    if not ends:
        return text, None
    end, _, met = min(ends)
    return text[: end - len(met)], met


def test_a_stop_string_over_several_tokens(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("this is text\n\nUser: hello").ids
    pieces, met = pieces_of(byte_level, ids, ("\n\nUser:", "xyz"))
    assert "".join(pieces) == "this is text"
    assert met == "\n\nUser:"


def test_nothing_that_may_begin_a_stop_string_is_given(byte_level: Tokenizer) -> None:
    detokenizer = IncrementalDetokenizer(byte_level, ("</end>",))
    assert detokenizer.feed(byte_level.encode("a </en").ids) == "a "
    assert detokenizer.feed(byte_level.encode("e").ids) == "</ene"
    assert detokenizer.feed(byte_level.encode("b <").ids) == "b "
    assert detokenizer.flush() == "<"
    assert detokenizer.stop is None


def test_a_stop_string_that_begins_inside_a_character_of_bytes(byte_level: Tokenizer) -> None:
    pieces, met = pieces_of(byte_level, byte_level.encode("hello 😀 world").ids, ("😀",))
    assert ("".join(pieces), met) == ("hello ", "😀")


def test_text_after_the_stop_is_dropped() -> None:
    matcher = StopMatcher(["b"])
    assert matcher.feed("abc") == "a"
    assert matcher.feed("abc") == ""
    assert matcher.flush() == ""


def test_of_two_that_end_together_the_longer_counts() -> None:
    matcher = StopMatcher(["lo", "hello"])
    assert matcher.feed("say hello") == "say "
    assert matcher.met == "hello"


@pytest.mark.parametrize("seed", range(5))
def test_stops_do_not_depend_on_the_pieces(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(400):
        text = "".join(rng.choice("ab") for _ in range(rng.randint(0, 40)))
        stop = tuple("".join(rng.choice("ab") for _ in range(rng.randint(1, 7))) for _ in range(rng.randint(1, 4)))
        matcher = StopMatcher(stop)
        given, start = "", 0
        while start < len(text):
            end = start + rng.randint(1, 6)
            given += matcher.feed(text[start:end])
            assert cut_by_search(text, stop)[0].startswith(given), "part of a stop string was given"
            start = end
        given += matcher.flush()
        assert (given, matcher.met) == cut_by_search(text, stop)


def test_hostile_stop_strings_take_linear_time() -> None:
    stop = ["a" * 1023 + chr(0x100 + i) for i in range(16)]
    started_s = time.perf_counter()
    matcher = StopMatcher(stop)
    assert matcher.feed("a" * 20_000) + matcher.flush() == "a" * 20_000
    assert time.perf_counter() - started_s < 5.0
