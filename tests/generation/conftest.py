"""A tiny language model that recomputes everything at each step: the slow, obvious twin of a model with a cache."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from audiomm.base.outputs import CausalLMOutput, Seq2SeqLMOutput
from audiomm.generation import GenerationConfig, GenerationMixin

VOCABULARY = 24


class IdsCache:
    """A "cache" that holds all ids so far and which of them are padding."""

    def __init__(self, batch: int, max_length: int | None, fixed: bool) -> None:
        self.ids = torch.zeros(batch, 0, dtype=torch.long)
        self.mask = torch.zeros(batch, 0, dtype=torch.bool)
        self.max_length, self.fixed = max_length, fixed

    @property
    def length(self) -> int:
        return self.ids.shape[1]

    def add(self, ids: Tensor, mask: Tensor | None = None) -> None:
        mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        self.ids = torch.cat((self.ids.to(ids.device), ids), dim=1)
        self.mask = torch.cat((self.mask.to(ids.device), mask), dim=1)

    def repeat(self, count: int) -> None:
        self.ids, self.mask = self.ids.repeat_interleave(count, 0), self.mask.repeat_interleave(count, 0)

    def reorder(self, index: Tensor) -> None:
        self.ids, self.mask = self.ids[index], self.mask[index]

    def crop(self, length: int) -> None:
        self.ids, self.mask = self.ids[:, :length], self.mask[:, :length]

    def take_back(self, counts: Tensor, room: int = 0) -> None:
        newest = self.mask.flip(1).cumsum(1).flip(1)  # 1 at the newest token of each row, 2 at the one before
        kept = self.mask & (newest > counts[:, None])
        self.ids, self.mask = self.ids[:, kept.any(dim=0)], kept[:, kept.any(dim=0)]


class ToyDecoder(GenerationMixin, nn.Module):
    """Scores from a table of the last token plus a fading sum of the earlier ones; padding counts for nothing."""

    main_input_name = "input_ids"

    def __init__(self, seed: int = 0, **options: Any) -> None:
        super().__init__()
        maker = torch.Generator().manual_seed(seed)
        self.table = nn.Parameter(torch.randn(VOCABULARY, VOCABULARY, generator=maker) * 2)
        self.dropout = nn.Dropout(0.5)
        self.config = SimpleNamespace(is_encoder_decoder=False, vocab_size=VOCABULARY)
        self.generation_config = GenerationConfig(**{"eos_token_id": 1, "pad_token_id": 0, **options})
        self.calls = {"prefill": 0, "step": 0}
        self.nan_at: int | None = None

    def make_cache(self, batch: int, *, max_length: int | None, fixed: bool) -> IdsCache:
        self.cache = IdsCache(batch, max_length, fixed)
        return self.cache

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        length = input_ids.shape[1]
        # Steps back are counted in tokens: what is masked out has no place.
        place, columns = mask.cumsum(dim=1), torch.arange(length, device=input_ids.device)
        weights = 0.6 ** (place[:, :, None] - place[:, None, :]).float() * (columns[:, None] >= columns[None, :])
        return self.dropout((weights * mask[:, None, :].float()) @ self.table[input_ids])

    def _output(self, cache: IdsCache, count: int) -> CausalLMOutput:
        logits = self(cache.ids, cache.mask)[:, -count:]
        if self.nan_at is not None and cache.length >= self.nan_at:
            logits = logits.clone()
            logits[-1, -1, 3] = float("nan")
        return CausalLMOutput(logits=logits)

    def prefill(
        self, input_ids: Tensor, cache: IdsCache, *, attention_mask: Tensor | None = None, **flags: bool
    ) -> CausalLMOutput:
        self.calls["prefill"] += 1
        cache.add(input_ids, attention_mask)
        return self._output(cache, input_ids.shape[1])

    def step(self, input_ids: Tensor, cache: IdsCache, **flags: bool) -> CausalLMOutput:
        self.calls["step"] += 1
        assert input_ids.shape == (cache.ids.shape[0], input_ids.shape[1])
        cache.add(input_ids)
        return self._output(cache, input_ids.shape[1])


class ToySeq2Seq(ToyDecoder):
    """The same with an "encoder": a bias on the scores that is stored once per batch item."""

    main_input_name = "input_features"

    def __init__(self, seed: int = 0, **options: Any) -> None:
        super().__init__(seed, **{"decoder_start_token_id": 2, **options})
        self.config.is_encoder_decoder = True

    def prefill(  # type: ignore[override]
        self,
        input_ids: Tensor,
        cache: IdsCache,
        *,
        attention_mask: Tensor | None = None,
        input_features: Tensor | None = None,
        encoder_outputs: Any = None,
        **flags: bool,
    ) -> Seq2SeqLMOutput:
        self.calls["prefill"] += 1
        self.encoded = input_features if encoder_outputs is None else encoder_outputs[0]
        cache.add(input_ids, attention_mask)
        return self._with_encoder(self._output(cache, input_ids.shape[1]), flags)

    def step(self, input_ids: Tensor, cache: IdsCache, **flags: bool) -> Seq2SeqLMOutput:  # type: ignore[override]
        return self._with_encoder(super().step(input_ids, cache), flags)

    def _with_encoder(self, output: CausalLMOutput, flags: dict[str, bool]) -> Seq2SeqLMOutput:
        assert output.logits is not None and self.encoded is not None
        rows = output.logits.shape[0]
        bias = self.encoded.repeat_interleave(rows // self.encoded.shape[0], 0)[:, None]
        attention = (torch.ones(rows, 1, output.logits.shape[1], 2),) if flags.get("output_attentions") else None
        return Seq2SeqLMOutput(logits=output.logits + bias, decoder_attentions=attention, cross_attentions=attention)


@pytest.fixture
def toy() -> type[ToyDecoder]:
    """The class of the toy decoder: toy(seed, **generation options)."""
    return ToyDecoder


@pytest.fixture
def seq2seq() -> type[ToySeq2Seq]:
    """The class of the toy encoder-decoder."""
    return ToySeq2Seq


@pytest.fixture
def prompts() -> Tensor:
    """(3, 5) token ids."""
    return torch.tensor([[5, 9, 4, 17, 8], [11, 3, 20, 6, 6], [7, 21, 14, 9, 13]])
