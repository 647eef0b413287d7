"""The vocabulary of a tiny Whisper for digit strings, and the numbers of its tokens."""

from __future__ import annotations

import digit_strings as ds
from tiny_whisper import BYTES, SPACE, Vocabulary

LETTER_MERGES = [(word[:i], word[i]) for word in ds.WORDS for i in range(1, len(word))]
VOCABULARY = Vocabulary(
    pieces=[left + right for left, right in LETTER_MERGES],
    words=ds.WORDS,
    merges=[*LETTER_MERGES, *((SPACE, word) for word in ds.WORDS)],
    languages=["en"],
)
WORD_TOKEN = BYTES + len(VOCABULARY.pieces)  # " zero" .. " nine"
EOT = WORD_TOKEN + len(ds.WORDS)
SOT, EN, TRANSLATE, TRANSCRIBE, _, PREV, NO_SPEECH, NO_TIMES, FIRST_TIME = range(EOT + 1, EOT + 10)
