"""From the tokens of one window to segments with times, and to the place where the next window starts.

Source: arXiv:2212.04356, section 4.5; the rules of OpenAI's `transcribe`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .config import FRAMES_PER_POSITION, FRAMES_PER_SECOND

#: Seconds between two timestamp tokens, and between two frames.
TIME_PRECISION = 0.02
FRAME_PRECISION = 1 / FRAMES_PER_SECOND


@dataclass
class Split:
    """Segments found in one window.

    Attributes:
        segments: (start seconds, end seconds, tokens) of each, timestamp tokens included.
        advance: Frames until the next window starts; at least 1.
        is_whole: The tokens end in text and one timestamp: nothing follows in the window.
        end_is_estimated: No timestamp says where the last segment ends, so it ends where the window does.
    """

    segments: list[tuple[float, float, Tensor]] = field(default_factory=list)
    advance: int = 0
    is_whole: bool = False
    end_is_estimated: bool = False


def split_segments(
    tokens: Tensor,
    timestamp_begin: int,
    window_frames: int,
    *,
    offset_seconds: float = 0.0,
    time_precision: float = TIME_PRECISION,
) -> Split:
    """Cut a window's tokens where two timestamps stand side by side.

    Text after the last such pair was cut off by the window's end: the next window starts at that timestamp, so the
    text is left out here. When the window ends in text and one timestamp, nothing follows in it: the next window
    starts after it. Without a pair the window is one segment.

    Args:
        tokens: (length,) generated tokens, without prompt and end token.
        timestamp_begin: Id of <|0.00|>.
        window_frames: Frames of audio in the window, at 100 a second.
        offset_seconds: Time at which the window starts.
        time_precision: Seconds between two timestamp tokens.

    Returns:
        The segments. The last one of a window that goes on keeps both timestamps of the pair that ends it.
    """
    window_seconds = window_frames / 100
    stamps = (tokens >= timestamp_begin).tolist()
    pairs = [index + 1 for index in range(len(stamps) - 1) if stamps[index] and stamps[index + 1]]
    ends_in_one = stamps[-2:] == [False, True]

    def seconds(token: Tensor) -> float:
        return (int(token) - timestamp_begin) * time_precision

    if not pairs:
        times = tokens[tokens >= timestamp_begin]
        is_known = len(times) > 0 and seconds(times[-1]) > 0
        end = seconds(times[-1]) if is_known else window_seconds
        return Split([(offset_seconds, offset_seconds + end, tokens)], window_frames, ends_in_one, not is_known)
    split = Split(is_whole=ends_in_one)
    if ends_in_one:
        cuts = [*pairs, len(stamps)]
    else:
        cuts = [*pairs[:-1], pairs[-1] + 1]
    first = 0
    for cut in cuts:
        piece = tokens[first:cut]
        keeps_pair = cut == cuts[-1] and not ends_in_one
        start, end = seconds(piece[0]), seconds(piece[-2] if keeps_pair else piece[-1])
        split.segments.append((offset_seconds + start, offset_seconds + end, piece))
        first = cut
    if ends_in_one:
        split.advance = window_frames
    else:
        position = int(tokens[pairs[-1] - 1]) - timestamp_begin
        # A pair at <|0.00|> would stay in place for ever.
        split.advance = min(position * FRAMES_PER_POSITION, window_frames) or window_frames
    return split


def without_closing_pair(tokens: Tensor, timestamp_begin: int) -> Tensor:
    """Segment tokens with one timestamp at the end where `split_segments` kept two."""
    if len(tokens) > 2 and int(tokens[-2]) >= timestamp_begin and int(tokens[-1]) >= timestamp_begin:
        return tokens[:-1]
    return tokens


def pad_right(rows: list[Tensor], value: int, device: torch.device) -> Tensor:
    """(rows, longest) int64 from token rows of different lengths."""
    longest = max((len(row) for row in rows), default=0)
    padded = torch.full((len(rows), longest), value, dtype=torch.long, device=device)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row
    return padded


def pad_left(rows: list[list[int]], value: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Prompts (rows, longest) padded at the left, and their mask, None when all are of one length."""
    longest = max(len(row) for row in rows)
    padded = torch.full((len(rows), longest), value, dtype=torch.long)
    mask = torch.zeros((len(rows), longest), dtype=torch.bool)
    for index, row in enumerate(rows):
        padded[index, longest - len(row) :] = torch.tensor(row)
        mask[index, longest - len(row) :] = True
    return padded.to(device), None if bool(mask.all()) else mask.to(device)


def rescale(segments: list[dict[str, Any]], step_seconds: float, frame_seconds: float, *, has_times: bool) -> None:
    """Write the times of segments as they are when timestamp tokens and frames last otherwise; in place.

    Args:
        segments: Of one recording, without words.
        step_seconds: Seconds between two timestamp tokens; where windows start is counted in these, too.
        frame_seconds: Seconds between two frames; they tell where a segment ends that no timestamp ends.
        has_times: The tokens hold timestamps.
    """
    for segment in segments:
        offset, scaled = segment["seek"] / FRAMES_PER_SECOND, segment["seek"] / FRAMES_PER_POSITION * step_seconds
        for name in ("start", "end"):
            within = segment[name] - offset
            by_frames = name == "end" and (not has_times or segment.get("end_estimated", False))
            unit, seconds = (FRAME_PRECISION, frame_seconds) if by_frames else (TIME_PRECISION, step_seconds)
            segment[name] = scaled + (within / unit).round() * seconds
        if "token_timestamps" in segment:
            segment["token_timestamps"] = segment["token_timestamps"] - offset + scaled


def segment_dict(start: float, end: float, tokens: Tensor, **facts: Any) -> dict[str, Any]:
    """The form in which generate() returns a segment: times as float64 tensors, as transformers has them."""
    times = {"start": torch.tensor(start, dtype=torch.float64), "end": torch.tensor(end, dtype=torch.float64)}
    return {**times, "tokens": tokens, **facts}
