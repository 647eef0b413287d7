"""Live speech to text by a Gemma 4: sound is encoded once, as it comes, and the model is asked about it at each step.

Its audio tower never looks ahead, so soft tokens that were made stay what they are, and those of a stream are those of
the whole recording. What two steps in a row agree on is settled, and so is everything before a pause (local agreement,
arXiv:2307.14743). What was said since the last pause is read anew at each step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..base.errors import InputError
from ..media.resample import Resampler, check_rate
from ..media.samples import check_finite, to_float
from .live import PAUSE_SECONDS
from .prompted_recognition import WINDOW_SECONDS, PromptedSpeechRecognitionPipeline, is_audible


@dataclass(frozen=True)
class LiveText:
    """What one step of a stream gave.

    Attributes:
        text: What is now settled, a space before each word; the texts of all updates together are the transcript.
        pending: What was heard behind it and may still change.
        seconds: How much of the stream had been heard.
    """

    text: str
    pending: str
    seconds: float


class PromptedLiveTranscriber:
    """Transcribes a stream while it is spoken.

        live = PromptedLiveTranscriber(pipeline("automatic-speech-recognition", model="google/gemma-4-E2B-it"))
        for update in live.listen(microphone()):
            print(update.text, end="", flush=True)

    Args:
        pipe: A speech recognition pipeline on a model whose audio tower can encode a stream.
        sampling_rate: Of the samples that come, in Hz; None is the model's.
        step_seconds: How often the model is asked.
        kwargs: As for a call of the pipeline: language, task, prompt, max_new_tokens, ...

    Raises:
        InputError: The model hears whole clips only, or a number is out of range.
    """

    def __init__(
        self,
        pipe: PromptedSpeechRecognitionPipeline,
        sampling_rate: int | None = None,
        step_seconds: float = 1.0,
        **kwargs: Any,
    ) -> None:
        self.tower: Any = getattr(getattr(pipe.model, "model", None), "audio_tower", None)
        if self.tower is None or not hasattr(self.tower, "stream"):
            raise InputError(
                f"{type(pipe.model).__name__} cannot encode a stream; Gemma 4 E2B and E4B can. With a Whisper model, "
                "use LiveTranscriber."
            )
        if not 0.1 <= step_seconds <= 10:
            raise InputError(f"step_seconds={step_seconds!r}: accepted are 0.1 to 10.")
        self.pipe, self.request = pipe, pipe.requested(kwargs)
        self.rate = int(pipe.feature_extractor.sampling_rate)
        self._resampler = Resampler(check_rate(self.rate if sampling_rate is None else sampling_rate), self.rate)
        self._step = round(step_seconds * self.rate)
        self._longest = round((min(self.request.window_seconds, WINDOW_SECONDS) - step_seconds) * self.rate)
        self._waiting = np.zeros(0, np.float32)
        self._heard_samples = 0
        self._is_finished = False
        #: Of what was said since the last pause: samples, soft tokens, words that are settled, words of the last step.
        self._samples = np.zeros(0, np.float32)
        self._tokens: list[Tensor] = []
        self._settled = 0
        self._before: list[str] = []
        self._encoder = self.tower.stream(pipe.feature_extractor)

    def listen(self, chunks: Iterable[Any]) -> Iterator[LiveText]:
        """Go through a stream of mono samples to its end: an update for each step, the last with everything settled."""
        for chunk in chunks:
            yield from self.push(chunk)
        yield self.finish()

    def push(self, samples: Any) -> list[LiveText]:
        """Take the next samples, any number of them; an update for each step that is now complete.

        Raises:
            InputError: They are not mono samples, or `finish` has been called.
        """
        if self._is_finished:
            raise InputError("this stream is finished; make a new PromptedLiveTranscriber for the next one.")
        chunk = to_float(samples, "cpu")
        if chunk.ndim != 1:
            raise InputError(f"a piece of a stream has shape {tuple(chunk.shape)}; mono samples (samples,) are needed.")
        check_finite(chunk, "a piece of a stream")
        self._waiting = np.concatenate([self._waiting, self._resampler.push(chunk.numpy())])
        updates = []
        while len(self._waiting) >= self._step:
            piece, self._waiting = self._waiting[: self._step], self._waiting[self._step :]
            updates.append(self._advance(piece))
        return updates

    def finish(self) -> LiveText:
        """Settle everything; the stream ends here."""
        rest = self._waiting
        if not self._is_finished:
            self._is_finished = True
            rest = np.concatenate([rest, self._resampler.finish()])
        self._waiting = np.zeros(0, np.float32)
        self._heard_samples += len(rest)
        self._samples = np.concatenate([self._samples, rest])
        self._collect(rest)
        return LiveText(self._close(), "", self._heard_samples / self.rate)

    # ------------------------------------------------------------------ steps

    def _begin(self) -> None:
        """Forget what was said up to a pause."""
        self._encoder = self.tower.stream(self.pipe.feature_extractor)
        self._samples = np.zeros(0, np.float32)
        self._tokens, self._settled, self._before = [], 0, []

    def _advance(self, piece: np.ndarray) -> LiveText:
        """Hear a step, ask, and settle what is certain."""
        self._heard_samples += len(piece)
        seconds = self._heard_samples / self.rate
        self._samples = np.concatenate([self._samples, piece])
        tail = self._samples[-round(PAUSE_SECONDS * self.rate) :]
        if not is_audible(self._samples, self.rate):
            # Nothing has been said yet: a stream that begins with the next sound is as good.
            self._begin()
            return LiveText("", "", seconds)
        self._collect(piece)
        if not is_audible(tail, self.rate) or len(self._samples) > self._longest:
            return LiveText(self._close(), "", seconds)
        words = self._ask().split()
        agreed = 0
        while agreed < min(len(words), len(self._before)) and words[agreed] == self._before[agreed]:
            agreed += 1
        new = words[self._settled : agreed]
        self._settled, self._before = max(self._settled, agreed), words
        return LiveText(_spaced(new), _spaced(words[self._settled :]), seconds)

    def _collect(self, piece: np.ndarray) -> None:
        """Encode the next samples."""
        if len(piece):
            self._tokens.append(self._encoder.push(piece))

    def _close(self) -> str:
        """Settle everything since the last pause, and begin anew."""
        text = ""
        if is_audible(self._samples, self.rate):
            # A stream needs a frame to end; what is missing is silence.
            shortest = math.ceil(0.1 * self.rate)
            self._collect(np.zeros(max(shortest - len(self._samples), 0), np.float32))
            self._tokens.append(self._encoder.finish())
            text = _spaced(self._ask().split()[self._settled :])
        self._begin()
        return text

    def _ask(self) -> str:
        """What the model writes about the soft tokens so far."""
        tokens = torch.cat(self._tokens, dim=1) if self._tokens else torch.zeros(1, 0, 1)
        count = tokens.shape[1]
        if not count:
            return ""
        processor, model = self.pipe.processor, self.pipe.model
        question = [{"type": "audio"}, {"type": "text", "text": self.request.prompt}]
        prompt = processor.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, enable_thinking=False
        )
        block = f"{processor.boa_token}{processor.audio_token * count}{processor.tokenizer.eoa_token}"
        text = prompt.replace(processor.audio_token, block, 1).removeprefix(processor.tokenizer.bos_token or "")
        inputs = processor.tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            encoded = SimpleNamespace(pooler_output=model.model.embed_audio(tokens))
            output = model.generate(
                inputs["input_ids"].to(self.pipe.device),
                mm_encoder_outputs={"audio": encoded},
                **self.request.generate_kwargs,
            )
        sequences = getattr(output, "sequences", output)
        return self.pipe.written(sequences[0, inputs["input_ids"].shape[1] :])


def _spaced(words: list[str]) -> str:
    return "".join(f" {word}" for word in words)
