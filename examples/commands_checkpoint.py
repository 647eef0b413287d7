"""The folder of the commands model: vocabulary, tokenizer, configuration files, weights, and the start from another.

Each of the words is one token with the space before it; the merges that lead to it come from ordinary byte pair
encoding of the list of words.
"""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import commands_words as cw
import torch
from digit_checkpoint import byte_letters
from safetensors.torch import save_file
from torch import Tensor

from audiomm import WhisperConfig, WhisperForConditionalGeneration

BYTES = 256
SPACE = "\u0120"


def word_merges() -> list[tuple[str, str]]:
    """Merges that make one piece of every word with its space: the most frequent pair first, until all are whole."""
    words = [[SPACE, *word] for word in cw.WORDS]
    merges: list[tuple[str, str]] = []
    while True:
        pairs = Counter(pair for word in words for pair in pairwise(word))
        if not pairs:
            return merges
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        for word in words:
            place = 0
            while place < len(word) - 1:
                if (word[place], word[place + 1]) == best:
                    word[place : place + 2] = ["".join(best)]
                place += 1


MERGES = word_merges()
_WHOLE = [SPACE + word for word in cw.WORDS]
PIECES = [piece for piece in dict.fromkeys(left + right for left, right in MERGES) if piece not in set(_WHOLE)]
WORD_TOKEN = BYTES + len(PIECES)  # the token of the first of `commands_words.WORDS`; the others follow
EOT = WORD_TOKEN + len(cw.WORDS)
SPECIALS = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|es|>", "<|translate|>", "<|transcribe|>"]
SPECIALS += ["<|startoflm|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>"]
SOT, EN, ES, TRANSLATE, TRANSCRIBE, _, PREV, NO_SPEECH, NO_TIMES = range(EOT + 1, EOT + 10)
FIRST_TIME = EOT + 10
VOCABULARY = FIRST_TIME + 1501
GUIDED = ((1, 0), (2, 0), (2, 1))  # (decoder layer, head)


def write_tokenizer(folder: Path) -> None:
    """Write tokenizer.json: bytes, merges up to the words, Whisper's special tokens and 1501 timestamps."""
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
    model = {
        "type": "BPE",
        **dict.fromkeys(("dropout", "unk_token")),
        **dict.fromkeys(("continuing_subword_prefix", "end_of_word_suffix"), ""),
        **dict.fromkeys(("fuse_unk", "byte_fallback", "ignore_merges"), False),
        "vocab": {piece: index for index, piece in enumerate([*byte_letters(), *PIECES, *_WHOLE])},
        "merges": [list(merge) for merge in MERGES],
    }
    tokenizer = {
        "version": "1.0",
        **dict.fromkeys(("truncation", "padding", "normalizer")),
        "added_tokens": added,
        "pre_tokenizer": level | {"add_prefix_space": False},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [*prefix, first, last[0]],
            "pair": [*prefix, first, second, last[1]],
            "special_tokens": {text: {"id": text, "ids": [token], "tokens": [text]} for text, token in named.items()},
        },
        "decoder": level | {"add_prefix_space": True},
        "model": model,
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


def generation_config() -> dict[str, object]:
    """No language: it is heard. No suppression, and a lenient compression threshold: few words repeat themselves."""
    return {
        "alignment_heads": [list(place) for place in GUIDED if place[0] == 2],
        "alignment_with_timestamps": True,
        "begin_suppress_tokens": None,
        "bos_token_id": EOT,
        "compression_ratio_threshold": 10.0,
        "condition_on_prev_tokens": False,
        "decoder_start_token_id": SOT,
        "eos_token_id": EOT,
        "is_multilingual": True,
        "lang_to_id": {"<|en|>": EN, "<|es|>": ES},
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


def save_model(state: dict[str, Tensor], folder: Path) -> None:
    """Write the whole model folder; every file appears complete or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    fresh = folder.with_name(folder.name + ".new")
    fresh.mkdir(exist_ok=True)
    write_tokenizer(fresh)
    config = model_config().to_dict() | {"architectures": ["WhisperForConditionalGeneration"], "dtype": "float16"}
    for key in ("transformers_version", "_name_or_path"):
        config.pop(key, None)
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
    files = {"config": config, "generation_config": generation_config(), "preprocessor_config": extractor}
    for name, content in files.items():
        (fresh / f"{name}.json").write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    half = {name: value.detach().half().contiguous() for name, value in state.items() if name != "proj_out.weight"}
    save_file(half, fresh / "model.safetensors", metadata={"format": "pt"})
    for path in fresh.iterdir():
        path.chmod(0o644)
        path.replace(folder / path.name)
    fresh.rmdir()


@torch.no_grad()
def take_weights(model: WhisperForConditionalGeneration, folder: Path) -> None:
    """Start from another model of this size: its layers, and the rows of the tokens that both know by name."""
    other = WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    weights, own = other.state_dict(), model.state_dict()
    for name, value in own.items():
        if "embed_tokens" not in name and not name.startswith("proj_out"):
            value.copy_(weights[name])
    rows, source = model.model.decoder.embed_tokens.weight, weights["model.decoder.embed_tokens.weight"]
    theirs, ours = (_token_numbers(path) for path in (folder / "tokenizer.json", None))
    words = source[[theirs[SPACE + word] for word in cw.DIGITS if SPACE + word in theirs]]
    rows[WORD_TOKEN:EOT] = words.mean(0) + torch.randn(len(cw.WORDS), rows.shape[1]) * 0.08
    for token, number in ours.items():
        if token in theirs:
            rows[number] = source[theirs[token]]
    if "<|es|>" not in theirs:
        rows[ES] = rows[EN]


def _token_numbers(path: Path | None) -> dict[str, int]:
    """Token to number, of a tokenizer.json or of this model's own vocabulary."""
    if path is None:
        names = [*byte_letters(), *PIECES, *_WHOLE, *SPECIALS, *(f"<|{index * 0.02:.2f}|>" for index in range(1501))]
        return {name: number for number, name in enumerate(names)}
    content = json.loads(path.read_text())
    return content["model"]["vocab"] | {token["content"]: token["id"] for token in content["added_tokens"]}
