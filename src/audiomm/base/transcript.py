"""What a transcription returns: words in segments in a transcript, with their times.

Times are seconds from the start of the audio and never None: where a model left an end open, the end is an estimate
and says so. `Transcript.to_dict` gives the shape that users of `transformers.pipeline` know.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal

Timestamps = bool | Literal["word"]


@dataclass(frozen=True)
class Word:
    """One word with its leading space, as the model wrote it.

    Attributes:
        text: The word; the texts of all words joined are the text of their segment.
        start: Seconds.
        end: Seconds.
        probability: Mean probability of the word's tokens; None where it was not computed.
    """

    text: str
    start: float
    end: float
    probability: float | None = None


@dataclass(frozen=True)
class Segment:
    """A stretch of speech, often a sentence or a clause.

    Attributes:
        text: What was said.
        start: Seconds.
        end: Seconds.
        tokens: Token ids, timestamps included where the model wrote them.
        words: The words, where word times were asked for.
        language: Code of the language, like "en"; None where unknown.
        end_is_estimated: The model gave no end, so this one is the end of what it heard.
        seek: Frame at which the window that holds this segment began (100 frames are one second).
        temperature: Temperature at which the window was accepted.
        avg_logprob: Mean log-probability of the window's tokens.
        compression_ratio: How well the window's text compresses; large means that it repeats itself.
        no_speech_prob: Probability that the window holds no speech.
    """

    text: str
    start: float
    end: float
    tokens: tuple[int, ...] = ()
    words: tuple[Word, ...] | None = None
    language: str | None = None
    end_is_estimated: bool = False
    seek: int | None = None
    temperature: float | None = None
    avg_logprob: float | None = None
    compression_ratio: float | None = None
    no_speech_prob: float | None = None

    def to_dict(self, number: int) -> dict[str, Any]:
        """The segment as openai-whisper writes it, without the values that are unknown."""
        content: dict[str, Any] = {
            "id": number,
            "seek": self.seek,
            "start": self.start,
            "end": self.end,
            "text": self.text,
            "tokens": list(self.tokens),
            "temperature": self.temperature,
            "avg_logprob": self.avg_logprob,
            "compression_ratio": self.compression_ratio,
            "no_speech_prob": self.no_speech_prob,
        }
        if self.words is not None:
            content["words"] = [_word_dict(word) for word in self.words]
        if self.end_is_estimated:
            content["end_is_estimated"] = True
        return {name: value for name, value in content.items() if value is not None}


@dataclass(frozen=True)
class Transcript:
    """The transcription of one audio.

    Attributes:
        text: Everything that was said.
        segments: Its parts in order of time.
        language: Code of the language spoken, like "en"; None where unknown.
        duration_seconds: Length of the audio.
        timestamps: The times that were asked for: False, True (segments) or "word".
        extra: Keys that came with the input and go out with the result.
        alternatives: The next likely transcripts, the best one first, where several were asked for.
    """

    text: str
    segments: tuple[Segment, ...] = ()
    language: str | None = None
    duration_seconds: float = 0.0
    timestamps: Timestamps = False
    extra: dict[str, Any] = field(default_factory=dict)
    alternatives: tuple[Transcript, ...] = ()

    @property
    def words(self) -> tuple[Word, ...]:
        """All words in order; empty unless word times were asked for."""
        return tuple(word for segment in self.segments for word in segment.words or ())

    def to_dict(
        self,
        *,
        return_language: bool = False,
        return_segments: bool = False,
        language_names: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        """The result of a transformers pipeline.

        Args:
            return_language: Add the language of each chunk.
            return_segments: Add "segments", "language" and "duration" as openai-whisper and its relatives give them.
            language_names: What each language code is called in the chunks; codes without a name stay codes.

        Returns:
            "text"; with times or languages "chunks", a list of {"text", "timestamp": (start, end)[, "language"]};
            "alternatives", a list of such dicts, where there are some; and the keys that came with the input, each a
            list of one value.
        """
        names = language_names or {}
        result: dict[str, Any] = {"text": self.text}
        if self.timestamps:
            result["chunks"] = self._timed_chunks(names if return_language else None)
        elif return_language:
            result["chunks"] = [
                {"language": names.get(code or "", code), "text": "".join(segment.text for segment in segments)}
                for code, segments in groupby(self.segments, key=lambda segment: segment.language)
            ]
        if return_segments:
            result["segments"] = [segment.to_dict(number) for number, segment in enumerate(self.segments)]
            result["language"] = self.language
            result["duration"] = self.duration_seconds
        if self.alternatives:
            result["alternatives"] = [
                one.to_dict(
                    return_language=return_language, return_segments=return_segments, language_names=language_names
                )
                for one in self.alternatives
            ]
        for name, value in self.extra.items():
            result.setdefault(name, [value])
        return result

    def _timed_chunks(self, names: Mapping[str, str] | None) -> list[dict[str, Any]]:
        """One dict a segment, or one a word where words were asked for; with languages unless `names` is None."""
        chunks: list[dict[str, Any]] = []
        for segment in self.segments:
            language = {} if names is None else {"language": names.get(segment.language or "", segment.language)}
            spans = (segment.words or ()) if self.timestamps == "word" else (segment,)
            chunks += [{**language, "timestamp": (span.start, span.end), "text": span.text} for span in spans]
        return chunks


def _word_dict(word: Word) -> dict[str, Any]:
    content: dict[str, Any] = {"word": word.text, "start": word.start, "end": word.end}
    return content if word.probability is None else {**content, "probability": word.probability}
