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
    """

    tokens: Tensor
    temperature: float
    average_logprob: float
    compression_ratio: float
    no_speech_probability: float | None
    is_complete: bool = True
    token_times: Tensor | None = None


@dataclass
class Recording:
    """Where the transcription of one item of the batch stands.

    Attributes:
        row: Its row of the features.
        end: Frames it has.
        start_tokens: What every window's text follows.
        seek: Frame at which the next window starts.
        segments: Found so far.
        history: Tokens that the next window's prompt may repeat, one tensor a segment.
        token_times: Of each segment's tokens, in seconds since its window began, where they are asked for.
        language: Code of its language, or None where the model has no choice.
    """

    row: int
    end: int
    start_tokens: list[int] = field(default_factory=list)
    language: str | None = None
    seek: int = 0
    segments: list[dict[str, Any]] = field(default_factory=list)
    history: list[Tensor] = field(default_factory=list)
    token_times: list[Tensor] = field(default_factory=list)
    windows: int = 0

    @property
    def is_done(self) -> bool:
        return self.seek >= self.end

    def take(self, text: WindowText, pieces: Sequence[tuple[float, float, Tensor]]) -> list[dict[str, Any]]:
        """Add the segments of a window's text; the next window is not settled yet.

        Args:
            text: Of the window at `seek`.
            pieces: (start seconds, end seconds, tokens) of each segment; the tokens are those of the text, in order.

        Returns:
            The new segments.
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
                language=self.language,
            )
            if text.token_times is not None:
                self.token_times.append(text.token_times[first : first + len(tokens)])
                segment["token_timestamps"] = self.token_times[-1] + self.seek / FRAMES_PER_SECOND
            first += len(tokens)
            segments.append(segment)
        self.segments += segments
        return segments


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
    if with_times:
        times = [torch.cat(one.token_times) if one.token_times else torch.zeros(0) for one in recordings]
        longest = answer["sequences"].shape[1]
        answer["token_timestamps"] = torch.stack([last_repeated(row, longest).to(device) for row in times])
    return answer


def compression_ratio(tokens: Tensor, vocabulary: int) -> float:
    """Bytes of the token ids over their zlib size; repetition compresses well."""
    if not len(tokens):
        return 0.0
    width = int(math.log2(vocabulary) / 8) + 1
    data = b"".join(int(token).to_bytes(width, "little") for token in tokens.tolist())
    return len(data) / len(zlib.compress(data))
