"""The blocks of Whisper: attention, encoder layer, decoder layer.

Module names are the checkpoint's names. Source: arXiv:2212.04356; the pre-norm transformer of arXiv:1706.03762.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...layers.attention import attend, attend_eager, read_by_products
from ...layers.cache import Cache, PassThrough
from ...layers.masks import Mask
from ...layers.rounded import exact, is_rounded
from .config import WhisperConfig

#: What may stand in an encoder layer of a float16 model before the largest number is reached.
_FLOAT16_LIMIT = torch.finfo(torch.float16).max - 1000


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The activation of the feed-forward parts, by its name in the configuration."""
    if name in ("gelu_new", "gelu_fast", "gelu_pytorch_tanh"):
        return partial(functional.gelu, approximate="tanh")
    named: dict[str, Callable[[Tensor], Tensor]] = {
        "gelu_python": functional.gelu,
        "quick_gelu": lambda hidden: hidden * torch.sigmoid(1.702 * hidden),
        "relu2": lambda hidden: functional.relu(hidden).square(),
        "swish": functional.silu,
        "sigmoid": torch.sigmoid,
        "tanh": torch.tanh,
        "linear": lambda hidden: hidden,
    }
    found: Callable[[Tensor], Tensor] = named.get(name) or getattr(functional, name)
    return found


class WhisperAttention(nn.Module):
    """Multi-head attention; keys have no bias."""

    def __init__(self, width: int, heads: int, dropout: float, config: WhisperConfig) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.scale = self.head_dim**-0.5
        self.dropout = dropout
        self.config = config
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def pair(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (rows, heads, length, head_dim) of hidden states (rows, length, width)."""
        return self._heads(self.k_proj(hidden)), self._heads(self.v_proj(hidden))

    def _heads(self, hidden: Tensor) -> Tensor:
        return hidden.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)

    def queries(self, hidden: Tensor) -> Tensor:
        """What hidden states (rows, length, width) look for, scaled: (rows, heads, length, head_dim)."""
        # The scale is applied to the queries before the kernel, which is where low-precision models had it in training.
        return self._heads(self.q_proj(hidden) * self.scale)

    def read(
        self,
        hidden: Tensor,
        pair: tuple[Tensor, Tensor],
        mask: Mask = None,
        head_mask: Tensor | None = None,
        weights_wanted: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """What `hidden` (rows, length, width) reads from keys and values, and the weights if they are wanted."""
        queries = self.queries(hidden)
        dropout = self.dropout if self.training else 0.0
        weights = None
        is_plain = not weights_wanted and head_mask is None and self.config.attn_implementation != "eager"
        if is_plain and mask is None and pair[0].dtype == torch.bfloat16 != hidden.dtype:
            # A cache keeps these for a float32 model where the processor multiplies them quicker.
            flat = queries.transpose(1, 2).flatten(0, 1)
            return self.out_proj(read_by_products(flat, *pair, None, scale=1.0).view_as(hidden)), None
        # It may keep others that are only stored in their type.
        pair = exact(pair[0], hidden.dtype), exact(pair[1], hidden.dtype)
        if is_plain:
            attended = attend(queries, *pair, mask, scale=1.0, dropout=dropout)
        else:
            attended, weights = attend_eager(queries, *pair, mask, scale=1.0, dropout=dropout, head_mask=head_mask)
        return self.out_proj(attended.transpose(1, 2).flatten(2)), weights if weights_wanted else None


class CrossWatch(PassThrough):
    """A cache that keeps nothing but what some heads of the decoder find in the audio.

    Args:
        heads: The (layer, head) pairs.
        pairs: Keys and values of the audio for every layer, where they are known.
    """

    def __init__(self, heads: Sequence[tuple[int, int]], pairs: Sequence[tuple[Tensor, Tensor]] | None = None) -> None:
        self._pairs = pairs
        self._heads = {layer: [head for place, head in heads if place == layer] for layer, _ in heads}
        self._found: dict[int, Tensor] = {}

    def cross(self, layer: int) -> tuple[Tensor, Tensor] | None:
        if self._pairs is None:
            return None
        keys, values = self._pairs[layer]
        if is_rounded(keys.dtype):
            return exact(keys, torch.float32), exact(values, torch.float32)
        # A cache may keep values in the order that one query reads quickest; here are many.
        return keys, values.contiguous()

    def note(self, layer: int, attention: WhisperAttention, hidden: Tensor, keys: Tensor) -> None:
        """Keep the scores of the layer's heads: of `hidden` (rows, tokens, width) against keys of the audio."""
        chosen = self._heads.get(layer)
        if chosen is not None:
            queries, keys = attention.queries(hidden)[:, chosen].float(), keys[:, chosen].float()
            self._found[layer] = queries @ keys.transpose(-1, -2)

    def scores(self) -> Tensor:
        """(rows, heads, tokens, positions) of float32, before softmax; heads in the order of layers."""
        found = [self._found[layer] for layer in sorted(self._found)]
        return found[0] if len(found) == 1 else torch.cat(found, dim=1)


class WhisperEncoderLayer(nn.Module):
    """Self-attention over the whole window and a feed-forward part, each after a norm and added to the stream."""

    def __init__(self, config: WhisperConfig) -> None:
        super().__init__()
        width = config.d_model
        self.self_attn = WhisperAttention(width, config.encoder_attention_heads, config.attention_dropout, config)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, config.encoder_ffn_dim)
        self.fc2 = nn.Linear(config.encoder_ffn_dim, width)
        self.final_layer_norm = nn.LayerNorm(width)
        self.dropout, self.activation_dropout = config.dropout, config.activation_dropout
        self.act = activation(config.activation_function)

    def forward(
        self, hidden: Tensor, head_mask: Tensor | None = None, weights_wanted: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        normed = self.self_attn_layer_norm(hidden)
        attended, weights = self.self_attn.read(normed, self.self_attn.pair(normed), None, head_mask, weights_wanted)
        hidden = hidden + functional.dropout(attended, self.dropout, self.training)
        hidden = hidden + feed_forward(self, hidden)
        if hidden.dtype == torch.float16:
            hidden = hidden.clamp(-_FLOAT16_LIMIT, _FLOAT16_LIMIT)
        return hidden, weights


class WhisperDecoderLayer(nn.Module):
    """Causal self-attention, attention to the encoder's output, and a feed-forward part."""

    def __init__(self, config: WhisperConfig) -> None:
        super().__init__()
        width = config.d_model
        self.self_attn = WhisperAttention(width, config.decoder_attention_heads, config.attention_dropout, config)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.encoder_attn = WhisperAttention(width, config.decoder_attention_heads, config.attention_dropout, config)
        self.encoder_attn_layer_norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, config.decoder_ffn_dim)
        self.fc2 = nn.Linear(config.decoder_ffn_dim, width)
        self.final_layer_norm = nn.LayerNorm(width)
        self.dropout, self.activation_dropout = config.dropout, config.activation_dropout
        self.act = activation(config.activation_function)

    def forward(
        self,
        hidden: Tensor,
        index: int,
        cache: Cache | PassThrough,
        mask: Mask,
        encoder_hidden: Tensor | None,
        head_mask: Tensor | None = None,
        cross_head_mask: Tensor | None = None,
        weights_wanted: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """One layer.

        Args:
            hidden: (rows, new tokens, width).
            index: Which layer this is, for the cache.
            cache: Holds the earlier tokens' keys and values.
            mask: Who sees whom among the tokens.
            encoder_hidden: (audios, positions, width); rows may be a multiple of audios. None without an encoder, or
                once the cache holds its keys and values.

        Returns:
            The new hidden states, and the weights of self- and cross-attention if they are wanted.
        """
        normed = self.self_attn_layer_norm(hidden)
        pair = cache.update(index, *self.self_attn.pair(normed))
        attended, weights = self.self_attn.read(normed, pair, mask, head_mask, weights_wanted)
        hidden = hidden + functional.dropout(attended, self.dropout, self.training)
        cross_weights = None
        cross = cache.cross(index)
        if cross is None and encoder_hidden is not None:
            cross = cache.set_cross(index, *self.encoder_attn.pair(encoder_hidden))
        if cross is not None:
            normed = self.encoder_attn_layer_norm(hidden)
            if isinstance(cache, CrossWatch):
                cache.note(index, self.encoder_attn, normed, cross[0])
            attended, cross_weights = self.encoder_attn.read(normed, cross, None, cross_head_mask, weights_wanted)
            hidden = hidden + functional.dropout(attended, self.dropout, self.training)
        return hidden + feed_forward(self, hidden), weights, cross_weights


def feed_forward(layer: WhisperEncoderLayer | WhisperDecoderLayer, hidden: Tensor) -> Tensor:
    """The feed-forward part of a layer, without the residual."""
    hidden = layer.act(layer.fc1(layer.final_layer_norm(hidden)))
    hidden = layer.fc2(functional.dropout(hidden, layer.activation_dropout, layer.training))
    return functional.dropout(hidden, layer.dropout, layer.training)
