"""Where the transcription of each item of a batch stands, and what it gives in the end."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .alignment import last_repeated
from .config import FRAMES_PER_SECOND
from .segments import pad_right, segment_dict


@dataclass
class WindowText:
    """What decoding one window gave.

    Attributes:
        tokens: (length,) without prompt and end token.
        temperature: At which it was decoded.
        average_logprob: Natural log, over the tokens and the end token.
        compression_ratio: Size of the tokens' bytes over their compressed size.
        no_speech_probability: None when it was not measured.
        is_complete: The end token came before the limit.
        token_times: (length,) seconds since the window began, where they are asked for.
        token_probabilities: (length,) of each token after those before it, where they are asked for.
        has_loop: It repeats itself; see `guards.find_loop`.
    """

    tokens: Tensor
    temperature: float
    average_logprob: float
    compression_ratio: float
    no_speech_probability: float | None
    is_complete: bool = True
    token_times: Tensor | None = None
    token_probabilities: Tensor | None = None
    has_loop: bool = False


@dataclass
class Recording:
    """Where the transcription of one item of the batch stands.

    Attributes:
        row: Its row of the features.
        end: Frames it has, or of the part of it that is heard now.
        start_tokens: What every window's text follows; empty until its language is known.
        seek: Frame at which the next window starts.
        segments: Found so far.
        history: Tokens that the next window's prompt may repeat, one tensor a segment.
        token_times: Of each segment's tokens, in seconds since its window began, where they are asked for.
        language: Code of its language, or None where the model has no choice.
        language_probabilities: {code: probability} where the language was detected.
        spoken: Code of the language of the next window; another one only in multilingual recordings.
        spoken_until_seconds: End of the last segment or word.
        windows: Heard so far.
        parts: (start, end) in frames of what is to be heard after `end`.
    """

    row: int
    end: int
    start_tokens: list[int] = field(default_factory=list)
    language: str | None = None
    language_probabilities: dict[str, float] | None = None
    spoken: str | None = None
    seek: int = 0
    segments: list[dict[str, Any]] = field(default_factory=list)
    history: list[Tensor] = field(default_factory=list)
    token_times: list[Tensor] = field(default_factory=list)
    spoken_until_seconds: float = 0.0
    windows: int = 0
    parts: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.frames = self.end

    def only(self, parts: Sequence[tuple[int, int]]) -> None:
        """Hear only these parts, (start, end) in frames, in order; what is outside the recording does not count."""
        inside = [(start, min(end, self.frames)) for start, end in parts]
        self.parts = [(start, end) for start, end in inside if start < end]
        self.seek = self.end = 0
        self.go_to(0)

    def go_to(self, frame: int) -> None:
        """Go on at a frame, or where the next part begins when this one is over."""
        self.seek = frame
        if self.is_done and self.parts:
            self.seek, self.end = self.parts.pop(0)

    @property
    def is_done(self) -> bool:
        return self.seek >= self.end

    def segments_of(
        self, text: WindowText, pieces: Sequence[tuple[float, float, Tensor]], end_is_estimated: bool
    ) -> list[dict[str, Any]]:
        """The segments of a window's text, which are not settled yet.

        Args:
            text: Of the window at `seek`.
            pieces: (start seconds, end seconds, tokens) of each segment; the tokens are those of the text, in order.
            end_is_estimated: No timestamp says where the last segment ends.
        """
        segments = []
        first = 0
        for start, end, tokens in pieces:
            segment = segment_dict(
                start,
                end,
                tokens,
                seek=self.seek,
                temperature=text.temperature,
                avg_logprob=text.average_logprob,
                compression_ratio=text.compression_ratio,
                no_speech_prob=text.no_speech_probability,
                language=self.spoken,
            )
            own = slice(first, first + len(tokens))
            if text.token_times is not None:
                segment["token_timestamps"] = text.token_times[own] + self.seek / FRAMES_PER_SECOND
            if text.token_probabilities is not None:
                segment["token_probabilities"] = text.token_probabilities[own]
            first += len(tokens)
            segments.append(segment)
        if segments and end_is_estimated:
            segments[-1]["end_estimated"] = True
        return segments

    def take(self, segments: Sequence[dict[str, Any]], history: Sequence[Tensor]) -> None:
        """Add the settled segments of the window at `seek`, and what later prompts may repeat of them."""
        self.segments += segments
        self.history += history
        for segment in segments:
            # Words that were found nowhere may end after their segment.
            ends = [float(segment["end"]), *(word["end"] for word in segment.get("words", ()))]
            self.spoken_until_seconds = max(self.spoken_until_seconds, *ends)
            if "token_timestamps" in segment:
                self.token_times.append(segment["token_timestamps"] - self.seek / FRAMES_PER_SECOND)


def collect(recordings: Sequence[Recording], pad: int, device: torch.device, *, with_times: bool) -> dict[str, Any]:
    """What generate() returns of all recordings: sequences, segments, languages and, if wanted, token times."""
    rows = [
        torch.cat([segment["tokens"] for segment in one.segments]) if one.segments else torch.zeros(0, dtype=torch.long)
        for one in recordings
    ]
    answer: dict[str, Any] = {
        "sequences": pad_right(rows, pad, device),
        "segments": [one.segments for one in recordings],
        "languages": [one.language for one in recordings],
    }
    if any(one.language_probabilities is not None for one in recordings):
        answer["language_probabilities"] = [one.language_probabilities for one in recordings]
    if with_times:
        times = [torch.cat(one.token_times) if one.token_times else torch.zeros(0) for one in recordings]
        longest = answer["sequences"].shape[1]
        answer["token_timestamps"] = torch.stack([last_repeated(row, longest).to(device) for row in times])
    return answer


def compression_ratio(tokens: Tensor, vocabulary: int) -> float:
    """Bytes of the token ids over their zlib size, as transformers measures; repetition compresses well."""
    if not len(tokens):
        return 0.0
    width = int(math.log2(vocabulary) / 8) + 1
    return _compression(b"".join(int(token).to_bytes(width, "little") for token in tokens.tolist()))


def text_compression_ratio(text: str) -> float:
    """Bytes of a text in UTF-8 over their zlib size, as openai-whisper measures."""
    return _compression(text.encode("utf-8"))


def _compression(data: bytes) -> float:
    return len(data) / len(zlib.compress(data))
