"""The tokenizer of Gemma 3n: 262,144 SentencePiece pieces and the tokens that stand for media."""

from __future__ import annotations

from typing import ClassVar

from ...base.sentencepiece import SentencePieceTokenizer


class GemmaTokenizer(SentencePieceTokenizer):
    """Text to ids for Gemma 3n; arguments as SentencePieceTokenizer.

    Attributes:
        image_token, boi_token, eoi_token: What stands for one image token, and what begins and ends an image; each has
            its `_id`. `audio_token`, `boa_token` and `eoa_token` likewise for clips.
    """

    media_tokens: ClassVar[dict[str, str]] = {
        "image_token": "<image_soft_token>",
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "audio_token": "<audio_soft_token>",
        "boa_token": "<start_of_audio>",
        "eoa_token": "<end_of_audio>",
    }


GemmaTokenizerFast = GemmaTokenizer
