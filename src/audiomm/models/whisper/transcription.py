"""How Whisper transcribes: files, windows, temperatures, as one nested loop.

Each window is encoded once; its language, its silence, every temperature and its words read the same encoder output.
Rows of a batch go through their own files at their own pace, and each gives what it would give alone.

Source: arXiv:2212.04356, section 4.5; the rules of OpenAI's `transcribe`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ...base.errors import GenerationError
from ...base.outputs import BaseModelOutput, GenerateOutput
from ...generation import GenerationConfig
from .alignment import Heads, alignment_heads, last_repeated, token_probabilities, token_times
from .config import FRAMES_PER_SECOND
from .decoding import Guests, WindowDecoder
from .detection import LanguageVote
from .guards import is_silence, leave_out_imagined
from .options import (
    RESET_TEMPERATURE,
    Options,
    forced_start,
    is_multilingual,
    language_ids,
    language_token,
    languages_per_item,
    start_tokens,
)
from .protocol import Transcriber, fit_window, select
from .recordings import Recording, WindowText, collect
from .segments import Split, pad_right, split_segments, without_closing_pair
from .side_by_side import SideBySide, Windows
from .word_times import Window, add_words

#: Gives another recording that the features have gained as their next row: its frames, and its language or None for
#: that of the call. None where there is none for now.
More = Callable[[], tuple[int, str | None] | None]


class Transcription:
    """One call of generate(): its recordings, and the loop over them.

    Args:
        model: Hears and writes.
        config: Options of the call, filled in.
        options: Those of the transcription.
        features: (batch, mel bins, frames), or None where `encoded` stands for them.
        guests: What the caller brings along.
        encoded: The encoder's output for the only window of each recording.
    """

    def __init__(
        self,
        model: Transcriber,
        config: GenerationConfig,
        options: Options,
        features: Tensor | None,
        guests: Guests,
        encoded: BaseModelOutput | None = None,
    ) -> None:
        self.model, self.config, self.options = model, config, options
        self.features, self.encoded, self.guests = features, encoded, guests
        self.recordings: list[Recording] = []
        self.decoder = WindowDecoder(model, config, options, guests, self._assistant_inputs)
        self.timestamp_begin = self.decoder.timestamp_begin
        self._task: str | None = None
        self._language: str | None = None
        self._forced_language: int | None = None
        self._is_multilingual = False
        self._is_announced = False

    # ------------------------------------------------------------------ opening

    def open(self, lengths: Tensor, language: Any, task: str | None, override: bool | None) -> None:
        """Make a recording of every item, and settle its language and start tokens where they are known.

        Raises:
            GenerationError: A language or task that this model does not know, or either for an English-only one.
        """
        languages = languages_per_item(language, len(lengths))
        self._is_multilingual = is_multilingual(self.config, override)
        if not self._is_multilingual and (task is not None or any(languages)):
            what = "task" if task is not None else "language"
            raise GenerationError(
                f"{what} cannot be chosen: this model is English-only and transcribes. Leave task and language unset."
            )
        # What recordings that come later are in, where nobody says it.
        self._language = language if isinstance(language, str) else None
        self._task = task
        forced = forced_start(self.config, self.model.config)
        if self._is_multilingual and task is None and not any(languages):
            names = {int(index): name for name, index in (getattr(self.config, "task_to_id", None) or {}).items()}
            task_token = forced.get(2)
            self._task = None if task_token is None else names.get(task_token)
            self._forced_language = forced.get(1)
        for frames, one in zip(lengths.tolist(), languages, strict=True):
            self._add(int(frames), one)

    def _add(self, frames: int, language: str | None) -> Recording:
        """A recording behind the others."""
        recording = Recording(len(self.recordings), frames)
        if self.options.clips is not None:
            recording.only(self.options.clips)
        if self.options.history_ids:
            recording.history.append(torch.tensor(self.options.history_ids))
        token = self._forced_language if language is None else language_token(language, self.config)
        if token is not None or not self._is_multilingual:
            self._set_language(recording, token)
        self.recordings.append(recording)
        return recording

    def _set_language(self, recording: Recording, token: int | None) -> None:
        """Settle the language of a recording's next window, None where the model has no choice."""
        recording.start_tokens = start_tokens(
            self.config, token, self._task, self.options.timestamps, token is not None
        )
        if token is not None:
            recording.spoken = {index: code for code, index in language_ids(self.config).items()}.get(token)
            # The language of a recording is that of its first window.
            recording.language = recording.language or recording.spoken

    def _detect_languages(self, recordings: list[Recording], encoded: BaseModelOutput) -> None:
        """Settle the languages that nobody named, from windows that are encoded anyway."""
        every = self.options.multilingual and self._is_multilingual
        unknown = [place for place, one in enumerate(recordings) if every or not one.start_tokens]
        if not unknown:
            return
        # Windows after the first have been settled by one; further ones are listened to for the first alone.
        votes = {place: LanguageVote(self.options.language_detection_threshold) for place in unknown}
        self._listen(votes, unknown, encoded)
        for further in range(1, self.options.language_detection_segments):
            starts = {place: recordings[place].seek + further * self.options.window_frames for place in unknown}
            unsure = [
                place
                for place in unknown
                if not votes[place].is_settled
                and not recordings[place].start_tokens
                and self.features is not None
                and starts[place] < recordings[place].end
            ]
            if not unsure:
                break
            later = [replace(recordings[place], seek=starts[place]) for place in unsure]
            self._listen(votes, unsure, self._encode(later, self.model), rows=list(range(len(unsure))))
        for place in unknown:
            recording, code = recordings[place], votes[place].language
            self._set_language(recording, language_ids(self.config)[code])
            if recording.language_probabilities is None:
                recording.language_probabilities = votes[place].probabilities

    def _listen(
        self, votes: dict[int, LanguageVote], places: list[int], encoded: BaseModelOutput, rows: list[int] | None = None
    ) -> None:
        heard = select(encoded, places if rows is None else rows)
        _, found = self.model.detect_language(
            encoder_outputs=heard, generation_config=self.config, return_probabilities=True
        )
        for place, probabilities in zip(places, found, strict=True):
            votes[place].add(probabilities)

    # ------------------------------------------------------------------ the loop

    @contextmanager
    def stream(self) -> Iterator[None]:
        """The streamer hears of the end after the block, whatever happens in it."""
        try:
            yield
        finally:
            if self.guests.streamer is not None:
                self.guests.streamer.end()

    def run(self, monitor: Callable[[Tensor], None] | None = None) -> None:
        """Go through all windows of all recordings."""
        for _ in self.events(monitor):
            pass

    def events(
        self, monitor: Callable[[Tensor], None] | None = None, more: More | None = None
    ) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        """Go through all windows of all recordings, and tell what was found in each as soon as it is settled.

        At most `options.batch_size` windows go through the decoder at once; when one is done, the recording's next
        one takes its row, or the first of the next recording.

        Args:
            monitor: Called before windows are encoded with (recordings, 2) frames done and frames in all.
            more: Asked for another recording when there is room for one and none waits.

        Yields:
            The row of a recording in the batch, and the segments that its next window added: none where it holds no
            speech. Windows of a recording come in order, those of different recordings in turn.
        """
        ready = deque(one for one in self.recordings if not one.is_done)

        def following(count: int) -> Windows | None:
            taken: list[Recording] = []
            while len(taken) < count and (ready or self._has_more(ready, more)):
                taken.append(ready.popleft())
            if not taken:
                return None
            if monitor is not None:
                monitor(torch.tensor([[min(one.seek, one.frames), one.frames] for one in self.recordings]))
            encoded = self._windows(taken)
            self._detect_languages(taken, encoded)
            self._announce(taken)
            return encoded, taken

        size = self.options.batch_size or len(self.recordings)
        size = size if more is not None else min(size, len(self.recordings))
        for encoded, heard, texts in SideBySide(self.decoder, size).texts(following):
            windows = self._settled(encoded, heard, texts)
            # Recordings that have been begun come before those that wait.
            ready.extendleft(one for one in reversed(heard) if not one.is_done)
            for recording, window in zip(heard, windows, strict=True):
                yield recording.row, window.segments

    def _has_more(self, waiting: deque[Recording], more: More | None) -> bool:
        """Ask for another recording that has something to be heard."""
        while more is not None and not waiting and (found := more()) is not None:
            frames, language = found
            recording = self._add(frames, self._language if language is None else language)
            if not recording.is_done:
                waiting.append(recording)
        return bool(waiting)

    def _settled(self, encoded: BaseModelOutput, active: list[Recording], texts: list[WindowText]) -> list[Window]:
        """What was found in the next window of each recording; they move on to the one after it."""
        texts = self._with_tokens_measured(encoded, active, texts)
        windows = [self._window(recording, text) for recording, text in zip(active, texts, strict=True)]
        options = self.options
        if options.word_tokenizer is not None:
            pairs = self.decoder.pairs_of(encoded)
            add_words(self.model, encoded, windows, options.word_tokenizer, self._heads, options.punctuation, pairs)
        self.decoder.forget()
        for recording, window in zip(active, windows, strict=True):
            self._settle(recording, window)
        return windows

    def _announce(self, recordings: list[Recording]) -> None:
        """The streamer gets the first prompt before anything else."""
        if self.guests.streamer is not None and not self._is_announced:
            self._is_announced = True
            self.guests.streamer.put(torch.tensor([self.decoder.prompt(recording) for recording in recordings]))

    def _windows(self, active: list[Recording]) -> BaseModelOutput:
        """The encoder's output for the next window of each recording."""
        if self.encoded is not None:
            return select(self.encoded, [recording.row for recording in active])
        return self._encode(active, self.model)

    def _frames_to_read(self, recording: Recording) -> int:
        """Frames of the next window that the encoder gets as they are.

        Within one window of features the padding is what the feature extractor made it, as in training; in longer
        audio it is 0.0 from the recording's own end on, which does not depend on what else is in the batch.
        """
        assert self.features is not None, "without features the encoder's output was passed in"
        frames = self.features.shape[-1]
        is_one_window = frames <= self.model.config.window_frames and self.options.clips is None
        return min((frames if is_one_window else recording.end) - recording.seek, self.options.window_frames)

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

    def _assistant_inputs(self, encoded: BaseModelOutput, recordings: list[Recording]) -> dict[str, Any] | None:
        """What a draft model reads: this model's encoder output, or its own encoder's of the same windows."""
        assistant = self.guests.assistant
        if assistant is None or not assistant.config.is_encoder_decoder:
            return None if assistant is None else {"encoder_outputs": encoded}
        if self.features is None:
            raise GenerationError(
                "assistant_model has an encoder of its own and needs input_features; with encoder_outputs alone pass "
                "a WhisperForCausalLM, which reads them."
            )
        return {"encoder_outputs": self._encode(recordings, assistant)}

    # ------------------------------------------------------------------ from texts to segments

    def _window(self, recording: Recording, text: WindowText) -> Window:
        """What was found in the next window of a recording; nothing is added to the recording yet."""
        frames = min(recording.end - recording.seek, self.options.window_frames)
        window = Window(
            first_frame=recording.seek,
            frames=self._frames_with_audio(recording),
            start_tokens=recording.start_tokens,
            language=recording.spoken,
            speech_end_seconds=recording.spoken_until_seconds,
            frames_heard=frames,
            window_frames=self.options.window_frames,
            advance=frames,
            temperature=text.temperature,
            is_silent=is_silence(text, self.options),
        )
        if window.is_silent:
            return window
        offset = recording.seek / FRAMES_PER_SECOND
        if self.options.timestamps:
            split = split_segments(text.tokens, self.timestamp_begin, frames, offset_seconds=offset)
        else:
            split = Split([(offset, offset + frames / FRAMES_PER_SECOND, text.tokens)], frames)
        window.advance, window.is_whole = split.advance, split.is_whole
        window.segments = recording.segments_of(text, split.segments, split.end_is_estimated)
        return window

    def _whole_window(self, recording: Recording, text: WindowText) -> list[dict[str, Any]]:
        """The segments of a window that no other follows: what its end cut off is the last of them."""
        window = self._window(recording, text)
        rest = text.tokens[sum(len(one["tokens"]) for one in window.segments) :]
        if not window.is_silent and bool((rest < self.timestamp_begin).any()):
            start = window.offset_seconds + window.advance / FRAMES_PER_SECOND
            end = window.offset_seconds + window.frames_heard / FRAMES_PER_SECOND
            window.segments += recording.segments_of(text, [(start, max(start, end), rest)], end_is_estimated=True)
        return window.segments

    def _settle(self, recording: Recording, window: Window) -> None:
        """Add what stands of a window to its recording, and move on to the next."""
        options = self.options
        if options.hallucination_silence_threshold is not None:
            leave_out_imagined(window, recording.frames, options.hallucination_silence_threshold)
        if options.text_of is not None:
            window.segments = [one for one in window.segments if self._has_text(one, options.text_of)]
        tokens = [without_closing_pair(one["tokens"], self.timestamp_begin) for one in window.segments]
        recording.take(window.segments, tokens)
        recording.windows += 1
        is_forgotten = bool(options.history_ids) and not options.condition_on_prev_tokens
        if not window.is_silent and (is_forgotten or window.temperature > RESET_TEMPERATURE):
            recording.history.clear()
        # Where the encoder's output was passed in, there is no more than its one window.
        recording.go_to(recording.end if self.features is None else recording.seek + window.advance)

    @staticmethod
    def _has_text(segment: dict[str, Any], text_of: Callable[[list[int]], str]) -> bool:
        """Whether a segment lasts and says something."""
        return bool(segment["start"] != segment["end"] and text_of(segment["tokens"].tolist()).strip())

    def _with_tokens_measured(
        self, encoded: BaseModelOutput, recordings: list[Recording], texts: list[WindowText]
    ) -> list[WindowText]:
        """The texts with the times and probabilities of their tokens, where these are asked for."""
        if self.options.return_token_timestamps:
            times = self._token_times(encoded, recordings, [(text.tokens, text.is_complete) for text in texts])
            texts = [replace(text, token_times=found) for text, found in zip(texts, times, strict=True)]
        if self.options.token_probabilities:
            prompts = [self.decoder.prompt(recording) for recording in recordings]
            hidden = _hidden(encoded)
            found = token_probabilities(self.model, hidden, prompts, [text.tokens.tolist() for text in texts])
            texts = [replace(text, token_probabilities=one) for text, one in zip(texts, found, strict=True)]
        return texts

    def _token_times(
        self, encoded: BaseModelOutput, recordings: list[Recording], texts: list[tuple[Tensor, bool]]
    ) -> list[Tensor]:
        """When each token of each window was said, (tokens,), from the tokens and whether the end token followed."""
        # The last token of a text that was cut off was never read; it gets the time of the one before, as does the
        # end token in transformers.
        times = token_times(
            self.model,
            _hidden(encoded),
            [self.decoder.prompt(recording) for recording in recordings],
            [(tokens if is_complete else tokens[:-1]).tolist() for tokens, is_complete in texts],
            [self._frames_with_audio(recording) for recording in recordings],
            self._heads,
            self.decoder.pairs_of(encoded),
        )
        found = zip(times, (tokens for tokens, _ in texts), strict=True)
        return [last_repeated(seconds, len(tokens)).to(tokens.device) for seconds, tokens in found]

    def _frames_with_audio(self, recording: Recording) -> int:
        """Frames of the next window that tokens and words can lie in."""
        end = recording.end
        if self.options.num_frames is not None:
            end = min(end, self.options.num_frames[recording.row])
        return min(max(end - recording.seek, 1), self.options.window_frames)

    # ------------------------------------------------------------------ answers

    def single_pass(
        self, keep_prompt: bool, as_output: bool, with_segments: bool = False
    ) -> Tensor | dict[str, Any] | GenerateOutput:
        """One pass over the first windows, for callers who want what the decoding loop itself returns.

        Args:
            keep_prompt: Leave prompt and end token in the sequences.
            as_output: Return everything that was collected, prompt and end token in the sequences.
            with_segments: Return a dictionary with the segments of every sequence.

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
        self._detect_languages(self.recordings, encoded)
        self._announce(self.recordings)
        output, length, _ = self.decoder.run(encoded, self.recordings, self.options.temperatures[0], None)
        assert output.sequences is not None, "a loop always returns sequences"
        times = None
        if self.options.return_token_timestamps:
            times = self._single_times(encoded, output.sequences, length, keep_prompt or as_output)
        self.decoder.forget()
        if as_output:
            output.logprobs = None
            output.encoder_hidden_states, output.encoder_attentions = encoded.hidden_states, encoded.attentions
            return output if times is None else {**dict(output.items()), "token_timestamps": times}
        sequences = output.sequences
        if with_segments:
            return {**self._hypotheses(output, length, times), **({} if times is None else {"token_timestamps": times})}
        if not keep_prompt:
            rows = [self.decoder.before_end(row) for row in sequences[:, length:]]
            sequences = pad_right(rows, self.decoder.pad, sequences.device)
        return sequences if times is None else {"sequences": sequences, "token_timestamps": times}

    def _hypotheses(self, output: GenerateOutput, start: int, times: Tensor | None) -> dict[str, Any]:
        """Sequences, segments and languages of several hypotheses a recording, the best one first."""
        assert output.sequences is not None, "a loop always returns sequences"
        rows = [self.decoder.before_end(row) for row in output.sequences[:, start:]]
        count = len(rows) // len(self.recordings)
        owners = [recording for recording in self.recordings for _ in range(count)]
        texts = self.decoder.measured(output, rows, owners)
        if times is not None:
            for text, found in zip(texts, times, strict=True):
                text.token_times = found[: len(text.tokens)]
        answer = {
            "sequences": pad_right(rows, self.decoder.pad, output.sequences.device),
            "segments": [self._whole_window(one, text) for one, text in zip(owners, texts, strict=True)],
            "languages": [one.language for one in owners],
        }
        if output.sequences_scores is not None:
            answer["sequences_scores"] = output.sequences_scores
        return answer

    def _single_times(self, encoded: BaseModelOutput, sequences: Tensor, start: int, keep_prompt: bool) -> Tensor:
        """Times of the tokens of one pass, as long as its sequences; the prompt is at 0.0."""
        count = len(sequences) // len(self.recordings)
        places = [place for place in range(len(self.recordings)) for _ in range(count)]
        rows = [(self.decoder.before_end(row), row) for row in sequences[:, start:]]
        texts = [(tokens, len(tokens) < len(row)) for tokens, row in rows]
        times = self._token_times(select(encoded, places), [self.recordings[place] for place in places], texts)
        length = sequences.shape[1] - start if keep_prompt else max(len(tokens) for tokens, _ in texts)
        padded = torch.stack([last_repeated(found, length) for found in times])
        return functional.pad(padded, (start, 0)) if keep_prompt else padded

    def result(self, as_dict: bool) -> Tensor | dict[str, Any]:
        """The sequences of all recordings, alone or with their segments, languages and times."""
        with_times = self.options.return_token_timestamps
        answer = collect(self.recordings, self.decoder.pad, self.model.device, with_times=with_times)
        return answer if as_dict else answer["sequences"]

    @property
    def _heads(self) -> Heads:
        return alignment_heads(self.config, self.model.config)


def _hidden(encoded: BaseModelOutput) -> Tensor:
    assert encoded.last_hidden_state is not None, "an encoder always returns its last hidden state"
    return encoded.last_hidden_state
