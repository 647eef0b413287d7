"""The configurations of Gemma 3n: text decoder, audio encoder, vision encoder, and the three together.

Field names and defaults are those of the hub's files; older spellings of the rotary fields are read and written anew.
Sources: the model card of Gemma 3n; "Matryoshka Transformer", arXiv:2310.07707; AltUp, arXiv:2301.13310; LAuReL,
arXiv:2411.07501.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from ...base.config import PreTrainedConfig
from ...base.errors import ConfigError

SLIDING, FULL = "sliding_attention", "full_attention"

#: Every so many layers one attends to everything.
_LAYERS_PER_FULL = 5
#: Stands for a nested configuration that was not given, where None means to go without.
_FULL = object()
#: So many layers at the bottom are sparse, in models that have more.
_SPARSE_LAYERS = 10


class Gemma3nTextConfig(PreTrainedConfig):
    """Sizes and switches of the text decoder; the defaults are those of E4B.

    | size | layers | intermediate_size | num_kv_shared_layers | parameters, with audio and vision |
    |---|---|---|---|---|
    | E2B | 30 | 8,192 | 10 | 5.44 billion |
    | E4B | 35 | 16,384 | 15 | 7.85 billion |

    `intermediate_size` and `activation_sparsity_pattern` may be one number for all layers or one for each; they are
    kept as lists. `rope_theta`, `rope_local_base_freq` and `rope_scaling` of older files become `rope_parameters`.
    """

    model_type: ClassVar[str] = "gemma3n_text"
    default_theta: ClassVar[dict[str, float]] = {"global": 1_000_000.0, "local": 10_000.0}

    vocab_size: int = 262_400
    hidden_size: int = 2048
    intermediate_size: Any = 16_384
    num_hidden_layers: int = 35
    num_attention_heads: int = 8
    num_key_value_heads: int = 2
    head_dim: int = 256
    hidden_activation: str = "gelu_pytorch_tanh"
    max_position_embeddings: int = 32_768
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 1
    bos_token_id: int | None = 2
    rope_parameters: Any = None
    attention_bias: bool = False
    attention_dropout: float = 0.0
    sliding_window: int = 512
    layer_types: Any = None
    final_logit_softcapping: float | None = 30.0
    vocab_size_per_layer_input: int = 262_144
    hidden_size_per_layer_input: int = 256
    altup_active_idx: int = 0
    altup_coef_clip: float | None = 120.0
    altup_correct_scale: bool = True
    altup_num_inputs: int = 4
    num_kv_shared_layers: int = 15
    laurel_rank: int = 64
    activation_sparsity_pattern: Any = None

    def __init__(self, **values: Any) -> None:
        values = dict(values)
        values["rope_parameters"] = self._rotary(values)
        count = values.get("num_hidden_layers", type(self).num_hidden_layers)
        if isinstance(count, int):
            self._fill_per_layer(values, count)
        super().__init__(**values)

    @classmethod
    def _rotary(cls, values: dict[str, Any]) -> dict[str, Any]:
        """{kind of layer: {"rope_type", "rope_theta", ...}} from the new field or the three older ones."""
        given = values.get("rope_parameters") or {}
        scaling = values.pop("rope_scaling", None) or {}
        thetas = {
            FULL: values.pop("rope_theta", cls.default_theta["global"]),
            SLIDING: values.pop("rope_local_base_freq", cls.default_theta["local"]),
        }
        unknown = set(given) - set(thetas)
        if unknown:
            raise ConfigError(
                f"rope_parameters has an entry {min(map(str, unknown))!r}: accepted are {SLIDING!r} and {FULL!r}."
            )
        parameters = {}
        for kind, theta in thetas.items():
            entry = {"rope_type": "default", "rope_theta": theta, **(given.get(kind) or {})}
            if kind == FULL:
                entry |= scaling
            entry["rope_type"] = entry.pop("type", entry["rope_type"])
            parameters[kind] = entry
        return parameters

    @classmethod
    def _fill_per_layer(cls, values: dict[str, Any], count: int) -> None:
        """Give every layer its entry in the fields that are lists."""
        size = values.get("intermediate_size", cls.intermediate_size)
        values["intermediate_size"] = [size] * count if isinstance(size, int) else size
        if values.get("layer_types") is None:
            values["layer_types"] = [FULL if (i + 1) % _LAYERS_PER_FULL == 0 else SLIDING for i in range(count)]
        pattern = values.get("activation_sparsity_pattern")
        if pattern is None:
            sparse = _SPARSE_LAYERS if count > _SPARSE_LAYERS else 0
            pattern = [0.95] * sparse + [0.0] * (count - sparse)
        values["activation_sparsity_pattern"] = [pattern] * count if isinstance(pattern, int | float) else pattern

    def validate(self) -> None:
        self.require_int(1, 10_000_000, "vocab_size", "vocab_size_per_layer_input", "max_position_embeddings",
                         "sliding_window")  # fmt: skip
        self.require_int(1, 1_000_000, "hidden_size", "head_dim", "hidden_size_per_layer_input", "laurel_rank")
        self.require_int(1, 1_024, "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        self.require_int(1, 64, "altup_num_inputs")
        self.require_int(0, self.altup_num_inputs - 1, "altup_active_idx")
        self.require_int(0, self.num_hidden_layers, "num_kv_shared_layers")
        self.require_fraction("attention_dropout")
        for fields in (("hidden_size", "num_attention_heads"), ("num_attention_heads", "num_key_value_heads")):
            whole, part = (getattr(self, name) for name in fields)
            if whole % part:
                raise ConfigError(f"{fields[0]}={whole} is no multiple of {fields[1]}={part}.")
        if self.head_dim % 2:
            raise ConfigError(f"head_dim={self.head_dim}: an even number is needed for the rotary embedding.")
        if self.hidden_activation != "gelu_pytorch_tanh":
            raise ConfigError(f"hidden_activation={self.hidden_activation!r}: accepted is 'gelu_pytorch_tanh'.")
        self._validate_per_layer()
        self._validate_rotary()

    def _validate_per_layer(self) -> None:
        count = self.num_hidden_layers
        for name in ("intermediate_size", "layer_types", "activation_sparsity_pattern"):
            entries = getattr(self, name)
            if not isinstance(entries, list | tuple) or len(entries) != count:
                given = f"{len(entries)} entries" if isinstance(entries, list | tuple) else repr(entries)
                raise ConfigError(
                    f"{name} has {given}; num_hidden_layers={count} asks for {count}, one a layer, or one number."
                )
            setattr(self, name, list(entries))
        for size in self.intermediate_size:
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ConfigError(f"intermediate_size holds {size!r}: accepted are whole numbers from 1.")
        for share in self.activation_sparsity_pattern:
            if not isinstance(share, int | float) or not 0.0 <= share < 1.0:
                raise ConfigError(
                    f"activation_sparsity_pattern holds {share!r}: accepted are numbers from 0 to below 1."
                )
        for kind in self.layer_types:
            if kind not in (SLIDING, FULL):
                raise ConfigError(f"layer_types holds {kind!r}: accepted are {SLIDING!r} and {FULL!r}.")
        orphans = set(self.layer_types) - set(self.layer_types[: self.first_shared_layer])
        if orphans:
            raise ConfigError(
                f"num_kv_shared_layers={self.num_kv_shared_layers} of {count} layers read the keys of an earlier layer "
                f"of their kind, but there is no earlier {min(orphans)} layer: share fewer layers."
            )

    def _validate_rotary(self) -> None:
        for kind, entry in self.rope_parameters.items():
            if entry["rope_type"] not in ("default", "linear"):
                raise ConfigError(
                    f"rope_parameters[{kind!r}] is of rope_type={entry['rope_type']!r}: accepted are 'default' and "
                    "'linear', which is what Gemma 3n was trained with or can be stretched by."
                )
            for name in ("rope_theta", *(("factor",) if entry["rope_type"] == "linear" else ())):
                value = entry.get(name)
                if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
                    raise ConfigError(f"rope_parameters[{kind!r}][{name!r}]={value!r}: a number above 0 is needed.")

    @property
    def first_shared_layer(self) -> int:
        """Index of the first layer that reads another's keys and values; the number of layers when none does."""
        return self.num_hidden_layers - self.num_kv_shared_layers

    def kv_source(self, layer: int) -> int:
        """The layer whose keys and values `layer` reads: itself, or the last of its kind that still has its own."""
        if layer < self.first_shared_layer:
            return layer
        own = self.layer_types[: self.first_shared_layer]
        return len(own) - 1 - own[::-1].index(self.layer_types[layer])

    @property
    def kv_sharing_modes(self) -> list[str | None]:
        """For each layer "store" (later layers read its keys), "reuse" (it reads those) or None."""
        if not self.num_kv_shared_layers:
            return [None] * self.num_hidden_layers
        own = self.layer_types[: self.first_shared_layer]
        stored = {len(own) - 1 - own[::-1].index(kind) for kind in set(own)}
        modes: list[str | None] = ["store" if i in stored else None for i in range(self.first_shared_layer)]
        return modes + ["reuse"] * self.num_kv_shared_layers

    def window(self, layer: int) -> int | None:
        """How many tokens back a layer looks, itself included; None is all of them."""
        return self.sliding_window if self.layer_types[layer] == SLIDING else None


class Gemma3nAudioConfig(PreTrainedConfig):
    """Sizes of the audio encoder (a conformer over log-mel frames); the same in every published size."""

    model_type: ClassVar[str] = "gemma3n_audio"

    vocab_size: int = 128
    vocab_offset: int = 262_272
    input_feat_size: int = 128
    hidden_size: int = 1536
    rms_norm_eps: float = 1e-6
    gradient_clipping: float = 1e10
    conf_attention_chunk_size: int = 12
    conf_attention_context_left: int = 13
    conf_attention_context_right: int = 0
    conf_attention_logit_cap: float = 50.0
    conf_num_attention_heads: int = 8
    conf_num_hidden_layers: int = 12
    conf_conv_kernel_size: int = 5
    conf_reduction_factor: int = 4
    conf_residual_weight: float = 0.5
    sscp_conv_channel_size: Any = (128, 32)
    sscp_conv_group_norm_eps: float = 1e-3
    sscp_conv_kernel_size: Any = ((3, 3), (3, 3))
    sscp_conv_stride_size: Any = ((2, 2), (2, 2))
    initializer_range: float = 0.02

    def validate(self) -> None:
        self.require_int(1, 1_000_000, "vocab_size", "input_feat_size", "hidden_size", "conf_num_attention_heads",
                         "conf_attention_chunk_size", "conf_attention_context_left", "conf_num_hidden_layers",
                         "conf_conv_kernel_size", "conf_reduction_factor")  # fmt: skip
        self.require_int(0, 1_000_000, "conf_attention_context_right")
        if self.hidden_size % self.conf_num_attention_heads:
            raise ConfigError(
                f"hidden_size={self.hidden_size} cannot be split over "
                f"conf_num_attention_heads={self.conf_num_attention_heads} heads."
            )
        lengths = {
            name: len(getattr(self, name))
            for name in ("sscp_conv_channel_size", "sscp_conv_kernel_size", "sscp_conv_stride_size")
        }
        if set(lengths.values()) != {2}:
            found = ", ".join(f"{name} has {length}" for name, length in lengths.items())
            raise ConfigError(f"the subsampling has two convolutions, so two entries each are needed: {found}.")
        # As a file would give them, so that a config equals itself after saving and loading.
        self.sscp_conv_channel_size = list(self.sscp_conv_channel_size)
        self.sscp_conv_kernel_size = [list(sizes) for sizes in self.sscp_conv_kernel_size]
        self.sscp_conv_stride_size = [list(sizes) for sizes in self.sscp_conv_stride_size]

    @property
    def frames_per_token(self) -> int:
        """Log-mel frames that become one soft token: 16, or 160 ms, in every published model."""
        (first, _), (second, _) = self.sscp_conv_stride_size
        return int(first) * int(second) * self.conf_reduction_factor

    def audio_tokens(self, frames: int) -> int:
        """Soft tokens that carry sound, of a clip of so many log-mel frames; the place in a prompt is always whole."""
        return -(-frames // self.frames_per_token)


class Gemma3nVisionConfig(PreTrainedConfig):
    """Sizes of the vision encoder: MobileNetV5, told by its name, or by stages of one's own in `model_args`.

    `label_names` and `num_classes` of transformers' files are kept and have no effect.
    """

    model_type: ClassVar[str] = "gemma3n_vision"

    architecture: str = "mobilenetv5_300m_enc"
    initializer_range: float = 0.02
    do_pooling: bool = False
    model_args: dict[str, Any] | None = None
    hidden_size: int = 2048
    vocab_size: int = 128
    vocab_offset: int = 262_144
    rms_norm_eps: float = 1e-6

    def validate(self) -> None:
        self.require_int(1, 1_000_000, "hidden_size", "vocab_size")
        if self.architecture != "mobilenetv5_300m_enc":
            raise ConfigError(f"architecture={self.architecture!r}: accepted is 'mobilenetv5_300m_enc'.")


class Gemma3nConfig(PreTrainedConfig):
    """A Gemma 3n that reads text, sees pictures and listens.

    Attributes:
        vision_config, audio_config: None for a model without that tower; default sizes when not given at all.
        audio_soft_tokens_per_image: Places that a clip takes in the prompt (the name is historical).
        vision_soft_tokens_per_image: Places that a picture takes in the prompt.
        boi_token_id, image_token_id, eoi_token_id: Begin, place and end of a picture.
        boa_token_id, audio_token_id, eoa_token_id: Begin, place and end of a clip.
    """

    model_type: ClassVar[str] = "gemma3n"
    sub_configs: ClassVar[dict[str, type[PreTrainedConfig]]] = {
        "text_config": Gemma3nTextConfig,
        "vision_config": Gemma3nVisionConfig,
        "audio_config": Gemma3nAudioConfig,
    }
    optional_configs: ClassVar[frozenset[str]] = frozenset({"vision_config", "audio_config"})

    text_config: Any = None
    vision_config: Any = None
    audio_config: Any = None
    audio_soft_tokens_per_image: int = 188
    vision_soft_tokens_per_image: int = 256
    boi_token_id: int | None = 255_999
    eoi_token_id: int | None = 262_144
    image_token_id: int | None = 262_145
    boa_token_id: int | None = 256_000
    eoa_token_id: int | None = 262_272
    audio_token_id: int | None = 262_273
    initializer_range: float = 0.02
    use_cache: bool = True

    def __init__(
        self, text_config: Any = None, vision_config: Any = _FULL, audio_config: Any = _FULL, **values: Any
    ) -> None:
        for name, part in (("vision_config", vision_config), ("audio_config", audio_config)):
            values[name] = {} if part is _FULL else part
        super().__init__(text_config=text_config, **values)

    def validate(self) -> None:
        self.require_int(1, 100_000, "audio_soft_tokens_per_image", "vision_soft_tokens_per_image")

    def image_tokens(self) -> int:
        """Places that a picture takes in the prompt, whatever its size."""
        return self.vision_soft_tokens_per_image

    def audio_tokens(self) -> int:
        """Places that a clip takes in the prompt, whatever its length; shorter clips are filled up."""
        return self.audio_soft_tokens_per_image

    @property
    def modalities(self) -> tuple[str, ...]:
        """What the model takes in: "text", and "image" and "audio" where it has the tower."""
        towers = {"image": self.vision_config, "audio": self.audio_config}
        return ("text", *(name for name, part in towers.items() if part is not None))

    def restrict(self, modalities: Sequence[str]) -> None:
        """Go without the towers that `modalities` does not name.

        Raises:
            ConfigError: A name is none of those the model takes in, or "text" is missing.
        """
        unknown = [name for name in modalities if name not in self.modalities]
        if unknown or "text" not in modalities or isinstance(modalities, str):
            raise ConfigError(
                f"modalities={modalities!r}: accepted are lists of {', '.join(map(repr, self.modalities))}, with "
                "'text' among them."
            )
        self.vision_config = self.vision_config if "image" in modalities else None
        self.audio_config = self.audio_config if "audio" in modalities else None

    def max_audio_frames(self) -> int:
        """Longest clip, in log-mel frames, whose tokens fit its places: 3,008, thirty seconds, as published."""
        return int(self.audio_soft_tokens_per_image * self.audio_config.frames_per_token)
