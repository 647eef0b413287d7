"""Speech to text: any audio in, a transcript out.

Audio of up to one window (30 s) is one pass of the model. Longer audio is sequential by default: generation moves
through it window by window, each starting where the previous one stopped speaking, and files of a batch move side by
side. With `chunk_length_s` it is cut into overlapping windows that are decoded independently and merged where they
overlap. Times are those of the segments that generation returned; only the merge of windows reads them from tokens.

The interface is that of transformers' AutomaticSpeechRecognitionPipeline.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from ..base.errors import InputError
from ..base.languages import LANGUAGES
from ..base.transcript import Timestamps, Transcript
from ..media.speech import SpeechFinder
from .assembly import Assembler, Heard
from .base import Pipeline, batched
from .clips import LOAD_OPTIONS, Clip, Piece, clip_times, cut, read_clip, time_spans

logger = logging.getLogger("audiomm.pipelines")

#: Anything shorter holds no speech: the transcript is empty.
MIN_DURATION_SECONDS = 0.1

#: Frames of features are 10 ms apart.
SECONDS_PER_FRAME = 0.01

#: Used where neither the call, nor the pipeline, nor the model's generation config says otherwise.
GENERATION_DEFAULTS = {"max_new_tokens": 256, "num_beams": 5}


@dataclass(frozen=True)
class Request:
    """What one call asks for.

    Attributes:
        chunk_length_s: Seconds in a window; 0 goes through long audio sequentially.
        stride_length_s: Seconds that a window shares with its neighbours at its left and right.
        timestamps: False, True (segments) or "word".
        read_again: Find words by reading the finished text once more, as OpenAI does, and not from the attention of
            the tokens as they were written, as transformers does.
        language: Name the language of each chunk.
        segments: Add the whole segments to the result.
        progress: Show a progress bar on long audio; None shows it in a terminal.
        speech: Finds the parts in which something is said, and only those are heard; None hears everything.
        clip_times: Starts and ends in turn of the only parts to be heard, in seconds; empty hears everything.
        load_options: For `load_audio`.
        generate_kwargs: For `model.generate`.
    """

    chunk_length_s: float = 0.0
    stride_length_s: tuple[float, float] = (0.0, 0.0)
    timestamps: Timestamps = False
    read_again: bool = False
    language: bool = False
    segments: bool = False
    progress: bool | None = None
    speech: SpeechFinder | None = None
    clip_times: tuple[float, ...] = ()
    load_options: dict[str, Any] = field(default_factory=dict)
    generate_kwargs: dict[str, Any] = field(default_factory=dict)


class AutomaticSpeechRecognitionPipeline(Pipeline):
    """Transcribes audio.

        pipe = pipeline("automatic-speech-recognition", model="openai/whisper-tiny")
        pipe("talk.mp3", return_timestamps=True)["chunks"]

    Args:
        model: A speech-to-text model, like WhisperForConditionalGeneration.
        feature_extractor: Its feature extractor.
        tokenizer: Its tokenizer.
        decoder: Accepted for compatibility; only CTC models have one.
        device: Where to run; None is the first accelerator, or the CPU.
        kwargs: The rest of `Pipeline`'s arguments, and defaults for the arguments of calls.

    Raises:
        InputError: The model cannot write, a part is missing, a decoder is given, or an argument is wrong.
    """

    task = "automatic-speech-recognition"

    def __init__(
        self,
        model: Any,
        feature_extractor: Any = None,
        tokenizer: Any = None,
        decoder: Any = None,
        device: int | str | torch.device | None = None,
        **kwargs: Any,
    ) -> None:
        if decoder is not None:
            raise InputError("decoder= is for CTC models, and the models here are not; leave it out.")
        if not hasattr(model, "generate"):
            raise InputError(
                f"model is a {type(model).__name__}, which writes no text; load it with AutoModelForSpeechSeq2Seq."
            )
        super().__init__(model, tokenizer=tokenizer, feature_extractor=feature_extractor, device=device, **kwargs)
        for name in ("tokenizer", "feature_extractor"):
            if getattr(self, name) is None:
                raise InputError(f"{name}: {type(model).__name__} needs one; pass {name}= or processor=.")
        self._request(dict(self.call_defaults))

    def __call__(
        self, inputs: Any, *, batch_size: int | None = None, num_workers: int | None = None, **kwargs: Any
    ) -> Any:
        """Transcribe one input, a list of them, or lazily whatever an iterator gives.

        Args:
            inputs: A path or URL, the bytes of an audio file, an open file, mono samples at the model's rate as
                array or tensor (integers are scaled), or a dict of "raw" or "array" and "sampling_rate". Channels
                come first. Other keys of a dict go to the result.
            batch_size: How many inputs (or windows of chunked audio) go through the model together.
            num_workers: Accepted for compatibility.
            kwargs: See `transcribe`; what is not listed there goes to `generate`.

        Returns:
            {"text"} with "chunks" where times or languages were asked for; a list of those for a list of inputs; an
            iterator of those for an iterator. An input of no or hardly any samples has the text "".

            With return_timestamps="word" the times are those of transformers, where a word begins as soon as the one
            before it has ended. With word_timestamps=True they are as `transcribe` finds them.

        Raises:
            AudioError: An input cannot be used; the message names it.
            InputError: An argument is wrong.
            GenerationError: `generate` was asked for something impossible.
        """
        request = self._request(kwargs)

        def results(stream: Iterator[Any], size: int) -> Iterator[dict[str, Any]]:
            for transcript in self._run(stream, size, request):
                yield transcript.to_dict(
                    return_language=request.language, return_segments=request.segments, language_names=LANGUAGES
                )

        return self._each(inputs, results, batch_size)

    def transcribe(
        self, inputs: Any, *, batch_size: int | None = None, num_workers: int | None = None, **kwargs: Any
    ) -> Any:
        """Like calling the pipeline, with a typed `Transcript` in place of each dict.

        Args:
            inputs: As for a call.
            batch_size: As for a call.
            num_workers: As for a call.
            kwargs: chunk_length_s: seconds in a window; 0, the default, goes through long audio sequentially.
                stride_length_s: seconds that a window shares with its left and right neighbour; a sixth of the
                window unless given. return_timestamps: False, True (segments) or "word", which finds when words begin
                and end, and how likely they are, in the way of OpenAI's transcribe. word_timestamps: True means
                return_timestamps="word"; with False that has the times of transformers, as audio with chunk_length_s
                always does, because windows are merged by the times of their tokens. return_language: name the
                language of each chunk. return_segments: add the whole segments. progress: show a bar on long audio;
                in a terminal unless given. vad_filter: True leaves out what is not speech, so that silence and noise
                cost nothing and nothing is imagined in them; times are those of the recording. vad_parameters: for
                `SpeechFinder.from_parameters`, like {"min_silence_duration_ms": 500} or {"detector": "silero"}.
                clip_timestamps: "start,end,start,end" in seconds, or a list of them: the only parts to be heard; the
                last end may be left out. Parts are heard as if they followed one another. initial_prompt: text to
                stand before the first window (with chunk_length_s, before each), like names with their spelling.
                carry_initial_prompt: True has it before every window. hotwords: text to stand before every window;
                with initial_prompt, both stand there, hotwords first. Of prompts that are too long, the end is kept.
                channel, layout, max_seconds, on_truncated, allow_urls, allowed_hosts: for
                `load_audio`. generate_kwargs: for `generate`, which also gets all other keywords
                (language, task, max_new_tokens, num_beams, ...).
        """
        request = self._request(kwargs, read_again=True)
        return self._each(inputs, lambda stream, size: self._run(stream, size, request), batch_size)

    # Arguments

    def _request(self, kwargs: dict[str, Any], read_again: bool = False) -> Request:
        """The request of a call: its own arguments over the pipeline's.

        Args:
            kwargs: Of the call.
            read_again: How words are found where `word_timestamps` does not say it.
        """
        asked = {**_flat(self.call_defaults), **_flat(kwargs)}
        asked.pop("ignore_warning", None)
        chunk, stride = asked.pop("chunk_length_s", None), asked.pop("stride_length_s", None)
        timestamps, words = asked.pop("return_timestamps", None), asked.pop("word_timestamps", None)
        if words:
            timestamps = "word"
        if not timestamps:
            timestamps = bool(getattr(self.model.generation_config, "return_timestamps", False))
        if timestamps == "char":
            raise InputError(
                "return_timestamps='char': Whisper gives no times for characters; pass 'word' for words or True for "
                "segments."
            )
        if timestamps not in (True, False, "word"):
            raise InputError(f"return_timestamps={timestamps!r}: expected False, True (segments) or 'word'.")
        speech = _speech_finder(asked.pop("vad_filter", None), asked.pop("vad_parameters", None))
        parts = clip_times(asked.pop("clip_timestamps", None))
        if speech is not None and parts:
            raise InputError("vad_filter and clip_timestamps both choose what is heard; pass one of them.")
        asked.update(_prompt(self.tokenizer, asked))
        return Request(
            chunk_length_s=_seconds("chunk_length_s", chunk or 0),
            stride_length_s=_stride_seconds(chunk or 0, stride),
            timestamps=timestamps,
            read_again=timestamps == "word" and not chunk and (read_again if words is None else bool(words)),
            language=bool(asked.pop("return_language", None)),
            segments=bool(asked.pop("return_segments", None)),
            progress=asked.pop("progress", None),
            speech=speech,
            clip_times=parts,
            load_options={name: asked.pop(name) for name in LOAD_OPTIONS if name in asked},
            generate_kwargs=self._with_defaults(asked),
        )

    def _with_defaults(self, generate_kwargs: dict[str, Any]) -> dict[str, Any]:
        """Add the pipeline's own defaults for what neither the call nor the model's generation config sets."""
        own = _set_fields(self.model.generation_config)
        given = {**own, **_set_fields(generate_kwargs.get("generation_config")), **generate_kwargs}
        defaults = {name: value for name, value in GENERATION_DEFAULTS.items() if name not in given}
        if "max_length" in given:
            defaults.pop("max_new_tokens", None)
        return {**defaults, **generate_kwargs}

    # The way of an input

    def _run(self, inputs: Iterator[Any], batch_size: int, request: Request) -> Iterator[Transcript]:
        """A transcript for each input, in order; reads ahead no further than a batch."""
        extractor = self.feature_extractor
        time_precision = extractor.chunk_length / self.model.config.max_source_positions
        assembler = Assembler(self.tokenizer, extractor.sampling_rate, time_precision)
        heard_of_clip: list[Heard] = []
        for batch in batched(self._pieces(inputs, request), batch_size):
            for heard in self._hear(batch, request):
                heard_of_clip.append(heard)
                if heard.piece.is_last:
                    yield assembler.transcript(heard_of_clip, request.timestamps, request.language)
                    heard_of_clip = []

    def _pieces(self, inputs: Iterator[Any], request: Request) -> Iterator[Piece]:
        rate = self.feature_extractor.sampling_rate
        length = round(request.chunk_length_s * rate)
        left, right = (round(seconds * rate) for seconds in request.stride_length_s)
        for number, item in enumerate(inputs):
            clip = self._chosen(read_clip(item, number, rate, **request.load_options), request)
            yield from cut(clip, length, left, right)

    def _chosen(self, clip: Clip, request: Request) -> Clip:
        """The clip, or the parts of it that are to be heard; says so where nothing can be heard."""
        rate, count = self.feature_extractor.sampling_rate, len(clip.samples)
        if count < MIN_DURATION_SECONDS * rate:
            logger.warning(
                "%s: %d samples are less than %s s, so its text is empty.", clip.name, count, MIN_DURATION_SECONDS
            )
        elif request.clip_times:
            clip = clip.only(time_spans(request.clip_times, count, rate), rate)
            if len(clip.samples) < MIN_DURATION_SECONDS * rate:
                logger.warning(
                    "%s: clip_timestamps leave %d samples of its %.2f s, less than %s s, so its text is empty.",
                    clip.name,
                    len(clip.samples),
                    count / rate,
                    MIN_DURATION_SECONDS,
                )
        elif request.speech is not None:
            padding_seconds = request.speech.options.speech_pad_ms / 1000
            clip = clip.only(request.speech(clip.samples, rate), rate, slack_seconds=padding_seconds)
        return clip

    def _hear(self, pieces: list[Piece], request: Request) -> list[Heard]:
        """What the model hears in each piece.

        Pieces of one window and longer ones go through the model apart: long audio always decodes with timestamps,
        and what is heard in a clip must not depend on its neighbours in the batch.
        """
        heard = {}
        groups: dict[bool, list[int]] = {}
        for index, piece in enumerate(pieces):
            if len(piece.samples) < MIN_DURATION_SECONDS * self.feature_extractor.sampling_rate:
                heard[index] = Heard(piece)
            else:
                groups.setdefault(len(piece.samples) > self.feature_extractor.n_samples, []).append(index)
        for is_long, indices in groups.items():
            results = self._generate([pieces[index] for index in indices], is_long, request)
            heard.update(zip(indices, results, strict=True))
        return [heard[index] for index in range(len(pieces))]

    def _generate(self, pieces: list[Piece], is_long: bool, request: Request) -> list[Heard]:
        features, mask = self._features([piece.samples for piece in pieces], is_long)
        # Without timestamps there is no telling where the next window of long audio starts; they stay inside.
        timestamps = is_long or bool(request.timestamps)
        kwargs = {**request.generate_kwargs, "return_timestamps": timestamps, "return_segments": True}
        if isinstance(kwargs.get("language"), (list, tuple)):
            kwargs["language"] = _languages_of(pieces, kwargs["language"])
        if request.read_again:
            kwargs.update(word_timestamps=True, tokenizer=self.tokenizer)
        elif request.timestamps == "word":
            kwargs["return_token_timestamps"] = True
        with torch.no_grad(), _progress_bar(kwargs, mask, is_long, request.progress):
            output = self.model.generate(
                features.to(self.device, self.dtype), attention_mask=mask.to(self.device), **kwargs
            )
        languages = output.get("languages") or [None] * len(pieces)
        return [Heard(*found) for found in zip(pieces, output["segments"], languages, strict=True)]

    def _features(self, clips: list[np.ndarray], is_long: bool) -> tuple[Tensor, Tensor]:
        """Features (batch, bins, frames), padded with 0.0, and their mask (batch, frames).

        Each clip is extracted alone, so that its features are the same to the bit in every batch.
        """
        options: dict[str, Any] = {"truncation": False, "padding": "longest"} if is_long else {}
        if self.device.type == "cuda":
            options["device"] = self.device
        extracted = [
            self.feature_extractor(
                clip,
                sampling_rate=self.feature_extractor.sampling_rate,
                return_tensors="pt",
                return_attention_mask=True,
                **options,
            )
            for clip in clips
        ]
        frames = max(item["input_features"].shape[-1] for item in extracted)
        features, masks = (
            torch.cat([functional.pad(item[name], (0, frames - item[name].shape[-1])) for item in extracted])
            for name in ("input_features", "attention_mask")
        )
        return features, masks


@contextmanager
def _progress_bar(
    generate_kwargs: dict[str, Any], mask: Tensor, is_long: bool, progress: bool | None
) -> Iterator[None]:
    """Seconds of audio done, on stderr, while long audio is generated from."""
    shown = sys.stderr.isatty() and is_long if progress is None else progress and is_long
    if not shown or "monitor_progress" in generate_kwargs:
        yield
        return
    total = float(mask.sum()) * SECONDS_PER_FRAME
    layout = "{percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s [{elapsed}<{remaining}]"
    with tqdm(total=total, bar_format=layout) as bar:

        def update(seek_and_length: Tensor) -> None:
            bar.update(max(0.0, float(seek_and_length.amin(dim=-1).sum()) * SECONDS_PER_FRAME - bar.n))

        generate_kwargs["monitor_progress"] = update
        yield
        bar.update(total - bar.n)


def _languages_of(pieces: list[Piece], languages: Sequence[str | None]) -> list[str | None]:
    """The languages of the inputs that the pieces belong to, out of a list with one for each input."""
    highest = max(piece.clip.number for piece in pieces)
    if highest >= len(languages):
        raise InputError(
            f"language holds {len(languages)} entries, and input {highest} has none; pass one for each input, or one "
            "for all."
        )
    return [languages[piece.clip.number] for piece in pieces]


def _speech_finder(wanted: Any, parameters: Any) -> SpeechFinder | None:
    """What `vad_filter` and `vad_parameters` ask for."""
    if wanted not in (None, False, True):
        raise InputError(f"vad_filter={wanted!r}: expected True or False; its options go into vad_parameters.")
    if parameters is not None and wanted is None:
        raise InputError("vad_parameters were given without vad_filter; pass vad_filter=True, too.")
    return SpeechFinder.from_parameters(parameters) if wanted else None


def _prompt(tokenizer: Any, asked: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `generate` for prompts given as text, whose own arguments are taken out of `asked`."""
    initial, hotwords = (asked.pop(name, None) for name in ("initial_prompt", "hotwords"))
    carried = asked.pop("carry_initial_prompt", None)
    for name, text in (("initial_prompt", initial), ("hotwords", hotwords)):
        if text is not None and not isinstance(text, str):
            raise InputError(f"{name} is a {type(text).__name__}; a text is needed, like 'Dr. Ørsted, Aarhus'.")
    if carried not in (None, False, True):
        raise InputError(f"carry_initial_prompt={carried!r}: expected True or False.")
    if carried and initial is None:
        raise InputError("carry_initial_prompt=True needs an initial_prompt to carry.")
    texts = [text.strip() for text in (hotwords, initial) if text and text.strip()]
    if not texts:
        return {}
    for name in ("prompt_ids", "prompt_condition_type"):
        if asked.get(name) is not None:
            raise InputError(f"{name} excludes initial_prompt and hotwords, which set it; pass one or the other.")
    repeated = bool(carried) or bool(hotwords and hotwords.strip())
    return {
        "prompt_ids": tokenizer.get_prompt_ids(" ".join(texts), return_tensors="pt"),
        "prompt_condition_type": "all-segments" if repeated else "first-segment",
    }


def _seconds(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise InputError(f"{name}={value!r}: a number of seconds of at least 0 is needed.")
    return float(value)


def _stride_seconds(chunk: float, stride: Any) -> tuple[float, float]:
    """Left and right overlap of windows; a sixth of the window unless given."""
    if not chunk:
        return 0.0, 0.0
    sides = [chunk / 6 if stride is None else stride] * 2 if not isinstance(stride, (list, tuple)) else list(stride)
    if len(sides) != 2:
        raise InputError(f"stride_length_s={stride!r}: expected a number of seconds, or two: (left, right).")
    left, right = (_seconds("stride_length_s", side) for side in sides)
    if left + right >= chunk:
        raise InputError(
            f"chunk_length_s={chunk:g} must be longer than both strides together ({left:g} s + {right:g} s), or no "
            "window would add anything. Pass a longer chunk or a shorter stride_length_s."
        )
    return left, right


def _flat(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keywords with those in generate_kwargs beside the others."""
    rest = {name: value for name, value in kwargs.items() if name != "generate_kwargs"}
    return {**(kwargs.get("generate_kwargs") or {}), **rest}


def _set_fields(config: Any) -> dict[str, Any]:
    """The fields of a generation config that are set."""
    return {} if config is None else {name: value for name, value in vars(config).items() if value is not None}
