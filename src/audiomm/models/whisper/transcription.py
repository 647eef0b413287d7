"""How Whisper transcribes: files, windows, temperatures, as one nested loop.

Each window is encoded once; its language, its silence and every temperature read the same encoder output. Rows of a
batch go through their own files at their own pace, and each gives what it would give alone.

Source: arXiv:2212.04356, section 4.5; the rules of OpenAI's `transcribe`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ...base.errors import GenerationError
from ...base.outputs import BaseModelOutput, GenerateOutput
from ...generation import (
    GenerationConfig,
    LogitsProcessorList,
    StoppingCriteriaList,
    WhisperTimeStampLogitsProcessor,
    build_processors,
    generate_tokens,
)
from .alignment import Heads, alignment_heads, last_repeated, token_times
from .config import FRAMES_PER_SECOND
from .options import (
    RESET_TEMPERATURE,
    Options,
    config_for,
    context_room,
    forced_start,
    is_multilingual,
    language_ids,
    language_token,
    new_token_limit,
    start_tokens,
)
from .protocol import NoSpeechProbe, Transcriber, fit_window, select
from .recordings import Recording, WindowText, collect, compression_ratio
from .segments import pad_left, pad_right, split_segments, without_closing_pair
from .word_times import Window, add_words


class Transcription:
    """One call of generate(): its recordings, and the loop over them."""

    def __init__(
        self,
        model: Transcriber,
        config: GenerationConfig,
        options: Options,
        features: Tensor | None,
        *,
        logits_processor: list[Any],
        stopping_criteria: list[Any],
        prefix_allowed_tokens_fn: Any,
        assistant: Any,
        streamer: Any,
        generator: Any,
        encoded: BaseModelOutput | None,
    ) -> None:
        self.model, self.config, self.options = model, config, options
        self.features, self.encoded = features, encoded
        self.logits_processor, self.stopping_criteria = logits_processor, stopping_criteria
        self.prefix_allowed_tokens_fn, self.streamer, self.generator = prefix_allowed_tokens_fn, streamer, generator
        self.assistant = assistant
        self.recordings: list[Recording] = []
        no_timestamps = getattr(config, "no_timestamps_token_id", None)
        #: Id of <|0.00|>; larger than any token where there are no timestamps.
        self.timestamp_begin = model.config.vocab_size if no_timestamps is None else int(no_timestamps) + 1
        #: Encoder output of the first windows, kept from language detection.
        self._first: BaseModelOutput | None = encoded

    # ------------------------------------------------------------------ opening

    def open(self, lengths: Tensor, languages: list[str | None], task: str | None, override: bool | None) -> None:
        """Settle every item's language and start tokens.

        Raises:
            GenerationError: A language or task that this model does not know, or either for an English-only one.
        """
        multilingual = is_multilingual(self.config, override)
        if not multilingual and (task is not None or any(languages)):
            what = "task" if task is not None else "language"
            raise GenerationError(
                f"{what} cannot be chosen: this model is English-only and transcribes. Leave task and language unset."
            )
        self.recordings = [Recording(row, int(frames)) for row, frames in enumerate(lengths.tolist())]
        ids = self._language_tokens(languages, task) if multilingual else [None] * len(languages)
        if multilingual and task is None and not any(languages):
            forced = forced_start(self.config, self.model.config).get(2)
            names = {int(index): name for name, index in (getattr(self.config, "task_to_id", None) or {}).items()}
            task = names.get(forced) if forced is not None else None
        codes = {index: code for code, index in language_ids(self.config).items()} if multilingual else {}
        for recording, token in zip(self.recordings, ids, strict=True):
            recording.start_tokens = start_tokens(self.config, token, task, self.options.timestamps, multilingual)
            recording.language = None if token is None else codes.get(token)

    def _language_tokens(self, languages: list[str | None], task: str | None) -> list[int | None]:
        tokens = [None if language is None else language_token(language, self.config) for language in languages]
        unknown = [row for row, token in enumerate(tokens) if token is None]
        forced = forced_start(self.config, self.model.config).get(1)
        if forced is not None and task is None and len(unknown) == len(tokens):
            return [forced] * len(tokens)
        if unknown:
            if self._first is None:
                self._first = self._windows(self.recordings)
            heard = select(self._first, unknown)
            found = self.model.detect_language(encoder_outputs=heard, generation_config=self.config)
            for row, token in zip(unknown, found.tolist(), strict=True):
                tokens[row] = token
        return tokens

    # ------------------------------------------------------------------ the loop

    @contextmanager
    def stream(self) -> Iterator[None]:
        """The first prompt goes to the streamer before the block, and its end after it, whatever happens."""
        if self.streamer is None:
            yield
            return
        try:
            self.streamer.put(torch.tensor([self._prompt(recording) for recording in self.recordings]))
            yield
        finally:
            self.streamer.end()

    def run(self, monitor: Callable[[Tensor], None] | None = None) -> None:
        """Go through all windows of all recordings."""
        while active := [recording for recording in self.recordings if not recording.is_done]:
            if monitor is not None:
                monitor(torch.tensor([[min(one.seek, one.end), one.end] for one in self.recordings]))
            encoded = self._windows(active)
            texts = self._decode_with_fallback(encoded, active)
            if self.options.return_token_timestamps:
                times = self._token_times(encoded, active, [(text.tokens, text.is_complete) for text in texts])
                texts = [replace(text, token_times=found) for text, found in zip(texts, times, strict=True)]
            windows = [self._take(recording, text) for recording, text in zip(active, texts, strict=True)]
            if self.options.word_tokenizer is not None:
                add_words(self.model, encoded, windows, self.options.word_tokenizer, self._heads)

    def _windows(self, active: list[Recording]) -> BaseModelOutput:
        """The encoder's output for the next window of each recording."""
        first, self._first = self._first, None
        if first is not None and len(first[0]) == len(active):
            return first
        return self._encode(active, self.model)

    def _frames_to_read(self, recording: Recording) -> int:
        """Frames of the next window that the encoder gets as they are.

        Within one window of features the padding is what the feature extractor made it, as in training; in longer
        audio it is 0.0 from the recording's own end on, which does not depend on what else is in the batch.
        """
        assert self.features is not None, "without features the encoder's output was passed in"
        frames = self.features.shape[-1]
        end = frames if frames <= self.model.config.window_frames else recording.end
        return min(end - recording.seek, self.options.window_frames)

    def _encode(self, recordings: list[Recording], model: Any) -> BaseModelOutput:
        """The output of a model's encoder for the next window of each recording, padded at the right with 0.0."""
        assert self.features is not None, "without features the encoder's output was passed in"
        size = self.model.config.window_frames
        windows = [
            fit_window(self.features[one.row : one.row + 1, :, one.seek : one.seek + self._frames_to_read(one)], size)
            for one in recordings
        ]
        encoded = model.get_encoder()(
            torch.cat(windows).to(self.model.device),
            output_attentions=self.config.output_attentions,
            output_hidden_states=self.config.output_hidden_states,
        )
        assert isinstance(encoded, BaseModelOutput), "the encoder returns a dataclass unless told otherwise"
        return encoded

    def _decode_with_fallback(self, encoded: BaseModelOutput, active: list[Recording]) -> list[WindowText]:
        """Decode windows at rising temperatures until each one's text is good enough; the last try stands."""
        texts: dict[int, WindowText] = {}
        pending = list(range(len(active)))
        for temperature in self.options.temperatures:
            tried = self._decode(select(encoded, pending), [active[place] for place in pending], temperature)
            texts.update(zip(pending, tried, strict=True))
            pending = [place for place in pending if self._needs_fallback(texts[place])]
            if not pending:
                break
        return [texts[place] for place in range(len(active))]

    def _needs_fallback(self, text: WindowText) -> bool:
        options = self.options
        repeats = (
            options.compression_ratio_threshold is not None
            and text.compression_ratio > options.compression_ratio_threshold
        )
        doubtful = options.logprob_threshold is not None and text.average_logprob < options.logprob_threshold
        return (repeats or doubtful) and not self._is_silence(text)

    def _is_silence(self, text: WindowText) -> bool:
        """No speech is likely, and the text is not so certain that it must be speech all the same."""
        options = self.options
        if options.no_speech_threshold is None or text.no_speech_probability is None:
            return False
        certain = options.logprob_threshold is not None and text.average_logprob > options.logprob_threshold
        return text.no_speech_probability > options.no_speech_threshold and not certain

    def _token_times(
        self, encoded: BaseModelOutput, recordings: list[Recording], texts: list[tuple[Tensor, bool]]
    ) -> list[Tensor]:
        """When each token of each window was said, (tokens,), from the tokens and whether the end token followed."""
        hidden = encoded.last_hidden_state
        assert hidden is not None, "an encoder always returns its last hidden state"
        # The last token of a text that was cut off was never read; it gets the time of the one before, as does the
        # end token in transformers.
        times = token_times(
            self.model,
            hidden,
            [self._prompt(recording) for recording in recordings],
            [(tokens if is_complete else tokens[:-1]).tolist() for tokens, is_complete in texts],
            [self._frames_with_audio(recording) for recording in recordings],
            self._heads,
        )
        pairs = zip(times, (tokens for tokens, _ in texts), strict=True)
        return [last_repeated(found, len(tokens)).to(tokens.device) for found, tokens in pairs]

    def _frames_with_audio(self, recording: Recording) -> int:
        """Frames of the next window that tokens and words can lie in."""
        end = recording.end
        if self.options.num_frames is not None:
            end = min(end, self.options.num_frames[recording.row])
        return min(max(end - recording.seek, 1), self.options.window_frames)

    def _take(self, recording: Recording, text: WindowText) -> Window:
        """Add a window's text to its recording and move on to the next window."""
        frames = min(recording.end - recording.seek, self.options.window_frames)
        window = Window(
            first_frame=recording.seek,
            frames=self._frames_with_audio(recording),
            start_tokens=recording.start_tokens,
            language=recording.language,
            speech_end_seconds=float(recording.segments[-1]["end"]) if recording.segments else 0.0,
        )
        recording.windows += 1
        if self._is_silence(text):
            recording.seek += frames
            return window
        if self.options.timestamps:
            offset = recording.seek / FRAMES_PER_SECOND
            split = split_segments(text.tokens, self.timestamp_begin, frames, offset_seconds=offset)
            pieces, advance = split.segments, split.advance
        else:
            pieces, advance = [(0.0, recording.end / FRAMES_PER_SECOND, text.tokens)], frames
        window.segments = recording.take(text, pieces)
        recording.history += [without_closing_pair(tokens, self.timestamp_begin) for _, _, tokens in pieces]
        if text.temperature > RESET_TEMPERATURE:
            recording.history.clear()
        recording.seek += advance
        return window

    # ------------------------------------------------------------------ one pass over some windows

    def _decode(
        self, encoded: BaseModelOutput, recordings: list[Recording], temperature: float | None
    ) -> list[WindowText]:
        """Decode one window of each recording at one temperature."""
        prompts = [self._prompt(recording) for recording in recordings]
        output, prompt_length, probe = self._pass(encoded, prompts, temperature, recordings)
        assert output.sequences is not None, "a loop always returns sequences"
        rows = output.sequences[:, prompt_length:]
        averages = self._averages(output, rows)
        silences = None if probe is None or probe.probability is None else probe.probability.tolist()
        used = temperature if temperature is not None else (self.config.temperature if self.config.do_sample else 0.0)
        texts = []
        for place, row in enumerate(rows):
            tokens = self._before_end(row)
            texts.append(
                WindowText(
                    tokens=tokens,
                    temperature=float(used or 0.0),
                    average_logprob=averages[place],
                    compression_ratio=compression_ratio(tokens, self.model.config.vocab_size),
                    no_speech_probability=None if silences is None else silences[place],
                    is_complete=len(tokens) < len(row),
                )
            )
        return texts

    def _pass(
        self,
        encoded: BaseModelOutput,
        prompts: list[list[int]],
        temperature: float | None,
        recordings: list[Recording],
    ) -> tuple[GenerateOutput, int, NoSpeechProbe | None]:
        """Run the decoder; the output, the length of the padded prompt, and the no-speech probe."""
        device = encoded.last_hidden_state.device  # type: ignore[union-attr]
        pad = self.config.pad_token_id
        prompt, mask = pad_left(prompts, int(self.config.eos_ids[0] if pad is None else pad), device)
        length = prompt.shape[1]
        start_count = len(self.recordings[0].start_tokens)
        limit = new_token_limit(self.config, self.model.config, self.options, length, start_count)
        config = config_for(self.config, temperature, length, limit)
        rules: list[Any] = []
        if self.options.timestamps:
            rules.append(WhisperTimeStampLogitsProcessor(config, begin_index=length))
        processors = build_processors(
            config,
            prompt_length=length,
            max_length=length + limit,
            prompt_mask=mask,
            prefix_allowed_tokens_fn=self.prefix_allowed_tokens_fn,
            model_processors=rules,
            user_processors=self.logits_processor,
        )
        probe = self._probe(prompts)
        output = generate_tokens(
            self.model,  # type: ignore[arg-type]
            prompt,
            config,
            model_inputs={"encoder_outputs": encoded, "probe": probe},
            prompt_mask=mask,
            processors=LogitsProcessorList(processors),
            stopping=StoppingCriteriaList(self.stopping_criteria),
            streamer=self.streamer,
            stream_goes_on=True,
            generator=self.generator,
            logprobs=True,
            assistant_model=self.assistant,
            assistant_inputs=self._assistant_inputs(encoded, recordings),
        )
        return output, length, probe

    def _assistant_inputs(self, encoded: BaseModelOutput, recordings: list[Recording]) -> dict[str, Any] | None:
        """What a draft model reads: this model's encoder output, or its own encoder's of the same windows."""
        if self.assistant is None or not self.assistant.config.is_encoder_decoder:
            return None if self.assistant is None else {"encoder_outputs": encoded}
        if self.features is None:
            raise GenerationError(
                "assistant_model has an encoder of its own and needs input_features; with encoder_outputs alone pass "
                "a WhisperForCausalLM, which reads them."
            )
        return {"encoder_outputs": self._encode(recordings, self.assistant)}

    def _probe(self, prompts: list[list[int]]) -> NoSpeechProbe | None:
        """A no-speech probe, where the vocabulary has a token for it and the rows start at the same place."""
        start = self.recordings[0].start_tokens[0]
        places = {len(prompt) - prompt.index(start) for prompt in prompts if start in prompt}
        if self.timestamp_begin >= self.model.config.vocab_size or len(places) != 1:
            return None
        # <|nospeech|> stands before <|notimestamps|> in every published vocabulary.
        return NoSpeechProbe(token=self.timestamp_begin - 2, places_from_end=places.pop())

    def _prompt(self, recording: Recording) -> list[int]:
        """Earlier text and the start tokens of a recording's next window."""
        options = self.options
        given = [] if options.prompt_ids is None else options.prompt_ids.tolist()
        # The prompt begins with <|startofprev|>, which stands in front of whatever is kept.
        opening = given[:1] or [self._previous_start()]
        room = context_room(self.config, self.model.config, len(recording.start_tokens))
        words = _last(given[1:], room)
        past = [token for piece in recording.history for token in piece.tolist()]
        if options.prompt_condition_type == "all-segments":
            text = words + (_last(past, room - len(words)) if options.condition_on_prev_tokens else [])
        elif options.condition_on_prev_tokens:
            text = _last(words + past, room)
        else:
            text = words if not recording.windows else []
        if not text or opening == [None]:
            return recording.start_tokens
        return [*opening, *text, *recording.start_tokens]

    def _previous_start(self) -> int | None:
        token = getattr(self.config, "prev_sot_token_id", None)
        if token is None and self.timestamp_begin < self.model.config.vocab_size:
            # <|startofprev|>, <|nospeech|>, <|notimestamps|>, <|0.00|> in every published vocabulary.
            token = self.timestamp_begin - 3
        return token

    def _before_end(self, row: Tensor) -> Tensor:
        """The tokens of a row before its first end token."""
        ends = torch.isin(row, torch.tensor(self.config.eos_ids, device=row.device))
        found = ends.nonzero()
        return row[: int(found[0])] if len(found) else row

    def _averages(self, output: GenerateOutput, rows: Tensor) -> list[float]:
        """Average log-probability of each row's tokens; beam searches have it as their score."""
        if output.sequences_scores is not None:
            return [float(score) for score in output.sequences_scores]
        if output.logprobs is None:
            return [math.nan] * len(rows)
        # The end token counts, and where the limit came first the missing one does too, as with OpenAI.
        lengths = [len(self._before_end(row)) + 1 for row in rows]
        return [total / length for total, length in zip(output.logprobs.tolist(), lengths, strict=True)]

    # ------------------------------------------------------------------ answers

    def single_pass(self, keep_prompt: bool, as_output: bool) -> Tensor | dict[str, Any] | GenerateOutput:
        """One pass over the first windows, for callers who want what the decoding loop itself returns.

        Args:
            keep_prompt: Leave prompt and end token in the sequences.
            as_output: Return everything that was collected, prompt and end token in the sequences.

        Returns:
            Sequences alone, or everything; a dictionary with "token_timestamps" where those are asked for.

        Raises:
            GenerationError: There is more than one window and more than one sequence is wanted.
        """
        count = self.config.num_return_sequences or 1
        if count > 1 and any(one.end > self.options.window_frames for one in self.recordings):
            raise GenerationError(
                f"num_return_sequences={count} with audio longer than one window: the windows of several hypotheses "
                "would part. Pass one window at a time, or num_return_sequences=1."
            )
        encoded = self._windows(self.recordings)
        prompts = [self._prompt(recording) for recording in self.recordings]
        output, length, _ = self._pass(encoded, prompts, self.options.temperatures[0], self.recordings)
        assert output.sequences is not None, "a loop always returns sequences"
        times = None
        if self.options.return_token_timestamps:
            times = self._single_times(encoded, output.sequences, length, keep_prompt or as_output)
        if as_output:
            output.logprobs = None
            output.encoder_hidden_states, output.encoder_attentions = encoded.hidden_states, encoded.attentions
            return output if times is None else {**dict(output.items()), "token_timestamps": times}
        sequences = output.sequences
        if not keep_prompt:
            rows = [self._before_end(row) for row in sequences[:, length:]]
            sequences = pad_right(rows, self._pad, sequences.device)
        return sequences if times is None else {"sequences": sequences, "token_timestamps": times}

    def _single_times(self, encoded: BaseModelOutput, sequences: Tensor, start: int, keep_prompt: bool) -> Tensor:
        """Times of the tokens of one pass, as long as its sequences; the prompt is at 0.0."""
        count = len(sequences) // len(self.recordings)
        places = [place for place in range(len(self.recordings)) for _ in range(count)]
        rows = [(self._before_end(row), row) for row in sequences[:, start:]]
        texts = [(tokens, len(tokens) < len(row)) for tokens, row in rows]
        times = self._token_times(select(encoded, places), [self.recordings[place] for place in places], texts)
        length = sequences.shape[1] - start if keep_prompt else max(len(tokens) for tokens, _ in texts)
        padded = torch.stack([last_repeated(found, length) for found in times])
        return functional.pad(padded, (start, 0)) if keep_prompt else padded

    def result(self, as_dict: bool) -> Tensor | dict[str, Any]:
        """The sequences of all recordings, alone or with their segments, languages and times."""
        with_times = self.options.return_token_timestamps
        answer = collect(self.recordings, self._pad, self.model.device, with_times=with_times)
        return answer if as_dict else answer["sequences"]

    @property
    def _heads(self) -> Heads:
        return alignment_heads(self.config, self.model.config)

    @property
    def _pad(self) -> int:
        pad = self.config.pad_token_id
        return int(self.config.eos_ids[0] if pad is None else pad)


def _last(tokens: list[int], count: int) -> list[int]:
    return tokens[-count:] if count > 0 else []
