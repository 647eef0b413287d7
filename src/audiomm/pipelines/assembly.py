"""From what generation heard to a transcript.

Sequential audio comes back as segments that know their times; windows that overlap come back as tokens, which the
tokenizer merges where they agree (its `_decode_asr`, the algorithm of transformers). Parts of a recording that were
heard apart from each other follow each other. Where only parts of a recording were heard, times go back to the
recording at the very end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from ..base.languages import LANGUAGES
from ..base.transcript import Segment, Timestamps, Transcript, Word
from ..media.speech import SpeechClock
from .clips import Clip, Piece
from .seams import join_windows

_CODES = {name: code for code, name in LANGUAGES.items()}
#: Frames of features in a second, in which `Segment.seek` counts.
_FRAMES_PER_SECOND = 100
_SCORES = ("temperature", "avg_logprob", "compression_ratio", "no_speech_prob")


@dataclass(frozen=True)
class Heard:
    """What generation returned for one piece.

    Attributes:
        piece: What was listened to.
        segments: Dicts of "start", "end" (seconds), "tokens", with "words" or "token_timestamps" where words were
            asked for.
        language: Code of the language.
        others: The segments of each further hypothesis, where several were asked for.
    """

    piece: Piece
    segments: Sequence[dict[str, Any]] = ()
    language: str | None = None
    others: tuple[Sequence[dict[str, Any]], ...] = ()

    def joined(self, key: str) -> Tensor:
        """A tensor of all segments one behind the other, (length,)."""
        parts = [torch.as_tensor(segment[key]).cpu() for segment in self.segments]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.long)


class Assembler:
    """Makes transcripts.

    Args:
        tokenizer: Decodes tokens, and merges those of windows.
        sampling_rate: Of the pieces, in Hz.
        time_precision: Seconds between two timestamp tokens.
    """

    def __init__(self, tokenizer: Any, sampling_rate: int, time_precision: float) -> None:
        self.tokenizer = tokenizer
        self.sampling_rate = sampling_rate
        self.time_precision = time_precision

    def transcript(self, heard: list[Heard], timestamps: Timestamps, name_languages: bool) -> Transcript:
        """The transcript of one clip.

        Args:
            heard: One for each piece of the clip, in order.
            timestamps: The times wanted: False, True (segments) or "word".
            name_languages: Look for changes of language between windows.
        """
        found = self._in_recording(self._of_samples(heard, timestamps, name_languages), heard[0].piece.clip)
        if len(heard) > 1:
            # Hypotheses of windows do not belong together.
            return found
        others = [replace(heard[0], segments=segments, others=()) for segments in heard[0].others]
        return replace(found, alternatives=tuple(self.transcript([one], timestamps, name_languages) for one in others))

    def segments(self, heard: Heard) -> tuple[Segment, ...]:
        """The segments of one piece that is its whole clip, before the others of that are known."""
        clip = heard.piece.clip
        found = self._segments(heard, len(clip.samples) / self.sampling_rate)
        return self._in_recording(Transcript("", found), clip).segments

    def _of_samples(self, heard: list[Heard], timestamps: Timestamps, name_languages: bool) -> Transcript:
        """The transcript of what was heard of one clip, with times in that."""
        clip = heard[0].piece.clip
        blank = Transcript(
            "",
            language=next((item.language for item in heard if item.language is not None), None),
            duration_seconds=len(clip.samples) / self.sampling_rate,
            timestamps=timestamps,
            extra=dict(clip.extra),
        )
        segments: list[Segment] = []
        text = ""
        for part, items in groupby(heard, key=lambda item: item.piece.part):
            first, end = part or (0, len(clip.samples))
            seconds = (end - first) / self.sampling_rate
            found = self._of_part(replace(blank, duration_seconds=seconds), list(items), name_languages)
            text += found.text
            segments += [_moved(segment, first / self.sampling_rate) for segment in found.segments]
        return replace(blank, text=text, segments=tuple(segments))

    def _of_part(self, blank: Transcript, heard: list[Heard], name_languages: bool) -> Transcript:
        """The transcript of one part, with times in that."""
        if not any(item.segments for item in heard):
            return blank
        if any(item.piece.stride is not None for item in heard):
            is_timed = heard[0].piece.part is not None
            return self._joined(blank, heard) if is_timed else self._merged(blank, heard, name_languages)
        segments = self._segments(heard[0], blank.duration_seconds)
        if blank.timestamps == "word" and any(segment.words is None for segment in segments):
            segments = _with_words(segments, self._words(heard[0], blank.duration_seconds))
        return replace(blank, text="".join(segment.text for segment in segments), segments=segments)

    def _segments(self, heard: Heard, duration: float) -> tuple[Segment, ...]:
        """The segments that generation returned, with their text; those without any are left out."""
        segments = []
        for found in heard.segments:
            tokens = torch.as_tensor(found["tokens"]).tolist()
            text = self.tokenizer.decode(tokens, skip_special_tokens=True)
            if not text:
                continue
            start, end = _span((float(found["start"]), float(found["end"])), duration)
            scores: dict[str, Any] = {name: float(found[name]) for name in _SCORES if found.get(name) is not None}
            segments.append(
                Segment(
                    text,
                    start,
                    end,
                    tokens=tuple(tokens),
                    words=_words_of(found, duration),
                    language=found.get("language") or heard.language,
                    end_is_estimated=bool(found.get("end_estimated", False)),
                    seek=None if found.get("seek") is None else int(found["seek"]),
                    **scores,
                )
            )
        return tuple(segments)

    def _words(self, heard: Heard, duration: float) -> list[Word]:
        _, found = self._decode([self._output(heard, "word", None)], "word", None)
        return [Word(chunk["text"], *_span(chunk["timestamp"], duration)) for chunk in found["chunks"]]

    def _merged(self, blank: Transcript, heard: list[Heard], name_languages: bool) -> Transcript:
        """One transcript of windows that overlap; windows in which nothing was heard still move the time on."""
        outputs = [self._output(item, blank.timestamps, item.language if name_languages else None) for item in heard]
        text, found = self._decode(outputs, blank.timestamps, name_languages or None)
        segments: list[Segment] = []
        previous_end = 0.0
        for chunk in found.get("chunks", [{"text": text}]):
            times = chunk.get("timestamp", (0.0, None))
            start, end = _span(times, blank.duration_seconds, previous_end)
            previous_end = end if chunk["text"] else previous_end
            language = _CODES.get(chunk.get("language"), blank.language)
            segments.append(Segment(chunk["text"], start, end, language=language, end_is_estimated=times[1] is None))
        segments = [segment for segment in segments if segment.text]
        if blank.timestamps == "word" and segments:
            words = tuple(Word(segment.text, segment.start, segment.end) for segment in segments)
            whole = Segment(text, words[0].start, words[-1].end, words=words, language=blank.language)
            return replace(blank, text=text, segments=(whole,))
        return replace(blank, text=text, segments=tuple(segments))

    def _joined(self, blank: Transcript, heard: list[Heard]) -> Transcript:
        """One transcript of windows that overlap and whose words have times."""
        windows, shared, start = [], [], 0.0
        for item in heard:
            size, _, right = (samples / self.sampling_rate for samples in item.piece.stride or (0, 0, 0))
            windows.append([_moved(segment, start) for segment in self._segments(item, size)])
            # What a window shares with the next lies half on either side of the cut between them.
            shared.append((start + size - 2 * right, start + size))
            start = shared[-1][0]
        segments = join_windows(windows, shared[:-1])
        if blank.timestamps != "word":
            segments = tuple(replace(segment, words=None) for segment in segments)
        return replace(blank, text="".join(segment.text for segment in segments), segments=segments)

    def _in_recording(self, transcript: Transcript, clip: Clip) -> Transcript:
        """The transcript with times of the recording, where only parts of that were heard."""
        if clip.clock is None or clip.recording_samples is None:
            return transcript
        duration = clip.recording_samples / self.sampling_rate
        segments = tuple(
            _segment_in_recording(segment, clip.clock, duration, self._written_times(segment))
            for segment in transcript.segments
        )
        return replace(transcript, segments=segments, duration_seconds=duration)

    def _written_times(self, segment: Segment) -> tuple[float, float] | None:
        """Start and end as the model wrote them, in what was heard; None where it wrote none.

        A segment with words starts and ends with these, whose times are found in another way.
        """
        begin = getattr(self.tokenizer, "timestamp_begin", None)
        tokens = segment.tokens
        if begin is None or segment.seek is None or len(tokens) < 2 or min(tokens[0], tokens[-1]) < begin:
            return None
        # The end stands twice where another segment follows in the window.
        end = tokens[-2] if len(tokens) > 2 and tokens[-2] >= begin else tokens[-1]
        offset = segment.seek / _FRAMES_PER_SECOND
        return offset + (tokens[0] - begin) * self.time_precision, offset + (end - begin) * self.time_precision

    def _output(self, heard: Heard, timestamps: Timestamps, language: str | None) -> dict[str, Any]:
        """What was heard in one window, in the form that the tokenizer merges."""
        tokens = heard.joined("tokens")
        if language is not None:
            tokens = torch.cat([tokens.new_tensor([self.tokenizer.convert_tokens_to_ids(f"<|{language}|>")]), tokens])
        output: dict[str, Any] = {"tokens": tokens[None].numpy()}
        if timestamps == "word":
            output["token_timestamps"] = heard.joined("token_timestamps").to(torch.float32)[None].numpy()
        if heard.piece.stride is not None:
            output["stride"] = tuple(samples / self.sampling_rate for samples in heard.piece.stride)
        return output

    def _decode(
        self, outputs: list[dict[str, Any]], timestamps: Timestamps, language: bool | None
    ) -> tuple[str, dict[str, Any]]:
        text, found = self.tokenizer._decode_asr(
            outputs, return_timestamps=timestamps, return_language=language, time_precision=self.time_precision
        )
        return text, found


def _moved(segment: Segment, seconds: float) -> Segment:
    """A segment of a part with times of the whole; segments of the first part stay as they are."""
    if not seconds:
        return segment
    words = segment.words
    if words is not None:
        words = tuple(
            replace(word, start=round(word.start + seconds, 3), end=round(word.end + seconds, 3)) for word in words
        )
    return replace(
        segment,
        start=round(segment.start + seconds, 3),
        end=round(segment.end + seconds, 3),
        words=words,
        seek=None if segment.seek is None else segment.seek + round(seconds * _FRAMES_PER_SECOND),
    )


def _segment_in_recording(
    segment: Segment, clock: SpeechClock, duration: float, written: tuple[float, float] | None
) -> Segment:
    """A segment with times of the recording; where it has words, it reaches from the first to the last.

    Args:
        segment: With times in the joined speech.
        clock: Of the recording.
        duration: Of the recording, in seconds.
        written: Where the model says that the segment starts and ends: its words are in the speech that this is in.
    """
    words = segment.words
    if words is not None:
        words = tuple(replace(word, **_times(clock.word(word.start, word.end, written), duration)) for word in words)
    times = (words[0].start, words[-1].end) if words else clock.stretch(segment.start, segment.end)
    seek = segment.seek
    if seek is not None:
        seek = round(clock.original(seek / _FRAMES_PER_SECOND) * _FRAMES_PER_SECOND)
    return replace(segment, words=words, seek=seek, **_times(times, duration))


def _times(times: tuple[float, float], duration: float) -> dict[str, Any]:
    start, end = _span(times, duration)
    return {"start": start, "end": end}


def _span(times: tuple[float | None, float | None], duration: float, default: float = 0.0) -> tuple[float, float]:
    """Start and end within the audio and in order; an unknown start is `default`, an unknown end that of the audio."""
    start, end = times
    first = min(max(default if start is None else float(start), 0.0), duration)
    last = duration if end is None else min(max(float(end), first), duration)
    return round(first, 3), round(last, 3)


def _words_of(segment: dict[str, Any], duration: float) -> tuple[Word, ...] | None:
    """The words that generation found for a segment."""
    if segment.get("words") is None:
        return None
    return tuple(
        Word(word["word"], *_span((word["start"], word["end"]), duration), word["probability"])
        for word in segment["words"]
    )


def _with_words(segments: tuple[Segment, ...], words: list[Word]) -> tuple[Segment, ...]:
    """Give each segment its words: both read the same text from left to right."""
    filled = []
    remaining = list(words)
    position = covered = 0
    for segment in segments:
        covered += len(segment.text)
        own = []
        # A word belongs to the segment in which it begins.
        while remaining and (position < covered or segment is segments[-1]):
            word = remaining.pop(0)
            position += len(word.text)
            own.append(word)
        filled.append(replace(segment, words=tuple(own)))
    return tuple(filled)
