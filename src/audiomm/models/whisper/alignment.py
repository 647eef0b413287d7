"""Where in the audio each token is: cross-attention of a few heads, smoothed, and a path through it.

Some heads of a trained decoder look at the audio of the word they write. One more pass over text that is known already,
all tokens at once, gives their attention; dynamic time warping finds the cheapest way through it that never goes back.
Source: arXiv:2212.04356 and OpenAI's `timing`; the heads are `alignment_heads` of the generation config.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ...base.errors import GenerationError
from ...generation import GenerationConfig
from .config import FRAMES_PER_POSITION, FRAMES_PER_SECOND, WhisperConfig
from .layers import CrossWatch

#: Seconds that one position of the encoder's output stands for.
SECONDS_PER_POSITION = FRAMES_PER_POSITION / FRAMES_PER_SECOND

#: Windows that are aligned together; bounds what the heads' weights take to about 30 MB a window of the largest model.
WINDOWS_AT_ONCE = 8

#: Of its height on the path, what a token's attention must reach where its word begins.
ONSET_SHARE = 0.5

_DIAGONAL, _UP, _LEFT = 0, 1, 2

Heads = tuple[tuple[int, int], ...]


class AlignedModel(Protocol):
    """What finding times asks of a model."""

    config: WhisperConfig
    proj_out: nn.Linear

    def get_decoder(self) -> Any:
        """The decoder: token ids and the encoder's output to hidden states."""


def alignment_heads(config: GenerationConfig, model: WhisperConfig) -> Heads:
    """The (decoder layer, head) pairs whose attention tells where words are.

    Without `alignment_heads` in the generation config these are all heads of the later half of the layers.

    Raises:
        GenerationError: `alignment_heads` names a head that the model does not have.
    """
    layers, heads = model.decoder_layers, model.decoder_attention_heads
    given = getattr(config, "alignment_heads", None)
    if not given:
        return tuple((layer, head) for layer in range(layers // 2, layers) for head in range(heads))
    chosen = []
    for pair in given:
        layer, head = (int(index) for index in pair)
        if not (0 <= layer < layers and 0 <= head < heads):
            raise GenerationError(
                f"alignment_heads of the generation config holds {[layer, head]}, but the decoder has layers 0 to "
                f"{layers - 1} with heads 0 to {heads - 1}: take the list that belongs to this model."
            )
        chosen.append((layer, head))
    return tuple(chosen)


# ---------------------------------------------------------------------- the pass over known text


def read_again(
    model: AlignedModel, encoded: Tensor, rows: Sequence[Sequence[int]], heads: Heads
) -> tuple[Tensor, Tensor]:
    """Pass known texts through the decoder, all tokens at once.

    Args:
        model: Whose decoder reads.
        encoded: (rows, positions, d_model) output of the encoder.
        rows: Token ids of each row, prompt included; shorter rows are padded at the right, which no token sees.
        heads: Of whose attention the scores are wanted.

    Returns:
        Scores before softmax (rows, heads, tokens, positions) in float32, and hidden states (rows, tokens, d_model).
    """
    longest = max(len(row) for row in rows)
    tokens = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=encoded.device)
    watch = CrossWatch(heads)
    # A compiled decoder would be compiled anew for every length of text, so its forward is called as it is.
    output = model.get_decoder().forward(
        tokens,
        encoder_hidden_states=encoded,
        past_key_values=watch,
        output_attentions=False,
        output_hidden_states=False,
        return_dict=True,
    )
    return watch.scores(), output.last_hidden_state


# ---------------------------------------------------------------------- from weights to a path


def smoothed(weights: Tensor, filter_width: int) -> np.ndarray:
    """Attention weights of several heads made one clean picture.

    Each position is compared over the tokens (zero mean, unit deviation), outliers go with a median filter along the
    audio, and the heads are averaged.

    Args:
        weights: (heads, tokens, positions) of float32.
        filter_width: Positions that the median is of; odd.

    Returns:
        (tokens, positions) of float64.
    """
    deviation = weights.std(dim=-2, keepdim=True, unbiased=False)
    centred = weights - weights.mean(dim=-2, keepdim=True)
    # A single token, or one that looks like all others, says nothing about where it is.
    normal = torch.where(deviation > 0, centred / deviation, torch.zeros_like(centred))
    return median_filter(normal, filter_width).mean(dim=0).double().cpu().numpy()


def median_filter(values: Tensor, width: int) -> Tensor:
    """The median of `width` (odd) neighbours along the last dimension, which is reflected at its ends."""
    side = width // 2
    if width == 1 or values.shape[-1] <= side:
        return values
    padded = functional.pad(values, (side, side), mode="reflect")
    length = values.shape[-1]
    # One head at a time stays in the processor's cache.
    return torch.stack([_median([one.narrow(-1, start, length) for start in range(width)]) for one in padded])


def _median(values: list[Tensor]) -> Tensor:
    """The median of an odd number of tensors, place by place.

    Of any n // 2 + 2 values neither the smallest nor the largest is the median of n: these two are dropped and the
    next value comes in their stead, until one is left.
    """
    size = len(values) // 2 + 2
    pool, waiting = values[:size], values[size:]
    while len(pool) > 1:
        smallest, others = pool[0], pool[1:]
        for place, value in enumerate(others):
            smallest, others[place] = torch.minimum(smallest, value), torch.maximum(smallest, value)
        largest = others.pop()
        for place, value in enumerate(others):
            largest, others[place] = torch.maximum(largest, value), torch.minimum(largest, value)
        pool = [*others, *waiting[:1]]
        waiting = waiting[1:]
    return pool[0]


def dynamic_time_warping(cost: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The cheapest path from the first to the last corner of a matrix: right, down or both at once.

    Cells of one anti-diagonal do not need each other, so a whole one is computed at a time. Where predecessors cost
    the same, the path comes from the left, as in the reference's loop for CPUs.

    Args:
        cost: (rows, columns), neither empty.

    Returns:
        Row and column indices of the path, first cell first.
    """
    rows, columns = cost.shape
    row, column = np.indices(cost.shape)
    slanted = np.full((rows + columns - 1, rows), np.inf)
    slanted[row + column, row] = cost
    came_from = np.full((rows + columns + 1, rows + 1), _LEFT, dtype=np.int8)
    # Sums live in a frame one cell wide; index i of an anti-diagonal is its cell in row i of the frame. float32 sums
    # are what ties are counted in by the references.
    before = np.full(rows + 1, np.inf, dtype=np.float32)
    last = before.copy()
    before[0] = 0.0
    for diagonal in range(2, rows + columns + 1):
        first, end = max(1, diagonal - columns), min(rows, diagonal - 1) + 1
        across, up, left = before[first - 1 : end - 1], last[first - 1 : end - 1], last[first:end]
        is_across, is_up = (across < up) & (across < left), (up < across) & (up < left)
        came_from[diagonal, first:end] = np.where(is_across, _DIAGONAL, np.where(is_up, _UP, _LEFT))
        total = np.full(rows + 1, np.inf, dtype=np.float32)
        cheapest = np.where(is_across, across, np.where(is_up, up, left))
        total[first:end] = slanted[diagonal - 2, first - 1 : end - 1] + cheapest
        before, last = last, total
    return _walk_back(came_from, rows, columns)


def _walk_back(came_from: np.ndarray, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    path = []
    row, column = rows, columns
    while row > 0 and column > 0:
        path.append((row - 1, column - 1))
        move = came_from[row + column, row]
        row -= move != _LEFT
        column -= move != _UP
    found = np.array(path[::-1])
    return found[:, 0], found[:, 1]


def first_positions(picture: np.ndarray) -> np.ndarray:
    """The first position on the path of each token, from a smoothed picture (tokens, positions)."""
    rows, columns = dynamic_time_warping(-picture)
    return columns[np.diff(rows, prepend=-1) > 0]


def onsets(picture: np.ndarray, entries: np.ndarray) -> np.ndarray:
    """Where, on the path, each token's attention first has half of its height.

    The path must spend the audio between two words on one of them and gives it to the second; its attention rises only
    where the word is heard. (OpenAI takes the entry for the start; on strings of recorded digits that is early by
    half the pause between them.)

    Args:
        picture: (tokens, positions), smoothed.
        entries: (tokens,) first position of each token on the path.
    """
    found = entries.copy()
    for token, (first, end) in enumerate(zip(entries, [*entries[1:], picture.shape[1] - 1], strict=True)):
        own = picture[token, first : end + 1]
        if own.max() > 0:
            found[token] = first + int(np.argmax(own >= own.max() * ONSET_SHARE))
    return np.minimum(found, [*entries[1:], picture.shape[1] - 1])


# ---------------------------------------------------------------------- times of tokens


def token_times(
    model: AlignedModel,
    encoded: Tensor,
    prompts: Sequence[Sequence[int]],
    texts: Sequence[Sequence[int]],
    frames: Sequence[int],
    heads: Heads,
) -> list[Tensor]:
    """When each generated token ends, in the scheme of transformers.

    A token's row is the one that reads it, and its time is where the path enters that row.

    Args:
        model: Whose decoder reads.
        encoded: (windows, positions, d_model) output of the encoder.
        prompts: What each text followed.
        texts: Generated tokens of each window.
        frames: Frames of audio in each window; no time is after them.
        heads: From `alignment_heads`.

    Returns:
        For each window (tokens,) seconds since it began, float32.
    """
    times = [torch.zeros(len(text)) for text in texts]
    spoken = [index for index, text in enumerate(texts) if len(text)]
    for start in range(0, len(spoken), WINDOWS_AT_ONCE):
        group = spoken[start : start + WINDOWS_AT_ONCE]
        rows = [[*prompts[index], *texts[index]] for index in group]
        scores, _ = read_again(model, encoded[group], rows, heads)
        for index, row, score in zip(group, rows, scores, strict=True):
            own = score[:, len(prompts[index]) : len(row)].softmax(dim=-1)
            picture = smoothed(own[..., : positions_of(frames[index])], model.config.median_filter_width)
            times[index] = torch.from_numpy(first_positions(picture) * SECONDS_PER_POSITION).float()
    return times


def token_probabilities(
    model: AlignedModel, encoded: Tensor, prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]]
) -> list[Tensor]:
    """How likely each token of a text is after those before it, with nothing forbidden and at temperature 1.

    Args:
        model: Whose decoder reads.
        encoded: (windows, positions, d_model) output of the encoder.
        prompts: What each text followed.
        texts: Tokens of each window.

    Returns:
        For each window (tokens,) float32 on the CPU.
    """
    found = []
    for window, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        row = torch.tensor([[*prompt, *text]], device=encoded.device)
        output = model.get_decoder()(
            row[:, :-1], encoder_hidden_states=encoded[window : window + 1], use_cache=False, return_dict=True
        )
        logits = model.proj_out(output.last_hidden_state[0, len(prompt) - 1 :]).float()
        chosen = logits.softmax(dim=-1).gather(1, row[0, len(prompt) :, None])[:, 0]
        found.append(chosen.cpu())
    return found


def last_repeated(times: Tensor, count: int) -> Tensor:
    """(count,) times, the last one repeated where there are fewer; 0.0 where there are none."""
    missing = times[-1:].expand(count - len(times)) if len(times) else times.new_zeros(count)
    return torch.cat([times, missing])


def positions_of(frames: int) -> int:
    """Encoder positions in some frames; at least one."""
    return max(frames // FRAMES_PER_POSITION, 1)
