"""The `polyhead` command: the client from a shell. Answers go to stdout, errors as one line to stderr, exit code 1."""

from __future__ import annotations

import dataclasses
import io
import sys
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import typer

from polyhead_client.client import Client, Stream
from polyhead_client.errors import InvalidRequest, PolyheadClientError
from polyhead_client.types import Adapter, Message, SamplingOptions, TokenLogprob
from polyhead_client.wire import DEFAULT_TARGET

app = typer.Typer(
    help="Ask a Polyhead server.", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)
adapter_app = typer.Typer(help="Load, unload or pin one adapter.", no_args_is_help=True)
app.add_typer(adapter_app, name="adapter")

Server = Annotated[str | None, typer.Option("--server", help=f"HOST:PORT, default {DEFAULT_TARGET}")]
AdapterOption = Annotated[str | None, typer.Option("--adapter", "-a", help="adapter's name; none: the backbone alone")]
TimeoutS = Annotated[float | None, typer.Option("--timeout-s", help="give up after this many seconds")]
MaxTokens = Annotated[int | None, typer.Option("--max-tokens")]
Temperature = Annotated[float | None, typer.Option("--temperature", help="0: greedy")]
TopK = Annotated[int | None, typer.Option("--top-k")]
TopP = Annotated[float | None, typer.Option("--top-p")]
MinP = Annotated[float | None, typer.Option("--min-p")]
Penalty = Annotated[float | None, typer.Option("--repetition-penalty")]
PresencePenalty = Annotated[float | None, typer.Option("--presence-penalty")]
FrequencyPenalty = Annotated[float | None, typer.Option("--frequency-penalty")]
Seed = Annotated[int | None, typer.Option("--seed")]
Stop = Annotated[list[str] | None, typer.Option("--stop", help="end before this text; may be given several times")]
StopTokenIds = Annotated[
    list[int] | None, typer.Option("--stop-token-id", help="end at this token; may be given several times")
]
MinTokens = Annotated[int | None, typer.Option("--min-tokens", help="no end before this many")]
Count = Annotated[int | None, typer.Option("--n", "-n", help="independent continuations, printed one after another")]
Logprobs = Annotated[
    int | None, typer.Option("--logprobs", help="print a table of the tokens, each with this many likeliest ones")
]
IgnoreEos = Annotated[bool, typer.Option("--ignore-eos")]

_LOGPROB_HEADER = ("token", "id", "logprob", "likeliest")


def main() -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # an answer may hold what the terminal's encoding lacks
    try:
        app()
    except PolyheadClientError as error:
        retry = f" (retry after {error.retry_after_s:g} s)" if error.retry_after_s else ""
        print(f"polyhead: {error.message}{retry}", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:
        # The reader of our output has had enough; a second failure at exit would only add noise.
        sys.stderr.close()
        sys.exit(1)
    except OSError as error:  # of our input or output, such as a full disk; it would come up again at exit
        print(f"polyhead: {error}", file=sys.stderr)
        sys.stderr.close()
        sys.exit(1)


@app.callback()
def _options(context: typer.Context, server: Server = None) -> None:
    context.obj = server


def _connect(context: typer.Context, server: str | None) -> Client:
    return Client(server or context.obj or DEFAULT_TARGET)


@app.command()
def generate(
    context: typer.Context,
    prompt: Annotated[str, typer.Argument(help="the text to continue; -: read it from stdin")],
    adapter: AdapterOption = None,
    max_tokens: MaxTokens = None,
    min_tokens: MinTokens = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: Penalty = None,
    presence_penalty: PresencePenalty = None,
    frequency_penalty: FrequencyPenalty = None,
    seed: Seed = None,
    stop: Stop = None,
    stop_token_id: StopTokenIds = None,
    ignore_eos: IgnoreEos = False,
    n: Count = None,
    logprobs: Logprobs = None,
    parse_special_tokens: Annotated[bool, typer.Option("--parse-special-tokens")] = False,
    timeout_s: TimeoutS = None,
    server: Server = None,
) -> None:
    """Continue a text, streaming."""
    sampling = SamplingOptions(
        max_tokens=max_tokens, min_tokens=min_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        repetition_penalty=repetition_penalty, presence_penalty=presence_penalty, frequency_penalty=frequency_penalty,
        seed=seed, stop=stop, stop_token_ids=stop_token_id, ignore_eos=ignore_eos or None, n=n, logprobs=logprobs,
    )  # fmt: skip
    with (
        _connect(context, server) as client,
        client.stream(
            _text(prompt),
            adapter=adapter,
            parse_special_tokens=parse_special_tokens,
            timeout_s=timeout_s,
            **sampling,
        ) as stream,
    ):
        _print_stream(stream)


@app.command()
def chat(
    context: typer.Context,
    message: Annotated[str, typer.Argument(help="the user's message; -: read it from stdin")],
    system: Annotated[str | None, typer.Option("--system", help="a system message before it")] = None,
    adapter: AdapterOption = None,
    max_tokens: MaxTokens = None,
    min_tokens: MinTokens = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: Penalty = None,
    presence_penalty: PresencePenalty = None,
    frequency_penalty: FrequencyPenalty = None,
    seed: Seed = None,
    stop: Stop = None,
    stop_token_id: StopTokenIds = None,
    ignore_eos: IgnoreEos = False,
    n: Count = None,
    logprobs: Logprobs = None,
    timeout_s: TimeoutS = None,
    server: Server = None,
) -> None:
    """Ask for the assistant's answer to one message, streaming."""
    messages: list[Message] = [Message(role="system", content=system)] if system is not None else []
    messages.append(Message(role="user", content=_text(message)))
    sampling = SamplingOptions(
        max_tokens=max_tokens, min_tokens=min_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        repetition_penalty=repetition_penalty, presence_penalty=presence_penalty, frequency_penalty=frequency_penalty,
        seed=seed, stop=stop, stop_token_ids=stop_token_id, ignore_eos=ignore_eos or None, n=n, logprobs=logprobs,
    )  # fmt: skip
    with (
        _connect(context, server) as client,
        client.chat_stream(messages, adapter=adapter, timeout_s=timeout_s, **sampling) as stream,
    ):
        _print_stream(stream)


@app.command()
def score(
    context: typer.Context,
    text: Annotated[str, typer.Argument(help="the text to score; -: read it from stdin")],
    adapter: AdapterOption = None,
    top_logprobs: Annotated[int, typer.Option("--top-logprobs")] = 0,
    parse_special_tokens: Annotated[bool, typer.Option("--parse-special-tokens")] = False,
    timeout_s: TimeoutS = None,
    server: Server = None,
) -> None:
    """Print the log-probability of each token of a text, and their sum."""
    with _connect(context, server) as client:
        scored = client.score(
            _text(text),
            adapter=adapter,
            top_logprobs=top_logprobs,
            parse_special_tokens=parse_special_tokens,
            timeout_s=timeout_s,
        )
    _print_table(_LOGPROB_HEADER, [_score_row(token) for token in scored.tokens])
    print(f"total {scored.total_logprob:.4f} over {max(0, len(scored.tokens) - 1)} tokens")


@app.command()
def adapters(context: typer.Context, server: Server = None) -> None:
    """List the adapters that the server knows."""
    with _connect(context, server) as client:
        _print_adapters(client.adapters())


@app.command()
def info(context: typer.Context, server: Server = None) -> None:
    """Say what the server is and what it allows."""
    with _connect(context, server) as client:
        facts = dataclasses.asdict(client.info())
    for name, value in facts.items():
        for key, inner in value.items() if isinstance(value, dict) else [("", value)]:
            print(f"{name}{'.' if key else ''}{key} = {inner}")


@adapter_app.command()
def load(context: typer.Context, name: str, server: Server = None) -> None:
    """Bring an adapter into the device pool and wait until it is there."""
    with _connect(context, server) as client:
        _print_adapters([client.load(name)])


@adapter_app.command()
def unload(context: typer.Context, name: str, server: Server = None) -> None:
    """Give up an adapter's memory."""
    with _connect(context, server) as client:
        _print_adapters([client.unload(name)])


@adapter_app.command()
def pin(
    context: typer.Context,
    name: str,
    off: Annotated[bool, typer.Option("--off", help="let it be evicted again")] = False,
    server: Server = None,
) -> None:
    """Keep an adapter in the device pool."""
    with _connect(context, server) as client:
        _print_adapters([client.pin(name, not off)])


def _text(argument: str) -> str:
    if argument != "-":
        return argument
    if sys.stdin is None:
        raise InvalidRequest("there is no standard input to read the text from")
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"standard input is not valid text: {error}") from error


def _print_stream(stream: Stream) -> None:
    """The first continuation as it comes, the others behind it, each under its number; then the tables of logprobs."""
    for chunk in stream:
        if chunk.index == 0:
            print(chunk.text, end="", flush=True)
    print()
    choices = stream.result().choices
    for choice in choices[1:]:
        print(f"\n[{choice.index}]\n{choice.text}")
    for choice in choices:
        if choice.logprobs:
            print(f"\n[{choice.index}]" if len(choices) > 1 else "")
            _print_table(_LOGPROB_HEADER, [_score_row(token) for token in choice.logprobs])


def _print_adapters(listed: Iterable[Adapter]) -> None:
    header = ("NAME", "TYPE", "RANK", "PARAMETERS", "WHERE", "PINNED", "ACTIVE", "HASH", "ERROR")
    rows = [
        (
            adapter.name, adapter.peft_type, adapter.max_rank, f"{adapter.num_parameters:,}", adapter.residency,
            "yes" if adapter.pinned else "no", adapter.active_requests, adapter.content_hash[:12], adapter.error,
        )
        for adapter in listed
    ]  # fmt: skip
    _print_table(header, rows)


def _score_row(token: TokenLogprob) -> tuple[str, int, str, str]:
    likeliest = " ".join(f"{top.token!r}:{top.logprob:.3f}" for top in token.top)
    return repr(token.token), token.token_id, f"{token.logprob:.4f}", likeliest


def _print_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    lines = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


if __name__ == "__main__":
    main()
