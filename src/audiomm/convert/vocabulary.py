"""A tokenizer from nothing but the bytes of its tokens in order of rank, as tiktoken, ggml and CTranslate2 have it.

Byte-pair merges are not in those files, but follow from the ranks: a token is the merge of the two pieces that the
tokens before it cut it into. Source: tiktoken's educational encoder and the layout of the hub's Whisper tokenizers.
"""

from __future__ import annotations

import base64
import binascii
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, pre_tokenizers

from ..base.errors import CorruptCheckpointError, InputError
from ..base.tokenizer_files import byte_level_bpe
from ..models.whisper.published import TIMESTAMPS, special_tokens
from ..models.whisper.tokenizer import WhisperTokenizer

#: Longest sequence that the hub's Whisper tokenizers declare.
_MODEL_MAX_LENGTH = 1024

#: Signs that are noise in a transcript: openai-whisper never lets a model write them.
_SIGNS = tuple('"#()*+/:;<=>@[\\]^_`{|}~「」『』')
_SIGN_GROUPS = (
    "<<", ">>", "<<<", ">>>", "--", "---", "-(", "-[", "('", '("', "((", "))", "(((", ")))", "[[", "]]", "{{", "}}",
    "♪♪", "♪♪♪",
)  # fmt: skip
#: Of these the first token is kept from being written even when they take several.
_MUSIC = tuple("♩♪♫♬♭♮♯")
#: Special tokens that no transcript holds.
_NEVER_WRITTEN = ("startoftranscript", "translate", "transcribe", "startoflm", "startofprev", "nospeech")


def _spelling() -> list[str]:
    """The character that a byte-level vocabulary writes for each byte: itself if visible, else one from U+0100 on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = iter(range(0x100, 0x200))
    return [chr(byte if byte in visible else next(hidden)) for byte in range(256)]


_CHARACTERS = _spelling()
_BYTES = {character: byte for byte, character in enumerate(_CHARACTERS)}


def spelled(token: bytes) -> str:
    """A token's bytes in the visible spelling of vocab.json."""
    return "".join(_CHARACTERS[byte] for byte in token)


def unspelled(text: str) -> bytes | None:
    """The bytes of a token in the spelling of vocab.json, None for text that is not in it."""
    found = [_BYTES.get(character) for character in text]
    return None if None in found else bytes(byte for byte in found if byte is not None)


def read_tiktoken(path: Path) -> list[bytes]:
    """The tokens of a .tiktoken file, `base64 rank` a line, in order of rank.

    Raises:
        CorruptCheckpointError: The file is not of that form, or ranks are missing.
    """
    ranks: dict[int, bytes] = {}
    try:
        for line in path.read_text(encoding="ascii").splitlines():
            if line:
                token, rank = line.split()
                # The last token of the multilingual vocabulary is empty, written as "=".
                ranks[int(rank)] = base64.b64decode(token)
    except (UnicodeDecodeError, ValueError, binascii.Error) as error:
        raise CorruptCheckpointError(f"{path} is not a tiktoken vocabulary, 'base64 rank' a line: {error}") from error
    if sorted(ranks) != list(range(len(ranks))) or not ranks:
        raise CorruptCheckpointError(f"{path}: its {len(ranks):,} ranks are not 0 to {len(ranks) - 1:,} without a gap.")
    return [ranks[rank] for rank in range(len(ranks))]


def merges_of(tokens: Sequence[bytes]) -> list[tuple[str, str]]:
    """The merges that make the tokens longer than one byte, in order."""
    ranks = {token: rank for rank, token in enumerate(tokens)}
    merges = []
    for rank, token in enumerate(tokens):
        if len(token) < 2:
            continue
        pieces = [token[place : place + 1] for place in range(len(token))]
        while len(pieces) > 2:
            pairs = [ranks.get(left + right, rank) for left, right in itertools.pairwise(pieces)]
            best = min(pairs)
            if best >= rank:
                break
            place = pairs.index(best)
            pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]
        # Tokens that never come of merging are in the vocabulary to be decoded only.
        if len(pieces) == 2 and pieces[0] in ranks and pieces[1] in ranks:
            merges.append((spelled(pieces[0]), spelled(pieces[1])))
    return merges


def build_tokenizer(tokens: Sequence[bytes], vocab_size: int, name: str) -> WhisperTokenizer:
    """The tokenizer of a vocabulary, with the special tokens that OpenAI's models have after the text.

    Args:
        tokens: Tokens of text, in order of id.
        vocab_size: Rows of the model's token embedding.
        name: Of the file, for messages.

    Raises:
        CorruptCheckpointError: The tokens are not distinct or leave out bytes.
        InputError: Text and special tokens do not add up to `vocab_size`.
    """
    vocabulary = {spelled(token): rank for rank, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise CorruptCheckpointError(f"{name}: only {len(vocabulary):,} of its {len(tokens):,} tokens are distinct.")
    missing = [character for character in pre_tokenizers.ByteLevel.alphabet() if character not in vocabulary]
    if missing:
        raise CorruptCheckpointError(f"{name}: its {len(tokens):,} tokens leave out {len(missing)} of the 256 bytes.")
    added = special_tokens(len(tokens), vocab_size)
    if added is None:
        raise InputError(
            f"{name}: {len(tokens):,} tokens of text do not fit a model of {vocab_size:,} tokens: between them belong "
            "1 to 100 languages and 1,509 other special tokens. Pass the model's own with tokenizer= (--tokenizer)."
        )
    backend = byte_level_bpe(vocabulary, merges_of(tokens), add_prefix_space=False)
    special, times = added[:-TIMESTAMPS], added[-TIMESTAMPS:]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    backend.add_tokens([AddedToken(token, normalized=False, special=False) for token in times])
    settings: dict[str, Any] = {
        **dict.fromkeys(("unk_token", "bos_token", "eos_token", "pad_token"), special[0]),
        "additional_special_tokens": special[1:],
        "model_max_length": _MODEL_MAX_LENGTH,
    }
    return WhisperTokenizer(tokenizer_object=backend, **settings)


def suppressed_tokens(tokenizer: WhisperTokenizer) -> list[int]:
    """Ids that are never written: signs that are no speech, and special tokens that only stand in prompts."""
    ids = set()
    for sign in (*_SIGNS, *_SIGN_GROUPS, *_MUSIC):
        for text in (sign, f" {sign}"):
            pieces = tokenizer.encode(text, add_special_tokens=False)
            if len(pieces) == 1 or sign in _MUSIC:
                ids.add(pieces[0])
    # Hyphens and apostrophes are fine inside words, not as words.
    ids.update(tokenizer.encode(text, add_special_tokens=False)[0] for text in (" -", " '"))
    vocabulary = tokenizer.get_vocab()
    ids.update(vocabulary[f"<|{name}|>"] for name in _NEVER_WRITTEN if f"<|{name}|>" in vocabulary)
    return sorted(ids)
