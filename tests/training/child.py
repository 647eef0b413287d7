"""A small training run for tests that start it in processes of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import audiomm


class Noise(torch.utils.data.Dataset):
    """Samples with noise drawn anew each time."""

    def __len__(self) -> int:
        return 21

    def __getitem__(self, index: int) -> dict[str, Any]:
        features = 0.1 * torch.randn(8, 40, generator=torch.Generator().manual_seed(index))
        features[index % 8] += 1.0
        labels = [10 + index % 8] * (1 + index % 5) + [2]
        return {"input_features": features, "labels": torch.tensor(labels + [-100] * (6 - len(labels)))}


def make_trainer(folder: str | Path, options: dict[str, Any], data: Any = None, dropout: float = 0.1) -> Any:
    """The Trainer; `options` are its arguments."""
    torch.set_num_threads(1)
    torch.manual_seed(5)
    config = audiomm.WhisperConfig(
        vocab_size=100, num_mel_bins=8, d_model=24, encoder_layers=1, encoder_attention_heads=3, encoder_ffn_dim=48,
        decoder_layers=1, decoder_attention_heads=4, decoder_ffn_dim=40, max_source_positions=20,
        max_target_positions=32, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3,
        begin_suppress_tokens=[], init_std=0.1, dropout=dropout,
    )  # fmt: skip
    values = {
        "output_dir": str(folder), "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2,
        "learning_rate": 3e-3, "disable_tqdm": True, "use_cpu": True, "logging_steps": 1, **options,
    }  # fmt: skip
    model = audiomm.WhisperForConditionalGeneration(config)
    return audiomm.Trainer(model, audiomm.TrainingArguments(**values), train_dataset=data or Noise())
