"""Encoders and prompts captured or compiled by bucket: they give what they give as they are."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from audiomm import WhisperForConditionalGeneration
from audiomm.generation import GenerationMixin, regions, runners
from audiomm.layers.regions import bucket, inside, recorded_by, recorder
from audiomm.models.whisper.modeling import WhisperEncoder

PLAIN = {"disable_compile": True}
NO_END = {"eos_token_id": None, "pad_token_id": 0}


@pytest.fixture
def whisper(tiny_whisper_config: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A tiny Whisper whose encoder runs as on a GPU."""
    monkeypatch.setattr(WhisperEncoder, "_quick_encoder", lambda self, features: None)
    torch.manual_seed(7)
    made = WhisperForConditionalGeneration(tiny_whisper_config(max_target_positions=256, init_std=0.5)).eval()
    made.generation_config.update(max_new_tokens=12, **NO_END)
    return made


def sounds(number: int, rows: int = 2, frames: int = 40) -> torch.Tensor:
    return torch.randn(rows, 8, frames, generator=torch.Generator().manual_seed(number))


def prompts(length: int, rows: int = 2, least: int = 3) -> torch.Tensor:
    return torch.randint(least, 69, (rows, length), generator=torch.Generator().manual_seed(length))


def test_encoder_and_prompt_replay_what_they_give_as_they_are(whisper, graphs):
    for number in range(5):
        given = {"decoder_input_ids": prompts(4)}
        plain = GenerationMixin.generate(whisper, sounds(number), **given, **PLAIN)
        assert torch.equal(GenerationMixin.generate(whisper, sounds(number), **given), plain)
    # Two warm-ups, then the recording; for the encoder and for the prompt.
    assert graphs.regions == {"warm_ups": 4, "captures": 2, "replays": 6}


def test_prompts_of_one_bucket_share_a_recording_and_padding_changes_nothing(whisper, graphs):
    for length in (5, 6, 7, 8, 5):
        given = {"decoder_input_ids": prompts(length)}
        plain = GenerationMixin.generate(whisper, sounds(length), **given, **PLAIN)
        got = GenerationMixin.generate(whisper, sounds(length), **given)
        assert torch.equal(got, plain)
    # A prompt that fills its bucket needs no mask, and has a recording of its own.
    assert graphs.regions["captures"] == 2


def test_padding_in_front_of_prompts_stays_where_it_is(whisper, graphs):
    ids, mask = prompts(6), torch.ones(2, 6, dtype=torch.bool)
    mask[1, :3] = False
    given = {"decoder_input_ids": ids, "decoder_attention_mask": mask}
    plain = GenerationMixin.generate(whisper, sounds(0), **given, **PLAIN)
    for _ in range(4):
        assert torch.equal(GenerationMixin.generate(whisper, sounds(0), **given), plain)
    assert graphs.regions["replays"] > 2


def test_a_prompt_is_not_padded_beyond_the_room_that_the_text_leaves(whisper, graphs):
    given = {"decoder_input_ids": prompts(6), "max_new_tokens": 250}
    plain = GenerationMixin.generate(whisper, sounds(0), **given, **PLAIN)
    assert torch.equal(GenerationMixin.generate(whisper, sounds(0), **given), plain)
    ids, mask = regions.padded(prompts(6), None, {}, room=1)
    assert (ids.shape, mask) == ((2, 6), None)
    ids, mask = regions.padded(prompts(6), None, {}, room=2)
    assert ids.shape == (2, 8)
    assert mask is not None
    assert mask.sum(dim=1).tolist() == [6, 6]
    assert regions.padded(prompts(6), None, {"inputs_embeds": torch.zeros(2, 6, 4)}, room=2)[1] is None


def test_long_recordings_replay_the_encoder_window_by_window(whisper, graphs):
    whisper.generation_config.no_timestamps_token_id, whisper.generation_config.is_multilingual = 69, False
    options = {"return_timestamps": True, "eos_token_id": 60, "return_segments": True}
    features = sounds(0, rows=1, frames=400)
    plain = whisper.generate(features, **options, **PLAIN)["segments"]
    got = whisper.generate(features, **options)["segments"]
    assert graphs.regions["replays"] > 3
    for one, other in zip(plain, got, strict=True):
        assert [segment["tokens"].tolist() for segment in one] == [segment["tokens"].tolist() for segment in other]


@pytest.mark.parametrize("kind", ["dense", "per-layer", "experts"])
def test_prompts_of_gemma_4_are_the_same_captured(gemmas, graphs, kind):
    gemma = gemmas._SIZES_4.make(kind)
    for length in (13, 14, 15, 13, 14):
        ids = prompts(length)
        ids[1, :3] = 0
        given = {"attention_mask": ids != 0, "max_new_tokens": 12, **NO_END}
        assert torch.equal(gemma.generate(ids, **given), gemma.generate(ids, **given, **PLAIN))
    # How many tokens an expert gets is asked for.
    assert graphs.regions["captures"] == (kind != "experts")


def test_a_prompt_of_gemma_3n_is_the_same_captured(gemmas, graphs):
    model = gemmas.FAMILIES["gemma3n"][1](gemmas.processor_3n()).eval()
    for length in (13, 14, 15, 13):
        given = {"attention_mask": torch.ones(2, length, dtype=torch.bool), "max_new_tokens": 12, **NO_END}
        assert torch.equal(model.generate(prompts(length), **given), model.generate(prompts(length), **given, **PLAIN))
    assert graphs.regions["captures"] == 1


def test_sounds_of_some_lengths_share_a_recording_of_gemma_4s_tower(gemmas, graphs):
    model = gemmas.FAMILIES["gemma4"][1](gemmas.processor_4()).eval()
    tower = model.model.audio_tower
    with torch.no_grad(), regions.recording(model, model.generation_config):
        for frames in (33, 37, 40, 35, 33):
            bands = 4 * tower.subsample_conv_projection.bands
            clips = torch.randn(2, frames, bands, generator=torch.Generator().manual_seed(frames))
            mask = torch.arange(frames) < torch.tensor([[frames], [frames - 9]])
            got = tower(clips, mask)
            with torch.no_grad():
                wanted = tower(clips, mask, output_hidden_states=True)
            assert torch.equal(got.attention_mask, wanted.attention_mask)
            real = wanted.attention_mask
            torch.testing.assert_close(
                got.last_hidden_state[real], wanted.last_hidden_state[real], rtol=1e-5, atol=1e-5
            )
    assert graphs.regions["captures"] == 1


@pytest.mark.parametrize("family", ["gemma3n", "gemma4"])
@pytest.mark.parametrize("medium", ["picture", "noise"])
def test_prompts_with_media_are_the_same_captured(gemmas, graphs, family, medium):
    make_processor, make_model = gemmas.FAMILIES[family]
    processor = make_processor()
    model = make_model(processor).eval()
    mark = processor.image_token if medium == "picture" else processor.audio_token
    for seed in range(4):
        media = {"images": gemmas.picture(seed)} if medium == "picture" else {"audio": gemmas.noise(0.5, seed)}
        inputs = processor(text=[f"a {mark} b"], return_tensors="pt", **media)
        given = {**inputs, "max_new_tokens": 10, **NO_END}
        assert torch.equal(model.generate(**given), model.generate(**given, **PLAIN))
    assert graphs.regions["captures"] == 2
    assert graphs.regions["replays"] == 4


def test_what_was_recorded_goes_when_weights_or_hooks_change(whisper, graphs):
    def hear(**options):
        return GenerationMixin.generate(whisper, sounds(0), decoder_input_ids=prompts(4), **options)

    for _ in range(4):
        hear()
    with torch.no_grad():
        whisper.model.encoder.conv1.weight.mul_(-1.0)
    assert torch.equal(hear(), hear(**PLAIN))
    graphs.clear()
    handle = whisper.model.encoder.layers[0].register_forward_hook(lambda module, inputs, output: None)
    for _ in range(4):
        hear()
    handle.remove()
    # The prompt's alone: the hook is not the decoder's.
    assert graphs.regions["captures"] == 1


@pytest.mark.parametrize("off", [PLAIN, {"cache_implementation": "dynamic"}, {"return_dict_in_generate": True}])
def test_what_turns_capture_off_turns_it_off_here_too(whisper, graphs, off):
    for _ in range(4):
        GenerationMixin.generate(whisper, sounds(0), decoder_input_ids=prompts(4), **off)
    # A cache that is handed out takes its prompts with it; the encoder's recording stays.
    assert graphs.regions["captures"] == ("return_dict_in_generate" in off)
    assert recorder() is None


def test_the_switch_turns_capture_off(whisper, graphs, monkeypatch):
    monkeypatch.setenv(runners.SWITCH, "0")
    for _ in range(4):
        GenerationMixin.generate(whisper, sounds(0), decoder_input_ids=prompts(4))
    assert not graphs.regions


def test_what_cannot_be_captured_goes_on_without_and_says_so(whisper, graphs, caplog):
    graphs.fails = True
    given = {"decoder_input_ids": prompts(4)}
    plain = GenerationMixin.generate(whisper, sounds(0), **given, **PLAIN)
    for _ in range(4):
        assert torch.equal(GenerationMixin.generate(whisper, sounds(0), **given), plain)
    assert caplog.text.count("that reads audio or a prompt cannot be captured") == 2


def test_large_passes_are_not_recorded(whisper, graphs, monkeypatch):
    monkeypatch.setattr(regions, "MOST_NUMBERS", 15)
    for _ in range(4):
        GenerationMixin.generate(whisper, sounds(0), decoder_input_ids=prompts(8))
    assert not graphs.regions


def test_lengths_come_in_few_buckets():
    lengths = [bucket(length) for length in range(1, 2049)]
    assert len(set(lengths)) <= 36
    assert all(0 <= room - length <= max(3, length // 4) for length, room in enumerate(lengths, 1))
    assert [bucket(room) for room in set(lengths)] == list(set(lengths))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_prompts_are_compiled_by_bucket(whisper):
    options = {"compile_config": {"backend": "aot_eager", "fullgraph": True}}
    for length in (5, 6, 7, 5):
        given = {"decoder_input_ids": prompts(length)}
        plain = GenerationMixin.generate(whisper, sounds(length), **given, **PLAIN)
        assert torch.equal(GenerationMixin.generate(whisper, sounds(length), **given, **options), plain)


# ---------------------------------------------------------------------- on a device


class Watch(TorchDispatchMode):
    """Notes operations for which a device would wait, or would be given something by the host."""

    def __init__(self, waits: tuple[str, ...]) -> None:
        super().__init__()
        self._waits = waits
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        places = {one.device.type for one in tree_leaves((args, kwargs, result)) if isinstance(one, torch.Tensor)}
        if function.overloadpacket.__name__ in self._waits or "cpu" in places:
            self.found.append(str(function))
        return result


@pytest.mark.parametrize("family", ["whisper", "gemma3n", "gemma4"])
def test_regions_take_nothing_from_the_host_and_ask_the_device_nothing(whisper, gemmas, launches, family):
    seen: dict[str, list[str]] = {}

    def watched(owner, name, function, *tensors, cache=None):
        with inside():
            function(*tensors)
            if cache is not None:
                cache.reset()
            with Watch(launches._WAITS) as watch:
                made = function(*tensors)
        seen[type(owner).__name__] = watch.found
        return made

    model = whisper if family == "whisper" else gemmas.FAMILIES[family][1](getattr(gemmas, f"processor_{family[5:]}")())
    model = model.eval().to("meta")
    made = partial(torch.ones, device="meta")
    with torch.no_grad(), recorded_by(watched):
        if family == "whisper":
            given = {"input_features": made(2, 8, 40)}
        else:
            config = model.get_decoder().config
            layers, width = config.num_hidden_layers, config.hidden_size_per_layer_input
            given = {"inputs_embeds": made(2, 4, config.hidden_size), "per_layer_inputs": made(2, 4, layers, width)}
            tower = model.model.audio_tower
            tower(made(2, 40, getattr(tower.config, "input_feat_size", 32)), made(2, 40, dtype=torch.bool))
            if family == "gemma3n":
                model.model.vision_tower(made(2, 3, 32, 32))
            else:
                eyes = model.model.vision_tower
                patches = made(2, 6, 3 * eyes.config.patch_size**2), made(2, 6, 2, dtype=torch.long)
                watched(eyes, "encoder", lambda *patches: eyes._encoded(*patches)[:1], *patches)
        cache = model.make_cache(2, max_length=64, fixed=True)
        ids = made(2, 4 if family == "whisper" else 0, dtype=torch.long)
        model.prefill(ids, cache, attention_mask=made(2, 4, dtype=torch.bool), **given)
    assert len(seen) == (2 if family == "whisper" else 3)
    assert not any(seen.values())
