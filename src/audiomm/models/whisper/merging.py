"""Joins the transcripts of overlapping chunks into one: text, timed chunks or timed words.

The state machine follows transformers' `_decode_asr`, whose results the pipeline's chunked mode reproduces. Long audio
that is transcribed window by window has segments with exact times and does not come through here.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ...base.encoding import plain_list
from ...base.errors import InputError
from ...base.languages import LANGUAGES

if TYPE_CHECKING:
    from .tokenizer import WhisperTokenizer

_LOGGER = logging.getLogger("audiomm.models.whisper.merging")

_WINDOW_STEPS = 1500

#: Token ids with their (start, end) in seconds; the times are empty unless words are timed.
_Times = list[tuple[float, float]]


class ChunkMerger:
    """Takes the token sequences of chunks one after the other and gives back the joined transcript.

    Attributes:
        pieces: Finished pieces: {"language", "timestamp", "text"[, "words"]}.
    """

    def __init__(
        self,
        tokenizer: WhisperTokenizer,
        return_timestamps: bool | str | None,
        return_language: bool | None,
        time_precision: float,
    ) -> None:
        """Start with nothing.

        Args:
            tokenizer: Decodes the tokens.
            return_timestamps: Falsy for text, True for timed pieces, "word" for timed words.
            return_language: Whether pieces and words tell their language.
            time_precision: Seconds from one timestamp token to the next.

        Raises:
            InputError: `return_timestamps` is something else.
        """
        if return_timestamps not in (None, False, True, "word"):
            raise InputError(f"return_timestamps={return_timestamps!r} is not False, True or 'word'.")
        self.tokenizer = tokenizer
        self.with_times = bool(return_timestamps)
        self.with_words = return_timestamps == "word"
        self.with_language = bool(return_language)
        self.time_precision = time_precision
        self.begin = tokenizer.timestamp_begin
        self.is_time = tokenizer.is_timestamp
        self.specials = tokenizer._special_ids()
        self.pieces: list[dict[str, Any]] = []
        self.language: str | None = None
        self.offset_seconds = 0.0
        self.is_skipping = False
        self._restart()

    def _restart(self) -> None:
        self.piece: dict[str, Any] = {"language": self.language, "timestamp": [None, None], "text": ""}
        self.earlier: list[tuple[list[int], _Times]] = []
        self.tokens: list[int] = []
        self.times: _Times = []

    def add(self, output: Mapping[str, Any]) -> None:
        """Take the tokens of one chunk.

        Args:
            output: {"tokens": (1, length) ids, "stride": (chunk, left, right) in seconds (optional),
                "token_timestamps": (1, length) seconds at which each token ends (for words)}.

        Raises:
            InputError: Words are asked for and `token_timestamps` are missing.
        """
        tokens = self.tokenizer._without_prompt(plain_list(output["tokens"])[0])
        ends = self._token_ends(output) if self.with_words else None
        chunk_seconds, left, right = output.get("stride", (0.0, 0.0, 0.0))
        self.offset_seconds -= left
        first_kept = self.begin + left / self.time_precision if left else self.begin
        last_kept = self._last_kept(tokens, chunk_seconds - right) if right else None
        self._read(tokens, ends, first_kept, last_kept)
        self.offset_seconds += chunk_seconds - right
        if self.tokens:
            self.earlier.append((self.tokens, self.times))
            self.tokens, self.times = [], []
        elif not any(tokens for tokens, _ in self.earlier):
            self._restart()

    def finish(self) -> tuple[str, dict[str, Any]]:
        """The whole text, and {"chunks": [...]} if times or languages were asked for."""
        if self.earlier:
            if self.with_times:
                _LOGGER.warning("the last words have no end time: the audio may have been cut off inside a word.")
            self._close()
        text = "".join(piece["text"] for piece in self.pieces)
        if not self.with_times and not self.with_language:
            return text, {}
        if self.with_words:
            return text, {"chunks": [word for piece in self.pieces for word in piece["words"]]}
        return text, {"chunks": [self._public(piece) for piece in self.pieces]}

    def _token_ends(self, output: Mapping[str, Any]) -> list[float]:
        if output.get("token_timestamps") is None:
            raise InputError("return_timestamps='word' needs 'token_timestamps' in every output; generate with them.")
        return list(plain_list(output["token_timestamps"])[0])

    def _last_kept(self, tokens: Sequence[int], right_start_seconds: float) -> int | None:
        """Where skipping begins: the first time in the right stride, or the last time of all if none lies there."""
        found = None
        for token in reversed(tokens):
            if self.is_time(token):
                if found is not None and (token - self.begin) * self.time_precision < right_start_seconds:
                    break
                found = token
        return found

    def _read(self, tokens: Sequence[int], ends: list[float] | None, first_kept: float, last_kept: int | None) -> None:
        latest = penultimate = elapsed = 0.0
        for position, token in enumerate(tokens):
            if token in self.specials:
                self._take_special(token)
            elif self.is_time(token):
                seconds = (token - self.begin) * self.time_precision
                if seconds < latest:
                    # Times fell back: the next 30 s window of one long generation has begun.
                    if position < 2 or all(self.is_time(before) for before in tokens[position - 2 : position]):
                        latest = penultimate
                        elapsed += penultimate
                    else:
                        elapsed += _WINDOW_STEPS * self.time_precision
                penultimate, latest = latest, seconds
                self._take_time(token, round(seconds + self.offset_seconds + elapsed, 2), first_kept, last_kept)
            else:
                self.tokens.append(token)
                if ends is not None:
                    start = ends[position - 1] if position else 0.0
                    self.times.append(
                        (round(start + self.offset_seconds, 2), round(ends[position] + self.offset_seconds, 2))
                    )

    def _take_special(self, token: int) -> None:
        code = str(self.tokenizer.convert_ids_to_tokens(token))[2:-2]
        language = LANGUAGES.get(code)
        if language is None:
            return
        if self.language and language != self.language and not self.with_times:
            self.earlier.append((self.tokens, self.times))
            self._close()
        self.piece["language"] = self.language = language

    def _take_time(self, token: int, seconds: float, first_kept: float, last_kept: int | None) -> None:
        if last_kept and token >= last_kept:
            # In the right stride: the next chunk says this again, so this time and its partner are left out.
            self.is_skipping = True
        elif self.is_skipping or (self.earlier and token < first_kept):
            self.is_skipping = False
        elif self.piece["timestamp"][0] is None:
            self.piece["timestamp"][0] = seconds
        elif seconds != self.piece["timestamp"][0]:
            self.piece["timestamp"][1] = seconds
            self.earlier.append((self.tokens, self.times))
            self._close()

    def _close(self) -> None:
        """Join what belongs to the present piece and begin a new one."""
        tokens, times = join_overlapping(self.earlier)
        self.piece["text"] = self.tokenizer.decode(tokens)
        if self.with_words:
            self.piece["words"] = self._words(tokens, times)
        self.pieces.append(self.piece)
        self._restart()

    def _words(self, tokens: list[int], times: _Times) -> list[dict[str, Any]]:
        words = []
        for word in self.tokenizer.combine_tokens_into_words(tokens, self.language):
            entry = {"text": word.text, "timestamp": (times[word.indices[0]][0], times[word.indices[-1]][1])}
            words.append({**entry, "language": self.language} if self.with_language else entry)
        return words

    def _public(self, piece: dict[str, Any]) -> dict[str, Any]:
        public = {"language": piece["language"]} if self.with_language else {}
        if self.with_times:
            public["timestamp"] = tuple(piece["timestamp"])
        return {**public, "text": piece["text"]}


def join_overlapping(sequences: Sequence[tuple[list[int], _Times]]) -> tuple[list[int], _Times]:
    """One sequence from several, each of which begins with (roughly) what the one before ends with.

    Every alignment of two neighbours is scored by the share of equal tokens, longer overlaps winning ties; both are cut
    in the middle of the best one. With times, an equal token counts only if it is not earlier in the first sequence's
    future: its time there must not be after its time in the second.

    Args:
        sequences: Token ids and their times (empty, or one pair per token).
    """
    joined: list[int] = []
    joined_times: _Times = []
    left, left_times = sequences[0]
    for right, right_times in sequences[1:]:
        left_middle, right_middle = _best_cut(left, left_times, right, right_times)
        joined += left[:left_middle]
        joined_times += left_times[:left_middle]
        left, left_times = right[right_middle:], right_times[right_middle:]
    return joined + left, joined_times + left_times


def _best_cut(left: list[int], left_times: _Times, right: list[int], right_times: _Times) -> tuple[int, int]:
    """Where to cut two overlapping sequences: the middle of their best alignment, or their border if there is none."""
    left_ids, right_ids = np.asarray(left), np.asarray(right)
    best, cut = 0.0, (len(left), 0)
    for shift in range(1, len(left) + len(right)):
        # `shift` tokens of overlap, as if both sequences went on for ever.
        left_start, left_stop = max(0, len(left) - shift), min(len(left), len(left) + len(right) - shift)
        right_start, right_stop = max(0, shift - len(left)), min(len(right), shift)
        equal = left_ids[left_start:left_stop] == right_ids[right_start:right_stop]
        if left_times and equal.any():
            pairs = zip(left_times[left_start:left_stop], right_times[right_start:right_stop], strict=True)
            equal = equal & np.array([before <= after for before, after in pairs])
        matches = int(equal.sum())
        score = matches / shift + shift / 10000.0
        if matches > 1 and score > best:
            best, cut = score, ((left_start + left_stop) // 2, (right_start + right_stop) // 2)
    return cut
