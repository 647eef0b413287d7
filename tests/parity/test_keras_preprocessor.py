"""Gemma4CausalLMPreprocessor against keras-hub's, field by field, on one tokenizer and the same media.

Pictures and frames here have exactly as many tokens as keras-hub reserves for each, for its counts are fixed and ours
are those of the features; what differs on purpose besides says why. keras-hub is a reference of this test only.
"""

from __future__ import annotations

import inspect
import string
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from audiomm import presets
from audiomm.models.gemma4 import (
    Gemma4AudioFeatureExtractor,
    Gemma4CausalLMPreprocessor,
    Gemma4ImageProcessor,
    Gemma4VideoProcessor,
    GemmaTokenizer,
)

# keras turns torch's tensors into arrays in a way that numpy warns of.
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")]

_MERGES = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("▁", "t"), ("▁t", "he")]
_MARKS = ["<|image|>", "<|image>", "<image|>", "<|audio|>", "<|audio>", "<audio|>", "<|video|>", "<|video>", "<video|>",
          "<|turn>", "<turn|>"]  # fmt: skip
_SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>"]
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_LETTERS = [*string.ascii_letters, *string.digits, *".,:;?!'-<>|_", "▁", "\n"]
_PIECES = [*_SPECIAL, *_BYTES, *_LETTERS, *("".join(merge) for merge in _MERGES), *_MARKS]
#: Tokens of every picture and frame: 7 x 10 squares of 48 pixels.
TOKENS, HEIGHT, WIDTH = 70, 336, 480


@pytest.fixture(scope="module")
def keras_hub() -> Any:
    """The reference package; without it the test is skipped."""
    return pytest.importorskip("keras_hub")


def our_tokenizer() -> GemmaTokenizer:
    vocabulary = {piece: number for number, piece in enumerate(_PIECES)}
    core = Tokenizer(models.BPE(vocabulary, _MERGES, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    core.normalizer = normalizers.Replace(" ", "▁")
    core.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    core.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in [*_SPECIAL, *_MARKS]])
    return GemmaTokenizer(tokenizer_object=core)


def their_tokenizer(keras_hub: Any) -> Any:
    """The same vocabulary as a SentencePiece model."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    kinds = sentencepiece_model_pb2.ModelProto.SentencePiece
    model.trainer_spec.model_type = sentencepiece_model_pb2.TrainerSpec.BPE
    model.trainer_spec.vocab_size = len(_PIECES)
    model.trainer_spec.byte_fallback = True
    for name in ("pad", "eos", "bos", "unk"):
        setattr(model.trainer_spec, f"{name}_id", _SPECIAL.index(f"<{name}>"))
    for spec in (model.normalizer_spec, model.denormalizer_spec):
        spec.add_dummy_prefix, spec.escape_whitespaces, spec.remove_extra_whitespaces = False, True, False
    model.normalizer_spec.name = "identity"
    merged = ["".join(merge) for merge in _MERGES]
    for piece in _PIECES:
        added = model.pieces.add()
        added.piece = piece
        added.score = -float(merged.index(piece)) if piece in merged else -float(len(merged) + 1)
        if piece == "<unk>":
            added.type = kinds.UNKNOWN
        elif piece in _BYTES:
            added.type = kinds.BYTE
        elif piece in _SPECIAL or piece in _MARKS:
            added.type = kinds.USER_DEFINED
    proto = model.SerializeToString()
    return keras_hub.models.Gemma4Tokenizer(proto, has_vision_tokens=True, has_audio_tokens=True)


def pair(keras_hub: Any, *parts: str, **options: Any) -> tuple[Gemma4CausalLMPreprocessor, Any]:
    """Ours and theirs with the converters named in `parts`."""
    layers = keras_hub.layers
    # The preset's converters scale to 0..1.
    sizes = {"patch_size": 16, "max_soft_tokens": TOKENS, "pooling_kernel_size": 3, "scale": 1 / 255}
    made = {
        "image": (Gemma4ImageProcessor(max_soft_tokens=TOKENS), lambda: layers.Gemma4ImageConverter(**sizes)),
        "video": (Gemma4VideoProcessor(num_frames=3), lambda: layers.Gemma4VideoConverter(num_frames=3, **sizes)),
        "audio": (Gemma4AudioFeatureExtractor(), lambda: layers.Gemma4AudioConverter(mel_floor=1e-3)),
    }
    options = {"num_vision_tokens_per_image": TOKENS, "num_frames_per_video": 3, "max_images_per_prompt": 1, **options}
    ours = Gemma4CausalLMPreprocessor(
        our_tokenizer(), **{f"{part}_converter": made[part][0] for part in parts}, **options
    )
    theirs = keras_hub.models.Gemma4CausalLMPreprocessor(
        their_tokenizer(keras_hub), **{f"{part}_converter": made[part][1]() for part in parts}, **options
    )
    return ours, theirs


def agree(found: dict[str, torch.Tensor], expected: dict[str, Any], leave: tuple[str, ...] = ()) -> None:
    """Every field: the same names, shapes and numbers."""
    assert set(found) == set(expected)
    for name in set(found) - set(leave):
        wanted = np.asarray(expected[name])
        assert tuple(found[name].shape) == wanted.shape, name
        assert np.allclose(found[name].numpy(), wanted, atol=1e-4), (name, found[name], wanted)


def pictures(count: int, *shape: int) -> np.ndarray:
    generator = np.random.default_rng(count)
    return generator.integers(0, 256, (*shape, count, HEIGHT, WIDTH, 3)).astype(np.uint8)


# ------------------------------------------------------------------------------------------------ text


@pytest.mark.parametrize(
    "options",
    [
        {"sequence_length": 12},
        {"sequence_length": 5},
        {"sequence_length": 7, "add_end_token": False},
        {"sequence_length": 9, "add_start_token": False},
        {"sequence_length": 30},
    ],
)
def test_text_is_packed_alike(keras_hub: Any, options: dict[str, Any]) -> None:
    ours, theirs = pair(keras_hub, **options)
    batch = {
        "prompts": ["hello the world", "he", "", "what?\nnaïve"],
        "responses": ["the hello", "", "yes, it is", "o"],
    }
    found, expected = ours(batch), theirs(batch)
    agree(found[0], expected[0])
    assert np.array_equal(found[1], np.asarray(expected[1])) and np.array_equal(found[2], np.asarray(expected[2]))
    one = {"prompts": "hello the world", "responses": "the"}
    found, expected = ours(one), theirs(one)
    # Theirs leaves the batch's axis at the positions of a single text alone.
    agree(found[0], expected[0], ("position_ids",))
    assert np.array_equal(found[0]["position_ids"], np.asarray(expected[0]["position_ids"])[0])
    assert np.array_equal(found[1], np.asarray(expected[1])) and np.array_equal(found[2], np.asarray(expected[2]))


def test_prompts_of_generation_and_their_answers_are_alike(keras_hub: Any) -> None:
    ours, theirs = pair(keras_hub, sequence_length=12)
    for x in ("hello the", ["hello the world", "he"], {"prompts": ["hello"], "responses": ["the"]}):
        found, expected = ours.generate_preprocess(x), theirs.generate_preprocess(x)
        agree(found, expected)
        assert ours.generate_postprocess(found) == (
            theirs.generate_postprocess(expected) if isinstance(x, str) else list(theirs.generate_postprocess(expected))
        )
    agree(
        ours.generate_preprocess("hello the", sequence_length=6),
        theirs.generate_preprocess("hello the", sequence_length=6),
    )


# ------------------------------------------------------------------------------------------------ pictures


def test_pictures_have_the_same_places_and_patches(keras_hub: Any) -> None:
    ours, theirs = pair(keras_hub, "image", sequence_length=100)
    batch = {"prompts": ["the <|image|> hello", "<|image|>"], "responses": ["hello", "the hello"],
             "images": pictures(1, 2)}  # fmt: skip
    found, expected = ours(batch), theirs(batch)
    agree(found[0], expected[0])
    assert np.array_equal(found[1], np.asarray(expected[1])) and np.array_equal(found[2], np.asarray(expected[2]))
    del batch["responses"]
    agree(ours.generate_preprocess(batch), theirs.generate_preprocess(batch))


def test_two_pictures_of_one_prompt(keras_hub: Any) -> None:
    ours, theirs = pair(keras_hub, "image", sequence_length=200, max_images_per_prompt=2)
    batch = {"prompts": ["the <|image|> hello <|image|>"], "responses": ["hello"], "images": pictures(2, 1)}
    agree(ours(batch)[0], theirs(batch)[0])


def test_without_pictures_the_fields_are_empty_alike(keras_hub: Any) -> None:
    ours, theirs = pair(keras_hub, "image", sequence_length=100)
    batch = {"prompts": ["the hello"], "responses": ["hello"]}
    agree(ours(batch)[0], theirs(batch)[0])


def test_smaller_pictures_are_padded_alike_where_that_is_asked_for(keras_hub: Any) -> None:
    # 240 x 240 pixels become 8 x 8 squares: 64 tokens; keras-hub writes 70 marks all the same.
    ours, theirs = pair(keras_hub, "image", sequence_length=100)
    ours.pad_images_to = TOKENS
    batch = {"prompts": ["the <|image|>"], "responses": ["hello"], "images": pictures(1, 1)[:, :, :336, :336]}
    found, expected = ours(batch)[0], theirs(batch)[0]
    # Their bicubic interpolation works on fractions and is clipped, ours (transformers') on bytes.
    agree(found, expected, ("pixel_values",))
    assert np.abs(found["pixel_values"].numpy() - np.asarray(expected["pixel_values"])).max() < 0.1
    ours.pad_images_to = None
    assert int(ours(batch)[0]["vision_mask"].sum()) == 64


def test_patches_made_before_are_taken(keras_hub: Any) -> None:
    ours, theirs = pair(keras_hub, "image", sequence_length=100)
    batch = {"prompts": ["the <|image|>"], "responses": ["hello"]}
    made = ours({**batch, "images": pictures(1, 1)})[0]
    ready = {name: made[name].numpy() for name in ("pixel_values", "pixel_position_ids")}
    agree(ours({**batch, **ready})[0], theirs({**batch, **ready})[0])


# ------------------------------------------------------------------------------------------------ videos


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        [{"frames_indices": [0, 8, 16], "fps": 30.0}],
        [{"frames_indices": [0, 120, 5000]}],
        [{"frames_indices": [0, 2999, 120_000], "fps": 29.97}],
    ],
)
def test_frames_stand_behind_the_same_times(keras_hub: Any, metadata: Any) -> None:
    ours, theirs = pair(keras_hub, "video", sequence_length=300)
    batch = {"prompts": ["the <|video|> hello"], "responses": ["the"], "videos": pictures(3, 1)}
    ours.video_metadata = theirs.video_metadata = metadata
    found, expected = ours(batch), theirs(batch)
    agree(found[0], expected[0])
    assert np.array_equal(found[1], np.asarray(expected[1])) and np.array_equal(found[2], np.asarray(expected[2]))
    if metadata is not None:
        ours.video_metadata = None
        agree(ours(batch, video_metadata=metadata)[0], expected[0])
    del batch["responses"]
    ours.video_metadata = metadata
    agree(ours.generate_preprocess(batch), theirs.generate_preprocess(batch))


def test_a_place_for_a_video_is_kept_alike_where_none_is_passed(keras_hub: Any) -> None:
    ours, theirs = pair(keras_hub, "video", sequence_length=300, num_vision_tokens_per_frame=5, video_fps=0.5)
    batch = {"prompts": ["the <|video|> hello"], "responses": ["the"]}
    # Theirs has no mask of vision tokens then, though the marks are in the ids.
    agree(ours(batch)[0], theirs(batch)[0], ("vision_mask", "vision_indices"))


# ------------------------------------------------------------------------------------------------ sound


@pytest.mark.parametrize("lengths", [[16_000], [16_000, 7_680], [3_840, 12_800]])
def test_clips_have_the_same_places_and_features(keras_hub: Any, lengths: list[int]) -> None:
    ours, theirs = pair(keras_hub, "audio", sequence_length=60)
    generator = np.random.default_rng(0)
    clips = [generator.normal(0, 0.1, length).astype(np.float32) for length in lengths]
    batch = {"prompts": ["the <|audio|> hello"] * len(clips), "responses": ["hello"] * len(clips), "audio": clips}
    found, expected = ours(batch), theirs({**batch, "audio": [clip.tolist() for clip in clips]})
    # Theirs counts one frame more a clip (samples // 160), which reaches on behind the last sample.
    agree(found[0], expected[0], ("audio_mel", "audio_mel_mask"))
    assert np.array_equal(found[1], np.asarray(expected[1])) and np.array_equal(found[2], np.asarray(expected[2]))
    for row in range(len(clips)):
        frames = int(found[0]["audio_mel_mask"][row].sum())
        assert int(np.asarray(expected[0]["audio_mel_mask"])[row].sum()) == frames + 1
        heard, wanted = found[0]["audio_mel"][row, 0, :frames], np.asarray(expected[0]["audio_mel"])[row, 0, :frames]
        assert np.allclose(heard, wanted, atol=1e-3)


# ------------------------------------------------------------------------------------------------ names


def test_every_argument_of_theirs_is_known(keras_hub: Any) -> None:
    def arguments(function: Any) -> dict[str, Any]:
        return {
            name: parameter.default
            for name, parameter in inspect.signature(function).parameters.items()
            if parameter.kind is not parameter.VAR_KEYWORD
        }

    theirs = keras_hub.models.Gemma4CausalLMPreprocessor
    wanted, found = arguments(theirs.__init__), arguments(Gemma4CausalLMPreprocessor.__init__)
    assert list(found)[: len(wanted)] == list(wanted)
    assert {name: found[name] for name in wanted} == wanted
    for name in ("generate_preprocess", "generate_postprocess"):
        assert list(arguments(getattr(theirs, name))) == [
            argument
            for argument in arguments(getattr(Gemma4CausalLMPreprocessor, name))
            if argument != "video_metadata"
        ]
    assert set(arguments(theirs.call)) <= set(arguments(Gemma4CausalLMPreprocessor.__call__))


def test_every_preset_of_theirs_is_known(keras_hub: Any) -> None:
    models, layers = keras_hub.models, keras_hub.layers
    for name in ("WhisperBackbone", "Gemma3nBackbone", "Gemma4Backbone", "Gemma3nCausalLM", "Gemma4CausalLM",
                 "WhisperTokenizer", "Gemma3nTokenizer", "Gemma4Tokenizer", "Gemma4CausalLMPreprocessor"):  # fmt: skip
        theirs = getattr(models, name)
        assert set(getattr(presets, name).presets) == set(theirs.presets), name
    for name in ("WhisperAudioConverter", "Gemma3nAudioConverter", "Gemma4AudioConverter", "Gemma3nImageConverter",
                 "Gemma4ImageConverter"):  # fmt: skip
        assert set(getattr(presets, name).presets) == set(getattr(layers, name).presets), name
