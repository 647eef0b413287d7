"""Configurations of Gemma 4's relatives: the 12B ("unified"), which has no towers, and the drafters."""

from __future__ import annotations

from typing import Any, ClassVar

from ...base.config import PreTrainedConfig
from ...base.errors import ConfigError
from ...feature_extraction.image import grid_tokens
from .config import Gemma4Config, Gemma4TextConfig


class Gemma4UnifiedTextConfig(Gemma4TextConfig):
    """The text stack of the 12B: neither per-layer embeddings nor experts."""

    model_type: ClassVar[str] = "gemma4_unified_text"

    max_position_embeddings: int = 262_144
    sliding_window: int = 1024
    use_bidirectional_attention: str | None = "vision"
    vocab_size_per_layer_input: int = 0
    hidden_size_per_layer_input: int = 0


class Gemma4UnifiedVisionConfig(PreTrainedConfig):
    """The 12B's picture embedder: a linear layer on 48 x 48 pixels."""

    model_type: ClassVar[str] = "gemma4_unified_vision"

    patch_size: int = 16
    pooling_kernel_size: int = 3
    mm_embed_dim: int = 3840
    mm_posemb_size: int = 1120
    rms_norm_eps: float = 1e-6
    output_proj_dims: int = 3840
    initializer_range: float = 0.02

    def validate(self) -> None:
        self.require_int(1, 1_024, "patch_size", "pooling_kernel_size")
        self.require_int(1, 1_000_000, "mm_embed_dim", "mm_posemb_size", "output_proj_dims")

    def image_tokens(self, height: int, width: int) -> int:
        """Tokens of a resized image, height and width in pixels."""
        return grid_tokens(height, width, self.patch_size * self.pooling_kernel_size)


class Gemma4UnifiedAudioConfig(PreTrainedConfig):
    """The 12B's audio embedder: a linear layer on 640 samples, 40 ms; one number under four names."""

    model_type: ClassVar[str] = "gemma4_unified_audio"
    attribute_map: ClassVar[dict[str, str]] = dict.fromkeys(
        ("audio_samples_per_token", "hidden_size", "output_proj_dims"), "audio_embed_dim"
    )

    audio_embed_dim: int = 640
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02

    def __init__(self, **values: Any) -> None:
        if "audio_embed_dim" in values:
            values = {name: value for name, value in values.items() if name not in self.attribute_map}
        super().__init__(**values)

    def validate(self) -> None:
        self.require_int(1, 1_000_000, "audio_embed_dim")

    def audio_tokens(self, frames: int) -> int:
        """Tokens of `frames` frames of raw samples: one each."""
        return frames


class Gemma4UnifiedConfig(Gemma4Config):
    """The 12B: the text stack, and embedders in place of towers."""

    model_type: ClassVar[str] = "gemma4_unified"
    sub_configs: ClassVar[dict[str, type[PreTrainedConfig]]] = {
        "text_config": Gemma4UnifiedTextConfig,
        "vision_config": Gemma4UnifiedVisionConfig,
        "audio_config": Gemma4UnifiedAudioConfig,
    }


class Gemma4AssistantConfig(PreTrainedConfig):
    """A drafter: a few layers that read the target model's keys and values, all of them.

    Attributes:
        backbone_hidden_size: Width of the target model.
        use_ordered_embeddings: Score only the tokens of the best `centroid_intermediate_top_k` of `num_centroids`
            groups.
    """

    model_type: ClassVar[str] = "gemma4_assistant"
    sub_configs: ClassVar[dict[str, type[PreTrainedConfig]]] = {"text_config": Gemma4TextConfig}

    text_config: Any = None
    backbone_hidden_size: int = 1536
    use_ordered_embeddings: bool = False
    num_centroids: int = 2048
    centroid_intermediate_top_k: int = 32

    def __init__(self, **values: Any) -> None:
        kind = self.sub_configs["text_config"]
        text = values.get("text_config")
        if text is None or isinstance(text, dict):
            # The text stack's own defaults have per-layer embeddings, which a drafter never has.
            bare = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
            values["text_config"] = kind.from_dict({**bare, **(text or {})})
        super().__init__(**values)

    def validate(self) -> None:
        self.require_int(1, 1_000_000, "backbone_hidden_size", "num_centroids")
        self.require_int(1, self.num_centroids, "centroid_intermediate_top_k")
        text = self.text_config
        for name in ("hidden_size_per_layer_input", "vocab_size_per_layer_input", "enable_moe_block",
                     "use_double_wide_mlp"):  # fmt: skip
            if getattr(text, name):
                raise ConfigError(f"text_config.{name}={getattr(text, name)}: a drafter has none, 0 is needed.")
        text.num_kv_shared_layers = text.num_kv_shared_layers or text.num_hidden_layers
        if text.num_kv_shared_layers != text.num_hidden_layers:
            raise ConfigError(
                f"text_config.num_kv_shared_layers={text.num_kv_shared_layers}: a drafter's layers read the target's "
                f"keys, all {text.num_hidden_layers} of them (num_hidden_layers)."
            )
        if self.use_ordered_embeddings and text.vocab_size % self.num_centroids:
            raise ConfigError(
                f"text_config.vocab_size={text.vocab_size} cannot be split over num_centroids={self.num_centroids}."
            )


class Gemma4UnifiedAssistantConfig(Gemma4AssistantConfig):
    """The 12B's drafter."""

    model_type: ClassVar[str] = "gemma4_unified_assistant"
    sub_configs: ClassVar[dict[str, type[PreTrainedConfig]]] = {"text_config": Gemma4UnifiedTextConfig}

    backbone_hidden_size: int = 3840
