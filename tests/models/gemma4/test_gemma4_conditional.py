"""Pictures, videos and sound among the tokens: the right features in the right places, in every kind of call."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from audiomm import InputError, PlaceholderError, ShapeError
from audiomm.models.gemma4 import Gemma4ForCausalLM, Gemma4Model, Gemma4UnifiedConfig
from audiomm.models.gemma4 import Gemma4UnifiedForConditionalGeneration as Unified

GREEDY = {
    "do_sample": False,
    "eos_token_id": None,
    "max_new_tokens": 14,
    "no_repeat_ngram_size": 1,
    "suppress_tokens": [0],
}
WINDOWED = {"use_bidirectional_attention": "vision"}
CASES = ["dense", "per-layer", "experts", "unified"]
#: Rows of an item's arguments, by row of the prompt: images 0 and 1, the video, clips 0 and 1.
ROWS = {"pixel_values": 1, "image_position_ids": 1, "input_features": 1, "input_features_mask": 1}


@pytest.fixture(scope="module", params=CASES)
def case(tiny, request):
    """(model, prompt and media)."""
    if request.param == "unified":
        return tiny.unified(), {**tiny.prompt(), **tiny.media("unified")}
    extra = WINDOWED if request.param == "dense" else {}
    return tiny.whole(request.param, **extra), {**tiny.prompt(), **tiny.media()}


def row_of(inputs, row):
    """What belongs to one row of the prompt, its padding cut off."""
    start = int((inputs["attention_mask"][row] == 0).sum())
    alone = {name: inputs[name][row : row + 1, start:] for name in ("input_ids", "attention_mask", "mm_token_type_ids")}
    alone |= {name: inputs[name][row : row + 1] for name in ROWS}
    if row == 0:
        alone |= {name: value for name, value in inputs.items() if "video" in name}
    return alone


def close(first, second, bound=1e-5):
    return (first - second).abs().max() < bound * second.abs().max()


@torch.no_grad()
def test_features_replace_the_embeddings_of_their_marks(case):
    model, inputs = case
    prompt, features = model.model.merge(inputs["input_ids"], None, None, None, _media(model, inputs))
    assert [len(item) for item in features["image"]] == [2, 4]
    assert [len(item) for item in features["video"]] == [4]
    assert [len(item) for item in features["audio"]] == [6, 4]
    embedded = prompt.embeddings
    assert torch.allclose(embedded[0, 3:5], features["image"][0])
    assert torch.allclose(embedded[0, 8:14], features["audio"][0])
    assert torch.allclose(embedded[0, [17, 18, 22, 23]], features["video"][0])
    assert torch.allclose(embedded[1, 12:16], features["image"][1])
    text = model.get_input_embeddings()(inputs["input_ids"][0, :3])
    assert torch.equal(embedded[0, :3], text)


def _media(model, inputs):
    from audiomm.models.gemma4.media import Media

    return Media(**{name: value for name, value in inputs.items() if name in Media.__dataclass_fields__})


@torch.no_grad()
def test_a_batch_of_everything_is_its_rows_alone_in_every_cache(case):
    model, inputs = case
    batch = model(**inputs).logits
    for row in range(2):
        start = int((inputs["attention_mask"][row] == 0).sum())
        assert close(model(**row_of(inputs, row)).logits[0], batch[row, start:])
    wanted = model.generate(**inputs, **GREEDY)
    assert torch.equal(model.generate(**inputs, **GREEDY, cache_implementation="static"), wanted)
    assert torch.equal(model.generate(**inputs, **GREEDY, prefill_chunk_size=5), wanted)
    assert torch.equal(model.generate(**inputs, **GREEDY, prefill_chunk_size=5, cache_implementation="static"), wanted)
    for row in range(2):
        start = int((inputs["attention_mask"][row] == 0).sum())
        assert torch.equal(model.generate(**row_of(inputs, row), **GREEDY)[0], wanted[row, start:])


@torch.no_grad()
def test_types_follow_from_the_ids(case):
    model, inputs = case
    told = model(**inputs).logits
    types = inputs["mm_token_type_ids"]
    assert torch.equal(model(**{**inputs, "mm_token_type_ids": None}).logits, told)
    seen = model.model.config.text_config.use_bidirectional_attention == "vision"
    assert torch.equal(model(**{**inputs, "mm_token_type_ids": types * 0}).logits, told) != seen


@torch.no_grad()
def test_features_computed_before_are_taken(case):
    model, inputs = case
    body = model.model
    encoded = {
        "image": body.get_image_features(inputs["pixel_values"], inputs["image_position_ids"]),
        "video": model.get_video_features(
            inputs["pixel_values_videos"], inputs["video_position_ids"], inputs["num_frames_per_video"]
        ),
        "audio": model.get_audio_features(inputs["input_features"], inputs["input_features_mask"]),
    }
    text = {name: inputs[name] for name in ("input_ids", "attention_mask", "mm_token_type_ids")}
    output = model(**text, mm_encoder_outputs=encoded)
    whole = model(**inputs)
    assert torch.equal(output.logits, whole.logits)
    assert torch.equal(output.image_hidden_states, whole.image_hidden_states)
    assert output.image_hidden_states.shape == (6, 32) and output.audio_hidden_states.shape == (10, 32)
    assert torch.equal(model.generate(**text, mm_encoder_outputs=encoded, **GREEDY), model.generate(**inputs, **GREEDY))
    with pytest.raises(InputError, match=r"input_features and mm_encoder_outputs\['audio'\] were both passed"):
        model(**inputs, mm_encoder_outputs={"audio": encoded["audio"]})


@torch.no_grad()
def test_without_a_mask_all_sound_is_real(case):
    model, inputs = case
    features = inputs["input_features"]
    every = torch.ones(features.shape[:2], dtype=torch.bool)
    found, wanted = model.get_audio_features(features), model.get_audio_features(features, every)
    assert torch.equal(found.pooler_output, wanted.pooler_output)


def test_marks_and_media_must_agree(case):
    model, inputs = case
    fewer = {
        **inputs,
        "pixel_values": inputs["pixel_values"][:1],
        "image_position_ids": inputs["image_position_ids"][:1],
    }
    with pytest.raises(PlaceholderError, match="Image features and image tokens do not match, tokens: 6, features: 2"):
        model(**fewer)
    swapped = {**inputs, "input_features": inputs["input_features"].flip(0),
               "input_features_mask": inputs["input_features_mask"].flip(0)}  # fmt: skip
    with pytest.raises(PlaceholderError, match="Row 0 of the batch holds 6 audio places"):
        model(**swapped)
    silent = {name: value for name, value in inputs.items() if "features" not in name}
    for call in (model.__call__, model.generate):
        with pytest.raises(PlaceholderError, match="row 0 of the batch holds 6 audio places, but input_features was"):
            call(**silent)
    with pytest.raises(ShapeError, match="counts 3 frames, but pixel_values_videos holds 2"):
        model(**{**inputs, "num_frames_per_video": torch.tensor([3])})
    with pytest.raises(InputError, match="num_frames_per_video was not passed"):
        model(**{**inputs, "num_frames_per_video": None})
    with pytest.raises(InputError, match="image_position_ids were not passed"):
        model.get_image_features(inputs["pixel_values"])
    with pytest.raises(ShapeError, match="pass exactly one of the two"):
        model(attention_mask=inputs["attention_mask"])
    with pytest.raises(ShapeError, match="pass input_ids or inputs_embeds"):
        model.model.get_placeholder_mask()


def test_media_that_a_model_does_not_take_are_refused(tiny):
    model = tiny.whole("dense")
    inputs = {**tiny.prompt(), **tiny.media()}
    del model.model.audio_tower, model.model.vision_tower
    with pytest.raises(InputError, match=r"input_features was passed, but this model takes no audio: its audio_config"):
        model.get_audio_features(inputs["input_features"])
    with pytest.raises(InputError, match="its vision_config is null"):
        model(**inputs)
    config = model.config.copy()
    config.audio_config = None
    with pytest.raises(InputError, match="takes no sound: its audio_config is null"):
        config.audio_tokens(100)
    with pytest.raises(InputError, match="both must be multiples of 12"):
        config.image_tokens(24, 30)
    assert config.image_tokens(24, 36) == 6 and config.video_tokens(5, 24, 36) == 30
    assert [tiny.whole("dense").config.audio_tokens(frames) for frames in (0, 1, 4, 5, 99, 2999)] == [
        0,
        1,
        1,
        2,
        25,
        750,
    ]
    assert Gemma4UnifiedConfig(audio_config={}, vision_config={}).audio_tokens(31) == 31


def test_inputs_made_for_other_sizes_are_refused_by_the_12b(tiny):
    model = tiny.unified()
    with pytest.raises(ShapeError, match="Gemma4UnifiedProcessor makes them"):
        model.get_audio_features(torch.zeros(1, 99, 128))
    with pytest.raises(ShapeError, match="squares of 12 x 12 pixels"):
        model.get_image_features(torch.zeros(1, 36, 48), torch.zeros(1, 36, 2, dtype=torch.long))


@torch.no_grad()
def test_the_12b_reads_the_names_of_the_hub_file(tiny, tmp_path):
    from safetensors.torch import load_file, save_file

    model = tiny.unified()
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert "model.embed_vision.multimodal_embedder.embedding_projection.weight" in weights
    hub = {}
    for name, tensor in weights.items():
        inner = "multimodal_embedder" in name
        old, new = ("multimodal_embedder.", "") if inner else ("model.embed_vision.", "model.vision_embedder.")
        hub[name.replace(old, new)] = tensor
    save_file(hub, tmp_path / "model.safetensors")
    inputs = {**tiny.prompt(), **tiny.media("unified")}
    assert torch.equal(Unified.from_pretrained(tmp_path)(**inputs).logits, model(**inputs).logits)


@torch.no_grad()
def test_a_whole_model_loads_without_its_head_and_its_text_alone(tiny, tmp_path):
    model, inputs = tiny.whole("per-layer"), {**tiny.prompt(), **tiny.media()}
    model.save_pretrained(tmp_path)
    body = Gemma4Model.from_pretrained(tmp_path)
    assert torch.equal(body(**inputs).last_hidden_state, model.model(**inputs).last_hidden_state)
    body.save_pretrained(tmp_path / "body")
    assert torch.equal(type(model).from_pretrained(tmp_path / "body")(**inputs).logits, model(**inputs).logits)
    ids = tiny.tokens(1, 9) % 80 + 1
    assert torch.equal(Gemma4ForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)


def test_only_labels_decide_what_is_learned_and_all_parts_are_reached(case):
    model, inputs = case
    labels = inputs["input_ids"].clone()
    kept = labels.masked_fill(inputs["attention_mask"] == 0, -100)
    for wanted in (labels, kept):  # padding is learned unless its labels are -100, as in transformers
        output = model(**inputs, labels=wanted)
        scores, targets = output.logits[:, :-1].flatten(0, 1), wanted[:, 1:].flatten()
        assert torch.allclose(output.loss, functional.cross_entropy(scores, targets, ignore_index=-100), atol=1e-5)
    model.zero_grad()
    short = kept.clone()
    short[:, :-5] = -100
    part, whole = model(**inputs, labels=short, loss_positions_only=True), model(**inputs, labels=short)
    assert torch.allclose(part.loss, whole.loss, atol=1e-5) and part.logits.shape[1] == 5
    part.loss.backward()
    reached = {
        name.split(".")[1] for name, p in model.named_parameters() if p.grad is not None and name != "lm_head.weight"
    }
    assert {"language_model", "embed_vision", "embed_audio"} <= reached
    model.zero_grad()


@torch.no_grad()
def test_pictures_of_packed_rows_still_see_themselves(case):
    model, inputs = case
    alone = [row_of(inputs, row) for row in range(2)]
    lengths = [each["input_ids"].shape[1] for each in alone]
    packed = {name: value for name, value in inputs.items() if name in ROWS or "video" in name}
    packed |= {name: torch.cat([each[name] for each in alone], dim=1) for name in ("input_ids", "mm_token_type_ids")}
    places = torch.cat([torch.arange(length) for length in lengths])[None]
    logits = model(**packed, position_ids=places, use_cache=False).logits
    wanted = torch.cat([model(**each).logits for each in alone], dim=1)
    assert (logits - wanted).abs().max() < 1e-4 * wanted.abs().max()


@torch.no_grad()
def test_a_mark_the_model_writes_is_read_as_padding(case):
    model, inputs = case
    cache = model.make_cache(2)
    media = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    model.prefill(inputs["input_ids"], cache, attention_mask=inputs["attention_mask"], **media)
    read = cache.length
    marks = torch.tensor([[90], [92]])
    found = model.step(marks, cache).logits
    cache.crop(read)
    assert torch.equal(model.step(marks * 0, cache).logits, found)
    cache.crop(read)
    assert torch.equal(model(marks, past_key_values=cache).logits, found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_low_precision_gives_numbers(case, dtype):
    model, inputs = case
    wanted = model(**inputs).logits
    low = type(model)(model.config)
    low.load_state_dict(model.state_dict())
    found = low.to(dtype).eval()(**inputs).logits
    assert found.isfinite().all()
    real = inputs["attention_mask"].bool()
    assert (found - wanted)[real].abs().mean() < 0.3 * wanted[real].abs().mean()


@pytest.mark.parametrize("kind", ["per-layer", "unified"])
def test_processes_never_wait_for_towers_that_had_nothing_to_do(tiny, kind, monkeypatch):
    model = tiny.unified() if kind == "unified" else tiny.whole(kind)
    ids = tiny.tokens(2, 12) % 80 + 1
    wanted = model(ids, labels=ids).loss
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    model.train()
    loss = model(ids, labels=ids).loss
    assert torch.equal(loss, wanted)
    loss.backward()
    assert [name for name, weight in model.named_parameters() if weight.grad is None] == []
    assert all(not weight.grad.any() for name, weight in model.named_parameters() if "_tower" in name)
