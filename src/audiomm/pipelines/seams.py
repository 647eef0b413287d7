"""Joins what was heard in windows that share some seconds, so that no word is lost or doubled.

Both windows have the shared seconds' words with their times. They are joined inside the longest run of words that both
heard, as near to the middle as that reaches: there neither window is at the end of what it knows.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from difflib import SequenceMatcher

from ..base.transcript import Segment, Word

#: Times of words are not exact: those this near to the shared seconds may lie in them.
MARGIN_SECONDS = 1.0


def join_windows(windows: Sequence[Sequence[Segment]], shared: Sequence[tuple[float, float]]) -> tuple[Segment, ...]:
    """The segments of all windows, each word once.

    Args:
        windows: The segments of each window, with words, in order of time; times are those of the whole.
        shared: Start and end in seconds of what each window shares with the next.
    """
    firsts, lasts = [0], []
    for left, right, zone in zip(windows[:-1], windows[1:], shared, strict=True):
        end, begin = _seam(_words(left), _words(right), zone)
        lasts.append(end)
        firsts.append(begin)
    lasts.append(len(_words(windows[-1])))
    joined: list[Segment] = []
    for segments, first, last in zip(windows, firsts, lasts, strict=True):
        # Where a window is so short of words that two seams cross in it, nothing of it is left.
        joined += _only(segments, first, max(first, last))
    return _in_order(joined)


def _seam(left: list[Word], right: list[Word], zone: tuple[float, float]) -> tuple[int, int]:
    """How many words of the left window are kept, and the first word of the right one that is."""
    middle = sum(zone) / 2
    first = sum(word.end < zone[0] - MARGIN_SECONDS for word in left)
    last = sum(word.start <= zone[1] + MARGIN_SECONDS for word in right)
    said = [_bare(word) for word in left[first:]], [_bare(word) for word in right[:last]]
    found = SequenceMatcher(None, *said, autojunk=False).find_longest_match()
    if not found.size or (found.size == 1 and abs(left[first + found.a].start - right[found.b].start) > MARGIN_SECONDS):
        # They have nothing in common: each is believed on its own side of the middle.
        return sum(_middle(word) < middle for word in left), sum(_middle(word) < middle for word in right)
    pairs = range(found.size)
    best = min(pairs, key=lambda at: abs(_middle(left[first + found.a + at]) - middle))
    return first + found.a + best + 1, found.b + best + 1


def _only(segments: Sequence[Segment], first: int, last: int) -> list[Segment]:
    """The segments with the words from number `first` to before number `last`; those without any are left out."""
    kept = []
    count = 0
    for segment in segments:
        words = segment.words or ()
        inside = words[max(first - count, 0) : max(last - count, 0)]
        count += len(words)
        if not inside:
            continue
        if len(inside) < len(words):
            text = "".join(word.text for word in inside)
            segment = replace(segment, text=text, start=inside[0].start, end=inside[-1].end, words=inside, tokens=())
        kept.append(segment)
    return kept


def _in_order(segments: list[Segment]) -> tuple[Segment, ...]:
    """The segments with no word that begins before the one before it has ended."""
    ordered: list[Segment] = []
    latest = 0.0
    for segment in segments:
        words = []
        for word in segment.words or ():
            start = max(word.start, latest)
            latest = max(word.end, start)
            words.append(replace(word, start=start, end=latest))
        start = max(segment.start, ordered[-1].end) if ordered else segment.start
        ordered.append(replace(segment, words=tuple(words), start=start, end=max(segment.end, start)))
    return tuple(ordered)


def _words(segments: Sequence[Segment]) -> list[Word]:
    return [word for segment in segments for word in segment.words or ()]


def _middle(word: Word) -> float:
    return (word.start + word.end) / 2


def _bare(word: Word) -> str:
    """The word without spaces, case and punctuation, of which windows know different amounts."""
    return re.sub(r"[\W_]+", "", word.text).casefold() or word.text.strip()
