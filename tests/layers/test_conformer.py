"""The conformer's parts against obvious twins: local attention, streams of pieces, clamps, clipped linear layers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from audiomm.base.errors import InputError
from audiomm.layers.clipped_linear import ClippedLinear
from audiomm.layers.conformer import (
    AudioStream,
    HalfStepFeedForward,
    LayerState,
    LightConv,
    LocalAttention,
    StageState,
    SubsampleStage,
    bounded,
    fresh_layer,
    relative_sinusoids,
)

WIDTH, HEADS = 12, 3


class Attention(LocalAttention):
    """Local attention with a position projection, as the towers have."""

    def __init__(self, **options) -> None:
        super().__init__(WIDTH, HEADS, cap=5.0, **options)
        self.positions = nn.Linear(WIDTH, WIDTH, bias=False)

    def position_projection(self) -> nn.Linear:
        return self.positions


def attention(**options) -> Attention:
    torch.manual_seed(1)
    module = Attention(**{"chunk": 4, "past": 5, "reach": 5} | options)
    nn.init.normal_(module.per_dim_scale)
    return module


def plain_attention(module: Attention, hidden: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Query by query, key by key."""
    rows, tokens, _ = hidden.shape
    split = (rows, tokens, HEADS, WIDTH // HEADS)
    scale = (WIDTH // HEADS) ** -0.5 / math.log(2) * functional.softplus(module.per_dim_scale)
    queries = module.q_proj(hidden).view(split) * scale
    keys, values = module.k_proj(hidden).view(split) * module.key_scale, module.v_proj(hidden).view(split)
    first = module.farthest - module.past
    table = relative_sinusoids(module.farthest, module.past + 1, WIDTH, hidden.device)
    positions = module.positions(table).view(-1, HEADS, WIDTH // HEADS)
    result = torch.zeros(split)
    for row in range(rows):
        for query in range(tokens):
            seen = [key for key in range(max(0, query - module.reach), query + 1) if valid[row, key]]
            if not seen:
                continue
            scores = []
            for key in seen:
                place = module.farthest - (query - key + first)
                both = keys[row, key] + positions[place]
                scores.append(module.cap * torch.tanh((queries[row, query] * both).sum(-1) / module.cap))
            weights = torch.stack(scores).softmax(dim=0)
            result[row, query] = (weights[:, :, None] * values[row, seen]).sum(0)
    return result.reshape(rows, tokens, WIDTH)


@pytest.mark.parametrize(
    "options", [{}, {"reach": 4, "key_scale": 1.9}, {"chunk": 7}, {"chunk": 3, "past": 2, "reach": 1}, {"farthest": 4}]
)
def test_attention_in_chunks_is_attention_key_by_key(options):
    module = attention(**options)
    hidden = torch.randn(2, 19, WIDTH)
    valid = torch.ones(2, 19, dtype=torch.bool)
    valid[1, 13:] = False
    with torch.no_grad():
        found, wanted = module(hidden, valid), plain_attention(module, hidden, valid)
    torch.testing.assert_close(found[0], wanted[0], atol=2e-6, rtol=0)
    torch.testing.assert_close(found[1, :13], wanted[1, :13], atol=2e-6, rtol=0)


def test_a_token_that_sees_nothing_gets_the_mean_of_its_window_and_no_nan():
    module = attention()
    hidden = torch.randn(1, 9, WIDTH)
    found = module(hidden, torch.zeros(1, 9, dtype=torch.bool))
    assert torch.isfinite(found).all()


def test_attention_in_half_precision_computes_in_float32():
    module = attention()
    hidden = torch.randn(1, 9, WIDTH)
    valid = torch.ones(1, 9, dtype=torch.bool)
    exact = module(hidden, valid)
    half = module.bfloat16()(hidden.bfloat16(), valid)
    assert half.dtype == torch.bfloat16
    assert (half - exact).abs().max() < 0.03 * exact.abs().max() + 0.02


def test_sinusoids_are_sines_then_cosines_and_zero_beyond_the_present():
    table = relative_sinusoids(2, 5, 6, torch.device("cpu"))
    assert table.shape == (5, 6)
    periods = torch.tensor([1.0, 1e-2, 1e-4])
    torch.testing.assert_close(table[0], torch.cat([(2 * periods).sin(), (2 * periods).cos()]))
    assert table[2].tolist() == [0, 0, 0, 1, 1, 1] and not table[3:].any()


def run_in_pieces(parts, hidden: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    attention_part, conv = parts
    state = fresh_layer(attention_part, conv)
    outputs = []
    for piece in hidden.split(sizes, dim=1):
        valid = torch.ones(piece.shape[:2], dtype=torch.bool)
        outputs.append(conv(attention_part(piece, valid, state), state))
    return torch.cat(outputs, dim=1)


@pytest.mark.parametrize("sizes", [[1] * 23, [2, 9, 1, 11], [23]])
def test_pieces_with_a_state_give_what_the_whole_gives(sizes):
    parts = attention(), LightConv(WIDTH, 5, 1e10)
    hidden = torch.randn(1, 23, WIDTH)
    with torch.no_grad():
        whole = parts[1](parts[0](hidden, torch.ones(1, 23, dtype=torch.bool)))
        torch.testing.assert_close(run_in_pieces(parts, hidden, sizes), whole, atol=2e-6, rtol=0)


def test_the_state_of_a_stream_does_not_grow():
    parts = attention(), LightConv(WIDTH, 5, 1e10)
    state = fresh_layer(*parts)
    sizes = [tensor.shape for tensor in vars(state).values()]
    for _ in range(3):
        hidden = torch.randn(1, 8, WIDTH)
        parts[1](parts[0](hidden, torch.ones(1, 8, dtype=torch.bool), state), state)
    assert isinstance(state, LayerState) and [tensor.shape for tensor in vars(state).values()] == sizes


@pytest.mark.parametrize("padding", [(1, 1), (0, 2)])
@pytest.mark.parametrize("sizes", [[1] * 13, [0, 5, 2, 6], [13]])
def test_a_convolution_fed_in_pieces_gives_its_rows(padding, sizes):
    stage = SubsampleStage((2, 3), (3, 3), (2, 2), padding, nn.LayerNorm(3))
    rows = torch.randn(1, 2, 13, 8)
    state = StageState()
    last = len(sizes) - 1
    pieces = [stage(part, state, place == last) for place, part in enumerate(rows.split(sizes, dim=2))]
    torch.testing.assert_close(torch.cat(pieces, dim=2), stage(rows), atol=1e-6, rtol=0)
    assert stage(rows).shape == (1, 3, 7, 4)


def test_the_half_step_is_half_and_bounds_bind():
    part = HalfStepFeedForward(WIDTH, 0.25, limit=1e10)
    hidden = torch.randn(2, 3, WIDTH)
    step = part.post_layer_norm(part.ffw_layer_2(functional.silu(part.ffw_layer_1(part.pre_layer_norm(hidden)))))
    torch.testing.assert_close(part(hidden), hidden + 0.25 * step)
    assert bounded(torch.tensor([3.0, -9.0]), 2.0).tolist() == [2.0, -2.0]
    assert bounded(torch.tensor([math.inf], dtype=torch.float16), 1e10).item() == 65504.0
    free = torch.tensor([2e10])
    assert bounded(free, 1e10) is free


# ---------------------------------------------------------------------------------------------------------- streams


class CountingTower:
    """Answers each frame with itself."""

    device = torch.device("cpu")

    def fresh_stream(self) -> list[bool]:
        return []

    def encode_piece(self, frames: torch.Tensor, state: list[bool], last: bool) -> torch.Tensor:
        state.append(last)
        return frames


class Doubling:
    def push(self, samples: torch.Tensor) -> torch.Tensor:
        return 2 * samples[:, None]

    def finish(self) -> torch.Tensor:
        return torch.full((1, 1), 7.0)


def test_a_stream_ends_once():
    stream = AudioStream(CountingTower(), Doubling())
    assert stream.push(torch.tensor([1.0, 2.0])).tolist() == [[[2.0], [4.0]]]
    assert stream.finish().tolist() == [[[7.0]]]
    for again in (stream.finish, lambda: stream.push(torch.zeros(1))):
        with pytest.raises(InputError, match="the stream is over"):
            again()


# ---------------------------------------------------------------------------------------------------------- clipping


def test_a_clipped_linear_layer_is_a_linear_layer_between_two_clamps():
    layer = ClippedLinear(4, 3)
    hidden = torch.randn(5, 4)
    assert isinstance(layer, nn.Linear) and layer.weight is layer.linear.weight and layer.bias is None
    torch.testing.assert_close(layer(hidden), hidden @ layer.weight.T)
    layer.input_max.fill_(0.3), layer.input_min.fill_(-0.2), layer.output_max.fill_(0.1), layer.output_min.fill_(-0.15)
    torch.testing.assert_close(layer(hidden), (hidden.clamp(-0.2, 0.3) @ layer.weight.T).clamp(-0.15, 0.1))
    layer.open_bounds()
    torch.testing.assert_close(layer(hidden), hidden @ layer.weight.T)


def test_a_clipped_linear_layer_bears_the_checkpoints_names_and_may_go_without_bounds():
    bounds = {"input_min", "input_max", "output_min", "output_max"}
    assert set(ClippedLinear(4, 3).state_dict()) == {"linear.weight", *bounds}
    plain = ClippedLinear(4, 3, clipped=False)
    assert set(plain.state_dict()) == {"linear.weight"}
    hidden = 1e6 * torch.randn(2, 4)
    torch.testing.assert_close(plain(hidden), plain.linear(hidden))
    assert [name for name, _ in plain.named_parameters()] == ["linear.weight"]
