"""The whole model: media on their places, the same answer in a batch as alone, and complaints that name the row."""

from __future__ import annotations

import copy

import pytest
import torch

from audiomm.base.errors import AudioLimitError, ConfigError, InputError, PlaceholderError, ShapeError
from audiomm.models.gemma3n import Gemma3nForConditionalGeneration

IMAGE, AUDIO, PLACES = 257, 273, 4
CLOSE = 1e-4


def logits_of(model, **inputs):
    with torch.no_grad():
        return model(**inputs).logits


def single_rows(batch):
    """The rows of a batch of `prompt`, each with its own media and without padding."""
    for row, (images, clips) in enumerate((((0,), (0,)), ((), ()), ((), (1,)))):
        real = batch["attention_mask"][row].bool()
        inputs = {"input_ids": batch["input_ids"][row : row + 1, real]}
        if images:
            inputs["pixel_values"] = batch["pixel_values"][list(images)]
        if clips:
            valid = batch["input_features_mask"][clips[0]]
            inputs["input_features"] = batch["input_features"][list(clips)][:, valid]
        yield row, real, inputs


def test_rows_of_different_media_are_what_they_are_alone(model, prompt):
    batch = prompt()
    together = logits_of(model, **batch)
    for row, real, inputs in single_rows(batch):
        assert (logits_of(model, **inputs)[0] - together[row, real]).abs().max() < CLOSE, row


def test_a_clip_is_what_it_is_alone_next_to_a_longer_one(model):
    """Complaints vllm#24006 and #50958: a clip's last tokens depended on what it was batched with."""
    short, long = torch.randn(1, 33, 16), torch.randn(1, 61, 16)
    padded = torch.cat((torch.nn.functional.pad(short, (0, 0, 0, 28)), long))
    mask = torch.ones(2, 61, dtype=torch.bool)
    mask[0, 33:] = False
    ids = torch.tensor([[251, *[AUDIO] * PLACES, 272]] * 2)
    both = logits_of(model, input_ids=ids, input_features=padded, input_features_mask=mask)
    alone = logits_of(model, input_ids=ids[:1], input_features=short)
    assert (both[0] - alone[0]).abs().max() < CLOSE


def test_masks_of_numbers_and_no_mask_count_as_masks(model, prompt):
    batch = prompt()
    expected = logits_of(model, **batch)
    batch["input_features_mask"] = batch["input_features_mask"].long()
    assert torch.equal(logits_of(model, **batch), expected)
    batch["input_features_mask"] = torch.ones(2, 60)
    everything = logits_of(model, **batch)
    del batch["input_features_mask"]
    assert torch.equal(logits_of(model, **batch), everything)


def test_what_stood_on_the_places_is_handed_out_and_can_be_used_again(model, prompt):
    batch = prompt()
    with torch.no_grad():
        out = model(**batch, token_type_ids=torch.zeros_like(batch["input_ids"]))
        images = model.get_image_features(batch["pixel_values"])
        clips = model.get_audio_features(batch["input_features"], ~batch["input_features_mask"])
    assert out.image_hidden_states.shape == (1, PLACES, 32)
    assert out.audio_hidden_states.shape == (2, PLACES, 32)
    assert torch.equal(images.pooler_output, out.image_hidden_states)
    again = {name: batch[name] for name in ("input_ids", "attention_mask")}
    again["mm_encoder_outputs"] = {"image": images, "audio": clips}
    assert torch.allclose(logits_of(model, **again), out.logits, atol=1e-6)
    with pytest.raises(InputError, match="same media twice"):
        model(**batch, mm_encoder_outputs={"image": images})
    with pytest.raises(InputError, match="entry 'video'"):
        model(**again | {"mm_encoder_outputs": {"video": images}})


def test_several_pictures_and_clips_in_a_row_keep_their_order(model):
    generator = torch.Generator().manual_seed(4)
    pictures = torch.rand(2, 3, 32, 32, generator=generator)
    ids = torch.tensor([[2, *[IMAGE] * PLACES, 9, *[IMAGE] * PLACES, 10]])
    straight = logits_of(model, input_ids=ids, pixel_values=pictures)
    swapped = logits_of(model, input_ids=ids, pixel_values=pictures.flip(0))
    assert (straight - swapped).abs().max() > 0.01
    uneven = torch.tensor([[2, *[IMAGE] * PLACES, *[IMAGE] * PLACES], [2, *range(20, 28)]])
    assert logits_of(model, input_ids=uneven, pixel_values=pictures).isfinite().all()


def test_ids_of_media_have_rows_of_their_own(model):
    """The end marks come out of the embedders' tables; ids above are ordinary (complaint transformers#39921)."""
    ids = torch.tensor([[5, 256, 272, 271, 287]])
    embeds = model.model.embed(ids)
    assert torch.equal(embeds[0, 0], model.get_input_embeddings()(ids)[0, 0])
    assert torch.allclose(embeds[0, 1], model.model.embed_vision(torch.tensor(256)), atol=1e-5)
    assert torch.allclose(embeds[0, 4], model.model.embed_audio(torch.tensor(287)), atol=1e-5)
    model.resize_token_embeddings(295)
    assert torch.equal(model.model.embed(torch.tensor([[290]])), model.get_input_embeddings()(torch.tensor([[290]])))


def test_kept_rows_follow_the_weights(model):
    ids = torch.tensor([[256]])
    with torch.no_grad():
        before = model.model.embed(ids).clone()
        assert torch.equal(model.model.embed(ids), before)
        model.model.embed_vision.embedding.weight.mul_(torch.rand(2048) + 0.5)
        assert not torch.allclose(model.model.embed(ids), before)
        model.double()
        assert model.model.embed(ids).dtype == torch.float64


def test_text_alone_reads_the_same_in_the_text_model(model, ids, tmp_path):
    from audiomm.models.gemma3n import Gemma3nForCausalLM

    model.save_pretrained(tmp_path)
    text, report = Gemma3nForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["unexpected_keys"] and not report["missing_keys"]
    tokens = ids()
    assert torch.allclose(logits_of(text, input_ids=tokens), logits_of(model, input_ids=tokens), atol=1e-6)


@pytest.mark.parametrize("modalities", [("text",), ("text", "audio"), ("text", "image")])
def test_a_model_without_some_towers_is_the_same_for_the_rest(model, prompt, ids, tmp_path, modalities):
    """Complaints LlamaFactory#8693 and transformers#39208: sound or text alone asked for the tower of pictures."""
    model.save_pretrained(tmp_path / "whole")
    part = Gemma3nForConditionalGeneration.from_pretrained(tmp_path / "whole", modalities=modalities)
    assert part.config.modalities == tuple(name for name in ("text", "image", "audio") if name in modalities)
    part.save_pretrained(tmp_path / "part")
    part = Gemma3nForConditionalGeneration.from_pretrained(tmp_path / "part")
    assert part.num_parameters() < model.num_parameters()
    tokens = ids()
    assert torch.allclose(logits_of(part, input_ids=tokens), logits_of(model, input_ids=tokens), atol=1e-6)
    batch = prompt()
    clip = {"input_ids": torch.tensor([[251, *[AUDIO] * PLACES]]), "input_features": batch["input_features"][:1]}
    if "audio" in modalities:
        assert torch.allclose(logits_of(part, **clip), logits_of(model, **clip), atol=1e-6)
    else:
        with pytest.raises(InputError, match="loaded without 'audio'"):
            part(**clip)
    if "image" not in modalities:
        with pytest.raises(InputError, match="loaded without 'image'"):
            part(torch.tensor([[IMAGE] * PLACES]), pixel_values=batch["pixel_values"])


@pytest.mark.parametrize("modalities", [("audio",), ("text", "video"), "text"])
def test_modalities_that_are_none_are_refused(config, modalities):
    with pytest.raises(ConfigError, match="accepted are lists of 'text', 'image', 'audio'"):
        config().restrict(modalities)


def test_wrong_numbers_of_marks_and_media_are_told_by_row(model, prompt):
    batch = prompt()
    short = batch | {"input_ids": batch["input_ids"].clone()}
    short["input_ids"][0, short["input_ids"][0] == IMAGE] = torch.tensor([IMAGE, IMAGE, IMAGE, 7])
    with pytest.raises(PlaceholderError, match="tokens: 3, features: 4.*Row 0 .* 3 image places"):
        model(**short)
    with pytest.raises(PlaceholderError, match="3 audio items were passed and the 3 rows have places for 2"):
        model(**batch | {"input_features": torch.zeros(3, 60, 16), "input_features_mask": None})
    with pytest.raises(PlaceholderError, match="from item 1 on there are none left"):
        model(**batch | {"input_features": torch.zeros(1, 60, 16), "input_features_mask": None})
    with pytest.raises(PlaceholderError, match="row 0 .* 4 image places, but pixel_values was not passed"):
        model(**{name: value for name, value in batch.items() if name != "pixel_values"})
    with pytest.raises(PlaceholderError, match="row 0 .* 4 audio places, but input_features was not passed"):
        model(batch["input_ids"], pixel_values=batch["pixel_values"])


def test_a_total_that_fits_by_chance_is_refused(model):
    """Two marks too many in one row, two too few in the other: the second row would get the first one's features."""
    ids = torch.tensor([[IMAGE] * 6 + [5] * 2, [IMAGE] * 2 + [5] * 6])
    with pytest.raises(PlaceholderError, match="Row 0 of the batch holds 6 image places"):
        model(ids, pixel_values=torch.rand(2, 3, 32, 32))


def test_clips_of_a_wrong_shape_or_length_are_refused(model):
    ids = torch.tensor([[AUDIO] * PLACES])
    with pytest.raises(ShapeError, match=r"input_features is of shape \(1, 60, 8\); \(clips, frames, 16\)"):
        model(ids, input_features=torch.zeros(1, 60, 8))
    with pytest.raises(ShapeError, match="input_features_mask is of shape"):
        model(ids, input_features=torch.zeros(1, 60, 16), input_features_mask=torch.ones(1, 59))
    with pytest.raises(AudioLimitError, match="clip 0 has 65 log-mel frames; at most 64 fit the 4 places"):
        model(ids, input_features=torch.zeros(1, 65, 16))
    mask = torch.arange(80)[None] < 64
    assert model(ids, input_features=torch.zeros(1, 80, 16), input_features_mask=mask).logits.isfinite().all()


def test_a_tower_of_another_resolution_than_its_places_is_refused(config):
    model = Gemma3nForConditionalGeneration(config(vision_soft_tokens_per_image=9))
    with pytest.raises(ShapeError, match="gives 4 tokens a picture, but vision_soft_tokens_per_image=9"):
        model.get_image_features(torch.rand(1, 3, 32, 32))


def test_ids_and_embeddings_together_are_refused(model, ids):
    with pytest.raises(ShapeError, match="exactly one"):
        model(ids(), inputs_embeds=torch.zeros(2, 15, 32))
    with pytest.raises(ShapeError, match="follow from input_ids"):
        model(ids(), per_layer_inputs=torch.zeros(2, 15, 6, 8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_with_media_stays_finite(model, prompt, dtype):
    """Complaints transformers#27260 and unsloth's of float16: float32 features met half weights, or overflowed."""
    assert logits_of(copy.deepcopy(model).to(dtype), **prompt()).isfinite().all()


def test_pictures_and_clips_reach_their_places_through_embeddings_too(model, prompt):
    batch = prompt()
    expected = logits_of(model, **batch)
    ids = batch.pop("input_ids")
    embeds = model.get_input_embeddings()(ids)
    # The end marks have rows of their own, which the table of text does not know.
    marks = ((ids == 256) | (ids == 272))[..., None]
    embeds = torch.where(marks, model.model.embed(ids), embeds)
    own = model.get_decoder().get_per_layer_inputs(ids)
    through = logits_of(model, inputs_embeds=embeds, per_layer_inputs=own, **batch)
    assert torch.allclose(through, expected, atol=1e-5)


def test_processes_that_train_together_find_a_gradient_for_every_weight(model, prompt, ids, monkeypatch):
    """Complaint axolotl#3584: without media in the batch, too. Alone, nothing is done for towers without work."""
    model.train()
    model(ids(), labels=ids()).loss.backward()
    assert all(weight.grad is None for weight in model.audio_tower.parameters())
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    plain = model(ids(), labels=ids()).loss
    model.zero_grad()
    plain.backward()
    assert all(weight.grad is not None and weight.grad.abs().max() == 0 for weight in model.audio_tower.parameters())
    model.zero_grad()
    model(**prompt(), labels=prompt()["input_ids"]).loss.backward()
    assert all(weight.grad is not None for weight in model.parameters())


@pytest.mark.slow
def test_eight_pairs_of_sound_and_text_are_learnt_by_heart(config, text_config):
    generator = torch.Generator().manual_seed(9)
    text = text_config(
        num_hidden_layers=4, num_kv_shared_layers=2, layer_types=["sliding_attention", "full_attention"] * 2,
        activation_sparsity_pattern=[0.5, 0.0, 0.0, 0.0],
    )  # fmt: skip
    model = Gemma3nForConditionalGeneration(config(text_config=text)).train()
    clips = 2.0 * torch.randn(8, 33, 16, generator=generator)
    words = torch.randint(3, 240, (8, 4), generator=generator)
    ids = torch.cat((torch.tensor([[2, *[AUDIO] * PLACES, 272]]).expand(8, -1), words), dim=1)
    labels = ids.clone()
    labels[:, : 2 + PLACES] = -100
    model.freeze_towers()
    model.audio_tower.requires_grad_(True)
    optimizer = torch.optim.AdamW((part for part in model.parameters() if part.requires_grad), lr=5e-3)
    for _ in range(150):
        optimizer.zero_grad()
        loss = model(ids, input_features=clips, labels=labels).loss
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05
    assert model.audio_tower.conformer[0].norm.weight.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in model.vision_tower.parameters())
