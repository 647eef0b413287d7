"""From encoded windows to their texts: prompts, one pass of the decoder at a temperature, and what it gave.

Source: arXiv:2212.04356, section 4.5; the rules of OpenAI's `decode`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ...base.outputs import BaseModelOutput, GenerateOutput
from ...generation import (
    GenerationConfig,
    LogitsProcessorList,
    StoppingCriteriaList,
    WhisperTimeStampLogitsProcessor,
    build_processors,
    generate_tokens,
    make_request,
)
from ...generation.decode import DecodeRequest
from ...generation.patience import length_divisor
from ...layers.cache import Cache
from .alignment import Pairs
from .guards import better, find_loop, needs_fallback, without_loop
from .options import Options, config_for, context_room, new_token_limit
from .protocol import NoSpeechProbe, Transcriber, select
from .recordings import Recording, WindowText, compression_ratio, text_compression_ratio
from .segments import pad_left


@dataclass
class Guests:
    """What the caller of generate() brings along: rules, criteria, a draft model, a streamer, random numbers."""

    logits_processor: list[Any] = field(default_factory=list)
    stopping_criteria: list[Any] = field(default_factory=list)
    prefix_allowed_tokens_fn: Any = None
    assistant: Any = None
    streamer: Any = None
    generator: Any = None


class WindowDecoder:
    """Decodes windows that are encoded already.

    Args:
        model: Whose decoder writes.
        config: Options of the call, filled in.
        options: Those of the transcription.
        guests: What the caller brings along.
        assistant_inputs: What the draft model reads, from the encoder's output and the recordings.
    """

    def __init__(
        self,
        model: Transcriber,
        config: GenerationConfig,
        options: Options,
        guests: Guests,
        assistant_inputs: Callable[[BaseModelOutput, list[Recording]], dict[str, Any] | None],
    ) -> None:
        self.model, self.config, self.options, self.guests = model, config, options, guests
        self._assistant_inputs = assistant_inputs
        no_timestamps = getattr(config, "no_timestamps_token_id", None)
        self._heard: tuple[BaseModelOutput, Pairs] | None = None
        #: Id of <|0.00|>; larger than any token where there are no timestamps.
        self.timestamp_begin = model.config.vocab_size if no_timestamps is None else int(no_timestamps) + 1

    def pairs_of(self, encoded: BaseModelOutput) -> Pairs | None:
        """What the decoder's layers made of `encoded`, if the last pass read just that; see `forget`."""
        return self._heard[1] if self._heard is not None and self._heard[0] is encoded else None

    def remember(self, encoded: BaseModelOutput, pairs: Pairs) -> None:
        """Keep what the decoder's layers made of `encoded`, for `pairs_of`."""
        self._heard = (encoded, pairs)

    def forget(self) -> None:
        """Let go of what the last pass left for `pairs_of`."""
        self._heard = None

    # ------------------------------------------------------------------ temperatures

    def best_texts(
        self, encoded: BaseModelOutput, recordings: list[Recording], first: list[WindowText] | None = None
    ) -> list[WindowText]:
        """Decode the next window of each recording at rising temperatures until its text is good enough.

        Args:
            first: What they came to at the first temperature, where that is known.
        """
        texts = dict(enumerate(first or ()))
        pending = [place for place in range(len(recordings)) if place not in texts or self.may_climb(texts[place])]
        for temperature in self.options.temperatures[0 if first is None else 1 :]:
            if not pending:
                break
            tried = self._texts_at(select(encoded, pending), [recordings[place] for place in pending], temperature)
            for place, text in zip(pending, tried, strict=True):
                is_rival = place in texts and self.options.keep_best and needs_fallback(text, self.options)
                texts[place] = better(texts[place], text, self.options) if is_rival else text
            pending = [place for place, text in zip(pending, tried, strict=True) if needs_fallback(text, self.options)]
        return [self._cut(texts[place], recording) for place, recording in enumerate(recordings)]

    def may_climb(self, text: WindowText) -> bool:
        """Whether a text of the first temperature is to be decoded again, at the next."""
        return len(self.options.temperatures) > 1 and needs_fallback(text, self.options)

    def _cut(self, text: WindowText, recording: Recording) -> WindowText:
        """A text that repeats itself at the last temperature, too, without the repetitions."""
        if not text.has_loop:
            return text
        frames = min(recording.end - recording.seek, self.options.window_frames)
        kept = without_loop(text.tokens, self.timestamp_begin, frames)
        return text if kept is None else replace(text, tokens=kept, compression_ratio=self._compression(kept))

    def _texts_at(
        self, encoded: BaseModelOutput, recordings: list[Recording], temperature: float | None
    ) -> list[WindowText]:
        """Decode one window of each recording at one temperature."""
        texts: dict[int, WindowText] = {}
        for places in self.groups(recordings):
            found = self._decode(select(encoded, places), [recordings[place] for place in places], temperature)
            texts.update(zip(places, found, strict=True))
        return [texts[place] for place in range(len(recordings))]

    def groups(self, recordings: list[Recording]) -> list[list[int]]:
        """Places of recordings whose next windows can be decoded in one pass.

        First windows that have a prefix go apart, and those whose prompt leaves less room than others'.
        """
        groups: dict[tuple[int, int | None], list[int]] = {}
        for place, recording in enumerate(recordings):
            groups.setdefault((len(self.prefix(recording)), self._own_limit(recording)), []).append(place)
        return list(groups.values())

    # ------------------------------------------------------------------ one pass

    def _decode(
        self, encoded: BaseModelOutput, recordings: list[Recording], temperature: float | None
    ) -> list[WindowText]:
        output, prompt_length, probe = self.run(encoded, recordings, temperature, self.options.best_of)
        silences = (
            [None] * len(recordings) if probe is None or probe.probability is None else probe.probability.tolist()
        )
        return self.texts_of(output, prompt_length, recordings, silences, temperature)

    def texts_of(
        self,
        output: GenerateOutput,
        prompt_length: int,
        recordings: list[Recording],
        silences: list[float | None],
        temperature: float | None,
    ) -> list[WindowText]:
        """The text of each recording's window, the likeliest one where several were drawn."""
        assert output.sequences is not None, "a loop always returns sequences"
        rows = output.sequences[:, prompt_length:]
        texts = [self.before_end(row) for row in rows]
        stands = self._likeliest(output, texts, len(recordings))
        owners = [recording for recording in recordings for _ in range(len(texts) // len(recordings))]
        found = self.measured(output, texts, owners, temperature)
        for best, silence in zip(stands, silences, strict=True):
            text = found[best]
            text.is_complete = len(texts[best]) < rows.shape[1]
            text.no_speech_probability = silence
        return [found[best] for best in stands]

    def measured(
        self, output: GenerateOutput, texts: list[Tensor], recordings: list[Recording], temperature: float | None = None
    ) -> list[WindowText]:
        """Texts (length,) of a pass over the next windows of recordings, with what is asked of them."""
        averages = self._averages(output, texts)
        used = temperature if temperature is not None else (self.config.temperature if self.config.do_sample else 0.0)
        found = []
        for text, average, recording in zip(texts, averages, recordings, strict=True):
            tokens = torch.cat((torch.tensor(self.prefix(recording), dtype=torch.long, device=text.device), text))
            words = [token for token in tokens.tolist() if token < self.timestamp_begin]
            found.append(
                WindowText(
                    tokens=tokens,
                    temperature=float(used or 0.0),
                    average_logprob=average,
                    compression_ratio=self._compression(tokens),
                    no_speech_probability=None,
                    has_loop=self.options.break_loops and find_loop(words) is not None,
                )
            )
        return found

    def _likeliest(self, output: GenerateOutput, texts: list[Tensor], count: int) -> list[int]:
        """Of the texts drawn for each window, the place of the one that stands; the score is that of searches."""
        copies = len(texts) // count
        if copies == 1 or output.logprobs is None:
            return list(range(0, len(texts), copies))
        lengths = torch.tensor([len(text) for text in texts], device=output.logprobs.device)
        scores = output.logprobs / length_divisor(self.config, lengths)
        return [window * copies + int(best) for window, best in enumerate(scores.view(count, copies).argmax(dim=1))]

    def run(
        self, encoded: BaseModelOutput, recordings: list[Recording], temperature: float | None, best_of: int | None
    ) -> tuple[GenerateOutput, int, NoSpeechProbe | None]:
        """Run the decoder over the next window of recordings of one group; see `_texts_at`.

        Returns:
            The output; the length of the padded prompt, prefix included; and the no-speech probe.
        """
        request, probe = self.request(encoded, recordings, temperature, best_of)
        self.forget()
        output = generate_tokens(
            request,
            stream_goes_on=True,
            assistant_model=self.guests.assistant,
            assistant_inputs=self._assistant_inputs(encoded, recordings),
        )
        cache = output.past_key_values
        # Buffers that others may write to are not handed out; `output` has no cache then. Rows that were done early
        # have left the cache: what is not there for all of them is computed again.
        if isinstance(cache, Cache):
            pairs = [pair for pair in cache.cross_pairs if pair is not None]
            hidden = encoded.last_hidden_state
            is_whole = bool(pairs) and hidden is not None and len(pairs[0][0]) == len(hidden)
            self._heard = (encoded, pairs) if is_whole else None
        return output, request.prompt.shape[1], probe

    def request(
        self,
        encoded: BaseModelOutput,
        recordings: list[Recording],
        temperature: float | None,
        best_of: int | None = None,
    ) -> tuple[DecodeRequest, NoSpeechProbe | None]:
        """What a pass over windows of one group is to do, the padded prompt with the prefix; and what it fills."""
        device = encoded.last_hidden_state.device  # type: ignore[union-attr]
        prefix = self.prefix(recordings[0])
        prompts = [[*self.prompt(recording), *prefix] for recording in recordings]
        prompt, mask = pad_left(prompts, self.pad, device)
        length = prompt.shape[1]
        limit = self._own_limit(recordings[0]) or new_token_limit(
            self.config, self.model.config, self.options, length, len(recordings[0].start_tokens), len(prefix)
        )
        config = config_for(self.config, temperature, length, limit, best_of)
        rules: list[Any] = []
        if self.options.timestamps:
            # The prefix is text of the window like any other.
            rules.append(WhisperTimeStampLogitsProcessor(config, begin_index=length - len(prefix)))
        processors = build_processors(
            config,
            prompt_length=length,
            max_length=length + limit,
            prompt_mask=mask,
            prefix_allowed_tokens_fn=self.guests.prefix_allowed_tokens_fn,
            # The caller's rules come on top: one about suppressed tokens leaves the model's own list standing.
            model_processors=[*rules, *self.guests.logits_processor],
        )
        probe = self._probe({len(recording.start_tokens) + len(prefix) for recording in recordings})
        request = make_request(
            self.model,  # type: ignore[arg-type]
            prompt,
            config,
            model_inputs={"encoder_outputs": encoded, "probe": probe},
            prompt_mask=mask,
            processors=LogitsProcessorList(processors),
            stopping=StoppingCriteriaList(self.guests.stopping_criteria),
            streamer=self.guests.streamer,
            generator=self.guests.generator,
            logprobs=True,
        )
        return request, probe

    def _probe(self, places: set[int]) -> NoSpeechProbe | None:
        """A no-speech probe, where the vocabulary has a token for it and all rows start at one place from the end."""
        if self.timestamp_begin >= self.model.config.vocab_size or len(places) != 1:
            return None
        # <|nospeech|> stands before <|notimestamps|> in every published vocabulary.
        return NoSpeechProbe(token=self.timestamp_begin - 2, places_from_end=places.pop())

    # ------------------------------------------------------------------ prompts

    def prompt(self, recording: Recording) -> list[int]:
        """Earlier text and the start tokens of a recording's next window."""
        options = self.options
        given = [] if options.prompt_ids is None else options.prompt_ids.tolist()
        # The prompt begins with <|startofprev|>, which stands in front of whatever is kept.
        opening = given[:1] or [self._previous_start()]
        room = context_room(self.config, self.model.config, len(recording.start_tokens))
        words = _last(given[1:], room)
        past = [token for piece in recording.history for token in piece.tolist()]
        if options.prompt_condition_type == "all-segments":
            repeats = options.condition_on_prev_tokens or bool(options.history_ids)
            text = words + (_last(past, room - len(words)) if repeats else [])
        elif options.condition_on_prev_tokens:
            text = _last(words + past, room)
        else:
            text = words if not recording.windows else []
        # A prompt may be empty: <|startofprev|> alone says that something was.
        is_prompted = bool(text) or (bool(given) and not recording.windows)
        if not is_prompted or opening == [None]:
            return recording.start_tokens
        return [*opening, *text, *recording.start_tokens]

    def prefix(self, recording: Recording) -> list[int]:
        """What the next window's text is to start with: the prefix, where it is the first."""
        if recording.windows or not self.options.prefix:
            return []
        return [*([self.timestamp_begin] if self.options.timestamps else []), *self.options.prefix]

    def _own_limit(self, recording: Recording) -> int | None:
        """New tokens of the next window where `sample_len` says how many; else None."""
        if self.options.sample_len is None:
            return None
        # The last token is written and never read, so it needs no position.
        room = self.model.config.max_target_positions + 1 - len(self.prompt(recording)) - len(self.prefix(recording))
        return max(1, min(self.options.sample_len, room))

    def _previous_start(self) -> int | None:
        token = getattr(self.config, "prev_sot_token_id", None)
        if token is None and self.timestamp_begin < self.model.config.vocab_size:
            # <|startofprev|>, <|nospeech|>, <|notimestamps|>, <|0.00|> in every published vocabulary.
            token = self.timestamp_begin - 3
        return token

    # ------------------------------------------------------------------ what came out

    @property
    def pad(self) -> int:
        """What fills rows up."""
        pad = self.config.pad_token_id
        return int(self.config.eos_ids[0] if pad is None else pad)

    def before_end(self, row: Tensor) -> Tensor:
        """The tokens of a row before its first end token."""
        ends = torch.isin(row, torch.tensor(self.config.eos_ids, device=row.device))
        found = ends.nonzero()
        return row[: int(found[0])] if len(found) else row

    def _averages(self, output: GenerateOutput, texts: list[Tensor]) -> list[float]:
        """Average log-probability of each text's tokens; beam searches of transformers have it as their score."""
        if output.sequences_scores is not None and self.config.patience is None:
            return [float(score) for score in output.sequences_scores]
        if output.logprobs is None:
            return [math.nan] * len(texts)
        # The end token counts, and where the limit came first the missing one does too, as with OpenAI.
        return [total / (len(text) + 1) for total, text in zip(output.logprobs.tolist(), texts, strict=True)]

    def _compression(self, tokens: Tensor) -> float:
        if self.options.text_of is None:
            return compression_ratio(tokens, self.model.config.vocab_size)
        return text_compression_ratio(self.options.text_of(tokens.tolist()).strip())


def _last(tokens: list[int], count: int) -> list[int]:
    return tokens[-count:] if count > 0 else []
