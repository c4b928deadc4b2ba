"""The stream between engine thread and event loop loses nothing, keeps order, and stays small for a slow reader."""

from __future__ import annotations

import asyncio
import threading
import time

from polyhead_server.request import ChoiceFinish, FinishedEvent, FinishReason, TokenLogprob, TokensEvent, Usage
from polyhead_server.service.output import MAX_CHUNK_TOKENS, OutputStream

END = FinishedEvent(choices=(ChoiceFinish(index=0, reason=FinishReason.STOP),), usage=Usage(prompt_tokens=1))


def token(index: int, number: int) -> TokensEvent:
    logprob = TokenLogprob(token_id=number, logprob=-1.0)
    return TokensEvent(index=index, text=f"{number},", token_ids=(number,), logprobs=(logprob,))


def test_a_reader_that_comes_late_gets_few_merged_chunks_in_order() -> None:
    async def main() -> None:
        stream = OutputStream(asyncio.get_running_loop())
        for number in range(1000):
            for index in (0, 1):
                stream.put(token(index, number))
        stream.put(END)
        chunks, end = await stream.read()
        assert end is END
        assert len(chunks) == 4
        for index in (0, 1):
            own = [chunk for chunk in chunks if chunk.index == index]
            assert [i for chunk in own for i in chunk.token_ids] == list(range(1000))
            assert [p.token_id for chunk in own for p in chunk.logprobs] == list(range(1000))
            assert "".join(chunk.text for chunk in own) == "".join(f"{number}," for number in range(1000))
        assert max(len(chunk.token_ids) for chunk in chunks) <= MAX_CHUNK_TOKENS

    asyncio.run(main())


def test_many_puts_wake_the_loop_once() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        wakes = []
        call = loop.call_soon_threadsafe
        loop.call_soon_threadsafe = lambda *args: (wakes.append(args), call(*args))[1]  # type: ignore[method-assign]
        stream = OutputStream(loop)
        for number in range(100):
            stream.put(token(0, number))
        assert len(wakes) == 1
        await stream.read()
        stream.put(END)
        assert len(wakes) == 2

    asyncio.run(main())


def test_nothing_is_lost_between_a_fast_thread_and_a_reader() -> None:
    async def main() -> list[int]:
        stream = OutputStream(asyncio.get_running_loop())

        def write() -> None:
            for number in range(5000):
                stream.put(token(0, number))
                if number % 500 == 0:
                    time.sleep(0.001)
            stream.put(END)

        threading.Thread(target=write).start()
        seen: list[int] = []
        end = None
        while end is None:
            chunks, end = await asyncio.wait_for(stream.read(), 10)
            seen += [i for chunk in chunks for i in chunk.token_ids]
        assert stream.has_ended
        return seen

    assert asyncio.run(main()) == list(range(5000))


def test_a_put_after_the_loop_has_closed_does_not_hurt_the_engine() -> None:
    loop = asyncio.new_event_loop()
    stream = OutputStream(loop)
    loop.close()
    stream.put(token(0, 1))
    stream.put(END)
    assert stream.has_ended
