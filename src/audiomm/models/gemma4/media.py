"""What comes into Gemma 4 besides tokens: how it is passed, embedded and handed back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...base.errors import ShapeError
from ...base.outputs import ModelOutput
from ...layers.norm import RMSNorm
from .text import Pair

#: Values of mm_token_type_ids.
IMAGE_TYPE, VIDEO_TYPE = 1, 2
#: Kind of media -> argument that brings it.
ARGUMENTS = {"image": "pixel_values", "video": "pixel_values_videos", "audio": "input_features"}


@dataclass
class Gemma4FeatureOutput(ModelOutput):
    """What a tower and its embedder made.

    Attributes:
        last_hidden_state: The tower's own answer.
        pooler_output: Features as the text stack reads them: one (tokens, width) tensor an image or video.
        hidden_states, attentions: One tensor a layer, if asked for.
    """

    last_hidden_state: Tensor | None = None
    pooler_output: tuple[Tensor, ...] | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class Gemma4ModelOutput(ModelOutput):
    """States of the text stack, and the features put in the place of the media's marks; see Gemma4CausalLMOutput."""

    last_hidden_state: Tensor | None = None
    past_key_values: Any = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    image_hidden_states: Tensor | None = None
    audio_hidden_states: Tensor | None = None
    shared_kv_states: dict[str, Pair] | None = None
    router_logits: tuple[Tensor, ...] | None = None


class Gemma4MultimodalEmbedder(nn.Module):
    """From a tower's width to the text stack's: a norm without weight, then a linear layer, in this order."""

    def __init__(self, tower_width: int, width: int, eps: float) -> None:
        super().__init__()
        self.embedding_pre_projection_norm = RMSNorm(tower_width, eps, scaled=False)
        self.embedding_projection = nn.Linear(tower_width, width, bias=False)

    def forward(self, inputs_embeds: Tensor) -> Tensor:
        """(..., tower width) -> (..., width), of the weights' dtype."""
        normed = self.embedding_pre_projection_norm(inputs_embeds.to(self.embedding_projection.weight.dtype))
        embedded: Tensor = self.embedding_projection(normed)
        return embedded


@dataclass
class Media:
    """What comes besides the tokens: tensors as the processor makes them, or features computed before.

    Attributes:
        pixel_values: (images, patches, patch values), with image_position_ids (images, patches, 2).
        pixel_values_videos: (frames, patches, patch values), with video_position_ids (frames, patches, 2) and
            num_frames_per_video (videos,).
        input_features: (clips, frames, mel bands), with input_features_mask (clips, frames), True where real.
        encoded: {"image", "video", "audio": what get_image_features and its like returned before}.
    """

    pixel_values: Tensor | None = None
    pixel_values_videos: Tensor | None = None
    input_features: Tensor | None = None
    input_features_mask: Tensor | None = None
    image_position_ids: Tensor | None = None
    video_position_ids: Tensor | None = None
    num_frames_per_video: Tensor | None = None
    encoded: dict[str, Any] | None = None


def feature_items(encoded: Any) -> list[Tensor]:
    """One (tokens, width) tensor an item, padding left out."""
    pooled: Tensor | Sequence[Tensor] = encoded.pooler_output
    mask = getattr(encoded, "attention_mask", None)
    if mask is None:
        return list(pooled)
    return [clip[valid] for clip, valid in zip(pooled, mask.bool(), strict=True)]


def hidden_features(features: dict[str, list[Tensor]]) -> dict[str, Tensor | None]:
    """The features of images and clips as outputs name them, all items of a kind in one (tokens, width) tensor."""
    return {
        f"{kind}_hidden_states": torch.cat(features[kind]) if features.get(kind) else None
        for kind in ("image", "audio")
    }


def picture_places(types: Tensor | None, rows: int, count: int) -> Tensor | None:
    """(rows, count) bool: which of the new tokens are those of pictures, by the types of all; None where those are.

    Raises:
        ShapeError: There are fewer types than tokens.
    """
    if types is None:
        return None
    if types.dim() != 2 or len(types) != rows or types.shape[1] < count:
        raise ShapeError(
            f"mm_token_type_ids are of shape {tuple(types.shape)} for {rows} rows of {count} tokens: pass one for each "
            "token, or leave them out."
        )
    types = types[:, -count:]
    return (types == IMAGE_TYPE) | (types == VIDEO_TYPE)
