"""The vocabulary of the commands model, the numbers of its tokens, and its start from another model.

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
from tiny_whisper import BYTES, SPACE, Vocabulary

from audiomm import WhisperForConditionalGeneration


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
_WHOLE = {SPACE + word for word in cw.WORDS}
VOCABULARY = Vocabulary(
    pieces=[piece for piece in dict.fromkeys(left + right for left, right in MERGES) if piece not in _WHOLE],
    words=cw.WORDS,
    merges=MERGES,
    languages=["en", "es"],
)
WORD_TOKEN = BYTES + len(VOCABULARY.pieces)  # the token of the first of `commands_words.WORDS`; the others follow
EOT = WORD_TOKEN + len(cw.WORDS)
SOT, EN, ES, TRANSLATE, TRANSCRIBE, _, PREV, NO_SPEECH, NO_TIMES, FIRST_TIME = range(EOT + 1, EOT + 11)


@torch.no_grad()
def take_weights(model: WhisperForConditionalGeneration, folder: Path) -> None:
    """Start from another model of this size: its layers, and the rows of the tokens that both know by name."""
    other = WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    weights, own = other.state_dict(), model.state_dict()
    for name, value in own.items():
        if "embed_tokens" not in name and not name.startswith("proj_out"):
            value.copy_(weights[name])
    rows, source = model.model.decoder.embed_tokens.weight, weights["model.decoder.embed_tokens.weight"]
    content = json.loads((folder / "tokenizer.json").read_text())
    theirs = content["model"]["vocab"] | {token["content"]: token["id"] for token in content["added_tokens"]}
    words = source[[theirs[SPACE + word] for word in cw.DIGITS if SPACE + word in theirs]]
    rows[WORD_TOKEN:EOT] = words.mean(0) + torch.randn(len(cw.WORDS), rows.shape[1]) * 0.08
    for token, number in VOCABULARY.numbers.items():
        if token in theirs:
            rows[number] = source[theirs[token]]
    if "<|es|>" not in theirs:
        rows[ES] = rows[EN]
