"""Where in the audio each token is: cross-attention of a few heads, smoothed, and a path through it.

Some heads of a trained decoder look at the audio of the word they write. One more pass over text that is known already,
all tokens at once, gives their attention; dynamic time warping finds the cheapest way through it that never goes back.
Source: arXiv:2212.04356 and OpenAI's `timing`; the heads are `alignment_heads` of the generation config.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.lib.stride_tricks import as_strided
from torch import Tensor, nn
from torch.nn import functional

from ...base.errors import GenerationError
from ...generation import GenerationConfig
from ...layers.projection import is_plain
from ...layers.quantized import Int8Linear, round_rows, whole_product
from .config import FRAMES_PER_POSITION, FRAMES_PER_SECOND, WhisperConfig
from .layers import CrossWatch

#: Seconds that one position of the encoder's output stands for.
SECONDS_PER_POSITION = FRAMES_PER_POSITION / FRAMES_PER_SECOND

#: Windows that are aligned together; bounds what the heads' weights take to about 30 MB a window of the largest model.
WINDOWS_AT_ONCE = 8

#: Of its height on the path, what a token's attention must reach where its word begins.
ONSET_SHARE = 0.5

#: Tokens of the vocabulary whose logits are worked on at a time: what a processor's cache holds.
_TOKENS_AT_ONCE = 2048

Heads = tuple[tuple[int, int], ...]

#: Keys and values (windows, heads, positions, head_dim) of the encoder's output, for every layer of the decoder.
Pairs = Sequence[tuple[Tensor, Tensor]]


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
    model: AlignedModel, encoded: Tensor, rows: Sequence[Sequence[int]], heads: Heads, pairs: Pairs | None = None
) -> tuple[Tensor, Tensor]:
    """Pass known texts through the decoder, all tokens at once.

    Args:
        model: Whose decoder reads.
        encoded: (rows, positions, d_model) output of the encoder.
        rows: Token ids of each row, prompt included; shorter rows are padded at the right, which no token sees.
        heads: Of whose attention the scores are wanted.
        pairs: What the decoder's layers make of `encoded`, where it is at hand; made anew otherwise.

    Returns:
        Scores before softmax (rows, heads, tokens, positions) in float32, and hidden states (rows, tokens, d_model).
    """
    longest = max(len(row) for row in rows)
    tokens = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=encoded.device)
    watch = CrossWatch(heads, pairs)
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


def probabilities(head: nn.Module, hidden: Tensor, tokens: Tensor, added: Tensor | None = None) -> Tensor:
    """How likely some tokens are: the softmax of a whole vocabulary, of which one number a row is wanted.

    Args:
        head: Hidden states to logits.
        hidden: (rows, d_model).
        tokens: (rows,) token ids.
        added: (vocabulary,) added to the logits: minus infinity where a token cannot be.

    Returns:
        (rows,) float32.
    """
    first, totals, chosen = 0, [], torch.zeros(len(tokens), device=hidden.device)
    for logits in _logits(head, hidden):
        count = logits.shape[1]
        if added is not None:
            logits += added[first : first + count]
        place = tokens - first
        found = logits.gather(1, place.clamp(0, count - 1)[:, None])[:, 0]
        chosen = torch.where((place >= 0) & (place < count), found, chosen)
        totals.append(_logsumexp(logits))
        first += count
    return (chosen - torch.stack(totals).logsumexp(dim=0)).exp()


def _logsumexp(logits: Tensor) -> Tensor:
    """torch.logsumexp of rows (rows, tokens), which it overwrites: exponents of two are the quicker ones on a CPU."""
    # Where all are minus infinity they stay so.
    largest = logits.amax(dim=1, keepdim=True).clamp_(min=torch.finfo(logits.dtype).min)
    total = logits.sub_(largest).mul_(math.log2(math.e)).exp2_().sum(dim=1)
    return largest[:, 0] + total.log()


def _logits(head: nn.Module, hidden: Tensor) -> Iterator[Tensor]:
    """The logits of hidden states (rows, d_model) in float32, on a CPU in pieces of some tokens of the vocabulary."""
    if hidden.device.type != "cpu" or not is_plain(head):
        yield head(hidden).float()
        return
    assert isinstance(head, nn.Linear | Int8Linear), "which is what `is_plain` says"
    rounded = None
    if isinstance(head, Int8Linear):
        rounded = round_rows(hidden, hidden.abs().amax(dim=1, keepdim=True))
    for first in range(0, len(head.weight), _TOKENS_AT_ONCE):
        piece = slice(first, first + _TOKENS_AT_ONCE)
        weight, bias = head.weight[piece], None if head.bias is None else head.bias[piece]
        if rounded is None or not isinstance(head, Int8Linear):
            yield functional.linear(hidden, weight, bias).float()
        else:
            yield whole_product(*rounded, weight, head.scale[piece], bias)


# ---------------------------------------------------------------------- from weights to a path


def smoothed(weights: Tensor, filter_width: int) -> np.ndarray:
    """Attention weights of several heads made one clean picture.

    Each position is compared over the tokens (zero mean, unit deviation), outliers go with a median filter along the
    audio, and the heads are averaged.

    Args:
        weights: (heads, tokens, positions) of float32.
        filter_width: Positions that the median is of; odd.

    Returns:
        (tokens, positions) of float32.
    """
    total = torch.zeros_like(weights[0])
    # One head at a time stays in the processor's cache.
    for one in weights:
        # A single token, or one that looks like all others, says nothing about where it is: that gives zeros, exactly.
        centred = one - one[:1]
        centred -= centred.mean(dim=0)
        # Squares of what few tokens look at leave float32.
        deviation = centred.double().square_().mean(dim=0).sqrt_().float()
        centred /= deviation.masked_fill_(deviation == 0, 1.0)
        total += median_filter(centred, filter_width)
    return (total / len(weights)).cpu().numpy()


def median_filter(values: Tensor, width: int) -> Tensor:
    """The median of `width` (odd) neighbours along the last dimension, which is reflected at its ends."""
    side = width // 2
    if width == 1 or values.shape[-1] <= side:
        return values
    first, last = values[..., 1 : side + 1].flip(-1), values[..., -side - 1 : -1].flip(-1)
    padded = torch.cat((first, values, last), dim=-1)
    # Rows one after the other are one line; medians across their borders are left out.
    medians = _sorted_runs(padded.view(-1), width, [side])[0]
    return medians.as_strided(values.shape, padded.stride())


def _sorted_runs(line: Tensor, count: int, ranks: Sequence[int]) -> list[Tensor]:
    """Of each run of `count` neighbours, (length - count + 1,) for each rank: its value of that rank, 0 the smallest.

    A run is two shorter ones, which other runs begin or end with, too.
    """
    if count == 1:
        return [line]
    size, length = count - count // 2, len(line) - count + 1
    left = _sorted_runs(line, size, range(size))
    right = left if 2 * size == count else _sorted_runs(line, count - size, range(count - size))
    left, right = [one[:length] for one in left], [one[size : size + length] for one in right]
    return [_ranked(left, right, rank) for rank in ranks]


def _ranked(left: list[Tensor], right: list[Tensor], rank: int) -> Tensor:
    """Of two sorted lists together, place by place, the value of a rank.

    It is the largest of some first values of both, and of all ways to choose these the one that makes it the smallest.
    """
    found: Tensor | None = None
    for taken in range(max(0, rank + 1 - len(right)), min(len(left), rank + 1) + 1):
        lasts = [one[number - 1] for one, number in ((left, taken), (right, rank + 1 - taken)) if number]
        largest = torch.maximum(*lasts) if len(lasts) == 2 else lasts[0]
        found = largest if found is None else torch.minimum(found, largest)
    assert found is not None, "no rank is beyond both lists"
    return found


def dynamic_time_warping(cost: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The cheapest path from the first to the last corner of a matrix: right, down or both at once.

    Cells of one anti-diagonal do not need each other, so a whole one is computed at a time. Where predecessors cost
    the same, the path comes from the left, as in the reference's loop for CPUs.

    Args:
        cost: (rows, columns) of floats, neither empty; in float32 it takes two thirds of the time of float64.

    Returns:
        Row and column indices of the path, first cell first.
    """
    rows, columns = cost.shape
    # Cell (i, j) is number i + 1 of anti-diagonal i + j + 2: around the cells is a frame that costs infinitely much.
    slanted = np.full((rows + columns - 1, rows), np.inf, dtype=cost.dtype)
    size = slanted.itemsize
    as_strided(slanted, cost.shape, ((rows + 1) * size, rows * size))[...] = cost
    # float32 sums are what ties are counted in by the references.
    totals = np.full((rows + columns + 1, rows + 1), np.inf, dtype=np.float32)
    totals[0, 0] = 0.0
    is_tie = np.empty(rows, dtype=bool)
    befores, lasts = totals[:-2], totals[1:-1]
    for price, total, across, up, left in zip(
        slanted, totals[2:, 1:], befores[:, :-1], lasts[:, :-1], lasts[:, 1:], strict=True
    ):
        np.minimum(across, up, out=total)
        np.minimum(total, left, out=total)
        # Neither is cheaper than both others then.
        np.equal(across, up, out=is_tie)
        np.copyto(total, left, where=is_tie)
        np.add(total, price, out=total, casting="same_kind")
    return _walk_back(totals, rows, columns)


def _walk_back(totals: np.ndarray, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """The path through slanted totals, from its end."""
    across, up, left = totals[:-2, :-1], totals[1:-1, :-1], totals[1:-1, 1:]
    is_across, is_up = (across < up) & (across < left), (up < across) & (up < left)
    # Bytes are looked at in a tenth of the time that cells of an array take.
    climbs, stays = (is_across | is_up).tobytes(), is_up.tobytes()
    path = []
    row, column = rows - 1, columns - 1
    while row >= 0 and column >= 0:
        path.append((row, column))
        cell = (row + column) * rows + row
        row -= climbs[cell]
        column -= 1 - stays[cell]
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
    pairs: Pairs | None = None,
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
        pairs: See `read_again`.

    Returns:
        For each window (tokens,) seconds since it began, float32.
    """
    times = [torch.zeros(len(text)) for text in texts]
    spoken = [index for index, text in enumerate(texts) if len(text)]
    for start in range(0, len(spoken), WINDOWS_AT_ONCE):
        group = spoken[start : start + WINDOWS_AT_ONCE]
        rows = [[*prompts[index], *texts[index]] for index in group]
        scores, _ = read_again(model, encoded[group], rows, heads, pairs_of(pairs, group))
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
        writers = output.last_hidden_state[0, len(prompt) - 1 :]
        found.append(probabilities(model.proj_out, writers, row[0, len(prompt) :]).cpu())
    return found


def pairs_of(pairs: Pairs | None, windows: Sequence[int]) -> Pairs | None:
    """The pairs of some windows."""
    if pairs is None or len(windows) == len(pairs[0][0]):
        return pairs
    return [(keys[windows], values[windows]) for keys, values in pairs]


def last_repeated(times: Tensor, count: int) -> Tensor:
    """(count,) times, the last one repeated where there are fewer; 0.0 where there are none."""
    missing = times[-1:].expand(count - len(times)) if len(times) else times.new_zeros(count)
    return torch.cat([times, missing])


def positions_of(frames: int) -> int:
    """Encoder positions in some frames; at least one."""
    return max(frames // FRAMES_PER_POSITION, 1)
