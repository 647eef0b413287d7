"""WhisperConfig: the sizes of a Whisper model, and the fixed relations between frames, positions and seconds.

Source: "Robust Speech Recognition via Large-Scale Weak Supervision", arXiv:2212.04356; field names of the hub's files.
"""

from __future__ import annotations

from typing import ClassVar

from ...base.config import PreTrainedConfig
from ...base.errors import ConfigError

#: Log-mel frames per encoder position: the second convolution has stride 2.
FRAMES_PER_POSITION = 2
#: Log-mel frames per second: hop of 160 samples at 16 kHz.
FRAMES_PER_SECOND = 100

ACTIVATIONS = (
    "gelu", "gelu_new", "gelu_fast", "gelu_python", "gelu_pytorch_tanh", "quick_gelu", "relu", "relu2", "relu6",
    "leaky_relu", "silu", "swish", "mish", "sigmoid", "tanh", "linear",
)  # fmt: skip


class WhisperConfig(PreTrainedConfig):
    """Sizes and switches of a Whisper model; the defaults are whisper-tiny.

    | size | d_model | layers | heads | mels | vocabulary | parameters |
    |---|---|---|---|---|---|---|
    | tiny | 384 | 4 + 4 | 6 | 80 | 51,865 | 37.8 M |
    | base | 512 | 6 + 6 | 8 | 80 | 51,865 | 72.6 M |
    | small | 768 | 12 + 12 | 12 | 80 | 51,865 | 241.7 M |
    | medium | 1,024 | 24 + 24 | 16 | 80 | 51,865 | 763.9 M |
    | large-v2 | 1,280 | 32 + 32 | 20 | 80 | 51,865 | 1,543.3 M |
    | large-v3 | 1,280 | 32 + 32 | 20 | 128 | 51,866 | 1,543.5 M |
    | large-v3-turbo | 1,280 | 32 + 4 | 20 | 128 | 51,866 | 808.9 M |

    English-only sizes have a vocabulary of 51,864. Special token ids that are not given follow from `vocab_size`;
    for a vocabulary of another size they are those of the multilingual models.
    """

    model_type: ClassVar[str] = "whisper"
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model",
        "num_hidden_layers": "encoder_layers",
        "num_attention_heads": "encoder_attention_heads",
        "num_key_value_heads": "encoder_attention_heads",
    }

    vocab_size: int = 51865
    num_mel_bins: int = 80
    d_model: int = 384
    encoder_layers: int = 4
    encoder_attention_heads: int = 6
    encoder_ffn_dim: int = 1536
    encoder_layerdrop: float = 0.0
    decoder_layers: int = 4
    decoder_attention_heads: int = 6
    decoder_ffn_dim: int = 1536
    decoder_layerdrop: float = 0.0
    activation_function: str = "gelu"
    dropout: float = 0.0
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    init_std: float = 0.02
    scale_embedding: bool = False
    max_source_positions: int = 1500
    max_target_positions: int = 448
    use_cache: bool = True
    is_encoder_decoder: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    decoder_start_token_id: int | None = None
    suppress_tokens: list[int] | None = None
    begin_suppress_tokens: list[int] | None = None
    use_weighted_layer_sum: bool = False
    classifier_proj_size: int = 256
    apply_spec_augment: bool = False
    mask_time_prob: float = 0.05
    mask_time_length: int = 10
    mask_time_min_masks: int = 2
    mask_feature_prob: float = 0.0
    mask_feature_length: int = 10
    mask_feature_min_masks: int = 0
    median_filter_width: int = 7

    def __init__(self, **values: object) -> None:
        # Files carry num_hidden_layers beside encoder_layers; the specific name wins.
        for alias, name in self.attribute_map.items():
            if name in values:
                values.pop(alias, None)
            elif alias in values:
                values[name] = values.pop(alias)
        super().__init__(**values)
        english_only = self.vocab_size == 51864
        end = 50256 if english_only else 50257
        ids = {"pad_token_id": end, "bos_token_id": end, "eos_token_id": end, "decoder_start_token_id": end + 1}
        for name, value in ids.items():
            if getattr(self, name) is None and name not in values:
                setattr(self, name, value)
        if self.begin_suppress_tokens is None and "begin_suppress_tokens" not in values:
            self.begin_suppress_tokens = [220, end]

    def validate(self) -> None:
        self.require_int(1, 10_000_000, "vocab_size")
        self.require_int(1, 4_096, "num_mel_bins")
        self.require_int(1, 65_536, "d_model", "encoder_ffn_dim", "decoder_ffn_dim", "classifier_proj_size")
        self.require_int(1, 256, "encoder_layers", "decoder_layers")
        self.require_int(1, 1_024, "encoder_attention_heads", "decoder_attention_heads")
        self.require_int(1, 1_000_000, "max_source_positions", "max_target_positions", "mask_time_length",
                         "mask_feature_length", "median_filter_width")  # fmt: skip
        self.require_fraction("dropout", "attention_dropout", "activation_dropout", "encoder_layerdrop",
                              "decoder_layerdrop", "mask_time_prob", "mask_feature_prob")  # fmt: skip
        for heads in ("encoder_attention_heads", "decoder_attention_heads"):
            if self.d_model % getattr(self, heads):
                raise ConfigError(f"d_model={self.d_model} cannot be split over {heads}={getattr(self, heads)} heads.")
        if self.d_model % 2:
            raise ConfigError(f"d_model={self.d_model}: an even number is needed for the sinusoidal positions.")
        if self.activation_function not in ACTIVATIONS:
            raise ConfigError(
                f"activation_function={self.activation_function!r}: accepted are {', '.join(ACTIVATIONS)}."
            )
        if self.median_filter_width % 2 == 0:
            raise ConfigError(f"median_filter_width={self.median_filter_width}: an odd number is needed.")

    @property
    def window_frames(self) -> int:
        """Log-mel frames of one window: 3,000, thirty seconds, in every published model."""
        return FRAMES_PER_POSITION * self.max_source_positions
