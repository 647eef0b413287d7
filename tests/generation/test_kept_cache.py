"""Texts that go on from the cache of an earlier call: turn by turn, from a common beginning, and where they cannot."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from audiomm.base.errors import GenerationError, ShapeError
from audiomm.generation.decode import StopFlag

GREEDY = {"do_sample": False, "max_new_tokens": 7, "return_dict_in_generate": True, "pad_token_id": 0}
STATIC = {"cache_implementation": "static", "disable_compile": True}


@pytest.fixture(scope="module", params=["gemma3n", "gemma4", "gemma4 that sees blocks"])
def pair(request: Any, gemmas: Any) -> tuple[str, Any, Any]:
    """(family, processor, model); pictures of the last see each other whole."""
    family = request.param.partition(" ")[0]
    make_processor, make_model = gemmas.FAMILIES[family]
    processor = make_processor()
    model = make_model(processor)
    if family != request.param:
        model.config.text_config.use_bidirectional_attention = "vision"
    return family, processor, model


def read(processor: Any, text: Any, **media: Any) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """(ids, mask, media) of texts; types of tokens follow from the ids."""
    made = dict(processor(text=text, return_tensors="pt", padding=True, return_mm_token_type_ids=False, **media))
    return made.pop("input_ids"), made.pop("attention_mask"), made


def turns_of(pair: tuple[str, Any, Any], gemmas: Any) -> list[tuple[Tensor, Tensor, dict[str, Any]]]:
    family, processor, _ = pair
    marks = gemmas.MARKS[family]
    return [
        read(processor, f"{marks['image']} what is it", images=[[gemmas.picture(1)]]),
        read(processor, "and so on"),
        read(processor, f"{marks['audio']} and {marks['image']}", images=[[gemmas.picture(2)]], audio=[gemmas.noise()]),
    ]


@pytest.mark.parametrize("options", [{}, STATIC, {"prefill_chunk_size": 5}, {"prompt_lookup_num_tokens": 2}])
def test_a_chat_goes_on_as_if_it_was_read_anew(
    pair: tuple[str, Any, Any], gemmas: Any, options: dict[str, Any]
) -> None:
    family, processor, model = pair
    cache = None
    ids = torch.zeros(1, 0, dtype=torch.long)
    heard: dict[str, Tensor] = {}
    for new, _, media in turns_of(pair, gemmas):
        ids = torch.cat([ids, new], dim=1)
        heard |= {name: torch.cat([heard[name], one]) if name in heard else one for name, one in media.items()}
        known = {} if cache is None else {"past_key_values": cache}
        types = {"mm_token_type_ids": (ids == processor.image_token_id).long()} if family == "gemma4" else {}
        kept = model.generate(ids, **media, **types, **known, **GREEDY, **options)
        whole = model.generate(ids, **heard, **GREEDY)
        assert torch.equal(kept.sequences, whole.sequences)
        assert known == {} or kept.past_key_values is cache
        ids, cache = kept.sequences, kept.past_key_values
        assert cache.length == ids.shape[1] - 1


@pytest.mark.parametrize("options", [{}, STATIC])
def test_rows_that_ended_early_are_as_alone_in_the_next_turn(
    pair: tuple[str, Any, Any], options: dict[str, Any]
) -> None:
    _, processor, model = pair
    ids, mask, _ = read(processor, ["hello the", "lo", "so the hello"])
    first = model.generate(ids, attention_mask=mask, **GREEDY, **options)
    # Whatever the second and third row wrote from some place on counts as padding.
    written = torch.ones_like(first.sequences[:, ids.shape[1] :])
    written[1, 3:], written[2, 1:] = 0, 0
    more, more_mask, _ = read(processor, ["more", "a hello", "x"])
    ids, mask = torch.cat([first.sequences, more], dim=1), torch.cat([mask, written, more_mask], dim=1)
    together = model.generate(ids, attention_mask=mask, past_key_values=first.past_key_values, **GREEDY)
    for row in range(3):
        alone = model.generate(ids[row][mask[row] > 0][None], **GREEDY).sequences[0]
        assert together.sequences[row, ids.shape[1] :].tolist() == alone[int(mask[row].sum()) :].tolist()


@pytest.mark.parametrize("options", [{}, {"prompt_lookup_num_tokens": 3}])
def test_a_chat_goes_on_from_captured_steps(pair: tuple[str, Any, Any], graphs: Any, options: dict[str, Any]) -> None:
    _, processor, model = pair
    ids = read(processor, "hello the")[0]
    first = model.generate(ids, **GREEDY | {"max_new_tokens": 20}, **options)
    assert graphs.replays > 0 and first.past_key_values.fixed
    # Longer than the buffers of the first run.
    more = read(processor, "so what is " * 9)[0]
    ids = torch.cat([first.sequences, more], dim=1)
    assert ids.shape[1] > first.past_key_values.capacity
    kept = model.generate(ids, past_key_values=first.past_key_values, **GREEDY)
    assert torch.equal(kept.sequences, model.generate(ids, **GREEDY, cache_implementation="dynamic").sequences)


def test_steps_that_were_taken_after_the_end_are_not_kept(
    pair: tuple[str, Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, processor, model = pair
    ids = read(processor, "hello the")[0]
    whole = model.generate(ids, **GREEDY).sequences
    told: list[Any] = []

    def late(flag: StopFlag, numbers: Tensor) -> list[Any] | None:
        """As on a device that works ahead."""
        told.append(numbers.tolist())
        return None if len(told) == 1 else told[-2]

    with monkeypatch.context() as patch:
        patch.setattr(StopFlag, "read", late)
        end = {"eos_token_id": int(whole[0, ids.shape[1] + 2])}
        first = model.generate(ids, **GREEDY | end)
    length = first.sequences.shape[1]
    assert length <= ids.shape[1] + 3 and first.past_key_values.length == length - 1
    ids = torch.cat([first.sequences, read(processor, "so")[0]], dim=1)
    kept = model.generate(ids, past_key_values=first.past_key_values, **GREEDY)
    assert torch.equal(kept.sequences, model.generate(ids, **GREEDY).sequences)


def test_a_common_beginning_is_read_once_for_several_texts(pair: tuple[str, Any, Any]) -> None:
    _, processor, model = pair
    start = read(processor, "you are a very helpful one: ")[0]
    with torch.no_grad():
        cache = model(start, use_cache=True).past_key_values
    for text in ("hello", "what is the"):
        ids = torch.cat([start, read(processor, text)[0]], dim=1)
        kept = model.generate(ids, past_key_values=copy.deepcopy(cache), **GREEDY)
        assert torch.equal(kept.sequences, model.generate(ids, **GREEDY).sequences)
    assert cache.length == start.shape[1]


def test_an_empty_cache_is_filled(pair: tuple[str, Any, Any]) -> None:
    _, processor, model = pair
    ids = read(processor, "hello the")[0]
    for options in ({"fixed": False, "max_length": None}, {"fixed": True, "max_length": 3}):
        cache = model.make_cache(1, **options)
        kept = model.generate(ids, past_key_values=cache, **GREEDY)
        assert torch.equal(kept.sequences, model.generate(ids, **GREEDY).sequences)
        assert cache.length == kept.sequences.shape[1] - 1


def test_a_cache_of_one_s_own_goes_from_call_to_call(pair: tuple[str, Any, Any]) -> None:
    """As transformers' guide has it: nothing but the ids comes back, and the cache has grown by them."""
    _, processor, model = pair
    greedy = {name: value for name, value in GREEDY.items() if name != "return_dict_in_generate"}
    cache, mask = model.make_cache(2), torch.zeros(2, 0, dtype=torch.long)
    ids = mask
    for turn in range(3):
        new, new_mask, _ = read(processor, ["hello the so", "lo"] if turn % 2 else ["a", "what is the hello"])
        ids, mask = torch.cat([ids, new], dim=1), torch.cat([mask, new_mask], dim=1)
        # One row ends before the other.
        end = {"eos_token_id": int(model.generate(ids, attention_mask=mask, **greedy)[turn % 2, ids.shape[1] + 1])}
        whole = model.generate(ids, attention_mask=mask, **greedy, **end)
        ids = model.generate(ids, attention_mask=mask, past_key_values=cache, **greedy, **end)
        assert torch.equal(ids, whole) and cache.length == ids.shape[1] - 1
        written = ids[:, mask.shape[1] :]
        mask = torch.cat([mask, (written != greedy["pad_token_id"]).long()], dim=1)


def test_several_answers_and_searches_go_on_from_one_cache(pair: tuple[str, Any, Any]) -> None:
    _, processor, model = pair
    first = model.generate(read(processor, "hello the")[0], **GREEDY)
    ids = torch.cat([first.sequences, read(processor, "so")[0]], dim=1)
    for options in ({"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True, "top_k": 1}):
        cache = copy.deepcopy(first.past_key_values)
        kept = model.generate(ids, past_key_values=cache, **GREEDY | options)
        assert torch.equal(kept.sequences, model.generate(ids, **GREEDY | options).sequences)


def test_what_cannot_go_on_is_refused(pair: tuple[str, Any, Any], gemmas: Any) -> None:
    family, processor, model = pair
    ids, mask, _ = read(processor, ["hello the", "lo"])
    first = model.generate(ids, attention_mask=mask, **GREEDY)
    cache, longer = first.past_key_values, torch.cat([first.sequences, ids], dim=1)
    embeds = model.get_input_embeddings()(longer)
    others = next(name for name in gemmas.FAMILIES if name != family)
    make_processor, make_model = gemmas.FAMILIES[others]
    stranger = make_model(make_processor()).make_cache(2)
    for call, words in (
        ({"input_ids": longer, "past_key_values": ((ids, ids),)}, "past_key_values is a tuple"),
        ({"input_ids": longer, "past_key_values": stranger}, "other layers"),
        ({"input_ids": longer[:1], "past_key_values": cache}, "hold 2 rows, but the prompt has 1"),
        ({"input_ids": ids, "past_key_values": cache}, f"hold {cache.length} tokens and the prompt has {ids.shape[1]}"),
        ({"inputs_embeds": embeds, "past_key_values": cache}, "input_ids, not inputs_embeds"),
    ):
        with pytest.raises(GenerationError, match=words):
            model.generate(**call, **GREEDY)
    shown = torch.ones_like(longer)
    shown[0, -ids.shape[1]] = 0
    with pytest.raises(GenerationError, match="row 1 of attention_mask shows tokens that past_key_values do not hold"):
        model.generate(longer, attention_mask=shown, past_key_values=cache, **GREEDY)


def test_a_mask_of_another_length_is_refused(pair: tuple[str, Any, Any]) -> None:
    _, processor, model = pair
    ids = read(processor, "hello the")[0]
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        short = torch.ones_like(ids)
        short[:, 0] = 0
        with pytest.raises(ShapeError, match=f"there are {cache.length} tokens in past_key_values"):
            model(ids, attention_mask=short, past_key_values=cache)


def test_types_of_fewer_tokens_than_there_are_are_refused(gemmas: Any) -> None:
    processor = gemmas.processor_4()
    model = gemmas.gemma4_model(processor)
    model.config.text_config.use_bidirectional_attention = "vision"
    ids, _, media = turns_of(("gemma4", processor, model), gemmas)[0]
    with pytest.raises(ShapeError, match=rf"shape \(1, 3\) for 1 rows of {ids.shape[1]} tokens"):
        model(ids, mm_token_type_ids=ids[:, :3], **media)
