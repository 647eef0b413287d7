"""What passes between the transcription loop and the model: windows, encoder outputs, and a probe for silence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...base.outputs import BaseModelOutput
from ...generation import GenerationConfig
from .config import WhisperConfig


@dataclass
class NoSpeechProbe:
    """Asks prefill for the probability of <|nospeech|> right after <|startoftranscript|>, from the raw logits."""

    token: int
    places_from_end: int
    probability: Tensor | None = None


class Transcriber(Protocol):
    """What the loop asks of the model, besides what `generation.Decoder` asks."""

    config: WhisperConfig
    proj_out: nn.Linear

    @property
    def device(self) -> torch.device:
        """Where the model is."""

    def get_encoder(self) -> Any:
        """The encoder: windows (batch, mel bins, frames) to hidden states."""

    def get_decoder(self) -> Any:
        """The decoder: token ids and the encoder's output to hidden states."""

    def detect_language(
        self, *, encoder_outputs: Any, generation_config: GenerationConfig, return_probabilities: bool
    ) -> Any:
        """(batch,) language tokens, and with `return_probabilities` also {code: probability} for each."""


def fit_window(features: Tensor, frames: int) -> Tensor:
    """Features (batch, mel bins, any) cut or padded at the right with 0.0 to `frames`, as OpenAI's transcribe pads."""
    features = features[:, :, :frames]
    return functional.pad(features, (0, frames - features.shape[-1]))


def select(encoded: BaseModelOutput, rows: list[int]) -> BaseModelOutput:
    """Some rows of an encoder's output."""
    hidden = encoded.last_hidden_state
    assert hidden is not None, "an encoder always returns its last hidden state"
    if rows == list(range(len(hidden))):
        return encoded
    return BaseModelOutput(last_hidden_state=hidden[rows])
