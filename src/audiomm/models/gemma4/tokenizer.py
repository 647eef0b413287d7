"""The tokenizer of Gemma 4: 262,144 SentencePiece pieces and the tokens that stand for media.

Published vocabularies have a place for `<|video|>` (258884) that some tokenizer.json files leave under another name; it
is put there when they are read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, ClassVar

from tokenizers import Tokenizer

from ...base.errors import ConfigError
from ...base.sentencepiece import SentencePieceTokenizer

VIDEO_TOKEN = "<|video|>"
#: In the published vocabulary: where `<|image|>` is, and how much further `<|video|>` is.
_IMAGE_ID, _VIDEO_ID = 258880, 258884


class GemmaTokenizer(SentencePieceTokenizer):
    """Text to ids for Gemma 4; arguments as SentencePieceTokenizer.

    Attributes:
        image_token, boi_token, eoi_token: What stands for one image token, and what begins and ends an image; each has
            its `_id`. `audio_token`, `boa_token` and `eoa_token` likewise for clips, `video_token` for a video's.
    """

    media_tokens: ClassVar[dict[str, str]] = {
        "image_token": "<|image|>",
        "boi_token": "<|image>",
        "eoi_token": "<image|>",
        "audio_token": "<|audio|>",
        "boa_token": "<|audio>",
        "eoa_token": "<audio|>",
    }

    def _name_special_tokens(self, settings: Mapping[str, Any]) -> None:
        self._tokenizer = _with_video(self._tokenizer)
        super()._name_special_tokens(settings)
        if self._tokenizer.token_to_id(self.media_tokens["image_token"]) is not None:  # else it is Gemma 3n's
            # Unnamed, as the published processors add it, so that files written here and there are the same.
            self.add_special_tokens({"additional_special_tokens": [VIDEO_TOKEN]}, replace_extra_special_tokens=False)

    @property
    def video_token(self) -> str | None:
        """What stands for one token of a video's frame; None in a vocabulary without media, or of Gemma 3n."""
        return None if self.video_token_id is None else VIDEO_TOKEN

    @property
    def video_token_id(self) -> int | None:
        """Its id."""
        return self._tokenizer.token_to_id(VIDEO_TOKEN)


GemmaTokenizerFast = GemmaTokenizer


def _with_video(backend: Tokenizer) -> Tokenizer:
    """`backend`, with `<|video|>` in its place if it is the published vocabulary and lacks it.

    Raises:
        ConfigError: Another token that is in use has that place, or `<|video|>` is elsewhere.
    """
    place = backend.token_to_id(VIDEO_TOKEN)
    if backend.token_to_id("<|image|>") != _IMAGE_ID or place == _VIDEO_ID:
        return backend
    holder = backend.id_to_token(_VIDEO_ID)
    if place is not None or (holder is not None and not holder.startswith("<unused")):
        raise ConfigError(
            f"tokenizer.json: {VIDEO_TOKEN} has id {place} and id {_VIDEO_ID} is {holder!r}, but the model has the "
            f"embedding of {VIDEO_TOKEN} at {_VIDEO_ID}."
        )
    content = json.loads(backend.to_str())
    if holder is not None:
        content["model"]["vocab"].pop(holder, None)
        content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != holder]
    content["model"]["vocab"][VIDEO_TOKEN] = _VIDEO_ID
    return Tokenizer.from_str(json.dumps(content))
