"""When each word is said: from tokens on a path through the audio to words that a subtitle can use.

The text of a window is read once more without its timestamps; with them where the checkpoint was trained to find its
way by them, which `alignment_with_timestamps` in its generation config says. The path through the attention enters the
row that writes a word's first token where the word before it ends; the word begins where that row's attention rises,
which after a pause is later. Rules of thumb then shorten words that swallowed a pause all the same.
Source: OpenAI's `timing`, where words begin as soon as the one before has ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...base.outputs import BaseModelOutput
from .alignment import (
    SECONDS_PER_POSITION,
    WINDOWS_AT_ONCE,
    AlignedModel,
    Heads,
    Pairs,
    first_positions,
    onsets,
    pairs_of,
    positions_of,
    probabilities,
    read_again,
    smoothed,
)
from .config import FRAMES_PER_SECOND
from .words import APPEND_PUNCTUATIONS, PREPEND_PUNCTUATIONS, TokenWord, merge_punctuations, split_words

#: Words are not expected to be longer than twice this, whatever the median of their window is.
LONGEST_MEDIAN_SECONDS = 0.7
#: A word further outside its segment than this is moved, and not the segment.
SEGMENT_TOLERANCE_SECONDS = 0.5
#: A pause of more than this many median words before a segment makes its first word suspect.
PAUSE_IN_WORDS = 4

_SENTENCE_ENDS = ".。!！?？"


@dataclass
class Window:
    """A decoded window, and what finding its words takes.

    Attributes:
        first_frame: Where it starts in its recording.
        frames: Frames of audio in it; no word is after them.
        start_tokens: What its text followed, without earlier text.
        language: Code of its language; None counts as one with spaces between words.
        speech_end_seconds: End of what was said before it.
        segments: Found in it: dicts with "start", "end" (seconds) and "tokens".
        frames_heard: Frames that the encoder got of the recording.
        window_frames: Frames of a whole window.
        advance: Frames from its start to that of the next window.
        is_whole: Its text ends in text and one timestamp: nothing follows in it.
        temperature: At which its text was decoded.
        is_silent: Nothing is said in it, whatever was decoded.
    """

    first_frame: int
    frames: int
    start_tokens: list[int]
    language: str | None = None
    speech_end_seconds: float = 0.0
    segments: list[dict[str, Any]] = field(default_factory=list)
    frames_heard: int = 0
    window_frames: int = 0
    advance: int = 0
    is_whole: bool = False
    temperature: float = 0.0
    is_silent: bool = False

    @property
    def offset_seconds(self) -> float:
        return self.first_frame / FRAMES_PER_SECOND


@dataclass
class _Word:
    """A word while its times are worked out, in seconds since its window began."""

    text: str
    start: float
    end: float
    probability: float

    @property
    def seconds(self) -> float:
        return self.end - self.start


@dataclass(frozen=True)
class _Durations:
    """How long words of a window usually are, and how long they may be."""

    usual: float
    longest: float


def add_words(
    model: AlignedModel,
    encoded: BaseModelOutput,
    windows: Sequence[Window],
    tokenizer: Any,
    heads: Heads,
    punctuation: tuple[str, str] = (PREPEND_PUNCTUATIONS, APPEND_PUNCTUATIONS),
    pairs: Pairs | None = None,
) -> None:
    """Give each segment its "words", and let it start and end with them; see `find_words`."""
    hidden = encoded.last_hidden_state
    assert hidden is not None, "an encoder always returns its last hidden state"
    words_of = find_words(model, hidden, windows, tokenizer, heads, punctuation, pairs)
    for window, found in zip(windows, words_of, strict=True):
        for segment, words in zip(window.segments, found, strict=True):
            segment["words"] = words
            # Words that were found nowhere do not take their segment with them.
            if words and words[-1]["end"] > words[0]["start"]:
                segment["start"] = torch.tensor(words[0]["start"], dtype=torch.float64)
                segment["end"] = torch.tensor(words[-1]["end"], dtype=torch.float64)


@torch.no_grad()
def find_words(
    model: AlignedModel,
    encoded: Tensor,
    windows: Sequence[Window],
    tokenizer: Any,
    heads: Heads,
    punctuation: tuple[str, str] = (PREPEND_PUNCTUATIONS, APPEND_PUNCTUATIONS),
    pairs: Pairs | None = None,
) -> list[list[list[dict[str, Any]]]]:
    """Find when the words of some windows were said.

    Args:
        model: Whose decoder reads the text again.
        encoded: (windows, positions, d_model) output of the encoder.
        windows: With their segments.
        tokenizer: Tells words and special tokens apart.
        heads: From `alignment_heads`.
        punctuation: Marks that belong to the word after them, and to the word before them.
        pairs: See `read_again`.

    Returns:
        For each window, for each segment, its words: {"word" (with the space before it), "start", "end" (seconds of
        the recording, two decimals), "probability" (mean of its tokens')}. Words are in order, do not overlap, and lie
        in their window.
    """
    texts = [[_text_of(segment["tokens"], tokenizer) for segment in window.segments] for window in windows]
    found: list[list[list[dict[str, Any]]]] = [[[] for _ in window.segments] for window in windows]
    spoken = [index for index, text in enumerate(texts) if any(text)]
    for start in range(0, len(spoken), WINDOWS_AT_ONCE):
        group = spoken[start : start + WINDOWS_AT_ONCE]
        tokens = [_read(model, windows[index], texts[index], tokenizer) for index in group]
        those = [windows[index] for index in group]
        spoken_tokens = _spoken(model, encoded[group], those, tokens, tokenizer, heads, pairs_of(pairs, group))
        for index, times in zip(group, spoken_tokens, strict=True):
            timed = _timed(windows[index], texts[index], times, tokenizer, punctuation)
            found[index] = _finished(windows[index], timed)
    return found


def _read(model: AlignedModel, window: Window, texts: Sequence[list[int]], tokenizer: Any) -> list[int]:
    """The tokens of a window to be read again: its text, or its text and timestamps."""
    config = getattr(model, "generation_config", None)
    if not getattr(config, "alignment_with_timestamps", False):
        return [token for text in texts for token in text]
    special = set(tokenizer.all_special_ids)
    every = [token for segment in window.segments for token in torch.as_tensor(segment["tokens"]).tolist()]
    return [token for token in every if token >= tokenizer.timestamp_begin or token not in special]


def _text_of(tokens: Any, tokenizer: Any) -> list[int]:
    """Token ids without special ones and timestamps."""
    special, begin = set(tokenizer.all_special_ids), tokenizer.timestamp_begin
    return [token for token in torch.as_tensor(tokens).tolist() if token < begin and token not in special]


# ---------------------------------------------------------------------- tokens


@dataclass(frozen=True)
class _Tokens:
    """When the tokens of a window are said, (tokens,) seconds since it began, and how likely each was."""

    starts: np.ndarray
    ends: np.ndarray
    probabilities: np.ndarray


def _spoken(
    model: AlignedModel,
    encoded: Tensor,
    windows: Sequence[Window],
    texts: Sequence[list[int]],
    tokenizer: Any,
    heads: Heads,
    pairs: Pairs | None,
) -> list[_Tokens]:
    begin = tokenizer.timestamp_begin
    openings = []
    for one, text in zip(windows, texts, strict=True):
        opening = [token for token in one.start_tokens if token != begin - 1]
        openings.append(opening if any(token >= begin for token in text) else [*opening, begin - 1])
    rows = [[*opening, *text, tokenizer.eos_token_id] for opening, text in zip(openings, texts, strict=True)]
    # The end token is there for comparison only; it may be one more than the decoder has places.
    rows = [row[: model.config.max_target_positions] for row in rows]
    scores, hidden = read_again(model, encoded, rows, heads, pairs)
    words = [[place for place, token in enumerate(text) if token < begin] for text in texts]
    # Row by row: the one before a token writes it.
    writers = [len(opening) - 1 for opening in openings]
    read = [hidden[index, writers[index] :][places] for index, places in enumerate(words)]
    chosen = torch.tensor(
        [text[place] for text, places in zip(texts, words, strict=True) for place in places], device=hidden.device
    )
    likely = probabilities(model.proj_out, torch.cat(read), chosen, _only_text(model, tokenizer).to(hidden.device))
    found = []
    for index, (window, text) in enumerate(zip(windows, texts, strict=True)):
        weights = scores[index, :, : len(rows[index]), : positions_of(window.frames)].softmax(dim=-1)
        picture = smoothed(weights, model.config.median_filter_width)[writers[index] :][: len(text) + 1]
        # The row after a token's says where that ends.
        entries = first_positions(picture)
        found.append((onsets(picture, entries)[:-1][words[index]], entries[1:][words[index]]))
    parts = likely.cpu().split([len(places) for places in words])
    return [
        _Tokens(starts * SECONDS_PER_POSITION, ends * SECONDS_PER_POSITION, part.numpy())
        for (starts, ends), part in zip(found, parts, strict=True)
    ]


def _only_text(model: AlignedModel, tokenizer: Any) -> Tensor:
    """(vocabulary,) to be added to logits so that timestamps and special tokens cannot be."""
    added = torch.zeros(model.config.vocab_size)
    added[tokenizer.timestamp_begin :] = -torch.inf
    added[[token for token in tokenizer.all_special_ids if token < len(added)]] = -torch.inf
    return added


# ---------------------------------------------------------------------- words


def _timed(
    window: Window, texts: Sequence[list[int]], times: _Tokens, tokenizer: Any, punctuation: tuple[str, str]
) -> list[list[_Word]]:
    """The words of each segment with their times, punctuation joined to them."""
    segments: list[list[tuple[TokenWord, _Word]]] = []
    starts, ends, likely = times.starts.tolist(), times.ends.tolist(), times.probabilities.tolist()
    first = 0
    for text in texts:
        pieces = split_words(tokenizer.backend_tokenizer, text, window.language, tokenizer.eos_token_id)
        timed = []
        for piece in pieces:
            begin, end = first + piece.indices[0], first + piece.indices[-1]
            probability = sum(likely[begin : end + 1]) / (end + 1 - begin)
            timed.append((piece, _Word(piece.text, starts[begin], ends[end], probability)))
        segments.append(timed)
        first += len(text)
    durations = _durations([word for segment in segments for _, word in segment])
    _cut_at_sentence_ends([word for segment in segments for _, word in segment], durations)
    return [_with_punctuation(segment, *punctuation) for segment in segments]


def _with_punctuation(timed: Sequence[tuple[TokenWord, _Word]], prepended: str, appended: str) -> list[_Word]:
    """Words with their punctuation joined to them, which leaves their times as they were."""
    words = []
    components = iter(timed)
    for merged in merge_punctuations([piece for piece, _ in timed], prepended, appended):
        parts: list[tuple[TokenWord, _Word]] = []
        while sum(len(piece.tokens) for piece, _ in parts) < len(merged.tokens):
            parts.append(next(components))
        # Opening marks come first; what follows the word itself closes it.
        core = next((word for piece, word in parts if not _opens(piece, prepended)), parts[-1][1])
        words.append(_Word(merged.text, core.start, core.end, core.probability))
    return words


def _opens(piece: TokenWord, prepended: str) -> bool:
    return piece.text.startswith(" ") and piece.text.strip() in prepended


def _durations(words: Sequence[_Word]) -> _Durations:
    lengths = [word.seconds for word in words if word.seconds > 0]
    usual = min(LONGEST_MEDIAN_SECONDS, float(np.median(lengths))) if lengths else 0.0
    return _Durations(usual, 2 * usual)


def _cut_at_sentence_ends(words: Sequence[_Word], durations: _Durations) -> None:
    """Shorten marks that end a sentence, and words right after one: a pause between sentences falls to them."""
    for before, word in pairwise(words):
        if word.seconds <= durations.longest:
            continue
        if word.text in _SENTENCE_ENDS:
            word.end = word.start + durations.longest
        elif before.text in _SENTENCE_ENDS:
            word.start = word.end - durations.longest


def _finished(window: Window, segments: Sequence[list[_Word]]) -> list[list[dict[str, Any]]]:
    """Words of each segment in seconds of the recording: pauses taken out of them, in order and inside the window."""
    durations = _durations([word for words in segments for word in words])
    offset, latest = window.offset_seconds, window.speech_end_seconds
    limit = offset + window.frames / FRAMES_PER_SECOND
    finished = []
    for segment, words in zip(window.segments, segments, strict=True):
        for word in words:
            word.start, word.end = word.start + offset, word.end + offset
        if words:
            _shorten_after_pause(words, latest, durations)
            _keep_near_segment(words, float(segment["start"]), float(segment["end"]), durations)
        for word in words:
            word.start = min(max(word.start, latest), limit)
            word.end = latest = min(max(word.end, word.start), limit)
        finished.append(
            [
                {
                    "word": word.text,
                    "start": round(word.start, 2),
                    "end": round(word.end, 2),
                    "probability": word.probability,
                }
                for word in words
            ]
        )
    return finished


def _shorten_after_pause(words: Sequence[_Word], speech_end: float, durations: _Durations) -> None:
    """Shorten the first and the second word after a pause that they reach back into."""
    first = words[0]
    if first.end - speech_end <= PAUSE_IN_WORDS * durations.usual:
        return
    second = words[1] if len(words) > 1 else None
    is_pair_long = second is not None and second.end - first.start > 2 * durations.longest
    if first.seconds <= durations.longest and not is_pair_long:
        return
    if second is not None and second.seconds > durations.longest:
        first.end = second.start = second.end - durations.longest
    first.start = max(0.0, first.end - durations.longest)


def _keep_near_segment(words: Sequence[_Word], start: float, end: float, durations: _Durations) -> None:
    """Trust the segment's times where its first or last word reaches far out of it."""
    first, last = words[0], words[-1]
    if first.start < start - SEGMENT_TOLERANCE_SECONDS and start < first.end:
        first.start = max(0.0, min(first.end - durations.usual, start))
    if last.end > end + SEGMENT_TOLERANCE_SECONDS and end > last.start:
        last.end = max(last.start + durations.usual, end)
