"""Tokenizers of the Gemma kind: SentencePiece pieces written down as a tokenizer.json of byte-pair merges.

Spaces are spelled "▁", what the vocabulary lacks is spelled in bytes (`<0x0A>`), a text begins with `<bos>`, and a
batch is padded on the left so that generation goes on where the text ends.
"""

from __future__ import annotations

import os
from typing import Any, ClassVar

from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from .errors import ConfigError, InputError
from .hub import read_json
from .tokenizer import PreTrainedTokenizer

_SPECIAL = {
    "pad_token": "<pad>",
    "eos_token": "<eos>",
    "bos_token": "<bos>",
    "unk_token": "<unk>",
    "mask_token": "<mask>",
}


class SentencePieceTokenizer(PreTrainedTokenizer):
    """A tokenizer of the Gemma kind.

    Args:
        vocab: {piece: id}, or the path of a JSON file with it, where there is no tokenizer.json.
        merges: The pairs that belong to it, ["a b", ...] or [("a", "b"), ...].
        tokenizer_object: A `tokenizers.Tokenizer`.
        tokenizer_file: Path of a tokenizer.json.
        add_bos_token: Begin every text with `<bos>`; None is what tokenizer.json says.
        add_eos_token: End every text with `<eos>`; None is what tokenizer.json says.
        settings: See PreTrainedTokenizer.

    Raises:
        InputError: There is no vocabulary.
        ConfigError: The vocabulary cannot be read.
    """

    default_padding_side: ClassVar[str] = "left"
    #: Special tokens by which text refers to media; those that the vocabulary lacks are left out.
    media_tokens: ClassVar[dict[str, str]] = {}

    def __init__(
        self,
        vocab: str | dict[str, int] | None = None,
        merges: list[Any] | None = None,
        tokenizer_object: Tokenizer | None = None,
        tokenizer_file: str | os.PathLike[str] | None = None,
        add_bos_token: bool | None = None,
        add_eos_token: bool | None = None,
        **settings: Any,
    ) -> None:
        if tokenizer_object is None and tokenizer_file is None:
            if vocab is None:
                raise InputError(f"{type(self).__name__} needs tokenizer_file=, tokenizer_object= or vocab=.")
            tokenizer_object = _byte_fallback_bpe(vocab, merges or [])
        super().__init__(tokenizer_object, tokenizer_file, **{**_SPECIAL, **settings})
        for name, token in self.media_tokens.items():
            if name not in self._named and self._tokenizer.token_to_id(token) is not None:
                self.add_special_tokens({name: token})
        if add_bos_token is not None or add_eos_token is not None or self._tokenizer.post_processor is None:
            self._frame(add_bos_token is not False, bool(add_eos_token))
            self.init_kwargs |= {"add_bos_token": add_bos_token is not False, "add_eos_token": bool(add_eos_token)}

    def _frame(self, begin: bool, end: bool) -> None:
        """Put `<bos>` before and `<eos>` behind every text, or not."""
        first = [self.bos_token] if begin else []
        last = [self.eos_token] if end else []
        self._tokenizer.post_processor = processors.TemplateProcessing(
            single=[*first, "$A", *last],
            pair=[*first, "$A", *last, *(f"{token}:1" for token in first), "$B:1", *(f"{token}:1" for token in last)],
            special_tokens=[(token, self._tokenizer.token_to_id(token)) for token in {*first, *last}],
        )


def _byte_fallback_bpe(vocab: str | dict[str, int], merges: list[Any]) -> Tokenizer:
    """The backend from pieces and merges.

    Raises:
        ConfigError: They do not fit together.
    """
    entries = vocab if isinstance(vocab, dict) else read_json(vocab)
    pairs: list[Any] = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in merges]
    try:
        model = BPE(vocab=entries, merges=pairs, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    except Exception as error:  # the library raises bare Exception for whatever does not fit
        raise ConfigError(f"vocabulary and merges do not make a tokenizer: {error}") from error
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend
