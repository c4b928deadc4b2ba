"""The `polyhead` command: answers on stdout, one clear line on stderr and exit code 1 otherwise."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
from service_doubles import Harness, answer, finished, tokens

from polyhead_client import SamplingOptions, cli
from polyhead_server.request import EventSink, Request


@pytest.fixture
def harness() -> Harness:
    return Harness()


@pytest.fixture
def address(harness: Harness) -> Iterator[str]:
    with harness.serve() as service:
        yield service.address


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["polyhead", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


@pytest.mark.parametrize("server_first", [True, False])
def test_generate_prints_the_answer(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    address: str,
    harness: Harness,
    server_first: bool,
) -> None:
    ask = ["generate", "--adapter", "french", "--max-tokens", "7", "--stop", "a", "--stop", "b", "hello"]
    server = ["--server", address]
    assert run(monkeypatch, *(server + ask if server_first else ask + server)) == 0
    assert capsys.readouterr().out == "Hello there\n"
    request = harness.engine.submitted[0]
    assert request.adapter is not None
    assert (request.adapter.name, request.params.max_tokens, request.params.stop) == ("french", 7, ("a", "b"))


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_every_sampling_option_reaches_the_server(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], address: str, harness: Harness, command: str
) -> None:
    given = {
        "max_tokens": 9, "min_tokens": 2, "temperature": 0.5, "top_k": 4, "top_p": 0.75, "min_p": 0.25,
        "repetition_penalty": 1.5, "presence_penalty": 0.5, "frequency_penalty": -0.5, "seed": 3, "stop": ("a", "b"),
        "stop_token_ids": (5, 6), "ignore_eos": True, "n": 2, "logprobs": 1,
    }  # fmt: skip
    assert set(given) == set(SamplingOptions.__annotations__), "an option without a flag"
    flags: list[str] = []
    for name, value in given.items():
        flag = "--" + name.removesuffix("s" if name == "stop_token_ids" else "").replace("_", "-")
        for one in value if isinstance(value, tuple) else [value]:
            flags += [flag] if one is True else [flag, str(one)]
    assert run(monkeypatch, command, "--server", address, *flags, "hello") == 0
    params = harness.engine.submitted[0].params
    for name, value in given.items():
        assert getattr(params, name) == value, name
    capsys.readouterr()


def test_all_continuations_and_their_logprobs_are_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], address: str, harness: Harness
) -> None:
    def behave(request: Request, sink: EventSink, cancelled: threading.Event) -> None:
        for index, text in ((1, "two"), (0, "one"), (2, "three")):
            sink(tokens(index, text, index, with_logprobs=request.params.logprobs is not None))
        sink(finished(request, 1))

    harness.engine.behave = behave
    assert run(monkeypatch, "generate", "--server", address, "-n", "3", "hello") == 0
    assert capsys.readouterr().out == "one\n\n[1]\ntwo\n\n[2]\nthree\n"
    assert run(monkeypatch, "generate", "--server", address, "--logprobs", "2", "hello") == 0
    out = capsys.readouterr().out
    assert "logprob" in out
    assert "-0.5000" in out
    assert ":-1.500" in out


def test_chat_reads_stdin(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], address: str, harness: Harness
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi"))
    assert run(monkeypatch, "chat", "--server", address, "--system", "be kind", "-") == 0
    assert capsys.readouterr().out == "Hello there\n"
    text = harness.backbone.tokenizer.decode(harness.engine.submitted[0].prompt_token_ids)
    assert "system\nbe kind" in text
    assert "user\nhi" in text


def test_score_adapters_and_info_print_tables(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], address: str
) -> None:
    assert run(monkeypatch, "score", "--server", address, "--top-logprobs", "1", "the user") == 0
    out = capsys.readouterr().out
    assert "logprob" in out
    assert "total -" in out
    assert run(monkeypatch, "adapters", "--server", address) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0].split()[:3] == ["NAME", "TYPE", "RANK"]
    assert "french" in out
    assert run(monkeypatch, "info", "--server", address) == 0
    assert "backbone.architecture = LlamaForCausalLM" in capsys.readouterr().out


def test_adapter_commands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], address: str, harness: Harness
) -> None:
    for command in (["load"], ["pin"], ["pin", "--off"], ["unload"]):
        assert run(monkeypatch, "adapter", *command, "--server", address, "french") == 0
        assert "french" in capsys.readouterr().out
    assert not harness.store.known["french"].pinned


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["generate", "--adapter", "frnch", "hello"], "near: french"),
        (["generate", ""], "empty"),
        (["adapter", "load", "nope"], "nope"),
        (["generate", "--seed", "-1", "hello"], "seed"),
    ],
)
def test_errors_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], address: str, arguments: list[str], says: str
) -> None:
    assert run(monkeypatch, "--server", address, *arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("polyhead: ")
    assert captured.err.count("\n") == 1
    assert says in captured.err


def test_a_reader_that_leaves_early_gets_no_traceback(address: str) -> None:
    command = f"{sys.executable} -m polyhead_client.cli --server {address} generate hello | true"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60, env=os.environ)
    assert "Traceback" not in done.stderr


def shell(line: str, stdin: bytes | None = None, **environment: str) -> subprocess.CompletedProcess[bytes]:
    command = line.replace("polyhead", f"{sys.executable} -m polyhead_client.cli", 1)
    return subprocess.run(
        command, shell=True, input=stdin, capture_output=True, timeout=60, env={**os.environ, **environment}
    )


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_text_that_the_terminal_cannot_show_is_escaped(address: str, harness: Harness, encoding: str) -> None:
    harness.engine.behave = answer("caf", "\u00e9 \u65e5")
    done = shell(f"polyhead --server {address} generate hello", PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode(encoding) == ("caf\\xe9" if encoding == "ascii" else "caf\u00e9") + " \\u65e5\n"


@pytest.mark.parametrize(
    ("line", "stdin", "says"),
    [
        ("generate -", b"caf\xe9", "not valid text"),
        ("chat - <&-", None, "no standard input"),
        ("generate hello >/dev/full", None, "No space left"),
        ("adapters >/dev/full", None, "No space left"),
    ],
)
def test_input_and_output_that_fail_are_one_line(address: str, line: str, stdin: bytes | None, says: str) -> None:
    command, *rest = line.split(maxsplit=1)
    done = shell(f"polyhead {command} --server {address} {' '.join(rest)}", stdin, PYTHONIOENCODING="utf-8:strict")
    assert done.returncode == 1
    assert done.stderr.startswith(b"polyhead: ")
    assert done.stderr.count(b"\n") == 1
    assert says in done.stderr.decode()


def test_score_takes_control_tokens_where_it_is_told_to(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], address: str
) -> None:
    totals = []
    for flags in ([], ["--parse-special-tokens"]):
        assert run(monkeypatch, "score", "--server", address, *flags, "<|im_start|>user") == 0
        totals.append(len(capsys.readouterr().out.splitlines()))
    assert totals[1] < totals[0]
