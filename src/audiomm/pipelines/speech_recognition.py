"""Speech to text: any audio in, a transcript out.

Audio of up to one window (30 s) is one pass of the model. Longer audio is sequential by default: generation moves
through it window by window, each starting where the previous one stopped speaking, and files of a batch move side by
side. With `chunk_length_s` it is cut into overlapping windows that are decoded independently and merged where they
overlap; with `batch_size` for one long recording it is cut at pauses, and the windows are decoded side by side. Times
are those of the segments that generation returned; only the merge of windows reads them from tokens.

The interface is that of transformers' AutomaticSpeechRecognitionPipeline.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from ..auto import AutoModelForSpeechSeq2Seq
from ..base.errors import InputError
from ..base.languages import LANGUAGES
from ..base.transcript import Segment, Transcript
from .assembly import Assembler, Heard
from .base import Pipeline, batched, is_single, positive
from .clips import Clip, Piece, cut, done_ahead, read_clip, time_spans
from .features import RecordingFeatures, recording_features
from .live import LiveTranscriber
from .progress import progress_bar
from .request import Request, flat
from .rows import SideBySide
from .windows import cut_at_pauses

logger = logging.getLogger("audiomm.pipelines")

#: Anything shorter holds no speech: the transcript is empty.
MIN_DURATION_SECONDS = 0.1


#: What `transcribe` and `stream` do unless told otherwise, and transformers does not.
_GUARDS = {"break_loops": True}


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
        kwargs: The rest of `Pipeline`'s arguments, and defaults for the arguments of calls; assistant_model, a model
            that drafts, may be where to read it.

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
        for name, ability in (("tokenizer", "_decode_asr"), ("feature_extractor", "sampling_rate")):
            part = getattr(self, name)
            if part is None:
                raise InputError(f"{name}: {type(model).__name__} needs one; pass {name}= or processor=.")
            if not hasattr(part, ability):
                raise InputError(f"{name} is a {type(part).__name__}, not that of a {type(model).__name__}.")
        self._read_assistant(AutoModelForSpeechSeq2Seq)
        self._request(dict(self.call_defaults))

    def __call__(
        self, inputs: Any, *, batch_size: int | None = None, num_workers: int | None = None, **kwargs: Any
    ) -> Any:
        """Transcribe one input, a list of them, or lazily whatever an iterator gives.

        Args:
            inputs: A path or URL, the bytes of an audio file, an open file, mono samples at the model's rate as
                array or tensor (integers are scaled), or a dict of "raw" or "array" and "sampling_rate". Channels
                come first. Other keys of a dict go to the result.
            batch_size: How many inputs go through the model together; for one input, how many of its windows: those
                of `chunk_length_s`, else windows cut at pauses, which give the same words as going through the
                recording sequentially where pauses are found. A list of one recording goes sequentially.
            num_workers: How many inputs are read ahead by threads of their own while others are heard. None is 1 for
                lists where the model is on a GPU, else 0: an iterator is asked for one more only when it is needed.
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
        request = self._request(kwargs, at_once=self._at_once(inputs, batch_size))

        def results(stream: Iterator[Any], size: int) -> Iterator[dict[str, Any]]:
            for transcript in self._run(stream, size, request, self._readers(inputs, num_workers)):
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
                (language, task, max_new_tokens, num_beams, ...). break_loops is True here; with num_return_sequences
                above 1 the transcript has the others as `alternatives`.
        """
        request = self._request({**_GUARDS, **flat(kwargs)}, read_again=True, at_once=self._at_once(inputs, batch_size))
        readers = self._readers(inputs, num_workers)
        return self._each(inputs, lambda stream, size: self._run(stream, size, request, readers), batch_size)

    def stream(
        self,
        inputs: Any,
        *,
        sampling_rate: int | None = None,
        step_seconds: float = 1.0,
        memory_seconds: float = 15.0,
        **kwargs: Any,
    ) -> Iterator[Segment]:
        """Segments as they are decided, while the rest of the audio is still waiting, or still to be said.

        Args:
            inputs: One input as for a call, of any length; or an iterator of samples that come live, in pieces of any
                size: float arrays or tensors, or integers, which are scaled by their type.
            sampling_rate: Of live samples in Hz; None is the model's.
            step_seconds: See `LiveTranscriber`; for live samples only.
            memory_seconds: Likewise.
            kwargs: As for `transcribe`, but chunk_length_s: a stream goes through audio sequentially.

        Returns:
            An iterator of segments; those of live samples have words, and no segment changes what came before it.

        Raises:
            AudioError: The input cannot be used.
            InputError: An argument is wrong.
        """
        if not is_single(inputs):
            live = LiveTranscriber(self, sampling_rate, step_seconds, memory_seconds, **kwargs)
            return live.segments(inputs)
        if sampling_rate is not None:
            raise InputError(
                f"sampling_rate={sampling_rate} is for an iterator of live samples; a recording has its own, or pass "
                "{'array': samples, 'sampling_rate': rate}."
            )
        request = self._request({"return_timestamps": True, **_GUARDS, **flat(kwargs)}, read_again=True)
        if request.chunk_length_s:
            raise InputError(
                f"chunk_length_s={request.chunk_length_s:g}: a stream goes through audio sequentially; leave it out."
            )
        return self._stream(inputs, request)

    def _stream(self, item: Any, request: Request) -> Iterator[Segment]:
        assembler, rate = self._assembler(), self.feature_extractor.sampling_rate
        clip = self._chosen(read_clip(item, 0, rate, **request.load_options), request)
        if len(clip.samples) < MIN_DURATION_SECONDS * rate:
            return
        piece = Piece(clip, clip.samples)
        is_long = self._is_long(piece)
        features = self._features([piece], is_long)
        kwargs = self._generate_kwargs([piece], is_long, request)
        with progress_bar(kwargs, features.mask, is_long, request.progress):
            for _, found in self.model.stream_segments(features, attention_mask=features.mask, **kwargs):
                yield from assembler.segments(Heard(piece, found))

    def _request(self, kwargs: dict[str, Any], read_again: bool = False, at_once: int | None = None) -> Request:
        """The request of a call: its own arguments over the pipeline's."""
        return Request.from_keywords(
            {**flat(self.call_defaults), **flat(kwargs)},
            tokenizer=self.tokenizer,
            generation_config=self.model.generation_config,
            read_again=read_again,
            at_once=at_once,
        )

    def _at_once(self, inputs: Any, batch_size: int | None) -> int | None:
        """Windows of one recording that go through the model together; None for several inputs, which go together."""
        size = self.batch_size if batch_size is None else positive("batch_size", batch_size)
        return size if size > 1 and is_single(inputs) else None

    def _readers(self, inputs: Any, num_workers: int | None) -> int:
        """Threads that read inputs ahead."""
        num_workers = self.num_workers if num_workers is None else num_workers
        if num_workers is None:
            return int(self.device.type == "cuda" and isinstance(inputs, (list, tuple)))
        return positive("num_workers", num_workers) if num_workers else 0

    # The way of an input

    def _run(self, inputs: Iterator[Any], batch_size: int, request: Request, readers: int) -> Iterator[Transcript]:
        """A transcript for each input, in order; reads ahead no further than a batch and what readers have."""
        assembler = self._assembler()
        heard_of_clip: list[Heard] = []
        for heard in self._heard(self._pieces(inputs, request, readers), batch_size, request):
            heard_of_clip.append(heard)
            if heard.piece.is_last:
                yield assembler.transcript(heard_of_clip, request.timestamps, request.language)
                heard_of_clip = []

    def _heard(self, pieces: Iterator[Piece], batch_size: int, request: Request) -> Iterator[Heard]:
        """What the model hears in each piece, in order."""
        if request.at_once:
            # The windows of one recording go to the model together, which takes the next one as soon as it has room.
            yield from self._hear(list(pieces), request)
        elif request.chunk_length_s or batch_size == 1:
            for batch in batched(pieces, batch_size):
                yield from self._hear(batch, request)
        else:
            yield from SideBySide(
                pieces,
                batch_size,
                self._is_long,
                lambda batch: self._hear(batch, request),
                lambda first, more: self._hear_long(first, more, batch_size, request),
            )

    def _hear_long(
        self, first: Piece, more: Callable[[], Piece | None], batch_size: int, request: Request
    ) -> Iterator[Heard]:
        """What the model hears in long pieces, each of which takes the row of one that is done."""
        features = self._features([first], True)
        kwargs = {**self._generate_kwargs([first], True, request), "batch_size": batch_size}
        under_way = {0: first}
        languages: Any = request.generate_kwargs.get("language")

        def following() -> tuple[int, str | None] | None:
            piece = more()
            if piece is None:
                return None
            under_way[len(features.clips)] = piece
            of_each = isinstance(languages, (list, tuple))
            return features.append(piece.samples), _languages_of([piece], languages)[0] if of_each else None

        with progress_bar(kwargs, features.mask, True, request.progress):
            stream = self.model.stream_recordings(features, attention_mask=features.mask, more=following, **kwargs)
            for row, found in stream:
                features.drop(row)
                yield Heard(under_way.pop(row), found["segments"], found["language"])

    def _is_long(self, piece: Piece) -> bool:
        # Samples that fill no further frame make no second window.
        extractor = self.feature_extractor
        return len(piece.samples) // int(extractor.hop_length) > int(extractor.nb_max_frames)

    def _assembler(self) -> Assembler:
        extractor = self.feature_extractor
        time_precision = extractor.chunk_length / self.model.config.max_source_positions
        return Assembler(self.tokenizer, extractor.sampling_rate, time_precision)

    def _pieces(self, inputs: Iterator[Any], request: Request, readers: int) -> Iterator[Piece]:
        rate = self.feature_extractor.sampling_rate
        length = round(request.chunk_length_s * rate)
        left, right = (round(seconds * rate) for seconds in request.stride_length_s)
        options = request.load_options
        reads = (partial(read_clip, item, number, rate, **options) for number, item in enumerate(inputs))
        for clip in (self._chosen(clip, request) for clip in done_ahead(reads, readers)):
            if request.at_once and clip.stride is None:
                yield from cut_at_pauses(clip, rate, self.feature_extractor.n_samples)
            else:
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
                groups.setdefault(self._is_long(piece), []).append(index)
        for is_long, indices in groups.items():
            results = self._generate([pieces[index] for index in indices], is_long, request)
            heard.update(zip(indices, results, strict=True))
        return [heard[index] for index in range(len(pieces))]

    def _generate(self, pieces: list[Piece], is_long: bool, request: Request) -> list[Heard]:
        features = self._features(pieces, is_long)
        kwargs = self._generate_kwargs(pieces, is_long, request)
        if request.at_once:
            kwargs["batch_size"] = request.at_once
        # A batch of single windows is read at once; more is read when its turn comes.
        inputs = features if is_long or request.at_once else features[:, :, :]
        with torch.no_grad(), progress_bar(kwargs, features.mask, is_long or bool(request.at_once), request.progress):
            output = self.model.generate(inputs, attention_mask=features.mask, return_segments=True, **kwargs)
        found = output["segments"]
        # Several hypotheses of a piece stand side by side, the best one first.
        count = len(found) // len(pieces)
        rows = range(0, len(found), count)
        languages = (output.get("languages") or [None] * len(found))[::count]
        return [
            Heard(piece, found[row], language, tuple(found[row + 1 : row + count]))
            for piece, row, language in zip(pieces, rows, languages, strict=True)
        ]

    def _features(self, pieces: list[Piece], is_long: bool) -> RecordingFeatures:
        clips = [piece.samples for piece in pieces]
        return recording_features(self.feature_extractor, clips, is_long, self.device, self.dtype)

    def _generate_kwargs(self, pieces: list[Piece], is_long: bool, request: Request) -> dict[str, Any]:
        """Arguments of `generate` for some pieces."""
        # Without timestamps there is no telling where the next window of long audio starts; they stay inside.
        kwargs = {**request.generate_kwargs, "return_timestamps": is_long or bool(request.timestamps)}
        if isinstance(kwargs.get("language"), (list, tuple)):
            kwargs["language"] = _languages_of(pieces, kwargs["language"])
        # Windows cut in the middle of speech are joined by the times of their words.
        if request.read_again or any(piece.part and piece.stride for piece in pieces):
            kwargs.update(word_timestamps=True, tokenizer=self.tokenizer)
        elif request.timestamps == "word":
            kwargs["return_token_timestamps"] = True
        return kwargs


def _languages_of(pieces: list[Piece], languages: Sequence[str | None]) -> list[str | None]:
    """The languages of the inputs that the pieces belong to, out of a list with one for each input."""
    highest = max(piece.clip.number for piece in pieces)
    if highest >= len(languages):
        raise InputError(
            f"language holds {len(languages)} entries, and input {highest} has none; pass one for each input, or one "
            "for all."
        )
    return [languages[piece.clip.number] for piece in pieces]
