"""Seq2SeqTrainer: a Trainer that evaluates what the model writes."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from ..base.errors import ConfigError
from ..generation.config import GenerationConfig
from .arguments import Seq2SeqTrainingArguments
from .evaluation import PredictionOutput
from .loss import IGNORE
from .trainer import Trainer


class Seq2SeqTrainer(Trainer):
    """A Trainer whose evaluation generates, with `Seq2SeqTrainingArguments(predict_with_generate=True)`.

    compute_metrics then gets generated tokens (rows, length), filled up with the pad token.
    """

    args: Seq2SeqTrainingArguments

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._generate_kwargs: dict[str, Any] = {}
        self._asked: dict[str, Any] = {}
        config = getattr(self.args, "generation_config", None)
        if isinstance(config, (str, os.PathLike)):
            config = GenerationConfig.from_pretrained(config)
        if config is not None:
            self.model.generation_config = config

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
        **gen_kwargs: Any,
    ) -> dict[str, float]:
        """As `Trainer.evaluate`; more keywords go to `generate`."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if not isinstance(dataset, dict):  # a dict comes back here once a dataset
            self._generate_kwargs = self._settled(gen_kwargs or self._asked)
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        self._asked = gen_kwargs
        try:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        finally:
            self._asked = {}

    def predict(
        self,
        test_dataset: Any,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "test",
        **gen_kwargs: Any,
    ) -> PredictionOutput:
        """As `Trainer.predict`; more keywords go to `generate`."""
        self._generate_kwargs = self._settled(gen_kwargs)
        return super().predict(test_dataset, ignore_keys, metric_key_prefix)

    def _settled(self, given: dict[str, Any]) -> dict[str, Any]:
        """The keywords for `generate`: those given, then those of the arguments."""
        args, options = self.args, dict(given)
        if not {"max_length", "max_new_tokens"} & set(options) and args.generation_max_length is not None:
            options["max_length"] = args.generation_max_length
        if "num_beams" not in options and args.generation_num_beams is not None:
            options["num_beams"] = args.generation_num_beams
        return options

    @property
    def _prediction_padding(self) -> int:
        config = getattr(self.model, "generation_config", None)
        pad = getattr(config, "pad_token_id", None)
        return IGNORE if pad is None or not getattr(self.args, "predict_with_generate", False) else int(pad)

    def prediction_step(
        self,
        model: Any,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """(loss, generated tokens, labels) of one batch."""
        if not self.args.predict_with_generate or prediction_loss_only:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if self._spreads_weights:
            raise ConfigError(
                "predict_with_generate=True cannot be used with FSDP or stage 3 of DeepSpeed: processes that write "
                "texts of different length would wait for each other for ever. Evaluate the loss, and the texts on one "
                "process afterwards."
            )
        labels = inputs.get(self.label_names[0])
        asked = {name: value for name, value in inputs.items() if name not in (*self.label_names, "decoder_input_ids")}
        generator = self.accelerator.unwrap_model(model)
        with torch.no_grad(), self.accelerator.autocast():
            tokens = generator.generate(**asked, **self._generate_kwargs)
            if labels is None:
                return None, tokens, None
            loss = self.compute_loss(model, inputs, **self._counted(inputs)).detach().mean()
        return loss, tokens, labels
