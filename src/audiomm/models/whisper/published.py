"""What the published Whisper models have in common: the order of their special tokens, and which heads watch the words.

Files of other programs, and files fine-tuned before generation_config.json existed, leave this out; it follows from
the vocabulary's size and the model's dimensions. Source: openai-whisper's tokenizer and its table of alignment heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...base.errors import ConfigError
from ...base.languages import LANGUAGES
from ...generation import GenerationConfig
from .config import WhisperConfig

#: Vocabulary size of the English-only models.
ENGLISH_ONLY = 51864
#: Vocabulary size -> tokens of text before <|endoftext|>, for the models of OpenAI: English-only, multilingual, v3.
TEXT_TOKENS = {ENGLISH_ONLY: 50256, 51865: 50257, 51866: 50257}
#: Timestamp tokens: <|0.00|> to <|30.00|>.
TIMESTAMPS = 1501
#: Special tokens beside languages and timestamps.
_OTHERS = 8

#: (encoder layers, decoder layers, width, vocabulary) -> (decoder layer, heads) pairs that align text and audio.
#: large-v1 and large-v2 have the same dimensions and are told apart by name.
_HEADS: dict[tuple[int, int, int, int], dict[int, tuple[int, ...]]] = {
    (4, 4, 384, 51864): {1: (0,), 2: (0, 5), 3: (0, 1, 2, 3, 4)},
    (4, 4, 384, 51865): {2: (2,), 3: (0, 2, 3, 4, 5)},
    (6, 6, 512, 51864): {3: (3,), 4: (7,), 5: (1, 5, 7)},
    (6, 6, 512, 51865): {3: (1,), 4: (2, 3, 7), 5: (1, 2, 4, 6)},
    (12, 12, 768, 51864): {
        6: (6,), 7: (0, 3, 8), 8: (2, 5, 7), 9: (0, 4, 8, 10), 10: (0, 1, 2, 3, 6, 11), 11: (2, 4),
    },
    (12, 12, 768, 51865): {5: (3, 9), 8: (0, 4, 7, 8), 9: (0, 7, 9), 10: (5,)},
    (24, 24, 1024, 51864): {
        11: (4,), 14: (1, 12, 14), 15: (4,), 16: (0, 4, 9), 17: (12, 14), 18: (7, 10, 15), 20: (0, 3, 9, 14), 21: (12,),
    },
    (24, 24, 1024, 51865): {13: (15,), 15: (4, 15), 16: (1,), 20: (0,), 23: (4,)},
    (32, 32, 1280, 51866): {
        7: (0,), 10: (17,), 12: (18,), 13: (12,), 16: (1,), 17: (14,), 19: (11,), 21: (4,), 24: (1,), 25: (6,),
    },
    (32, 4, 1280, 51866): {2: (4, 11), 3: (3, 6, 11, 14)},
}  # fmt: skip
_LARGE = (32, 32, 1280, 51865)
_LARGE_HEADS: dict[str, dict[int, tuple[int, ...]]] = {
    "large-v1": {9: (19,), 11: (2, 4, 17), 22: (7, 11, 17), 23: (2, 15)},
    "large-v2": {
        10: (12,), 13: (17,), 16: (11, 12, 13), 17: (15, 16), 18: (4, 11, 19), 19: (11,), 21: (2, 3), 22: (3, 9, 12),
        23: (5, 7, 13), 25: (5,), 26: (1, 12), 27: (15,),
    },
}  # fmt: skip


def alignment_heads(config: WhisperConfig, name: str = "") -> list[list[int]] | None:
    """The (layer, head) pairs of a model of published dimensions, None for others.

    Args:
        config: The model's dimensions.
        name: Of the file, which tells large-v1 and large-v2 apart.
    """
    size = (config.encoder_layers, config.decoder_layers, config.d_model, config.vocab_size)
    table = _HEADS.get(size)
    if size == _LARGE:
        table = next((heads for version, heads in _LARGE_HEADS.items() if version in name), None)
    return None if table is None else [[layer, head] for layer, heads in table.items() for head in heads]


def special_tokens(text_tokens: int, vocab_size: int) -> list[str] | None:
    """Everything that follows the text tokens in a vocabulary laid out as OpenAI's, in order of id.

    None when what is left between the two sizes cannot be that layout: 1 to 100 languages and 1,509 further tokens.
    """
    languages = vocab_size - text_tokens - _OTHERS - TIMESTAMPS
    if not 1 <= languages <= len(LANGUAGES):
        return None
    codes = list(LANGUAGES)[:languages]
    tasks = ["<|translate|>", "<|transcribe|>", "<|startoflm|>", "<|startofprev|>", "<|nospeech|>"]
    times = [f"<|{step * 0.02:.2f}|>" for step in range(TIMESTAMPS)]
    start = ["<|endoftext|>", "<|startoftranscript|>", *(f"<|{code}|>" for code in codes)]
    return [*start, *tasks, "<|notimestamps|>", *times]


def special_ids(vocab_size: int) -> dict[str, int] | None:
    """{special token: id} of OpenAI's vocabulary of that size, None for sizes that are not theirs."""
    count = TEXT_TOKENS.get(vocab_size)
    tokens = None if count is None else special_tokens(count, vocab_size)
    return None if tokens is None or count is None else {token: count + place for place, token in enumerate(tokens)}


def generation_fields(ids: Mapping[str, int], config: WhisperConfig, multilingual: bool) -> dict[str, Any]:
    """What generation_config.json says of a model whose special tokens have these ids; alignment heads where known."""
    fields: dict[str, Any] = {
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|endoftext|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "decoder_start_token_id": ids["<|startoftranscript|>"],
        "prev_sot_token_id": ids["<|startofprev|>"],
        "no_timestamps_token_id": ids["<|notimestamps|>"],
        "max_initial_timestamp_index": 50,
        "max_length": config.max_target_positions,
        "return_timestamps": False,
        "is_multilingual": multilingual,
    }
    if multilingual:
        codes = [f"<|{code}|>" for code in LANGUAGES]
        fields["lang_to_id"] = {code: ids[code] for code in codes if code in ids}
        fields["task_to_id"] = {task: ids[f"<|{task}|>"] for task in ("transcribe", "translate")}
    heads = alignment_heads(config, config.name_or_path)
    return fields if heads is None else {**fields, "alignment_heads": heads}


def without_forced(values: Mapping[str, Any], ids: Mapping[str, int]) -> dict[str, Any]:
    """The values of a generation config, forced tokens written as the language and the task that they stand for.

    Forced tokens that stand for something else stay as they are.

    Args:
        values: Content of generation_config.json.
        ids: {special token: id} of the model.

    Raises:
        ConfigError: `forced_decoder_ids` is not a list of (place, token) pairs.
    """
    settled = dict(values)
    forced = settled.pop("forced_decoder_ids", None) or []
    try:
        pairs = [(int(place), None if number is None else int(number)) for place, number in forced]
    except (TypeError, ValueError) as error:
        raise ConfigError(f"forced_decoder_ids={str(forced)[:80]}: [place, token] pairs are needed.") from error
    names = {number: token for token, number in ids.items()}
    named: dict[str, str] = {}
    for place, number in pairs:
        token = "<|notimestamps|>" if number is None else names.get(number, "")
        if place == 1 and token[2:-2] in LANGUAGES:
            named["language"] = token
        elif token in ("<|transcribe|>", "<|translate|>"):
            named["task"] = token[2:-2]
        elif token != "<|notimestamps|>":
            return dict(values)
    return {**named, **{name: value for name, value in settled.items() if value is not None or name not in named}}


def complete(generation: GenerationConfig, config: WhisperConfig) -> None:
    """Bring the generation config of an older checkpoint to today's form.

    What it leaves out is filled in where the vocabulary is one of OpenAI's, and tokens that it or the model's config
    forces become the language and the task they stand for. What it says otherwise stays as it is.

    Raises:
        ConfigError: `forced_decoder_ids` is not a list of (place, token) pairs.
    """
    ids = special_ids(config.vocab_size)
    if ids is not None and generation.decoder_start_token_id in (None, ids["<|startoftranscript|>"]):
        for name, value in generation_fields(ids, config, multilingual=config.vocab_size != ENGLISH_ONLY).items():
            is_open = name == "max_initial_timestamp_index" and hasattr(generation, name)
            if getattr(generation, name, None) is None and not is_open:
                setattr(generation, name, value)
    forced = vars(config).pop("forced_decoder_ids", None)
    forced = vars(generation).pop("forced_decoder_ids", None) or forced
    if forced:
        values = {name: getattr(generation, name, None) for name in ("language", "task")}
        for name, value in without_forced({**values, "forced_decoder_ids": forced}, named_ids(generation)).items():
            setattr(generation, name, value)


def named_ids(generation: GenerationConfig) -> dict[str, int]:
    """{token: id} of the languages and tasks that a generation config names."""
    tasks = getattr(generation, "task_to_id", None) or {}
    ids = {**(getattr(generation, "lang_to_id", None) or {}), **{f"<|{task}|>": tasks[task] for task in tasks}}
    no_timestamps = getattr(generation, "no_timestamps_token_id", None)
    return ids if no_timestamps is None else {**ids, "<|notimestamps|>": no_timestamps}
