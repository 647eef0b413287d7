"""Windows that are decoded side by side: where one is done, the next takes its place.

What takes more than one token after the other, and what is decoded again at a higher temperature, is decoded by itself
while the others wait.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ...base.outputs import BaseModelOutput
from ...generation.refill import Done, RowBatch, can_enter
from .decoding import WindowDecoder
from .options import new_token_limit
from .protocol import NoSpeechProbe, select
from .recordings import Recording, WindowText

#: What the encoder made of the next windows of some recordings, and these.
Windows = tuple[BaseModelOutput, list[Recording]]

#: Windows read at once on a GPU, where there is room for many.
MOST_AT_ONCE = 16
#: Start, language, task, and no timestamps.
_MOST_START_TOKENS = 4


@dataclass
class _Row:
    """One window under way: what its row reads, and what the prompt has told of it."""

    encoded: Tensor
    recording: Recording
    prompt_length: int
    probe: NoSpeechProbe | None
    place: int

    @property
    def no_speech_probability(self) -> float | None:
        found = None if self.probe is None else self.probe.probability
        return None if found is None else float(found[self.place])


class SideBySide:
    """Decodes windows that come and go.

    Args:
        decoder: Decodes windows by themselves, and knows the options.
        size: Windows at most.
    """

    def __init__(self, decoder: WindowDecoder, size: int) -> None:
        self.decoder, self.size = decoder, size
        self._on_cpu = decoder.model.device.type == "cpu"
        #: On a GPU windows are read, and climb to higher temperatures, several together.
        self._wanted = 1 if self._on_cpu else max(1, size // 4)

    def texts(
        self, following: Callable[[int], Windows | None]
    ) -> Iterator[tuple[BaseModelOutput, list[Recording], list[WindowText]]]:
        """Decode windows until there are no more.

        Args:
            following: Gives at most so many windows that are to be decoded next, of different recordings; None where
                there are none for now. What has been yielded may bring more.

        Yields:
            What the encoder made of some windows, their recordings, and their texts.
        """
        decoder = self.decoder
        doubtful: list[tuple[Done, WindowText]] = []
        with RowBatch(self.size, self._longest()) as batch:
            while True:
                room = batch.free if self._on_cpu else min(batch.free, MOST_AT_ONCE)
                found = following(room) if room else None
                if found is not None:
                    if not self._enter(batch, *found):
                        yield *found, decoder.best_texts(*found)
                    continue
                if not batch.is_busy and not doubtful:
                    return
                if batch.is_busy:
                    done = [(one, self._text_of(one)) for one in batch.run(self._wanted)]
                    good = [pair for pair in done if not decoder.may_climb(pair[1])]
                    doubtful += [pair for pair in done if decoder.may_climb(pair[1])]
                    if good:
                        yield self._settled(good, batch)
                if len(doubtful) >= (self._wanted if batch.is_busy else 1):
                    climbing, doubtful = doubtful, []
                    yield self._settled(climbing)

    def _longest(self) -> int:
        """Tokens of a prompt and its text at most."""
        config, model, options = self.decoder.config, self.decoder.model.config, self.decoder.options
        most = model.max_target_positions + 1
        if options.has_context or options.prefix or options.sample_len is not None:
            return most
        start, new = _MOST_START_TOKENS, config.max_new_tokens
        return min(most, start + (new_token_limit(config, model, options, start, start) if new is None else new))

    def _enter(self, batch: RowBatch, encoded: BaseModelOutput, recordings: list[Recording]) -> bool:
        """Let windows be decoded beside those under way; False where they have to be decoded by themselves."""
        decoder = self.decoder
        if (
            self.size == 1
            or decoder.guests.assistant is not None
            or decoder.config.prompt_lookup_num_tokens is not None
        ):
            return False
        hidden = encoded.last_hidden_state
        assert hidden is not None, "an encoder always returns its last hidden state"
        passes = []
        for places in decoder.groups(recordings):
            own = [recordings[place] for place in places]
            request, probe = decoder.request(select(encoded, places), own, decoder.options.temperatures[0])
            if request.max_length > batch.longest or not can_enter(request):
                return False
            heard = [hidden[place : place + 1] for place in places]
            length = request.prompt.shape[1]
            rows = [_Row(*pair, length, probe, number) for number, pair in enumerate(zip(heard, own, strict=True))]
            passes.append((request, rows))
        for request, rows in passes:
            batch.enter(request, rows)
        return True

    def _text_of(self, done: Done) -> WindowText:
        row, temperature = done.key, self.decoder.options.temperatures[0]
        silences = [row.no_speech_probability]
        return self.decoder.texts_of(done.output, row.prompt_length, [row.recording], silences, temperature)[0]

    def _settled(
        self, found: list[tuple[Done, WindowText]], batch: RowBatch | None = None
    ) -> tuple[BaseModelOutput, list[Recording], list[WindowText]]:
        """Windows with their texts, after the temperatures that these need.

        Args:
            batch: Where the windows' rows still are.
        """
        options, rows = self.decoder.options, [one.key for one, _ in found]
        hidden = [row.encoded for row in rows]
        encoded = BaseModelOutput(last_hidden_state=hidden[0] if len(hidden) == 1 else torch.cat(hidden))
        recordings = [row.recording for row in rows]
        self.decoder.forget()
        if batch is not None and (options.word_tokenizer is not None or options.return_token_timestamps):
            self.decoder.remember(encoded, batch.cross_pairs([one.row for one, _ in found]))
        return encoded, recordings, self.decoder.best_texts(encoded, recordings, [text for _, text in found])
