"""generate(): the same tokens whatever the cache, the batch, the help of a draft, and the form the prompt comes in."""

from __future__ import annotations

import pytest
import torch

from audiomm.generation.streamers import BaseStreamer

NEW = 14  # more than twice the window
#: Half the layers, every kind of them among these: windows, one that sees all, and two that share keys.
SMALL = {
    "num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2,
    "activation_sparsity_pattern": [0.8, 0.0, 0.0, 0.0],
}  # fmt: skip


def naive(model, ids, **inputs):
    """Greedy tokens, the whole text read anew at every step."""
    with torch.no_grad():
        for _ in range(NEW):
            last = model(ids, use_cache=False, **inputs).logits[:, -1:].argmax(dim=-1)
            ids = torch.cat((ids, last), dim=1)
    return ids


@pytest.fixture(scope="module")
def written(text_model, ids):
    """A model, three prompts and what it writes to each, read anew at every step."""
    model, prompts = text_model(**SMALL), ids(rows=3, length=9)
    return model, prompts, naive(model, prompts)


OPTIONS = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}


@pytest.mark.parametrize("cache", [None, "dynamic", "static", "hybrid", "sliding_window"])
def test_every_cache_writes_the_same_tokens(written, cache):
    model, prompts, expected = written
    assert torch.equal(model.generate(prompts, cache_implementation=cache, **OPTIONS), expected)
    assert torch.equal(model.generate(prompts[1:2], cache_implementation=cache, **OPTIONS), expected[1:2])


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_left_padding_changes_no_token(written, cache):
    model, prompts, expected = written
    padded = torch.cat((torch.zeros(3, 5, dtype=torch.long), prompts), dim=1)
    padded[1, :7] = torch.tensor([0, 0, 0, 0, 0, 0, 0])
    mask = (padded != 0).long()
    tokens = model.generate(padded, attention_mask=mask, cache_implementation=cache, **OPTIONS)
    assert torch.equal(tokens[[0, 2], 5:], expected[[0, 2]])
    assert torch.equal(tokens[1, 7:], naive(model, prompts[1:2, 2:])[0])


def test_drafts_change_no_token(written, text_model):
    model, prompts, expected = written
    assistant = text_model(
        seed=4, num_hidden_layers=2, num_kv_shared_layers=0, layer_types=None, activation_sparsity_pattern=0.0
    )
    assert torch.equal(model.generate(prompts[:1], assistant_model=assistant, **OPTIONS), expected[:1])
    assert torch.equal(model.generate(prompts[:1], prompt_lookup_num_tokens=4, **OPTIONS), expected[:1])


def test_embeddings_of_a_prompt_write_what_its_ids_do(written):
    model, prompts, expected = written
    embeds = model.get_input_embeddings()(prompts).detach()
    new = expected[:, 9:]
    assert torch.equal(model.generate(inputs_embeds=embeds, **OPTIONS), new)
    own = model.model.get_per_layer_inputs(prompts).detach()
    assert torch.equal(model.generate(inputs_embeds=embeds, per_layer_inputs=own, **OPTIONS), new)
    assert torch.equal(model.generate(prompts, inputs_embeds=embeds, **OPTIONS), expected)
    static = model.generate(inputs_embeds=embeds, cache_implementation="static", **OPTIONS)
    assert torch.equal(static, new)
    assert torch.equal(model.generate(inputs_embeds=embeds[:1], prompt_lookup_num_tokens=3, **OPTIONS), new[:1])


def test_beams_of_a_batch_are_those_of_each_row(written):
    model, prompts, _ = written
    options = {"num_beams": 3, "max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False}
    together = model.generate(prompts, **options)
    alone = torch.cat([model.generate(row[None], cache_implementation="static", **options) for row in prompts])
    assert torch.equal(together, alone)


def test_sampling_repeats_with_the_same_seed(written):
    model, prompts, _ = written
    options = {"do_sample": True, "top_k": 20, "temperature": 0.8, "max_new_tokens": 8}
    one, other = (model.generate(prompts, generator=torch.Generator().manual_seed(6), **options) for _ in range(2))
    assert torch.equal(one, other)


def test_hidden_states_of_beams_keep_their_streams(written):
    model, prompts, _ = written
    out = model.generate(
        prompts[:2], num_beams=2, max_new_tokens=3, output_hidden_states=True, return_dict_in_generate=True
    )
    assert [states[0].shape[:2] for states in out.hidden_states] == [(4, 4)] * len(out.hidden_states)


class Collected(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def test_tokens_stream_as_they_come(written):
    model, prompts, expected = written
    streamer = Collected()
    model.generate(prompts[:1], streamer=streamer, **OPTIONS)
    assert streamer.ended and streamer.tokens[-NEW:] == expected[0, -NEW:].tolist()


def test_a_conversation_goes_on_in_its_cache(text_model, ids):
    model, tokens = text_model(**SMALL), ids(rows=1, length=20)
    cache = model.make_cache(1)
    with torch.no_grad():
        for turn in (tokens[:, :9], tokens[:, 9:10], tokens[:, 10:20]):
            last = model(turn, past_key_values=cache).logits[:, -1]
        assert torch.allclose(last, model(tokens).logits[:, -1], atol=2e-5)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_rows_with_and_without_media_write_what_they_do_alone(model, prompt, cache):
    batch = prompt()
    runs = []
    for tower in (model.vision_tower, model.audio_tower):
        tower.register_forward_hook(lambda *_: runs.append(1))
    options = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False, "cache_implementation": cache}
    together = model.generate(**batch, **options)
    assert len(runs) == 2  # the towers ran when the prompt was read, and no more
    rows = (({"pixel_values"}, 0), (set(), None), (set(), 1))
    for row, (names, clip) in enumerate(rows):
        real = batch["attention_mask"][row].bool()
        inputs = {name: batch[name] for name in names}
        if clip is not None:
            inputs["input_features"] = batch["input_features"][clip : clip + 1]
            inputs["input_features_mask"] = batch["input_features_mask"][clip : clip + 1]
        alone = model.generate(batch["input_ids"][row : row + 1, real], **inputs, **options)
        assert torch.equal(alone[0], together[row, int((~real).sum()) :])


def test_samples_of_one_prompt_share_its_media(model, prompt):
    batch = prompt()
    options = {"do_sample": True, "num_return_sequences": 2, "max_new_tokens": 3}
    assert model.generate(**batch, token_type_ids=torch.zeros_like(batch["input_ids"]), **options).shape[0] == 6


@pytest.mark.parametrize("size", [1, 7, 50])
def test_a_prompt_read_in_pieces_is_the_prompt(written, model, prompt, size):
    text, prompts, expected = written
    assert torch.equal(text.generate(prompts, prefill_chunk_size=size, **OPTIONS), expected)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    whole = model.generate(**prompt(), **options)
    assert torch.equal(model.generate(**prompt(), prefill_chunk_size=size, **options), whole)


def test_drafts_after_media_change_no_token(model, prompt):
    batch = {name: value[:1] for name, value in prompt().items()}
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    expected = model.generate(**batch, **options)
    assert torch.equal(model.generate(**batch, assistant_model=model, **options), expected)
    assert torch.equal(model.generate(**batch, prompt_lookup_num_tokens=3, **options), expected)
