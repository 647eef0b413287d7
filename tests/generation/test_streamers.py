"""Streamers: what they hand on, when, and to whom."""

from __future__ import annotations

import asyncio
import queue
import threading

import pytest
import torch

from audiomm.base.errors import GenerationError
from audiomm.generation import (
    AsyncTextIteratorStreamer,
    BaseStreamer,
    GenerationConfig,
    TextIteratorStreamer,
    TextStreamer,
    generate_tokens,
    make_request,
)


class Words:
    """Each id is a piece of text."""

    def __init__(self, pieces=None):
        self.pieces = pieces or [f"{chr(97 + i)} " for i in range(24)]

    def decode(self, ids, skip_special_tokens=False):
        return "".join(self.pieces[i] for i in ids if not (skip_special_tokens and i == 1))


class Collector(TextStreamer):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.pieces = []

    def on_finalized_text(self, text, stream_end=False):
        self.pieces.append((text, stream_end))


def test_words_are_handed_on_when_they_are_complete():
    streamer = Collector(Words(["pro", "mpt", " new", " wo", "rd", "\n", "日", "本"]))
    streamer.put(torch.tensor([[0, 1]]))
    for token in (2, 3, 4, 5, 6, 7, 2):
        streamer.put(torch.tensor([token]))
    streamer.end()
    texts = [piece for piece, _ in streamer.pieces]
    assert texts == ["", "prompt ", "new ", "", "word\n", "日", "本", " ", "new"]
    assert streamer.pieces[-1] == ("new", True)


def test_the_prompt_can_be_left_out_each_time():
    streamer = Collector(Words(), skip_prompt=True, skip_special_tokens=True)
    for _ in range(2):
        streamer.pieces.clear()
        streamer.put(torch.tensor([[5, 6, 7]]))
        streamer.put(torch.tensor([2]))
        streamer.put(torch.tensor([1]))
        streamer.end()
        assert "".join(text for text, _ in streamer.pieces) == "c "


def test_text_goes_to_standard_output(capsys, toy, prompts):
    got = toy(0).generate(prompts[:1], max_new_tokens=4, streamer=TextStreamer(Words()))
    assert capsys.readouterr().out == Words().decode(got[0].tolist()) + "\n"


def test_more_than_one_sequence_is_refused(toy, prompts):
    with pytest.raises(GenerationError, match="takes one sequence, but tokens of 3 were put"):
        toy().generate(prompts, streamer=Collector(Words()))
    with pytest.raises(GenerationError, match="takes one sequence, but tokens of 2 were put"):
        toy().generate(prompts[:1], do_sample=True, num_return_sequences=2, streamer=Collector(Words()))


@pytest.mark.parametrize("options", [{}, {"prompt_lookup_num_tokens": 3}])
def test_an_iterator_reads_from_another_thread(toy, prompts, options):
    model, streamer = toy(0, eos_token_id=None), TextIteratorStreamer(Words(), skip_prompt=True, timeout=10)
    arguments = {"max_new_tokens": 5, "streamer": streamer, **options}
    thread = threading.Thread(target=model.generate, args=(prompts[:1],), kwargs=arguments)
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == Words().decode(model.generate(prompts[:1], max_new_tokens=5)[0, 5:].tolist())


def test_one_stream_may_span_several_calls(toy, prompts):
    model, streamer = toy(0, eos_token_id=None).eval(), Collector(Words(), skip_prompt=True)
    config = GenerationConfig(max_new_tokens=3)
    streamer.put(prompts[:1])
    for row in range(2):
        generate_tokens(make_request(model, prompts[row : row + 1], config, streamer=streamer), stream_goes_on=True)
    streamer.end()
    wanted = [model.generate(prompts[row : row + 1], config)[0, 5:].tolist() for row in range(2)]
    assert "".join(text for text, _ in streamer.pieces) == Words().decode(wanted[0] + wanted[1])
    assert [ended for _, ended in streamer.pieces] == [False] * 6 + [True]


def test_an_iterator_ends_when_generation_fails(toy, prompts):
    streamer = TextIteratorStreamer(Words(), timeout=5)
    with pytest.raises(GenerationError):
        toy().generate(prompts[:1], streamer=streamer, num_beams=0)
    assert list(streamer) == [""]


def test_an_iterator_gives_up_after_its_timeout():
    with pytest.raises(queue.Empty):
        next(TextIteratorStreamer(Words(), timeout=0.01))


def test_an_async_iterator_reads_in_its_loop(toy, prompts):
    model = toy(0, eos_token_id=None)

    async def read():
        streamer = AsyncTextIteratorStreamer(Words(), skip_prompt=True, timeout=10)
        thread = threading.Thread(
            target=model.generate, args=(prompts[:1],), kwargs={"max_new_tokens": 5, "streamer": streamer}
        )
        thread.start()
        pieces = [piece async for piece in streamer]
        thread.join()
        return "".join(pieces)

    text = asyncio.run(read())
    assert text == Words().decode(model.generate(prompts[:1], max_new_tokens=5)[0, 5:].tolist())


def test_an_async_iterator_gives_up_after_its_timeout():
    async def read():
        async for _ in AsyncTextIteratorStreamer(Words(), timeout=0.01):
            pass

    with pytest.raises(asyncio.TimeoutError):
        asyncio.run(read())


def test_a_streamer_without_methods_says_so():
    with pytest.raises(GenerationError, match="BaseStreamer does not define put"):
        BaseStreamer().put(torch.tensor([1]))
    with pytest.raises(GenerationError, match="BaseStreamer does not define end"):
        BaseStreamer().end()
