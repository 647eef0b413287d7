"""The doors that keras-hub's users know: `Backbone.from_preset("whisper_tiny_en")` and its like, in PyTorch.

A door hands out this package's own objects: a backbone is the family's model without a head, a converter is an
extractor with keras-hub's arguments. Only `WhisperBackbone` is a class of its own, for its inputs have other names and
another layout. Weights come from the hub, by the table in `base.presets`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from . import auto
from .base.errors import InputError, ShapeError
from .base.presets import PRESETS, FromPreset, checkpoint_of
from .feature_extraction import audio_converter as converters
from .models.gemma4.preprocessor import Gemma4CausalLMPreprocessor
from .models.whisper.config import WhisperConfig
from .models.whisper.modeling import WhisperModel

__all__ = [
    "PRESETS",
    "AudioConverter",
    "AudioToText",
    "Backbone",
    "CausalLM",
    "Gemma3nAudioConverter",
    "Gemma3nBackbone",
    "Gemma3nCausalLM",
    "Gemma3nImageConverter",
    "Gemma3nTokenizer",
    "Gemma4AssistantCausalLM",
    "Gemma4AudioConverter",
    "Gemma4Backbone",
    "Gemma4CausalLM",
    "Gemma4CausalLMPreprocessor",
    "Gemma4ImageConverter",
    "Gemma4Tokenizer",
    "Gemma4VideoConverter",
    "ImageConverter",
    "Tokenizer",
    "VideoConverter",
    "WhisperAudioConverter",
    "WhisperBackbone",
    "WhisperTokenizer",
]


class _Door(FromPreset):
    """A name of keras-hub behind which one of the Auto classes stands."""

    auto_class: ClassVar[str]

    def __init__(self) -> None:
        raise TypeError(f"{type(self).__name__} is not built directly: use {type(self).__name__}.from_preset(name).")

    @classmethod
    def from_preset(cls, preset: str | os.PathLike[str], load_weights: bool = True, **kwargs: Any) -> Any:
        """Load by a preset's name, a folder or a hub id.

        Args:
            preset: A preset's name, a folder or a hub id.
            load_weights: False gives a model its size and initial weights.
            **kwargs: Options of `from_pretrained`: dtype, device_map, revision, token, ...

        Raises:
            CheckpointNotFoundError: There is no such preset or checkpoint, or it is another family's.
        """
        name = checkpoint_of(preset, cls.families, **kwargs)
        loader = getattr(auto, cls.auto_class)
        if load_weights:
            return loader.from_pretrained(name, **kwargs)
        return loader.from_config(auto.AutoConfig.from_pretrained(name, **kwargs))


class Backbone(_Door):
    """A model without a head."""

    auto_class = "AutoModel"


class CausalLM(_Door):
    """A model that continues text, with whatever media it takes."""

    auto_class = "AutoModelForCausalLM"
    families: ClassVar[tuple[str, ...]] = ("gemma3n", "gemma4")


class AudioToText(_Door):
    """A model that writes what it hears."""

    auto_class = "AutoModelForSpeechSeq2Seq"
    families = ("whisper",)


class Tokenizer(_Door):
    """The tokenizer of a model."""

    auto_class = "AutoTokenizer"


class ImageConverter(_Door):
    """The image processor of a model."""

    auto_class = "AutoImageProcessor"
    families: ClassVar[tuple[str, ...]] = ("gemma3n", "gemma4")


class VideoConverter(_Door):
    """The video processor of a model."""

    auto_class = "AutoVideoProcessor"
    families: ClassVar[tuple[str, ...]] = ("gemma4",)


class Gemma3nBackbone(Backbone):
    """Gemma 3n without a head."""

    families = ("gemma3n",)


class Gemma3nCausalLM(CausalLM):
    """Gemma 3n."""

    families = ("gemma3n",)


class Gemma3nImageConverter(ImageConverter):
    """The image processor of Gemma 3n."""

    families = ("gemma3n",)


class Gemma3nTokenizer(Tokenizer):
    """The tokenizer of Gemma 3n."""

    families = ("gemma3n",)


class Gemma4Backbone(Backbone):
    """Gemma 4 without a head."""

    families = ("gemma4",)


class Gemma4CausalLM(CausalLM):
    """Gemma 4."""

    families = ("gemma4",)


class Gemma4AssistantCausalLM(Gemma4CausalLM):
    """A drafter of Gemma 4."""


class Gemma4ImageConverter(ImageConverter):
    """The image processor of Gemma 4."""

    families = ("gemma4",)


class Gemma4VideoConverter(VideoConverter):
    """The video processor of Gemma 4."""


class Gemma4Tokenizer(Tokenizer):
    """The tokenizer of Gemma 4."""

    families = ("gemma4",)


class WhisperTokenizer(Tokenizer):
    """The tokenizer of Whisper."""

    families = ("whisper",)


class AudioConverter(FromPreset):
    """The converter of a model's audio, with keras-hub's arguments; each family's own is a subclass of it."""

    kinds: ClassVar[dict[str, type[converters.AudioConverter]]] = {
        "whisper": converters.WhisperAudioConverter,
        "gemma3n": converters.Gemma3nAudioConverter,
        "gemma4": converters.Gemma4AudioConverter,
    }

    def __init__(self) -> None:
        raise TypeError("AudioConverter is not built directly: use AudioConverter.from_preset(name).")

    @classmethod
    def from_preset(cls, preset: str | os.PathLike[str], **overrides: Any) -> Any:
        """The converter of the preset's family, with the checkpoint's settings; constructor arguments override them.

        Raises:
            CheckpointNotFoundError: There is no such preset or checkpoint.
            InputError: The checkpoint's family is not known.
        """
        name = checkpoint_of(preset)
        family = PRESETS[str(preset)][0] if str(preset) in PRESETS else auto.AutoConfig.from_pretrained(name).model_type
        if family not in cls.kinds:
            raise InputError(
                f"{name!r} is of the family {family!r}; audio converters are there for {', '.join(cls.kinds)}."
            )
        return cls.kinds[family].from_preset(preset, **overrides)


WhisperAudioConverter = converters.WhisperAudioConverter
Gemma3nAudioConverter = converters.Gemma3nAudioConverter
Gemma4AudioConverter = converters.Gemma4AudioConverter


class WhisperBackbone(nn.Module, FromPreset):
    """Whisper's encoder and decoder without the head, with keras-hub's arguments and inputs.

    Args:
        vocabulary_size: Tokens.
        num_layers: Of the encoder, and of the decoder.
        num_heads: Of each layer's attention.
        hidden_dim: Width of the model.
        intermediate_dim: Width inside the feed-forward layers.
        num_mels: Mel bands.
        dropout: Share of numbers dropped in training.
        max_encoder_sequence_length: Most frames; the encoder has half as many positions.
        max_decoder_sequence_length: Most tokens.
        dtype: Type of the weights, "float32" or "bfloat16" for example.

    Attributes:
        model: The WhisperModel inside.
    """

    families: ClassVar[tuple[str, ...]] = ("whisper",)

    def __init__(
        self,
        vocabulary_size: int,
        num_layers: int,
        num_heads: int,
        hidden_dim: int,
        intermediate_dim: int,
        num_mels: int = 80,
        dropout: float = 0.0,
        max_encoder_sequence_length: int = 3000,
        max_decoder_sequence_length: int = 448,
        dtype: str | torch.dtype | None = None,
    ) -> None:
        config = WhisperConfig(
            vocab_size=vocabulary_size,
            encoder_layers=num_layers,
            decoder_layers=num_layers,
            encoder_attention_heads=num_heads,
            decoder_attention_heads=num_heads,
            d_model=hidden_dim,
            encoder_ffn_dim=intermediate_dim,
            decoder_ffn_dim=intermediate_dim,
            num_mel_bins=num_mels,
            dropout=dropout,
            max_source_positions=max_encoder_sequence_length // 2,
            max_target_positions=max_decoder_sequence_length,
        )
        wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        self._wrap(WhisperModel(config).to(wanted or torch.float32))

    def _wrap(self, model: WhisperModel) -> None:
        super().__init__()
        self.model = model

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> WhisperBackbone:
        """The backbone of a folder or hub id; options as for a model's `from_pretrained`."""
        backbone = cls.__new__(cls)
        backbone._wrap(WhisperModel.from_pretrained(pretrained_model_name_or_path, **kwargs))
        return backbone

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments.

        Raises:
            InputError: Encoder and decoder differ in depth, which these arguments cannot say (turbo, distilled models).
        """
        config = self.model.config
        if config.encoder_layers != config.decoder_layers:
            raise InputError(
                f"{config.encoder_layers} encoder layers and {config.decoder_layers} decoder layers cannot be one "
                "num_layers; use model.config."
            )
        return {
            "vocabulary_size": config.vocab_size,
            "num_layers": config.encoder_layers,
            "num_heads": config.encoder_attention_heads,
            "hidden_dim": config.d_model,
            "intermediate_dim": config.encoder_ffn_dim,
            "num_mels": config.num_mel_bins,
            "dropout": config.dropout,
            "max_encoder_sequence_length": 2 * config.max_source_positions,
            "max_decoder_sequence_length": config.max_target_positions,
        }

    def forward(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Encode features and read tokens.

        Args:
            inputs: encoder_features (batch, frames, num_mels), any number of frames up to the most;
                decoder_token_ids (batch, tokens); decoder_padding_mask (batch, tokens), 1 for tokens, or none.

        Returns:
            encoder_sequence_output (batch, frames / 2, hidden_dim) and decoder_sequence_output (batch, tokens,
            hidden_dim).

        Raises:
            ShapeError: The features have another shape.
            InputError: An input is missing.
        """
        missing = {"encoder_features", "decoder_token_ids"} - set(inputs)
        if missing:
            raise InputError(f"WhisperBackbone needs {', '.join(sorted(missing))}; got {', '.join(sorted(inputs))}.")
        weight = self.model.encoder.conv1.weight
        features = torch.as_tensor(inputs["encoder_features"], device=weight.device).to(weight.dtype)
        ids = torch.as_tensor(inputs["decoder_token_ids"], device=weight.device).long()
        mask = inputs.get("decoder_padding_mask")
        mask = None if mask is None else torch.as_tensor(mask, device=weight.device)
        encoded = self._encode(features)
        decoded = self.model.decoder(
            input_ids=ids, attention_mask=mask, encoder_hidden_states=encoded, use_cache=False
        ).last_hidden_state
        return {"encoder_sequence_output": encoded, "decoder_sequence_output": decoded}

    def _encode(self, features: Tensor) -> Tensor:
        """The encoder on any number of frames; the model's own call takes whole windows only."""
        encoder, config = self.model.encoder, self.model.config
        most = 2 * config.max_source_positions
        if features.dim() != 3 or features.shape[2] != config.num_mel_bins or not 2 <= features.shape[1] <= most:
            raise ShapeError(
                f"encoder_features of shape {tuple(features.shape)}: (batch, 2 to {most} frames, {config.num_mel_bins} "
                "mel bands) is needed."
            )
        hidden = functional.gelu(encoder.conv2(functional.gelu(encoder.conv1(features.transpose(1, 2))))).transpose(
            1, 2
        )
        hidden = hidden + encoder.embed_positions.weight[: hidden.shape[1]]
        hidden = functional.dropout(hidden, config.dropout, self.training)
        for layer in encoder.layers:
            hidden = layer(hidden, None, False)[0]
        result: Tensor = encoder.layer_norm(hidden)
        return result
