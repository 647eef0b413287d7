"""When tokens and words are said: the path through the attention, transformers' token times, OpenAI's words."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from audiomm import GenerationError, WhisperForConditionalGeneration, WhisperProcessor, pipeline
from audiomm.base.hub import BUNDLED_MODELS
from audiomm.layers.cache import Cache
from audiomm.layers.quantized import Int8Linear
from audiomm.media.audio import load_audio
from audiomm.models.whisper import alignment
from audiomm.models.whisper.alignment import (
    alignment_heads,
    dynamic_time_warping,
    first_positions,
    median_filter,
    onsets,
    probabilities,
    read_again,
    smoothed,
)
from audiomm.models.whisper.word_times import Window, find_words

ROOT = Path(__file__).parents[2]
AUDIO = ROOT / "examples" / "audio"
DIGITS = BUNDLED_MODELS["audiomm/whisper-commands"]
BEGIN = 79

# examples/audio/README.md
STARTS = {
    "pi": (0.35, 1.05, 1.72, 2.28, 2.95, 3.66, 4.31, 4.82),
    "phone_number": (0.35, 1.00, 1.61, 3.34, 4.14, 4.78, 5.40),
    "two_voices": (0.35, 0.87, 1.44, 3.00, 3.33, 3.95, 4.31),
}
SAID = {
    "pi": "three one four one five nine two six",
    "phone_number": "five five five zero one nine eight",
    "two_voices": "seven two four eight zero six three",
}

needs_model = pytest.mark.skipif(
    not (DIGITS / "model.safetensors").is_file(), reason="the bundled model is not in this checkout"
)


@pytest.fixture
def whisper(tiny_whisper):
    """100 tokens: 0 pad, 2 end, 3 start, 4-6 languages, 7 task, 78 notimestamps, 79-99 times; windows of 40 frames."""
    config = tiny_whisper.generation_config
    config.update(pad_token_id=0, eos_token_id=2, decoder_start_token_id=3)
    for name, value in {
        "is_multilingual": True,
        "lang_to_id": {"<|en|>": 4, "<|de|>": 5, "<|fr|>": 6},
        "task_to_id": {"transcribe": 7},
        "no_timestamps_token_id": BEGIN - 1,
        "prev_sot_token_id": 76,
        "max_initial_timestamp_index": 5,
        "max_length": 32,
        "alignment_heads": [[1, 2], [0, 1], [1, 0]],
    }.items():
        setattr(config, name, value)
    return tiny_whisper


@pytest.fixture(scope="module")
def silence(digits):
    """The encoder's output for a window without sound, three times."""
    with torch.no_grad():
        return digits[0].get_encoder()(torch.zeros(1, 80, 3000)).last_hidden_state.expand(3, -1, -1)


@pytest.fixture(scope="module")
def digits():
    return WhisperForConditionalGeneration.from_pretrained(DIGITS), WhisperProcessor.from_pretrained(DIGITS)


def noise(rows: int, frames: int, seed: int = 0):
    return torch.randn(rows, 8, frames, generator=torch.Generator().manual_seed(seed))


def mask(*lengths: int):
    return torch.stack([(torch.arange(max(lengths)) < length).long() for length in lengths])


# ---------------------------------------------------------------------- the path


def slow_path(cost):
    """The obvious loop over all cells, with the reference's rule for ties."""
    rows, columns = cost.shape
    total = np.full((rows + 1, columns + 1), np.inf, dtype=np.float32)
    total[0, 0] = 0
    moves = {}
    for i, j in itertools.product(range(1, rows + 1), range(1, columns + 1)):
        across, up, left = total[i - 1, j - 1], total[i - 1, j], total[i, j - 1]
        if across < up and across < left:
            best, moves[i, j] = across, (1, 1)
        elif up < across and up < left:
            best, moves[i, j] = up, (1, 0)
        else:
            best, moves[i, j] = left, (0, 1)
        total[i, j] = cost[i - 1, j - 1] + best
    path = [(rows, columns)]
    while path[-1] != (1, 1):
        (i, j), (down, right) = path[-1], moves[path[-1]]
        path.append((i - down, j - right))
    return [(i - 1, j - 1) for i, j in reversed(path)]


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (6, 1), (5, 5), (4, 13), (11, 3), (9, 40)])
@pytest.mark.parametrize("kind", ["random", "single precision", "ties"])
def test_the_path_is_that_of_the_obvious_loop(shape, kind):
    draw = np.random.default_rng(sum(shape))
    for _ in range(10):
        cost = draw.integers(-1, 2, shape).astype(float) if kind == "ties" else draw.normal(size=shape)
        if kind == "single precision":
            cost = cost.astype(np.float32)
        assert list(zip(*(side.tolist() for side in dynamic_time_warping(cost)), strict=True)) == slow_path(cost)


@pytest.mark.parametrize(("width", "length"), [(7, 30), (3, 5), (1, 4), (5, 3), (9, 5), (15, 40)])
def test_the_median_is_taken_over_neighbours_and_mirrored_ends(width, length):
    values = torch.randn(2, 3, length)
    side = width // 2
    padded = np.pad(values.numpy(), ((0, 0), (0, 0), (side, side)), mode="reflect") if length > side else None
    expected = np.stack([np.median(padded[..., at : at + width], -1) for at in range(length)], -1)
    assert np.array_equal(median_filter(values, width).numpy(), expected.astype(np.float32))


def test_audio_shorter_than_the_filter_is_left_alone():
    values = torch.randn(2, 3, 2)
    assert torch.equal(median_filter(values, 7), values)


@pytest.mark.parametrize("tokens", [1, 9])
def test_positions_are_compared_over_tokens_and_heads_averaged(tokens):
    weights = torch.rand(3, tokens, 40)
    # What all tokens look at alike, whatever sums of it are rounded to, says nothing.
    weights[..., 7] = 0.1
    # What nobody looks at is compared like the rest, small as it is.
    weights[..., 20] *= 1e-25
    exact = weights.double()
    deviation = exact.std(dim=1, keepdim=True, unbiased=False)
    normal = torch.where(deviation > 0, (exact - exact.mean(dim=1, keepdim=True)) / deviation, 0.0)
    normal[..., 7] = 0.0
    found = smoothed(weights, 1)
    assert np.allclose(found, normal.mean(dim=0).numpy(), atol=1e-5)
    assert not found[:, 7].any()
    assert np.allclose(smoothed(weights, 7), median_filter(normal, 7).mean(dim=0).numpy(), atol=1e-5)


def test_a_word_begins_where_its_attention_rises_and_not_where_the_last_one_ended():
    picture = np.full((3, 12), -1.0)
    picture[0, 2:5], picture[1, 8:10], picture[2, 10:] = 2.0, 3.0, 1.0
    picture[1, 5:8] = 0.5
    entries = first_positions(picture)
    assert entries.tolist() == [0, 5, 10]
    assert onsets(picture, entries).tolist() == [2, 8, 10]


def test_attention_that_never_rises_leaves_the_path_as_it_is():
    picture = np.zeros((2, 5))
    entries = first_positions(picture)
    assert onsets(picture, entries).tolist() == entries.tolist()


# ---------------------------------------------------------------------- the attention


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_the_scores_are_those_of_the_heads_asked_for(whisper, dtype, tolerance):
    whisper.to(dtype)
    tokens = torch.tensor([[3, 4, 7, 20, 30, 40], [3, 5, 7, 25, 0, 0]])
    with torch.no_grad():
        encoded = whisper.get_encoder()(noise(2, 40)).last_hidden_state
        heads = alignment_heads(whisper.generation_config, whisper.config)
        scores, hidden = read_again(whisper, encoded, [[3, 4, 7, 20, 30, 40], [3, 5, 7, 25]], heads)
        full = whisper(encoder_outputs=encoded, decoder_input_ids=tokens, output_attentions=True)
    assert scores.dtype == torch.float32
    by_layer = sorted(heads, key=lambda pair: pair[0])
    wanted = torch.stack([full.cross_attentions[layer][:, head] for layer, head in by_layer], 1)
    assert torch.allclose(scores.softmax(-1), wanted.float(), atol=tolerance)
    assert torch.allclose(whisper.proj_out(hidden), full.logits, atol=tolerance * 10)


@pytest.mark.parametrize(
    ("for_products", "kept", "tolerance"), [(False, None, 1e-6), (True, None, 4e-3), (True, torch.bfloat16, 5e-2)]
)
def test_what_the_cache_holds_of_the_audio_gives_the_same_scores(whisper, for_products, kept, tolerance):
    rows, heads = [[3, 4, 7, 20, 30], [3, 5, 7]], alignment_heads(whisper.generation_config, whisper.config)
    cache = Cache(whisper.cache_specs(), for_products=for_products)
    cache.cross_dtype = kept
    with torch.no_grad():
        encoded = whisper.get_encoder()(noise(2, 40)).last_hidden_state
        whisper.prefill(torch.tensor([[3], [3]]), cache, encoder_outputs=encoded)
        expected = read_again(whisper, encoded, rows, heads)
        found = read_again(whisper, encoded, rows, heads, cache.cross_pairs)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, atol=tolerance), "values may be kept in 16 bits"


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"return_dict_in_generate": True}])
def test_keys_and_values_of_the_audio_are_made_once_a_window(whisper, options):
    calls = []
    handle = whisper.model.decoder.layers[0].encoder_attn.k_proj.register_forward_hook(lambda *_: calls.append(1))
    features = noise(2, 40)
    found = whisper.generate(features, language="en", return_token_timestamps=True, **options)
    handle.remove()
    assert len(calls) == 1
    expected = whisper.generate(features, language="en", return_token_timestamps=True, **options)
    assert torch.equal(found["token_timestamps"], expected["token_timestamps"])


@pytest.mark.parametrize("kind", ["linear", "int8", "another module"])
def test_probabilities_are_those_of_the_whole_vocabulary(kind, monkeypatch):
    monkeypatch.setattr(alignment, "_TOKENS_AT_ONCE", 16)
    hidden, tokens = torch.randn(9, 8), torch.tensor([0, 15, 16, 17, 31, 32, 40, 47, 48])
    head = torch.nn.Linear(8, 50)
    if kind == "int8":
        linear, head = head, Int8Linear.empty_like(head)
        head.take_weight(linear.weight, "cpu", torch.float32)
        head.bias.data.copy_(linear.bias)
    if kind == "another module":
        head = torch.nn.Sequential(head, torch.nn.Identity())
    added = torch.zeros(50)
    added[[1, 20, 49]] = -torch.inf
    # A whole piece of the vocabulary cannot be.
    added[32:48] = -torch.inf
    with torch.no_grad():
        for extra in (None, added):
            logits = head(hidden) if extra is None else head(hidden) + extra
            expected = logits.softmax(dim=-1)[torch.arange(9), tokens]
            assert torch.allclose(probabilities(head, hidden, tokens, extra), expected, rtol=1e-5)


def test_without_a_list_all_heads_of_the_later_layers_are_used(whisper):
    whisper.generation_config.alignment_heads = None
    assert alignment_heads(whisper.generation_config, whisper.config) == ((1, 0), (1, 1), (1, 2), (1, 3))
    assert "token_timestamps" in whisper.generate(noise(1, 40), language="en", return_token_timestamps=True)


@pytest.mark.parametrize("pair", [[2, 0], [0, 4], [-1, 0]])
def test_heads_that_the_model_does_not_have_are_refused(whisper, pair):
    whisper.generation_config.alignment_heads = [[1, 0], pair]
    with pytest.raises(GenerationError, match="layers 0 to 1 with heads 0 to 3"):
        whisper.generate(noise(1, 40), language="en", return_token_timestamps=True)


def test_the_model_is_left_as_it_was(whisper):
    implementation = whisper.config.attn_implementation
    whisper.generate(noise(1, 90), language="en", return_token_timestamps=True)
    assert whisper.config.attn_implementation == implementation
    assert not any(module._forward_hooks for module in whisper.modules())


# ---------------------------------------------------------------------- times of tokens


def obvious_times(whisper, features, prompt, tokens, positions):
    """Token times from all attention weights of a plain forward pass."""
    with torch.no_grad():
        output = whisper(features, decoder_input_ids=torch.tensor([prompt + tokens]), output_attentions=True)
    pictures = []
    for layer, head in whisper.generation_config.alignment_heads:
        weights = output.cross_attentions[layer][0, head, len(prompt) :, :positions]
        weights = (weights - weights.mean(0)) / weights.std(0, unbiased=False)
        pictures.append(median_filter(weights[None], whisper.config.median_filter_width)[0])
    path = slow_path(-torch.stack(pictures).mean(0).double().numpy())
    return [min(column for row, column in path if row == token) * 0.02 for token in range(len(tokens))]


@pytest.mark.parametrize("beams", [1, 3])
def test_token_times_are_those_of_a_plain_forward_pass(whisper, beams):
    features = noise(1, 40)
    options = {"language": "de", "max_new_tokens": 12, "num_beams": beams}
    output = whisper.generate(features, attention_mask=mask(40), return_token_timestamps=True, **options)
    tokens = output["sequences"][0].tolist()
    assert tokens == whisper.generate(features, **options)[0].tolist()
    read = tokens if len(tokens) < 12 else tokens[:-1]
    expected = obvious_times(whisper, features, [3, 5, 7, 78], read, 20)
    expected += expected[-1:] * (len(tokens) - len(read))
    assert output["token_timestamps"][0].tolist() == pytest.approx(expected)
    assert output["token_timestamps"].dtype == torch.float32


def test_rows_of_a_batch_have_the_times_they_have_alone(whisper):
    features, lengths = noise(3, 130), mask(130, 60, 95)
    features = features * lengths[:, None]
    options = {"language": "en", "return_token_timestamps": True, "return_segments": True}
    together = whisper.generate(features, attention_mask=lengths, **options)
    for row, frames in enumerate((130, 60, 95)):
        alone = whisper.generate(features[row : row + 1, :, :frames], attention_mask=mask(frames), **options)
        times = alone["token_timestamps"][0]
        assert together["token_timestamps"][row, : len(times)].tolist() == times.tolist()
        assert (together["token_timestamps"][row, len(times) :] == times[-1]).all()
        relative = torch.cat([part["token_timestamps"] - part["seek"] / 100 for part in alone["segments"][0]])
        assert torch.allclose(relative, times, atol=1e-5)
        for part in alone["segments"][0]:
            assert len(part["token_timestamps"]) == len(part["tokens"])
            assert part["token_timestamps"].max() <= frames / 100
            assert (part["token_timestamps"].diff() >= 0).all()


@pytest.mark.parametrize("frames", [12, [12], torch.tensor([12])])
def test_num_frames_bounds_the_times(whisper, frames):
    output = whisper.generate(noise(1, 40), language="en", return_token_timestamps=True, num_frames=frames)
    assert output["token_timestamps"].max() <= 0.12


def test_the_other_forms_of_the_answer_have_times_too(whisper):
    options = {"language": "en", "max_new_tokens": 6, "return_token_timestamps": True}
    plain = whisper.generate(noise(2, 40), **options)["token_timestamps"]
    output = whisper.generate(noise(2, 40), return_dict_in_generate=True, output_scores=True, **options)
    assert len(output["scores"]) == output["sequences"].shape[1] - 4
    assert output["token_timestamps"].shape == output["sequences"].shape
    assert not output["token_timestamps"][:, :4].any()
    assert torch.equal(output["token_timestamps"][:, 4 : 4 + plain.shape[1]], plain)
    unique = whisper.generate(noise(2, 40), force_unique_generate_call=True, **options)
    assert torch.equal(unique["token_timestamps"], output["token_timestamps"])
    several = whisper.generate(noise(2, 40), num_beams=2, num_return_sequences=2, **options)
    best = whisper.generate(noise(2, 40), num_beams=2, **options)
    assert several["token_timestamps"].shape == several["sequences"].shape
    length = best["token_timestamps"].shape[1]
    assert torch.equal(several["token_timestamps"][::2, :length], best["token_timestamps"])


def test_an_empty_text_has_no_times(whisper):
    class OnlyEnd:
        def __call__(self, input_ids, scores):
            return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([2]), 0.0)

    output = whisper.generate(noise(1, 40), language="en", return_token_timestamps=True, logits_processor=[OnlyEnd()])
    assert output["token_timestamps"].shape == (1, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"return_token_timestamps": True, "num_frames": [10, 20]}, "each of the 1 items"),
        ({"return_token_timestamps": True, "num_frames": 0}, "positive number of frames"),
        ({"word_timestamps": True}, "needs tokenizer=, the WhisperTokenizer of the model.* it is None"),
        ({"word_timestamps": True, "tokenizer": "en"}, "it is str"),
    ],
)
def test_options_that_cannot_be_are_refused(whisper, options, message):
    with pytest.raises(GenerationError, match=message):
        whisper.generate(noise(1, 40), language="en", **options)


# ---------------------------------------------------------------------- words


def words_of(digits, waves, **options):
    """Words of each clip."""
    model, processor = digits
    is_long = max(map(len, waves)) > 480_000
    features = processor.feature_extractor(
        list(waves),
        sampling_rate=16_000,
        return_tensors="pt",
        return_attention_mask=True,
        **({"truncation": False, "padding": "longest"} if is_long else {}),
    )
    output = model.generate(
        features["input_features"],
        attention_mask=features["attention_mask"],
        word_timestamps=True,
        tokenizer=processor,
        **{"return_timestamps": True, **options},
    )
    return [[word for part in parts for word in part["words"]] for parts in output["segments"]], output


def clip(name: str) -> np.ndarray:
    return load_audio(AUDIO / f"{name}.flac", 16_000)


def starts_of(words, name: str) -> list[float]:
    """How far the starts of those words are off that are what was said, as far as both agree."""
    pairs = zip(words, SAID[name].split(), STARTS[name], strict=False)
    said = itertools.takewhile(lambda pair: pair[0]["word"].strip() == pair[1], pairs)
    return [abs(word["start"] - start) for word, _, start in said]


def check_order(words, seconds: float) -> None:
    edges = [edge for word in words for edge in (word["start"], word["end"])]
    assert edges == sorted(edges)
    assert all(0 <= edge <= seconds + 0.01 for edge in edges)
    assert all(0 < word["probability"] <= 1 for word in words)


@needs_model
def test_words_of_the_recordings_start_where_they_are_said(digits):
    waves = [clip(name) for name in STARTS]
    found, output = words_of(digits, waves)
    errors = []
    for name, wave, words, parts in zip(STARTS, waves, found, output["segments"], strict=True):
        check_order(words, len(wave) / 16_000)
        errors += starts_of(words, name)
        alone, _ = words_of(digits, [wave])
        assert [(word["word"], word["start"], word["end"]) for word in alone[0]] == [
            (word["word"], word["start"], word["end"]) for word in words
        ]
        for part in parts:
            assert float(part["start"]) == part["words"][0]["start"]
            assert float(part["end"]) == part["words"][-1]["end"]
    assert len(errors) >= 8
    assert np.median(errors) <= 0.08


@needs_model
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_words_are_found_in_half_precision(digits, dtype):
    _, processor = digits
    half = WhisperForConditionalGeneration.from_pretrained(DIGITS, dtype=dtype)
    found, _ = words_of((half, processor), [clip("pi")])
    check_order(found[0], 5.7)
    assert np.median(starts_of(found[0], "pi")) <= 0.1


@needs_model
def test_words_of_long_audio_are_in_seconds_of_the_whole(digits):
    pi = clip("pi")
    wave = np.concatenate([pi, np.zeros(27 * 16_000, np.float32), pi])
    found, _ = words_of(digits, [wave])
    check_order(found[0], len(wave) / 16_000)
    later = [word for word in found[0] if word["start"] > 20]
    offset = len(pi) / 16_000 + 27
    near = [min(abs(word["start"] - offset - start) for start in STARTS["pi"]) for word in later]
    assert len(later) >= 4
    assert np.median(near) <= 0.1


@needs_model
def test_asking_for_words_does_not_change_the_text(digits):
    _, output = words_of(digits, [clip("two_voices")], return_timestamps=False)
    model, processor = digits
    features = processor(clip("two_voices"), sampling_rate=16_000, return_tensors="pt")["input_features"]
    assert torch.equal(output["sequences"], model.generate(features, return_timestamps=False))
    text = "".join(word["word"] for word in output["segments"][0][0]["words"])
    assert text == processor.decode(output["sequences"][0], skip_special_tokens=True)


@needs_model
@pytest.mark.parametrize(
    ("language", "text", "words"),
    [
        ("ja", "天気が。", ["天", "気", "が。"]),
        ("en", " one (two), three.", [" one", " (two),", " three."]),
        (None, " one", [" one"]),
    ],
)
def test_words_are_split_as_the_language_is_written(digits, silence, language, text, words):
    model, processor = digits
    tokens = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    marks = ["<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|0.00|>", "<|0.50|>"]
    start, english, transcribe, *times = processor.tokenizer.convert_tokens_to_ids(marks)
    prompt = [start, english, transcribe]
    window = Window(500, 600, prompt, language, 5.0, [{"start": 5.0, "end": 11.0, "tokens": tokens}])
    silent = Window(0, 600, prompt, language, 0.0, [{"start": 0.0, "end": 1.0, "tokens": times}])
    heads = alignment_heads(model.generation_config, model.config)
    empty = Window(0, 600, prompt)
    found = find_words(model, silence, [window, silent, empty], processor.tokenizer, heads)
    assert [word["word"] for word in found[0][0]] == words
    check_order(found[0][0], 11.0)
    assert found[0][0][0]["start"] >= 5.0
    assert found[1:] == [[[]], []]


@needs_model
@pytest.mark.parametrize("option", [{"force_unique_generate_call": True}, {"num_return_sequences": 2, "num_beams": 2}])
def test_words_need_segments(digits, option):
    with pytest.raises(GenerationError, match=f"{next(iter(option))}=.* gives none"):
        words_of(digits, [clip("pi")], **option)


@needs_model
def test_the_pipeline_has_words_of_both_kinds(digits):
    pipe = pipeline("automatic-speech-recognition", model=str(DIGITS), device="cpu", num_beams=1)
    path = str(AUDIO / "pi.flac")
    best = pipe.transcribe(path, return_timestamps="word")
    assert all(word.probability is not None for word in best.words)
    assert "".join(word.text for word in best.words) == best.text
    assert pipe.transcribe(path, word_timestamps=True).words == best.words
    asked = pipe(path, word_timestamps=True)["chunks"]
    assert [chunk["timestamp"] for chunk in asked] == [(word.start, word.end) for word in best.words]
    plain = pipe(path, return_timestamps="word")["chunks"]
    assert plain[0]["timestamp"][0] == 0.0
    as_before = pipe.transcribe(path, return_timestamps="word", word_timestamps=False)
    assert [chunk["timestamp"] for chunk in plain] == [(word.start, word.end) for word in as_before.words]
    merged = pipe.transcribe(path, return_timestamps="word", chunk_length_s=4)
    assert merged.words
    assert all(word.probability is None for word in merged.words)


@needs_model
@pytest.mark.slow
def test_words_in_strings_of_real_recordings_start_where_they_are_said(digits):
    folder = ROOT.parent / "shared" / "data" / "spoken_digits"
    if not folder.is_dir():
        pytest.skip("the recordings are not at hand")
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    draw = np.random.default_rng(7)
    speakers = sorted(path.name for path in folder.iterdir() if path.is_dir())
    errors, heard = [], 0
    for number in range(20):
        speaker = speakers[number % len(speakers)]
        parts, starts, said = [np.zeros(4_800, np.float32)], [], []
        for digit in draw.integers(0, 10, 6).tolist():
            take = int(draw.integers(0, 5))
            wave = load_audio(folder / speaker / f"{digit}_{speaker}_{take}.flac", 16_000)
            loud = np.flatnonzero(np.abs(wave) > 0.1 * np.abs(wave).max())
            starts.append((sum(map(len, parts)) + loud[0]) / 16_000)
            said.append(names[digit])
            parts += [wave / np.abs(wave).max() * 0.5, np.zeros(int(draw.integers(800, 6_400)), np.float32)]
        found, _ = words_of(digits, [np.concatenate(parts)])
        if [word["word"].strip() for word in found[0]] == said:
            heard += 1
            errors += [abs(word["start"] - start) for word, start in zip(found[0], starts, strict=True)]
    assert heard >= 8
    assert np.median(errors) <= 0.08
