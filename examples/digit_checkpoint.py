"""The folder of a tiny Whisper for digit strings: its vocabulary, tokenizer, configuration files and weights."""

from __future__ import annotations

import json
from pathlib import Path

import digit_strings as ds
from safetensors.torch import save_file
from torch import Tensor

from audiomm import WhisperConfig

BYTES = 256
LETTER_MERGES = [(word[:i], word[i]) for word in ds.WORDS for i in range(1, len(word))]
WORD_TOKEN = BYTES + len(LETTER_MERGES)  # " zero" .. " nine"
EOT = WORD_TOKEN + len(ds.WORDS)
SPECIALS = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|translate|>", "<|transcribe|>"]
SPECIALS += ["<|startoflm|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>"]
SOT, EN, TRANSLATE, TRANSCRIBE, _, PREV, NO_SPEECH, NO_TIMES = range(EOT + 1, EOT + 9)
FIRST_TIME = EOT + 9
VOCABULARY = FIRST_TIME + 1501
GUIDED = ((1, 0), (2, 0), (2, 1))  # (decoder layer, head)


def byte_letters() -> list[str]:
    """The printable letter that stands for each byte, in the order of GPT-2's vocabulary."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(byte) for byte in plain] + [chr(256 + i) for i in range(256 - len(plain))]


def write_tokenizer(folder: Path) -> None:
    """Write tokenizer.json: bytes, merges up to the ten words, Whisper's special tokens and 1501 timestamps."""
    merges = [*LETTER_MERGES, *(("\u0120", word) for word in ds.WORDS)]
    pieces = [*byte_letters(), *(left + right for left, right in merges)]
    times = [f"<|{index * 0.02:.2f}|>" for index in range(1501)]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [
        {"id": EOT + index, "content": text, "special": index < len(SPECIALS)} | flags
        for index, text in enumerate(SPECIALS + times)
    ]
    level = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
    prefix = [{"SpecialToken": {"id": token, "type_id": 0}} for token in ("<|startoftranscript|>", "<|notimestamps|>")]
    first, second = ({"Sequence": {"id": name, "type_id": index}} for index, name in enumerate("AB"))
    last = [{"SpecialToken": {"id": "<|endoftext|>", "type_id": index}} for index in (0, 1)]
    named = {"<|startoftranscript|>": SOT, "<|notimestamps|>": NO_TIMES, "<|endoftext|>": EOT}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": level | {"add_prefix_space": False},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [*prefix, first, last[0]],
            "pair": [*prefix, first, second, last[1]],
            "special_tokens": {text: {"id": text, "ids": [token], "tokens": [text]} for text, token in named.items()},
        },
        "decoder": level | {"add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {piece: index for index, piece in enumerate(pieces)},
            "merges": [list(merge) for merge in merges],
        },
    }
    config = {
        "add_prefix_space": False,
        **dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), "<|endoftext|>"),
        "extra_special_tokens": SPECIALS[1:],
        "model_max_length": 448,
        "processor_class": "WhisperProcessor",
        "tokenizer_class": "WhisperTokenizer",
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False))
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def model_config() -> WhisperConfig:
    return WhisperConfig(
        vocab_size=VOCABULARY,
        num_mel_bins=80,
        d_model=128,
        encoder_layers=4,
        encoder_attention_heads=2,
        encoder_ffn_dim=512,
        decoder_layers=3,
        decoder_attention_heads=4,
        decoder_ffn_dim=512,
        max_source_positions=1500,
        max_target_positions=448,
        decoder_start_token_id=SOT,
        bos_token_id=EOT,
        eos_token_id=EOT,
        pad_token_id=EOT,
        begin_suppress_tokens=None,
        suppress_tokens=None,
    )


def save_model(state: dict[str, Tensor], folder: Path) -> None:
    """Write the whole model folder; every file appears complete or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    fresh = folder.with_name(folder.name + ".new")
    fresh.mkdir(exist_ok=True)
    write_tokenizer(fresh)
    config = model_config().to_dict() | {"architectures": ["WhisperForConditionalGeneration"], "dtype": "float16"}
    for key in ("transformers_version", "_name_or_path"):
        config.pop(key, None)
    generation = {
        "alignment_heads": [list(place) for place in GUIDED if place[0] == 2],
        "alignment_with_timestamps": True,
        "begin_suppress_tokens": None,
        "bos_token_id": EOT,
        "compression_ratio_threshold": 10.0,  # ten words said again and again compress well
        "condition_on_prev_tokens": False,  # it never saw a text before the window
        "decoder_start_token_id": SOT,
        "eos_token_id": EOT,
        "is_multilingual": True,
        "lang_to_id": {"<|en|>": EN},
        "language": "<|en|>",  # with the task, nothing is left to detection
        "max_initial_timestamp_index": None,
        "max_length": 448,
        "no_timestamps_token_id": NO_TIMES,
        "pad_token_id": EOT,
        "prev_sot_token_id": PREV,
        "return_timestamps": True,
        "suppress_tokens": [],
        "task": "transcribe",
        "task_to_id": {"transcribe": TRANSCRIBE, "translate": TRANSLATE},
    }
    extractor = {
        "chunk_length": 30,
        "dither": 0.0,
        "feature_extractor_type": "WhisperFeatureExtractor",
        "feature_size": 80,
        "hop_length": 160,
        "n_fft": 400,
        "n_samples": 480000,
        "nb_max_frames": 3000,
        "padding_side": "right",
        "padding_value": 0.0,
        "processor_class": "WhisperProcessor",
        "return_attention_mask": False,
        "sampling_rate": 16000,
    }
    for name, content in (("config", config), ("generation_config", generation), ("preprocessor_config", extractor)):
        (fresh / f"{name}.json").write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    half = {name: value.detach().half().contiguous() for name, value in state.items() if name != "proj_out.weight"}
    save_file(half, fresh / "model.safetensors", metadata={"format": "pt"})
    for path in fresh.iterdir():
        path.chmod(0o644)
        path.replace(folder / path.name)
    fresh.rmdir()
