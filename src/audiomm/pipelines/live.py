"""Live speech to text: samples come in pieces of any size, words go out as soon as they will not change any more.

What has been said lately is transcribed anew at every step of the stream's own clock; words on which two steps in a row
agree are settled, and so are those before a pause; nothing that follows changes them (local agreement,
arXiv:2307.14743). Steps depend on how much was said, not on how it was cut into pieces, so the words do not either.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from ..base.errors import InputError
from ..base.transcript import Segment, Transcript, Word
from ..media.resample import Resampler, check_rate
from ..media.samples import check_finite, to_float
from ..media.speech import energy_spans, frame_levels

#: Quieter than this, in decibels of full scale, a stretch is not worth listening to.
_SILENT_DB = -60.0
#: A silence of this length ends what is being said.
PAUSE_SECONDS = 0.5


class Transcribes(Protocol):
    """What live transcription asks of a pipeline."""

    feature_extractor: Any

    def transcribe(self, inputs: Any, **kwargs: Any) -> Any:
        """A `Transcript` with the times of its words."""


@dataclass(frozen=True)
class LiveUpdate:
    """What one step of a stream gave.

    Attributes:
        words: Words that are now settled, with times since the stream began. They follow those of earlier updates.
        pending: Text behind them that may still change.
        seconds: How much of the stream had been heard.
    """

    words: tuple[Word, ...]
    pending: str
    seconds: float

    @property
    def text(self) -> str:
        """The settled words as text."""
        return "".join(word.text for word in self.words)


class LiveTranscriber:
    """Transcribes a stream while it is spoken.

        live = LiveTranscriber(pipeline("automatic-speech-recognition"))
        for update in live.listen(microphone()):
            print(update.text, end="", flush=True)

    Args:
        pipe: A speech recognition pipeline.
        sampling_rate: Of the samples that come, in Hz; None is the model's.
        step_seconds: How often what was said lately is transcribed. Words are settled one step after they were first
            heard whole.
        memory_seconds: At most this much of what was said lately is transcribed at each step; what is older is settled.
        kwargs: For `pipe.transcribe`: language, task, num_beams, ...

    Raises:
        InputError: A number is out of range.
    """

    def __init__(
        self,
        pipe: Transcribes,
        sampling_rate: int | None = None,
        step_seconds: float = 1.0,
        memory_seconds: float = 15.0,
        **kwargs: Any,
    ) -> None:
        extractor = pipe.feature_extractor
        longest = extractor.n_samples / extractor.sampling_rate
        if not 0.1 <= step_seconds <= longest / 2:
            raise InputError(f"step_seconds={step_seconds!r}: accepted are 0.1 to {longest / 2:g}.")
        if not 2 * step_seconds <= memory_seconds <= longest - step_seconds:
            raise InputError(
                f"memory_seconds={memory_seconds!r}: with step_seconds={step_seconds:g} accepted are "
                f"{2 * step_seconds:g} to {longest - step_seconds:g}."
            )
        self.pipe, self.kwargs = pipe, kwargs
        self.rate = int(extractor.sampling_rate)
        self._resampler = Resampler(check_rate(self.rate if sampling_rate is None else sampling_rate), self.rate)
        self._step = round(step_seconds * self.rate)
        self._memory = round(memory_seconds * self.rate)
        self._waiting: list[np.ndarray] = []
        #: Samples that steps still listen to, and the place of the first of them in the stream.
        self._heard = np.zeros(0, np.float32)
        self._first = 0
        self._settled: list[Word] = []
        #: Those of the settled words that the samples still hold.
        self._known: list[Word] = []
        self._proposed: list[Word] = []
        self._language: str | None = None
        self._is_finished = False

    def listen(self, chunks: Iterable[Any]) -> Iterator[LiveUpdate]:
        """Go through a stream to its end.

        Args:
            chunks: Mono samples: float arrays or tensors in [-1, 1], or integers, which are scaled by their type.

        Yields:
            An update for each step, the last one with everything settled.
        """
        for chunk in chunks:
            yield from self.push(chunk)
        yield self.finish()

    def segments(self, chunks: Iterable[Any]) -> Iterator[Segment]:
        """Go through a stream to its end: a segment for each step that settles words."""
        for update in self.listen(chunks):
            if update.words:
                start, end = update.words[0].start, update.words[-1].end
                yield Segment(update.text, start, end, words=update.words, language=self._language)

    def push(self, samples: Any) -> list[LiveUpdate]:
        """Take the next samples of the stream, any number of them.

        Returns:
            An update for each step that is now complete.

        Raises:
            InputError: They are not mono samples, or `finish` has been called.
        """
        if self._is_finished:
            raise InputError("this stream is finished; make a new LiveTranscriber for the next one.")
        chunk = to_float(samples, "cpu")
        if chunk.ndim != 1:
            raise InputError(f"a piece of a stream has shape {tuple(chunk.shape)}; mono samples (samples,) are needed.")
        check_finite(chunk, "a piece of a stream")
        self._waiting.append(self._resampler.push(chunk.numpy()))
        return list(self._steps())

    def finish(self) -> LiveUpdate:
        """Settle everything; the stream ends here."""
        if not self._is_finished:
            self._is_finished = True
            self._waiting.append(self._resampler.finish())
        updates = list(self._steps())
        self._take(sum(map(len, self._waiting)))
        words = self._settle(self._new_words() if self._is_audible() else [])
        earlier = tuple(word for update in updates for word in update.words)
        return LiveUpdate((*earlier, *words), "", self._seconds)

    @property
    def transcript(self) -> Transcript:
        """Everything that is settled so far."""
        words = tuple(self._settled)
        text = "".join(word.text for word in words)
        whole = Segment(text, words[0].start, words[-1].end, words=words, language=self._language) if words else None
        return Transcript(text, (whole,) if whole else (), self._language, self._seconds, "word")

    # ------------------------------------------------------------------ steps

    @property
    def _seconds(self) -> float:
        """How much of the stream has been heard."""
        return (self._first + len(self._heard)) / self.rate

    def _steps(self) -> Iterator[LiveUpdate]:
        """Do all steps for which enough samples have come."""
        while sum(map(len, self._waiting)) >= self._step:
            self._take(self._step)
            yield self._advance()

    def _take(self, count: int) -> None:
        """Listen to the next samples of those that wait."""
        waiting = np.concatenate([np.zeros(0, np.float32), *self._waiting])
        self._heard = np.concatenate([self._heard, waiting[:count]])
        self._waiting = [waiting[count:]]

    def _advance(self) -> LiveUpdate:
        """Transcribe what was said lately, settle what is certain, and forget what is settled."""
        words = self._new_words() if self._is_audible() else []
        pause = self._closing_pause()
        is_full = len(self._heard) + self._step > self._memory
        if pause is not None:
            # Nothing is being said: no word is cut off, and what follows will not belong to these.
            count = len(words)
        else:
            count = _agreed(self._proposed, words)
        if is_full and not count:
            # There is no room to wait for agreement: what is not at the very end is settled as it is.
            count = max(len(words) - 1, 0)
        settled = self._settle(words[:count])
        self._proposed = words[count:]
        if pause is not None:
            self._forget(pause)
        elif is_full:
            self._forget(self._seam())
        return LiveUpdate(settled, "".join(word.text for word in self._proposed), self._seconds)

    def _settle(self, words: list[Word]) -> tuple[Word, ...]:
        """Add words to those that will not change, with times that only go forward."""
        added: list[Word] = []
        end = self._settled[-1].end if self._settled else 0.0
        for word in words:
            start = max(word.start, end)
            end = max(word.end, start)
            added.append(replace(word, start=start, end=end))
        self._settled += added
        self._known += added
        return tuple(added)

    def _closing_pause(self) -> int | None:
        """The sample from which on nothing is said up to the end of what was heard; None while something is."""
        spans = energy_spans(self._heard, self.rate)
        if not spans:
            return None if self._is_audible() else max(len(self._heard) - self._step, 0)
        last = spans[-1][1]
        if len(self._heard) - last < PAUSE_SECONDS * self.rate:
            return None
        return last + round(PAUSE_SECONDS * self.rate / 2)

    def _seam(self) -> int:
        """The sample between the settled words and the others; in the nearest pause, as times are not exact."""
        after = self._proposed[0].start if self._proposed else self._seconds
        before = self._settled[-1].end if self._settled else after
        wanted = round(min(max((before + after) / 2, after - 1.0), after) * self.rate) - self._first
        spans = energy_spans(self._heard, self.rate)
        gaps = [(end + begin) // 2 for (_, end), (begin, _) in itertools.pairwise(spans)]
        seam = min(gaps, key=lambda gap: abs(gap - wanted), default=wanted)
        # At least a step is dropped, or the next one would have no room.
        return min(max(seam, self._step), len(self._heard))

    def _forget(self, count: int) -> None:
        """Drop the first samples; the settled words that begin behind them will be heard again."""
        self._heard = self._heard[count:]
        self._first += count
        self._known = [word for word in self._known if word.start * self.rate >= self._first]

    def _is_audible(self) -> bool:
        levels, _ = frame_levels(self._heard, self.rate)
        return bool(len(levels)) and float(levels.max()) > _SILENT_DB

    def _new_words(self) -> list[Word]:
        """Words behind the settled ones, as the model hears them now."""
        heard: Transcript = self.pipe.transcribe(
            {"array": self._heard, "sampling_rate": self.rate}, **self.kwargs, return_timestamps="word", progress=False
        )
        self._language = heard.language or self._language
        start = self._first / self.rate
        words = [
            replace(word, start=round(word.start + start, 3), end=round(word.end + start, 3)) for word in heard.words
        ]
        return self._behind_settled(words)

    def _behind_settled(self, words: list[Word]) -> list[Word]:
        """Those of a step's words that are not among the settled ones, which are heard again at its start."""
        known = [_bare(word) for word in self._known]
        costs = _prefix_costs(known, [_bare(word) for word in words])
        end = self._known[-1].end if self._known else 0.0

        def misfit(count: int) -> tuple[int, float]:
            return costs[count], abs((words[count - 1].end if count else 0.0) - end)

        return words[min(range(len(words) + 1), key=misfit) :] if known else words


def _agreed(before: list[Word], now: list[Word]) -> int:
    """How many words two steps have in common at their starts."""
    pairs = zip(before, now, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: _bare(pair[0]) == _bare(pair[1]), pairs))


def _prefix_costs(known: list[str], words: list[str]) -> list[int]:
    """Edits between the known words and the first 0, 1, 2, ... of the others."""
    costs = list(range(len(words) + 1))
    for place, one in enumerate(known, start=1):
        last, costs[0] = costs[0], place
        for at, other in enumerate(words, start=1):
            last, costs[at] = costs[at], min(costs[at] + 1, costs[at - 1] + 1, last + (one != other))
    return costs


def _bare(word: Word) -> str:
    """The word without spaces, case and punctuation, which change with what follows."""
    return re.sub(r"[\W_]+", "", word.text).casefold() or word.text.strip()
