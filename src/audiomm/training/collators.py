"""Samples to batches: padding, labels that do not count, and the checks that save a night of training.

Labels of what is not to be learnt are -100.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..base.errors import InputError
from .loss import IGNORE

_ANSWERING = ("assistant", "model")


def default_data_collator(features: list[Any], return_tensors: str = "pt") -> dict[str, Tensor]:
    """Stack samples whose values have equal shapes; "label" and "label_ids" become "labels"."""
    samples = [feature if isinstance(feature, dict) else vars(feature) for feature in features]
    batch: dict[str, Tensor] = {}
    for name in samples[0]:
        values = [sample[name] for sample in samples]
        if values[0] is None or isinstance(values[0], str):
            continue
        try:
            stacked = torch.stack([torch.as_tensor(np.asarray(value)) for value in values])
        except RuntimeError as error:
            shapes = sorted({tuple(np.shape(value)) for value in values})
            raise InputError(
                f"{name!r} has the shapes {', '.join(map(str, shapes))} in one batch; pass a data_collator that pads."
            ) from error
        batch["labels" if name in ("label", "label_ids") else name] = stacked
    return batch


def padding_collator(processing_class: Any) -> Callable[[list[Any]], Any]:
    """A collator that pads with a tokenizer where there is one; else `default_data_collator`."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    if not hasattr(tokenizer, "pad"):
        return default_data_collator

    def collate(features: list[Any]) -> Any:
        if "input_features" in features[0] or "input_ids" not in features[0]:
            return default_data_collator(features)
        return pad_samples(tokenizer, features)

    return collate


def pad_samples(tokenizer: Any, features: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Pad input_ids, attention_mask and labels of text samples at the tokenizer's side."""
    left = getattr(tokenizer, "padding_side", "right") == "left"
    fill = {"input_ids": tokenizer.pad_token_id, "labels": IGNORE}
    batch: dict[str, Tensor] = {}
    samples = [{"attention_mask": [1] * len(sample["input_ids"]), **sample} for sample in features]
    for name in samples[0]:
        values = [torch.as_tensor(np.asarray(sample[name])) for sample in samples]
        batch[name] = _padded(values, fill.get(name, 0), left) if values[0].dim() == 1 else torch.stack(values)
    return batch


def _padded(rows: list[Tensor], value: Any, left: bool = False) -> Tensor:
    """Rows of unequal length as one tensor."""
    out = rows[0].new_full((len(rows), max(len(row) for row in rows)), value)
    for index, row in enumerate(rows):
        if left:
            out[index, out.shape[1] - len(row) :] = row
        else:
            out[index, : len(row)] = row
    return out


@dataclass
class DataCollatorSpeechSeq2SeqWithPadding:
    """Batches for speech-to-text models: log-mel features and the tokens to write.

    Attributes:
        processor: Holds the feature extractor and the tokenizer.
        decoder_start_token_id: The start token that the model puts before the labels itself; a leading one is taken
            away. None reads it from the tokenizer ("<|startoftranscript|>").
        forward_attention_mask: Give the model the mask of the features, for SpecAugment.
        max_label_length: Most tokens a sample may have; the decoder has no positions for more.
        mask_prompt: Do not learn what stands before the start token (earlier text in a prompt).

    Samples are dicts with "input_features" (bins, frames), or "audio" (samples, path or dict, extracted here, so that
    worker processes do it), and "labels", or "text" to be tokenized.

    Raises:
        InputError: A sample has too many label tokens or lacks a part; the message names it.
    """

    #: Keys of samples that are read here although the model does not take them.
    columns: ClassVar[tuple[str, ...]] = ("audio", "text", "input_features", "id", "path", "file")

    processor: Any
    decoder_start_token_id: int | None = None
    forward_attention_mask: bool = False
    max_label_length: int = 448
    mask_prompt: bool = True

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Samples to input_features (batch, bins, frames) and labels (batch, tokens)."""
        strange = next((one for one in features if not isinstance(one, Mapping)), None)
        if strange is not None or not features:
            what = f"a {type(strange).__name__}" if features else "nothing"
            raise InputError(f"a batch holds {what}; samples are dicts with 'audio' and 'text', or their features.")
        batch = self._heard([self._with_features(sample, index) for index, sample in enumerate(features)])
        start = self.decoder_start_token_id
        if start is None:
            start = self.processor.tokenizer.convert_tokens_to_ids("<|startoftranscript|>")
        batch["labels"] = _padded([self._labels(sample, index, start) for index, sample in enumerate(features)], IGNORE)
        return batch

    def _with_features(self, sample: dict[str, Any], index: int) -> dict[str, Any]:
        if "input_features" in sample:
            return sample
        if "audio" not in sample:
            raise InputError(f"{_name(sample, index)} has neither 'input_features' nor 'audio'.")
        extractor = self.processor.feature_extractor
        waveform = extractor.read_recording(sample["audio"])
        limit = extractor.n_samples
        if len(waveform) > limit:
            raise InputError(
                f"{_name(sample, index)} lasts {len(waveform) / extractor.sampling_rate:.1f} s; the model hears "
                f"{limit / extractor.sampling_rate:g} s at once. Cut it, and its text, into parts."
            )
        extracted = extractor(
            waveform, sampling_rate=extractor.sampling_rate, return_tensors="pt", return_attention_mask=True
        )
        return {"input_features": extracted["input_features"][0], "attention_mask": extracted["attention_mask"][0]}

    def _heard(self, samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        values = [torch.as_tensor(np.asarray(sample["input_features"])) for sample in samples]
        shapes = [tuple(value.shape) for value in values]
        if len(set(shapes)) > 1:
            other = next(index for index, shape in enumerate(shapes) if shape != shapes[0])
            raise InputError(
                f"{_name(samples[other], other)} has input_features of shape {shapes[other]} and sample 0 of "
                f"{shapes[0]}: extract all with padding='max_length', the default, or pass 'audio'."
            )
        batch = {"input_features": torch.stack(values)}
        if self.forward_attention_mask and all("attention_mask" in sample for sample in samples):
            batch["attention_mask"] = torch.stack([torch.as_tensor(np.asarray(s["attention_mask"])) for s in samples])
        return batch

    def _labels(self, sample: dict[str, Any], index: int, start: int) -> Tensor:
        labels = sample.get("labels")
        if labels is None and "text" in sample:
            labels = self.processor.tokenizer(sample["text"]).input_ids
        if labels is None:
            raise InputError(f"{_name(sample, index)} has neither 'labels' nor 'text'.")
        if isinstance(labels, str) or np.ndim(labels) != 1:
            raise InputError(
                f"{_name(sample, index)} has the labels {str(labels)[:40]!r}: token ids in a row are needed; a text "
                "goes into 'text'."
            )
        row = torch.as_tensor(np.asarray(labels), dtype=torch.long)
        if len(row) and row[0] == start:  # the model puts it there itself
            row = row[1:]
        if len(row) > self.max_label_length:
            raise InputError(
                f"{_name(sample, index)} has {len(row)} label tokens; the decoder has {self.max_label_length} "
                "positions. Cut the recording and its text into parts, or leave the sample out."
            )
        if self.mask_prompt and bool((row == start).any()):
            row = row.masked_fill((row == start).cumsum(0) == 0, IGNORE)
        return row


@dataclass
class DataCollatorForCausalLM:
    """Batches of chats with pictures and sound for models that go on writing; only the answers are learnt.

    A row is what the model reads when it is asked, apply_chat_template(..., add_generation_prompt=True) to the token,
    and then the answer. Earlier answers stand in the history otherwise than where they were to be written (Gemma 4
    writes an empty thought before an answer, and none into the history), so each answer of a chat gets its own row.

    Attributes:
        processor: Of the model; its apply_chat_template makes tokens and media of messages.
        train_on_prompt: Learn the questions, too; every chat is one row then.
        max_length: Most tokens of a row; None is no limit.
        last_answer_only: Learn the last answer of each chat: one row, whatever the number of turns.

    Samples are dicts with "messages" whose last turn is an answer (content parts as in `apply_chat_template`). A turn
    that calls a tool and is followed by the result is given, not learnt.

    Raises:
        InputError: A sample has no answer, or is too long; the message names it.
    """

    #: Keys of samples that are read here although the model does not take them.
    columns: ClassVar[tuple[str, ...]] = ("messages", "id", "path", "file")

    processor: Any
    train_on_prompt: bool = False
    max_length: int | None = None
    last_answer_only: bool = False

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Samples to the model's inputs and labels (rows, tokens), padded at the right."""
        names, prompts, answers = [], [], []
        for index, sample in enumerate(features):
            name, messages = _name(sample, index), sample.get("messages")
            if not messages or messages[-1].get("role") not in _ANSWERING:
                raise InputError(f"{name}: the last of its 'messages' must be the assistant's answer.")
            for turn in self._learnt_turns(messages):
                names.append(name)
                prompts.append(messages[:turn])
                answers.append(self._answer(messages[: turn + 1], name))
        batch = self.processor.apply_chat_template(
            prompts,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "right"},
        )
        return self._with_answers(dict(batch), answers, names)

    def _learnt_turns(self, messages: list[dict[str, Any]]) -> list[int]:
        last = len(messages) - 1
        if self.train_on_prompt or self.last_answer_only:
            return [last]
        answering = [turn for turn, message in enumerate(messages) if message.get("role") in _ANSWERING]
        return [turn for turn in answering if turn == last or messages[turn + 1].get("role") != "tool"]

    def _answer(self, messages: list[dict[str, Any]], name: str) -> Tensor:
        """The tokens that the model is to write: what the template makes of the last message, but for its opening."""
        write, last = self.processor.apply_chat_template, messages[-1]
        texts = []
        for word in "ab":  # where these two part, the opening of a turn ends
            content = word if isinstance(last.get("content"), str) else [{"type": "text", "text": word}]
            texts.append(write([*messages[:-1], {"role": last["role"], "content": content}]))
        pairs = enumerate(zip(*texts, strict=False))
        opening = next((place for place, (one, other) in pairs if one != other), len(texts[0]))
        text = write(messages)
        if not text.startswith(texts[0][:opening]):
            raise InputError(f"{name}: the chat template does not open the answer {text[-80:]!r} as it opens others.")
        tokens = torch.tensor(self.processor.tokenizer(text[opening:], add_special_tokens=False).input_ids)
        if not set(tokens.tolist()).isdisjoint(self._media_tokens()):
            raise InputError(f"{name}: its answer holds a picture or sound; answers are text.")
        return tokens

    def _with_answers(self, batch: dict[str, Tensor], answers: list[Tensor], names: list[str]) -> dict[str, Tensor]:
        """The prompts' rows with the answers behind them, and the labels."""
        prompt_lengths = batch["attention_mask"].sum(1).tolist()
        rows: dict[str, list[Tensor]] = {name: [] for name in ("input_ids", "attention_mask", "labels")}
        types = self.processor.type_ids_name
        if types in batch:
            rows[types] = []
        for row, (length, answer, name) in enumerate(zip(prompt_lengths, answers, names, strict=True)):
            if self.max_length is not None and length + len(answer) > self.max_length:
                raise InputError(
                    f"{name} has {length + len(answer)} tokens; max_length is {self.max_length}. Leave it out, shorten "
                    "it, or raise the limit: cutting it would cut a picture or a recording."
                )
            prompt = batch["input_ids"][row, :length]
            learnt = prompt if self.train_on_prompt else torch.full_like(prompt, IGNORE)
            learnt = learnt.masked_fill(torch.isin(prompt, torch.tensor(self._media_tokens())), IGNORE)
            parts = {"input_ids": (prompt, answer), "labels": (learnt, answer)}
            parts["attention_mask"] = (torch.ones_like(prompt), torch.ones_like(answer))
            if types in batch:
                parts[types] = (batch[types][row, :length], torch.zeros_like(answer))
            for key, pieces in parts.items():
                rows[key].append(torch.cat(pieces))
        fill = {"input_ids": self.processor.tokenizer.pad_token_id, "labels": IGNORE}
        return {**batch, **{key: _padded(values, fill.get(key, 0)) for key, values in rows.items()}}

    def _media_tokens(self) -> list[int]:
        names = ("image_token_id", "audio_token_id", "video_token_id")
        return [value for value in (getattr(self.processor, name, None) for name in names) if value is not None]


def _name(sample: dict[str, Any], index: int) -> str:
    """How an error names a sample of a batch."""
    for key in ("id", "path", "file"):
        if isinstance(sample.get(key), (str, int)):
            return f"sample {index} of the batch ({key} {sample[key]!r})"
    audio = sample.get("audio")
    if isinstance(audio, (str, dict)):
        path = audio.get("path") if isinstance(audio, dict) else audio
        if path:
            return f"sample {index} of the batch (audio {str(path)!r})"
    return f"sample {index} of the batch"
