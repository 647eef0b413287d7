"""The folder of a tiny Whisper of 2.2 million weights: tokenizer, configuration files and weights.

The tokenizer is that of Whisper with few merges: the bytes, pieces of words, whole words with the space before them,
special tokens, and 1501 timestamps.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from audiomm import WhisperConfig

BYTES = 256
SPACE = "\u0120"  # the letter of the space
GUIDED = ((1, 0), (2, 0), (2, 1))  # (decoder layer, head) of the heads that are told where the next token is heard
EXTRACTOR = {
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


def byte_letters() -> list[str]:
    """The printable letter that stands for each byte, in the order of GPT-2's vocabulary."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(byte) for byte in plain] + [chr(256 + i) for i in range(256 - len(plain))]


@dataclass(frozen=True)
class Vocabulary:
    """Tokens in the order of their numbers: bytes, `pieces`, `words`, special tokens, timestamps.

    Args:
        pieces: Parts of words that `merges` make.
        words: Whole words, each a token with the space before it.
        merges: Pairs of pieces to join, the first ones first.
        languages: Codes of the languages.
    """

    pieces: Sequence[str]
    words: Sequence[str]
    merges: Sequence[tuple[str, str]]
    languages: Sequence[str]

    @cached_property
    def specials(self) -> list[str]:
        names = ["endoftext", "startoftranscript", *self.languages, "translate", "transcribe"]
        return [f"<|{name}|>" for name in [*names, "startoflm", "startofprev", "nospeech", "notimestamps"]]

    @cached_property
    def numbers(self) -> dict[str, int]:
        """Token to number."""
        words = [SPACE + word for word in self.words]
        times = [f"<|{index * 0.02:.2f}|>" for index in range(1501)]
        return {
            name: number for number, name in enumerate([*byte_letters(), *self.pieces, *words, *self.specials, *times])
        }

    def __getitem__(self, special: str) -> int:
        """The number of a special token, without its marks."""
        return self.numbers[f"<|{special}|>"]

    def tokenizer(self) -> dict[str, Any]:
        """The content of tokenizer.json."""
        end = self["endoftext"]
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        added = [
            {"id": number, "content": text, "special": text in self.specials} | flags
            for text, number in self.numbers.items()
            if number >= end
        ]
        level = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
        first_tokens = ("<|startoftranscript|>", "<|notimestamps|>")
        prefix = [{"SpecialToken": {"id": token, "type_id": 0}} for token in first_tokens]
        first, second = ({"Sequence": {"id": name, "type_id": index}} for index, name in enumerate("AB"))
        last = [{"SpecialToken": {"id": "<|endoftext|>", "type_id": index}} for index in (0, 1)]
        named = {text: self.numbers[text] for text in (*first_tokens, "<|endoftext|>")}
        model = {
            "type": "BPE",
            **dict.fromkeys(("dropout", "unk_token")),
            **dict.fromkeys(("continuing_subword_prefix", "end_of_word_suffix"), ""),
            **dict.fromkeys(("fuse_unk", "byte_fallback", "ignore_merges"), False),
            "vocab": {piece: number for piece, number in self.numbers.items() if number < end},
            "merges": [list(merge) for merge in self.merges],
        }
        return {
            "version": "1.0",
            **dict.fromkeys(("truncation", "padding", "normalizer")),
            "added_tokens": added,
            "pre_tokenizer": level | {"add_prefix_space": False},
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [*prefix, first, last[0]],
                "pair": [*prefix, first, second, last[1]],
                "special_tokens": {
                    text: {"id": text, "ids": [token], "tokens": [text]} for text, token in named.items()
                },
            },
            "decoder": level | {"add_prefix_space": True},
            "model": model,
        }

    def tokenizer_config(self) -> dict[str, Any]:
        return {
            "add_prefix_space": False,
            **dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), "<|endoftext|>"),
            "extra_special_tokens": self.specials[1:],
            "model_max_length": 448,
            "processor_class": "WhisperProcessor",
            "tokenizer_class": "WhisperTokenizer",
        }

    def model_config(self) -> WhisperConfig:
        end = self["endoftext"]
        return WhisperConfig(
            vocab_size=len(self.numbers),
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
            decoder_start_token_id=self["startoftranscript"],
            bos_token_id=end,
            eos_token_id=end,
            pad_token_id=end,
            begin_suppress_tokens=None,
            suppress_tokens=None,
        )

    def generation_config(self) -> dict[str, Any]:
        """No suppression, and a lenient compression threshold: few words repeat themselves.

        With one language nothing is left to detection, with more it is heard.
        """
        end, only = self["endoftext"], {"language": f"<|{self.languages[0]}|>"} if len(self.languages) == 1 else {}
        return only | {
            "alignment_heads": [list(place) for place in GUIDED if place[0] == 2],
            "alignment_with_timestamps": True,
            "begin_suppress_tokens": None,
            "bos_token_id": end,
            "compression_ratio_threshold": 10.0,
            "condition_on_prev_tokens": False,
            "decoder_start_token_id": self["startoftranscript"],
            "eos_token_id": end,
            "is_multilingual": True,
            "lang_to_id": {f"<|{name}|>": self[name] for name in self.languages},
            "max_initial_timestamp_index": None,
            "max_length": 448,
            "no_timestamps_token_id": self["notimestamps"],
            "pad_token_id": end,
            "prev_sot_token_id": self["startofprev"],
            "return_timestamps": True,
            "suppress_tokens": [],
            "task": "transcribe",
            "task_to_id": {name: self[name] for name in ("transcribe", "translate")},
        }

    def save_model(self, state: dict[str, Tensor], folder: Path) -> None:
        """Write the whole model folder; every file appears complete or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        fresh = folder.with_name(folder.name + ".new")
        fresh.mkdir(exist_ok=True)
        config = self.model_config().to_dict()
        config |= {"architectures": ["WhisperForConditionalGeneration"], "dtype": "float16"}
        for key in ("transformers_version", "_name_or_path"):
            config.pop(key, None)
        files = {"config": config, "generation_config": self.generation_config(), "preprocessor_config": EXTRACTOR}
        for name, content in files.items():
            (fresh / f"{name}.json").write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
        (fresh / "tokenizer.json").write_text(json.dumps(self.tokenizer(), ensure_ascii=False))
        (fresh / "tokenizer_config.json").write_text(json.dumps(self.tokenizer_config(), indent=2) + "\n")
        half = {name: value.detach().half().contiguous() for name, value in state.items() if name != "proj_out.weight"}
        save_file(half, fresh / "model.safetensors", metadata={"format": "pt"})
        for path in fresh.iterdir():
            path.chmod(0o644)
            path.replace(folder / path.name)
        fresh.rmdir()
