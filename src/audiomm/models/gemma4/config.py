"""Gemma 4's configurations: sizes, kinds of layers, and how many tokens a clip, an image or a video becomes.

Field names are those of the hub's files, in both spellings: files of early 2026 name the widths of full-attention
layers by two scalars (`global_head_dim`, `num_global_key_value_heads`), later ones by `per_layer_config`. Both are
read and both are written.
"""

from __future__ import annotations

import logging
from typing import Any, ClassVar

from ...base.config import PreTrainedConfig
from ...base.errors import ConfigError, InputError
from ...feature_extraction.image import grid_tokens

logger = logging.getLogger("audiomm.models.gemma4")

SLIDING, FULL = "sliding_attention", "full_attention"

#: One full-attention layer after this many sliding ones, where a file does not list its layers.
_SLIDING_PER_FULL = 5

_ROPE = {
    SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
}
_ROPE_TYPES = ("default", "proportional", "linear")


class Gemma4TextConfig(PreTrainedConfig):
    """The text stack: E2B and E4B (per-layer embeddings, shared keys), 26B-A4B (experts), 31B (dense).

    | size | layers | width | heads | key-value heads, sliding / full | shared | per-layer | experts | window |
    |---|---|---|---|---|---|---|---|---|
    | E2B | 35 | 1,536 | 8 | 1 / 1 | 20 | 256 | | 512 |
    | E4B | 42 | 2,560 | 8 | 2 / 2 | 18 | 256 | | 512 |
    | 12B | 48 | 3,840 | 16 | 8 / 1 | | | | 1,024 |
    | 26B-A4B | 30 | 2,816 | 16 | 8 / 2 | | | 128, 8 a token | 1,024 |
    | 31B | 60 | 5,376 | 32 | 16 / 4 | | | | 1,024 |

    Attributes:
        head_dim, num_key_value_heads: Of sliding layers, and of full ones where nothing else is said.
        global_head_dim, num_global_key_value_heads: Of full layers; the second counts only with `attention_k_eq_v`.
        per_layer_config: {layer: {"head_dim": ..., "num_key_value_heads": ...}}, the newer spelling; it wins.
        sliding_window: Tokens a sliding layer looks back, itself included.
        attention_k_eq_v: Full layers have no value projection; values come from the key projection.
        num_kv_shared_layers: So many last layers read the keys and values of the last layer of their kind before them.
        use_double_wide_mlp: Those layers have a feed-forward of twice `intermediate_size`.
        hidden_size_per_layer_input: Width of the per-layer embeddings; 0 is none.
        use_bidirectional_attention: None, or "vision": tokens of one image see each other in sliding layers.
    """

    model_type: ClassVar[str] = "gemma4_text"
    attribute_map: ClassVar[dict[str, str]] = {"expert_intermediate_size": "moe_intermediate_size"}

    vocab_size: int = 262_144
    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_hidden_layers: int = 30
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 256
    global_head_dim: int | None = 512
    num_global_key_value_heads: int | None = None
    per_layer_config: dict[str, dict[str, int]] | None = None
    hidden_activation: str = "gelu_pytorch_tanh"
    max_position_embeddings: int = 131_072
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 1
    bos_token_id: int | None = 2
    rope_parameters: dict[str, dict[str, Any]] | None = None
    attention_bias: bool = False
    attention_dropout: float = 0.0
    sliding_window: int = 512
    layer_types: list[str] | None = None
    final_logit_softcapping: float | None = None
    use_bidirectional_attention: str | None = None
    vocab_size_per_layer_input: int = 262_144
    hidden_size_per_layer_input: int = 256
    attention_k_eq_v: bool = False
    num_kv_shared_layers: int = 0
    enable_moe_block: bool = False
    use_double_wide_mlp: bool = False
    num_experts: int | None = None
    top_k_experts: int | None = None
    moe_intermediate_size: int | None = None

    def __init__(self, **values: Any) -> None:
        for alias, name in self.attribute_map.items():
            if name in values:
                values.pop(alias, None)
        layers = values.get("num_hidden_layers", type(self).num_hidden_layers)
        if isinstance(layers, int):
            values["layer_types"] = self._kinds(layers, values)
            values["per_layer_config"] = self._widths(layers, values)
        given = values.get("rope_parameters") or {}
        if isinstance(given, dict):
            values["rope_parameters"] = {kind: {**_ROPE[kind], **given.get(kind, {})} for kind in (SLIDING, FULL)}
        super().__init__(**values)
        self._write_scalars()

    @classmethod
    def _kinds(cls, layers: int, values: dict[str, Any]) -> list[str]:
        """The kind of every layer; the last one always sees everything."""
        kinds = values.get("layer_types")
        if kinds is None:
            pattern = values.get("sliding_window_pattern", values.get("_sliding_window_pattern"))
            period = pattern if isinstance(pattern, int) and pattern > 0 else _SLIDING_PER_FULL + 1
            kinds = [SLIDING if (index + 1) % period else FULL for index in range(layers)]
        kinds = list(kinds)
        if kinds and kinds[-1] != FULL:
            logger.warning("layer_types ends with %r; the last layer is made %r.", kinds[-1], FULL)
            kinds[-1] = FULL
        return kinds

    @classmethod
    def _widths(cls, layers: int, values: dict[str, Any]) -> dict[str, dict[str, int]]:
        """What single layers have of their own, by layer number as text, from either spelling."""
        digits = len(str(layers - 1))
        given = values.get("per_layer_config")
        if given is not None:
            return {f"{int(index):0{digits}d}": dict(own) for index, own in given.items()}
        own: dict[str, int] = {}
        head_dim = values.get("global_head_dim", cls.global_head_dim)
        heads = values.get("num_global_key_value_heads")
        if head_dim is not None:
            own["head_dim"] = head_dim
        if heads is not None and values.get("attention_k_eq_v", cls.attention_k_eq_v):
            own["num_key_value_heads"] = heads
        kinds = values["layer_types"]
        return {f"{index:0{digits}d}": dict(own) for index, kind in enumerate(kinds) if own and kind == FULL}

    def _write_scalars(self) -> None:
        """Make the older spelling say what the newer one does, as far as it can."""
        full = [index for index, kind in enumerate(self.layer_types or []) if kind == FULL]
        widths = {self.head_dim_of(index) for index in full}
        heads = {self.key_value_heads_of(index) for index in full}
        self.global_head_dim = widths.pop() if len(widths) == 1 else None
        if self.attention_k_eq_v:
            self.num_global_key_value_heads = heads.pop() if len(heads) == 1 else None

    def validate(self) -> None:
        self.require_int(1, 10_000_000, "vocab_size")
        self.require_int(1, 1_000_000, "hidden_size", "intermediate_size", "sliding_window")
        self.require_int(1, 1_024, "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        self.require_int(2, 16_384, "head_dim")
        self.require_int(1, 100_000_000, "max_position_embeddings")
        self.require_int(0, 10_000_000, "vocab_size_per_layer_input")
        self.require_int(0, 65_536, "hidden_size_per_layer_input")
        self.require_int(0, self.num_hidden_layers, "num_kv_shared_layers")
        self.require_fraction("attention_dropout")
        kinds = self.layer_types or []
        if len(kinds) != self.num_hidden_layers or not set(kinds) <= {SLIDING, FULL}:
            raise ConfigError(
                f"layer_types has {len(kinds)} entries of {', '.join(sorted(set(map(str, kinds))))}; needed are "
                f"{self.num_hidden_layers} (num_hidden_layers), each {SLIDING!r} or {FULL!r}."
            )
        self._validate_widths()
        self._validate_kinds()
        if self.enable_moe_block:
            self.require_int(1, 65_536, "num_experts", "moe_intermediate_size")
            self.require_int(1, self.num_experts or 1, "top_k_experts")

    def _validate_widths(self) -> None:
        accepted = {"head_dim", "num_key_value_heads"}
        for index, own in (self.per_layer_config or {}).items():
            if int(index) >= self.num_hidden_layers or not set(own) <= accepted:
                raise ConfigError(
                    f"per_layer_config[{index!r}]={own}: accepted are layers below {self.num_hidden_layers} with "
                    f"{' and '.join(sorted(accepted))}."
                )
        for layer in range(self.num_hidden_layers):
            width, heads = self.head_dim_of(layer), self.key_value_heads_of(layer)
            if not isinstance(width, int) or width < 2 or width % 2:
                raise ConfigError(f"head_dim={width!r} of layer {layer}: an even number is needed.")
            if not isinstance(heads, int) or heads < 1 or self.num_attention_heads % heads:
                raise ConfigError(
                    f"num_attention_heads={self.num_attention_heads} cannot be shared out over "
                    f"num_key_value_heads={heads!r} of layer {layer}."
                )

    def _validate_kinds(self) -> None:
        if self.hidden_activation != "gelu_pytorch_tanh":
            raise ConfigError(f"hidden_activation={self.hidden_activation!r}: accepted is 'gelu_pytorch_tanh'.")
        if self.use_bidirectional_attention not in (None, "vision"):
            raise ConfigError(
                f"use_bidirectional_attention={self.use_bidirectional_attention!r}: accepted are None and 'vision'."
            )
        for kind, rope in (self.rope_parameters or {}).items():
            if rope.get("rope_type") not in _ROPE_TYPES:
                raise ConfigError(
                    f"rope_parameters[{kind!r}]['rope_type']={rope.get('rope_type')!r}: accepted are "
                    f"{', '.join(_ROPE_TYPES)}."
                )
        if 0 < self.first_shared_layer < self.num_hidden_layers:
            own = set(self.layer_types[: self.first_shared_layer])  # type: ignore[index]
            alone = set(self.layer_types[self.first_shared_layer :]) - own  # type: ignore[index]
            if alone:
                raise ConfigError(
                    f"num_kv_shared_layers={self.num_kv_shared_layers}: no layer below {self.first_shared_layer} is of "
                    f"kind {alone.pop()}, whose keys and values the last layers could read."
                )

    # ------------------------------------------------------------------ facts of single layers

    @property
    def first_shared_layer(self) -> int:
        """From this layer on, keys and values are those of an earlier layer."""
        return self.num_hidden_layers - self.num_kv_shared_layers

    def head_dim_of(self, layer: int) -> int:
        return self._own(layer).get("head_dim", self.head_dim)

    def key_value_heads_of(self, layer: int) -> int:
        return self._own(layer).get("num_key_value_heads", self.num_key_value_heads)

    def _own(self, layer: int) -> dict[str, int]:
        digits = len(str(self.num_hidden_layers - 1))
        return (self.per_layer_config or {}).get(f"{layer:0{digits}d}", {})

    def kind_of(self, layer: int) -> str:
        """What the layer looks at: "sliding_attention" or "full_attention"."""
        return self.layer_types[layer]  # type: ignore[index]

    def last_of(self, kind: str) -> int:
        """The last layer of a kind."""
        return max(index for index in range(self.num_hidden_layers) if self.kind_of(index) == kind)

    def window_of(self, layer: int) -> int | None:
        """Tokens the layer looks back, itself included; None is all."""
        return self.sliding_window if self.kind_of(layer) == SLIDING else None

    def intermediate_size_of(self, layer: int) -> int:
        wide = self.use_double_wide_mlp and layer >= self.first_shared_layer > 0
        return self.intermediate_size * (2 if wide else 1)

    def key_value_source(self, layer: int) -> int:
        """The layer whose keys and values this one reads: itself, or the last of its kind that has its own."""
        first = self.first_shared_layer
        if layer < first:
            return layer
        return max(index for index in range(first) if self.kind_of(index) == self.kind_of(layer))


class Gemma4VisionConfig(PreTrainedConfig):
    """The picture tower; defaults are E2B's and E4B's, save that theirs clips its linear layers."""

    model_type: ClassVar[str] = "gemma4_vision"

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 16
    num_attention_heads: int = 12
    num_key_value_heads: int = 12
    head_dim: int = 64
    hidden_activation: str = "gelu_pytorch_tanh"
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 131_072
    attention_bias: bool = False
    attention_dropout: float = 0.0
    rope_parameters: dict[str, Any] | None = None
    pooling_kernel_size: int = 3
    patch_size: int = 16
    position_embedding_size: int = 10_240
    use_clipped_linears: bool = False
    standardize: bool = False
    initializer_range: float = 0.02

    def __init__(self, **values: Any) -> None:
        given = values.get("rope_parameters") or {}
        values["rope_parameters"] = {"rope_type": "axial", "rope_theta": values.pop("rope_theta", 100.0), **given}
        super().__init__(**values)

    def validate(self) -> None:
        self.require_int(1, 65_536, "hidden_size", "intermediate_size", "head_dim", "position_embedding_size")
        self.require_int(1, 1_024, "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "patch_size",
                         "pooling_kernel_size")  # fmt: skip
        self.require_fraction("attention_dropout")
        if self.head_dim % 4:
            raise ConfigError(f"head_dim={self.head_dim}: a multiple of 4 is needed, half a head for each axis.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads={self.num_attention_heads} cannot be shared out over "
                f"num_key_value_heads={self.num_key_value_heads}."
            )
        if self.hidden_activation != "gelu_pytorch_tanh":
            raise ConfigError(f"hidden_activation={self.hidden_activation!r}: accepted is 'gelu_pytorch_tanh'.")

    def image_tokens(self, height: int, width: int) -> int:
        """Tokens of a resized image, height and width in pixels.

        Raises:
            InputError: A side is not a multiple of `patch_size` times `pooling_kernel_size`.
        """
        return grid_tokens(height, width, self.patch_size * self.pooling_kernel_size)


class Gemma4AudioConfig(PreTrainedConfig):
    """The conformer of E2B and E4B; the defaults are theirs."""

    model_type: ClassVar[str] = "gemma4_audio"

    hidden_size: int = 1024
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    hidden_act: str = "silu"
    subsampling_conv_channels: list[int] | tuple[int, ...] = (128, 32)
    conv_kernel_size: int = 5
    residual_weight: float = 0.5
    attention_chunk_size: int = 12
    attention_context_left: int = 13
    attention_context_right: int = 0
    attention_logit_cap: float = 50.0
    attention_invalid_logits_value: float = -1e9
    use_clipped_linears: bool = True
    rms_norm_eps: float = 1e-6
    gradient_clipping: float = 1e10
    output_proj_dims: int = 1536
    initializer_range: float = 0.02

    def validate(self) -> None:
        self.subsampling_conv_channels = list(self.subsampling_conv_channels)
        self.require_int(1, 65_536, "hidden_size", "output_proj_dims")
        self.require_int(1, 1_024, "num_hidden_layers", "num_attention_heads", "conv_kernel_size",
                         "attention_chunk_size", "attention_context_left")  # fmt: skip
        self.require_int(0, 1_024, "attention_context_right")
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"hidden_size={self.hidden_size} cannot be split over num_attention_heads={self.num_attention_heads}."
            )
        if len(self.subsampling_conv_channels) != 2:
            raise ConfigError(f"subsampling_conv_channels={self.subsampling_conv_channels}: two numbers are needed.")
        if self.hidden_act != "silu":
            raise ConfigError(f"hidden_act={self.hidden_act!r}: accepted is 'silu'.")

    def audio_tokens(self, frames: int) -> int:
        """Tokens of `frames` log-mel frames: two convolutions of stride 2, 40 ms a token."""
        return ((frames + 1) // 2 + 1) // 2


class Gemma4Config(PreTrainedConfig):
    """Text stack, towers and the ids of the media marks.

    Attributes:
        vision_config: None for a model without pictures.
        audio_config: None for a model without sound (26B-A4B, 31B).
        boi_token_id, eoi_token_id, boa_token_id, eoa_token_index: Marks around an image and a clip.
        image_token_id, video_token_id, audio_token_id: The placeholders that features replace.
    """

    model_type: ClassVar[str] = "gemma4"
    sub_configs: ClassVar[dict[str, type[PreTrainedConfig]]] = {
        "text_config": Gemma4TextConfig,
        "vision_config": Gemma4VisionConfig,
        "audio_config": Gemma4AudioConfig,
    }
    optional_configs: ClassVar[frozenset[str]] = frozenset(("vision_config", "audio_config"))
    attribute_map: ClassVar[dict[str, str]] = {"eoa_token_id": "eoa_token_index"}

    text_config: Any = None
    vision_config: Any = None
    audio_config: Any = None
    boi_token_id: int = 255_999
    eoi_token_id: int = 258_882
    image_token_id: int = 258_880
    video_token_id: int = 258_884
    boa_token_id: int = 256_000
    eoa_token_index: int = 258_883
    audio_token_id: int = 258_881
    initializer_range: float = 0.02

    def __init__(self, **values: Any) -> None:
        if "eoa_token_index" in values:
            values.pop("eoa_token_id", None)
        super().__init__(**values)

    def audio_tokens(self, frames: int) -> int:
        """Tokens of a clip of `frames` feature frames.

        Raises:
            InputError: The model has no audio part.
        """
        return int(self._part("audio_config", "sound").audio_tokens(frames))

    def image_tokens(self, height: int, width: int) -> int:
        """Tokens of an image resized to `height` x `width` pixels.

        Raises:
            InputError: The model has no vision part, or a side is not a multiple of the pooled patch.
        """
        return int(self._part("vision_config", "pictures").image_tokens(height, width))

    def video_tokens(self, frames: int, height: int, width: int) -> int:
        """Tokens of a video of `frames` frames resized to `height` x `width` pixels, time stamps not counted."""
        return frames * self.image_tokens(height, width)

    def _part(self, name: str, media: str) -> Any:
        part = getattr(self, name)
        if part is None:
            raise InputError(f"this model takes no {media}: its {name} is null.")
        return part
