"""Speech to text by a model that is asked to write down what it hears: Gemma 3n and Gemma 4.

The call and its result are those of the Whisper pipeline. A recording is cut at pauses into windows that the model can
hear at once, each window is one question, and the answers are joined; silent windows are not asked about. Times are
those of the windows: such models tell no others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from difflib import SequenceMatcher
from typing import Any

import numpy as np

from ..auto import AutoModelForCausalLM
from ..base.errors import InputError
from ..base.languages import LANGUAGES, language_code
from ..base.transcript import Segment, Timestamps, Transcript
from ..media.speech import SpeechFinder, energy_spans, frame_levels
from .any_to_text import AnsweringPipeline
from .base import batched
from .clips import LOAD_OPTIONS, Clip, Piece, read_clip
from .request import flat, speech_finder
from .windows import cut_at_pauses

#: The longest window in seconds; what the audio towers were trained on.
WINDOW_SECONDS = 30.0
#: Tokens for a window when nobody says how many.
DEFAULT_NEW_TOKENS = 448
#: Shorter windows are filled up with silence, so that there is a soft token to hear.
SHORTEST_SECONDS = 0.1
#: Windows that stay below this level, in decibels of full scale, hold nothing to write down.
_SILENT_DB = -60.0

_TRANSCRIBE = "Write down word for word what is said in this recording{language}. Answer with the transcript only."
_TRANSLATE = "Translate what is said in this recording{language} into English. Answer with the translation only."


@dataclass(frozen=True)
class PromptedRequest:
    """What one call asks for.

    Attributes:
        prompt: The question about each window.
        language: Code of the language spoken, where the caller says it.
        timestamps: False, or True for the times of the windows.
        name_language: Name the language of each chunk.
        segments: Add the whole segments to the result.
        window_seconds: The longest window.
        speech: Finds the parts in which something is said, and only those are heard; None hears everything.
        load_options: For `load_audio`.
        generate_kwargs: For `generate`.
    """

    prompt: str
    language: str | None = None
    timestamps: Timestamps = False
    name_language: bool = False
    segments: bool = False
    window_seconds: float = WINDOW_SECONDS
    speech: SpeechFinder | None = None
    load_options: dict[str, Any] = field(default_factory=dict)
    generate_kwargs: dict[str, Any] = field(default_factory=dict)


class PromptedSpeechRecognitionPipeline(AnsweringPipeline):
    """Transcribes audio with a model that answers questions about it.

        pipe = pipeline("automatic-speech-recognition", model="google/gemma-3n-E2B-it")
        pipe("talk.mp3")["text"]
        pipe("vortrag.mp3", task="translate", language="de", return_timestamps=True)["chunks"]

    Args:
        model: A model whose processor takes audio, like Gemma3nForConditionalGeneration.
        processor: Its processor.
        kwargs: The rest of `Pipeline`'s arguments, and defaults for the arguments of calls; assistant_model, a model
            that drafts, may be where to read it.

    Raises:
        InputError: The processor takes no audio.
    """

    task = "automatic-speech-recognition"

    def __init__(self, model: Any, processor: Any = None, **kwargs: Any) -> None:
        super().__init__(model, processor=processor, **kwargs)
        if self.feature_extractor is None or getattr(model.config, "audio_config", None) is None:
            raise InputError(
                f"{type(model).__name__}: this checkpoint does not listen (it has no audio tower); choose one that "
                "does."
            )
        self._read_assistant(AutoModelForCausalLM)

    def __call__(self, inputs: Any, *, batch_size: int | None = None, num_workers: int | None = None, **kw: Any) -> Any:
        """Transcribe one input, a list of them, or lazily whatever an iterator gives.

        Args:
            inputs: As for the Whisper pipeline: a path, bytes, an open file, samples, or a dict.
            batch_size: Windows that go through the model together.
            num_workers: Accepted for compatibility.
            kw: language: name or code of what is spoken. task: "transcribe" or "translate" (into English). prompt: the
                question, in place of these. return_timestamps: True adds "chunks" with the times of the windows.
                return_language, return_segments: as for Whisper. chunk_length_s: the longest window, at most 30.
                vad_filter, vad_parameters: leave out what is not speech. channel, layout, max_seconds, on_truncated,
                allow_urls, allowed_hosts: for `load_audio`. generate_kwargs and all others: for `generate`.

        Returns:
            {"text"} with "chunks" where times were asked for; lists and iterators of those likewise.

        Raises:
            AudioError: An input cannot be used; the message names it.
            InputError: An argument is wrong.
        """
        request = self.requested(kw)

        def results(stream: Iterator[Any], size: int) -> Iterator[dict[str, Any]]:
            for transcript in self._run(stream, size, request):
                yield transcript.to_dict(
                    return_language=request.name_language,
                    return_segments=request.segments,
                    language_names=LANGUAGES,
                )

        return self._each(inputs, results, batch_size)

    def transcribe(
        self, inputs: Any, *, batch_size: int | None = None, num_workers: int | None = None, **kw: Any
    ) -> Any:
        """Like calling the pipeline, with a typed `Transcript` in place of each dict."""
        request = self.requested(kw)
        return self._each(inputs, lambda stream, size: self._run(stream, size, request), batch_size)

    def requested(self, kwargs: dict[str, Any]) -> PromptedRequest:
        asked = {**flat(self.call_defaults), **flat(kwargs)}
        for name in ("ignore_warning", "stride_length_s", "progress"):
            asked.pop(name, None)
        timestamps = asked.pop("return_timestamps", None) or False
        if timestamps not in (True, False):
            raise InputError(
                f"return_timestamps={timestamps!r}: {type(self.model).__name__} tells no times of words; True gives "
                "the times of the windows. For words, use a Whisper model."
            )
        language, task = asked.pop("language", None), asked.pop("task", None) or "transcribe"
        if task not in ("transcribe", "translate"):
            raise InputError(f"task={task!r}: expected 'transcribe' or 'translate'.")
        code = None if language is None else language_code(language)
        question = _TRANSCRIBE if task == "transcribe" else _TRANSLATE
        spoken = "" if code is None else f", which is in {LANGUAGES[code].title()}"
        longest = self._longest_seconds()
        seconds = asked.pop("chunk_length_s", None) or longest
        if not 0 < seconds <= longest:
            raise InputError(
                f"chunk_length_s={seconds!r}: windows of this model last up to {longest:g} s; longer recordings are "
                "cut at pauses by themselves."
            )
        return PromptedRequest(
            prompt=asked.pop("prompt", None) or question.format(language=spoken),
            language=code,
            timestamps=timestamps,
            name_language=bool(asked.pop("return_language", None)),
            segments=bool(asked.pop("return_segments", None)),
            window_seconds=float(seconds),
            speech=speech_finder(asked.pop("vad_filter", None), asked.pop("vad_parameters", None)),
            load_options={name: asked.pop(name) for name in LOAD_OPTIONS if name in asked},
            generate_kwargs=self._writing(asked),
        )

    @staticmethod
    def _writing(asked: dict[str, Any]) -> dict[str, Any]:
        """Options for `generate`: the most likely words, unless the call says otherwise."""
        if (asked.get("num_return_sequences") or 1) > 1:
            raise InputError(f"num_return_sequences={asked['num_return_sequences']}: a recording has one transcript.")
        defaults: dict[str, Any] = {"do_sample": False} if "generation_config" not in asked else {}
        if "max_length" not in asked:
            defaults["max_new_tokens"] = DEFAULT_NEW_TOKENS
        return {**defaults, **asked}

    def _longest_seconds(self) -> float:
        """The longest clip that has room in a prompt, at 100 frames a second."""
        config = self.model.config
        places = getattr(config, "audio_soft_tokens_per_image", None)  # Gemma 3n: as many for every clip
        return (
            WINDOW_SECONDS
            if places is None
            else min(WINDOW_SECONDS, places * config.audio_config.frames_per_token / 100)
        )

    def _run(self, inputs: Iterator[Any], batch_size: int, request: PromptedRequest) -> Iterator[Transcript]:
        """A transcript for each input, in order; reads ahead no further than a batch."""
        found: list[Segment] = []
        for batch in batched(self._pieces(inputs, request), batch_size):
            for (piece, start), text in zip(batch, self._texts([piece for piece, _ in batch], request), strict=True):
                size, left, _ = piece.stride or (len(piece.samples), 0, 0)
                if left:
                    before, whole = found.pop(), int(request.window_seconds * self.feature_extractor.sampling_rate)
                    kept, text = seam(before.text, text, (2 * left / whole, 2 * left / size))
                    found.append(replace(before, text=kept))
                found.append(self._segment(piece, start, text, request))
                if piece.is_last:
                    yield self._transcript(piece.clip, [segment for segment in found if segment.text], request)
                    found = []

    def _pieces(self, inputs: Iterator[Any], request: PromptedRequest) -> Iterator[tuple[Piece, int]]:
        """Windows of all inputs, and the sample of its clip at which each begins."""
        rate = self.feature_extractor.sampling_rate
        length = int(request.window_seconds * rate)
        for number, item in enumerate(inputs):
            clip = read_clip(item, number, rate, **request.load_options)
            if clip.stride is not None:
                raise InputError(f"{clip.name}: 'stride' needs the times of words, which this model does not tell.")
            if request.speech is not None and len(clip.samples):
                slack = request.speech.options.speech_pad_ms / 1000
                clip = clip.only(request.speech(clip.samples, rate), rate, slack_seconds=slack)
            start = 0
            for piece in cut_at_pauses(clip, rate, length):
                size, left, _ = piece.stride or (len(piece.samples), 0, 0)
                start -= 2 * left  # both sides of a cut in speech hear the seconds around it
                yield piece, start
                start += size

    def _texts(self, pieces: list[Piece], request: PromptedRequest) -> list[str]:
        """What the model writes about each window; windows in which nothing sounds are not asked about."""
        rate = self.feature_extractor.sampling_rate
        heard = [number for number, piece in enumerate(pieces) if is_audible(piece.samples, rate)]
        texts = [""] * len(pieces)
        if not heard:
            return texts
        shortest = math.ceil(SHORTEST_SECONDS * rate)
        clips = [np.pad(pieces[at].samples, (0, max(shortest - len(pieces[at].samples), 0))) for at in heard]
        question = {"type": "text", "text": request.prompt}
        inputs = self.processor.apply_chat_template(
            [[{"role": "user", "content": [{"type": "audio", "audio": clip}, question]}] for clip in clips],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            enable_thinking=False,
            processor_kwargs={"padding": True, "padding_side": "left", "sampling_rate": rate},
        )
        output = self.generated(inputs, request.generate_kwargs)
        new = getattr(output, "sequences", output)[:, inputs["input_ids"].shape[1] :]
        for number, row in zip(heard, new, strict=True):
            texts[number] = self.written(row)
        return texts

    def written(self, tokens: Any) -> str:
        """The answer without control tokens and thoughts."""
        if hasattr(self.processor, "parse_response"):
            answer = self.processor.parse_response(tokens)
            if "reasoning_content" in answer:
                return str(answer["content"])
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True)).strip()

    def _segment(self, piece: Piece, start: int, text: str, request: PromptedRequest) -> Segment:
        rate = self.feature_extractor.sampling_rate
        _, left, right = piece.stride or (0, 0, 0)
        begin, end = (start + left) / rate, (start + len(piece.samples) - right) / rate
        if piece.clip.clock is not None:
            begin, end = piece.clip.clock.stretch(begin, end)
        return Segment(start=begin, end=end, text=text, language=request.language)

    def _transcript(self, clip: Clip, found: list[Segment], request: PromptedRequest) -> Transcript:
        rate = self.feature_extractor.sampling_rate
        samples = len(clip.samples) if clip.recording_samples is None else clip.recording_samples
        return Transcript(
            text=" ".join(segment.text for segment in found),
            segments=tuple(found),
            language=request.language,
            duration_seconds=samples / rate,
            timestamps=request.timestamps,
            extra=clip.extra,
        )


def is_audible(samples: np.ndarray, sampling_rate: int) -> bool:
    """Whether there may be something to write down: steady noise can hide speech, silence cannot."""
    levels, _ = frame_levels(samples, sampling_rate)
    if not len(levels):  # shorter than a frame
        return bool(np.any(np.abs(samples) > 10 ** (_SILENT_DB / 20)))
    return float(levels.max()) > _SILENT_DB or bool(energy_spans(samples, sampling_rate))


def seam(left: str, right: str, shares: tuple[float, float]) -> tuple[str, str]:
    """What is kept of the texts of two windows that share some seconds, so that no word is lost or doubled.

    They are joined behind the longest run of words that both have where they may have heard the same; where there is
    none of two words, both are kept whole.

    Args:
        left: What the first window heard.
        right: What the second window heard.
        shares: The part of each window that both heard; so many of its words, and half as many more, are compared.
    """
    before, after = left.split(), right.split()
    ends = [math.ceil(1.5 * share * len(words)) + 2 for share, words in zip(shares, (before, after), strict=True)]
    tail, head = before[-ends[0] :], after[: ends[1]]
    said, again = ([word.strip(".,;:!?\"'").casefold() for word in words] for words in (tail, head))
    found = SequenceMatcher(None, said, again, autojunk=False).find_longest_match()
    if found.size < min(2, len(before), len(after)) or not found.size:
        return left, right
    end = len(before) - len(tail) + found.a + found.size
    return " ".join(before[:end]), " ".join(after[found.b + found.size :])
