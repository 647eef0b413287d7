"""model.transcribe(): the engine of generate() with the arguments and defaults of openai-whisper.

Where the two doors differ, they differ by options alone: fallback through rising temperatures, thresholds on text and
silence, and text before a window as its prompt are on here; audio is padded as openai-whisper pads it.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ...base.errors import GenerationError
from ...base.transcript import Segment, Transcript, Word
from ...feature_extraction.waveform import as_recordings, read_waveform
from ...generation import GenerationConfig
from .call import begin
from .config import FRAMES_PER_SECOND
from .options import OFF, is_multilingual
from .processing import WhisperProcessor
from .segments import TIME_PRECISION
from .words import APPEND_PUNCTUATIONS, PREPEND_PUNCTUATIONS

logger = logging.getLogger("audiomm.transcribe")

TEMPERATURES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
#: openai-whisper's defaults of what a generation config may settle, too, by their names there.
OPENAI_DEFAULTS = {
    "compression_ratio_threshold": 2.4,
    "logprob_threshold": -1.0,
    "no_speech_threshold": 0.6,
    "condition_on_prev_tokens": True,
}
#: The first <|time|> of a window is at most this, where a generation config does not say it.
MAX_INITIAL_TIMESTAMP_SECONDS = 1.0
#: Later than any timestamp.
ANY_SECONDS = 1e6
#: Anything shorter holds no speech: the transcript is empty.
MIN_DURATION_SECONDS = 0.1
#: Samples of silence after a recording, so that its last frame does not see it mirrored.
_TAIL_SAMPLES = 480

_SCORES = ("temperature", "avg_logprob", "compression_ratio", "no_speech_prob")


class OpenAIFace:
    """Gives a Whisper `transcribe()`."""

    config: Any
    generation_config: GenerationConfig
    name_or_path: str
    device: torch.device
    dtype: torch.dtype
    _events: Callable[..., Any]

    def transcribe(
        self,
        audio: Any,
        *,
        processor: Any = None,
        verbose: bool | None = None,
        temperature: float | Sequence[float] = TEMPERATURES,
        compression_ratio_threshold: float | Literal["model"] | None = "model",
        logprob_threshold: float | Literal["model"] | None = "model",
        no_speech_threshold: float | Literal["model"] | None = "model",
        condition_on_previous_text: bool | Literal["model"] = "model",
        initial_prompt: str | Sequence[int] | None = None,
        carry_initial_prompt: bool = False,
        hotwords: str | None = None,
        word_timestamps: bool = False,
        prepend_punctuations: str = PREPEND_PUNCTUATIONS,
        append_punctuations: str = APPEND_PUNCTUATIONS,
        clip_timestamps: str | Sequence[float] = "0",
        hallucination_silence_threshold: float | None = None,
        task: str | None = None,
        language: str | None = None,
        multilingual: bool = False,
        language_detection_threshold: float = 0.5,
        language_detection_segments: int = 1,
        sample_len: int | None = None,
        best_of: int | None = 5,
        beam_size: int | None = None,
        patience: float | None = None,
        length_penalty: float | None = None,
        prefix: str | Sequence[int] | None = None,
        suppress_tokens: str | Sequence[int] | None = "-1",
        suppress_blank: bool = True,
        without_timestamps: bool = False,
        max_initial_timestamp: float | Literal["model"] | None = "model",
        break_loops: bool = True,
        keep_best: bool = False,
        fp16: bool | None = None,
        batch_size: int | None = None,
        **options: Any,
    ) -> Any:
        """Transcribe recordings as openai-whisper does.

        Every window is encoded once, for its language, its silence, all temperatures and the times of its words.

        Args:
            audio: A path, bytes, an open file, samples at the model's rate, or a dict of "array" and "sampling_rate";
                or a list of those.
            processor: WhisperProcessor; None reads the one beside the model.
            verbose: True logs each segment as it is found, to the logger "audiomm.transcribe".
            temperature: One, or several to fall back to while a threshold is missed. 0 is greedy or beam search.
            compression_ratio_threshold: Text (UTF-8) that compresses better than this repeats itself. "model", here
                and in the next three, is what the model's generation config says, and where it says nothing
                openai-whisper's default: 2.4.
            logprob_threshold: On the average log-probability of a window's tokens; else -1.0.
            no_speech_threshold: Windows that are more likely silent than this are skipped, unless their text is more
                likely than logprob_threshold; else 0.6.
            condition_on_previous_text: Text before a window is its prompt, unless it was drawn at more than 0.5; else
                True. In the generation config it is condition_on_prev_tokens.
            initial_prompt: Text or tokens before the first window.
            carry_initial_prompt: ... and before every window.
            hotwords: Text before every window, in front of all else.
            word_timestamps: Find when each word was said, and how likely it is.
            prepend_punctuations, append_punctuations: Marks that belong to the word after them, or before.
            clip_timestamps: "start,end,start,end" in seconds, or a list: the only parts to be heard.
            hallucination_silence_threshold: Leave out words that look imagined where at least this many seconds of
                silence are around them; needs word_timestamps.
            task: "transcribe" (None) or "translate".
            language: Code, name or token; None detects it.
            multilingual: Detect it for every window.
            language_detection_threshold, language_detection_segments: See `generate`.
            sample_len: New tokens of a window; None is half of the decoder's length.
            best_of: Texts to draw at temperatures above 0, the likeliest of which stands.
            beam_size: Beams at temperature 0; None is greedy.
            patience: beam_size * patience texts must have ended; None is 1.0. Source: arXiv:2204.05424.
            length_penalty: From 0 to 1, as Google's; None divides by the length.
            prefix: Text or tokens that the first window's text starts with.
            suppress_tokens: Ids, or text of them with commas between, that are never written; -1 stands for those of
                the model's generation config.
            suppress_blank: A text does not begin with a blank or end before it began.
            without_timestamps: Windows follow one another whole; their segments are as long as they are.
            max_initial_timestamp: Seconds at which a window's text begins at the latest, None for any; "model" is
                what the generation config says, 1.0 where it says nothing.
            break_loops: Text that repeats itself at every temperature is cut where it begins to; openai-whisper
                keeps it.
            keep_best: Where no temperature gave a good text the likeliest stands, as in faster-whisper, and not the
                last, as in openai-whisper.
            fp16: Accepted; the model's own dtype counts.
            batch_size: Recordings that are heard together; None has all of them.
            **options: More arguments of `generate` (generator, assistant_model, monitor_progress, ...).

        Returns:
            A Transcript, or a list of them for a list. Times are inside the recording and in order.

        Raises:
            AudioError: A recording cannot be used.
            GenerationError: Options that do not exist, do not fit together, or do not fit this model.
        """
        processor = self._processor(processor)
        tokenizer, extractor = processor.tokenizer, processor.feature_extractor
        if carry_initial_prompt and initial_prompt is None:
            raise GenerationError("carry_initial_prompt=True needs an initial_prompt to carry.")
        if patience is not None and beam_size is None:
            raise GenerationError(f"patience={patience} is for searches: pass beam_size, too, or leave it out.")
        several, is_single = as_recordings(audio)
        waves = [read_waveform(one, extractor.sampling_rate) for one in several]
        features, mask = _features(waves, extractor)
        text_of = _text_of(tokenizer)
        settings = {
            "generation_config": _config(
                self.generation_config,
                max_new_tokens=None,
                max_length=self.config.max_target_positions,
                num_beams=beam_size or 1,
                length_penalty=1.0,
                patience=None if beam_size is None else (patience or 1.0),
                google_length_penalty=length_penalty,
                suppress_tokens=_suppressed(suppress_tokens, self.generation_config),
                suppress_blank=suppress_blank,
                max_initial_timestamp=max_initial_timestamp,
            ),
            "attention_mask": mask,
            "temperature": temperature if isinstance(temperature, (int, float)) else tuple(temperature),
            **self._checks(
                compression_ratio_threshold=compression_ratio_threshold,
                logprob_threshold=logprob_threshold,
                no_speech_threshold=no_speech_threshold,
                condition_on_prev_tokens=condition_on_previous_text,
            ),
            **_prompts(tokenizer, initial_prompt, carry_initial_prompt, hotwords, prefix),
            "word_timestamps": word_timestamps,
            "tokenizer": tokenizer if word_timestamps else None,
            "punctuation": (prepend_punctuations, append_punctuations),
            "clips": _clips(clip_timestamps),
            "hallucination_silence_threshold": hallucination_silence_threshold,
            "multilingual": multilingual,
            "language_detection_threshold": language_detection_threshold,
            "language_detection_segments": language_detection_segments,
            "best_of": best_of,
            "break_loops": break_loops,
            "keep_best": keep_best,
            "sample_len": self.config.max_target_positions // 2 if sample_len is None else sample_len,
            "return_timestamps": not without_timestamps,
            "fixed_windows": without_timestamps,
            "text_of": text_of,
            "batch_size": batch_size,
            **self._spoken(language, task),
            **options,
        }
        monitor = settings.pop("monitor_progress", None)
        run, _ = begin(self, features.to(self.dtype), **settings)
        for row, segments in self._events(run, monitor):
            if verbose:
                _tell(row, segments, text_of)
        seconds = [len(wave) / extractor.sampling_rate for wave in waves]
        found = [
            transcript(one.segments, one.language, duration, text_of, word_timestamps)
            for one, duration in zip(run.recordings, seconds, strict=True)
        ]
        return found[0] if is_single else found

    def _processor(self, processor: Any) -> Any:
        if processor is not None:
            return processor
        if not self.name_or_path:
            raise GenerationError(
                "processor: this model does not know where it was loaded from; pass processor=, a WhisperProcessor."
            )
        return WhisperProcessor.from_pretrained(self.name_or_path)

    def _checks(self, **asked: Any) -> dict[str, Any]:
        """Thresholds and conditioning for `generate`, "model" replaced by what that stands for."""
        settled = {
            name: openai_default(self.generation_config, name) if value == "model" else value
            for name, value in asked.items()
        }
        # None would be what the generation config says.
        return {name: OFF if value is None else value for name, value in settled.items()}

    def _spoken(self, language: str | None, task: str | None) -> dict[str, Any]:
        """Language and task for `generate`; English-only models need to be told neither."""
        if is_multilingual(self.generation_config):
            return {"language": language, "task": task or "transcribe"}
        is_english = language is None or language.strip("<|>").lower() in ("en", "english")
        return {"language": None if is_english else language, "task": None if task in (None, "transcribe") else task}


def openai_default(config: GenerationConfig, name: str) -> float | bool:
    """What a generation config says about one of `OPENAI_DEFAULTS`, else openai-whisper's default."""
    own: float | bool | None = getattr(config, name, None)
    return OPENAI_DEFAULTS[name] if own is None else own


def transcript(
    segments: Sequence[dict[str, Any]],
    language: str | None,
    duration_seconds: float,
    text_of: Callable[[list[int]], str],
    with_words: bool = False,
) -> Transcript:
    """Segments of generation as a Transcript, with all times inside the recording and in order."""
    found, latest = [], 0.0
    for one in segments:
        start = min(max(float(one["start"]), latest), duration_seconds)
        end = latest = min(max(float(one["end"]), start), duration_seconds)
        tokens = one["tokens"].tolist()
        words = [Word(word["word"], word["start"], word["end"], word["probability"]) for word in one.get("words", ())]
        found.append(
            Segment(
                text_of(tokens),
                start,
                end,
                tokens=tuple(tokens),
                words=tuple(words) if with_words else None,
                language=one.get("language") or language,
                end_is_estimated=bool(one.get("end_estimated", False)),
                seek=int(one["seek"]),
                **{name: float(one[name]) for name in _SCORES if one.get(name) is not None},
            )
        )
    return Transcript(
        "".join(segment.text for segment in found),
        tuple(found),
        language=language,
        duration_seconds=duration_seconds,
        timestamps="word" if with_words else True,
    )


# ---------------------------------------------------------------------- arguments


def _features(waves: Sequence[np.ndarray], extractor: Any) -> tuple[Tensor, Tensor]:
    """Log-mel features (recordings, bins, frames), 0.0 after the end of each, and their mask.

    As in openai-whisper each recording is followed by silence, and what that adds is cut off again.
    """
    shortest = MIN_DURATION_SECONDS * extractor.sampling_rate
    counts = [len(wave) // extractor.hop_length if len(wave) >= shortest else 0 for wave in waves]
    longest = max([*counts, 1])
    tail = np.zeros(_TAIL_SAMPLES, dtype=np.float32)
    rows = []
    for wave, count in zip(waves, counts, strict=True):
        features = extractor(
            np.concatenate((wave, tail)),
            sampling_rate=extractor.sampling_rate,
            truncation=False,
            padding="longest",
            return_tensors="pt",
        )["input_features"][..., :count]
        rows.append(functional.pad(features, (0, longest - count)))
    mask = torch.arange(longest)[None] < torch.tensor(counts)[:, None]
    return torch.cat(rows), mask.long()


def _tokens(text: str | Sequence[int] | None, tokenizer: Any) -> list[int]:
    """Tokens of a prompt or prefix given as text or tokens."""
    if text is None or (isinstance(text, str) and not text.strip()):
        return []
    if isinstance(text, str):
        return [int(token) for token in tokenizer.get_prompt_ids(text)[1:]]
    return [int(token) for token in text]


def _prompts(
    tokenizer: Any,
    initial_prompt: str | Sequence[int] | None,
    carried: bool,
    hotwords: str | None,
    prefix: str | Sequence[int] | None,
) -> dict[str, Any]:
    """What stands before windows, and what the first text starts with.

    An initial prompt is earlier text and forgotten like it, unless it is carried; hotwords never are.
    """
    prompt = _tokens(initial_prompt, tokenizer)
    repeated = [*_tokens(hotwords, tokenizer), *(prompt if carried else [])]
    opening = int(tokenizer.convert_tokens_to_ids("<|startofprev|>")) if repeated else None
    return {
        "prompt_condition_type": "all-segments",
        "prompt_ids": [opening, *repeated] if repeated else None,
        "history_ids": [] if carried else prompt,
        "prefix_ids": _tokens(prefix, tokenizer) or None,
    }


def _tell(row: int, segments: Sequence[dict[str, Any]], text_of: Callable[[list[int]], str]) -> None:
    for one in segments:
        text = text_of(one["tokens"].tolist()).strip()
        logger.info("recording %d: [%.2f --> %.2f] %s", row, float(one["start"]), float(one["end"]), text)


def _text_of(tokenizer: Any) -> Callable[[list[int]], str]:
    begin = tokenizer.timestamp_begin

    def text(tokens: list[int]) -> str:
        decoded: str = tokenizer.decode([token for token in tokens if token < begin], skip_special_tokens=True)
        return decoded

    return text


def _clips(clip_timestamps: str | Sequence[float]) -> tuple[tuple[int, int], ...] | None:
    """Parts in frames from "start,end,..." in seconds; None where everything is to be heard.

    Raises:
        GenerationError: They are not seconds in order.
    """
    entries = clip_timestamps.split(",") if isinstance(clip_timestamps, str) else list(clip_timestamps)
    try:
        frames = [round(float(entry) * FRAMES_PER_SECOND) for entry in entries if str(entry).strip()]
    except (TypeError, ValueError, OverflowError) as error:
        raise GenerationError(
            f"clip_timestamps={clip_timestamps!r}: expected seconds as 'start,end,start,end', or a list of them."
        ) from error
    if any(later < earlier for earlier, later in zip([0, *frames], frames, strict=False)):
        raise GenerationError(
            f"clip_timestamps={clip_timestamps!r}: seconds of at least 0 are needed, each no less than the one before."
        )
    if frames in ([], [0]):
        return None
    ends = [*frames, 1 << 40] if len(frames) % 2 else frames
    return tuple(zip(ends[::2], ends[1::2], strict=True))


def _config(
    own: GenerationConfig, *, suppress_blank: bool, max_initial_timestamp: float | str | None, **fields: Any
) -> GenerationConfig:
    """The options of a call as a generation config."""
    config = copy.deepcopy(own)
    for name, value in fields.items():
        setattr(config, name, value)
    if not suppress_blank:
        config.begin_suppress_tokens = []
    if max_initial_timestamp != "model" or not hasattr(config, "max_initial_timestamp_index"):
        latest = MAX_INITIAL_TIMESTAMP_SECONDS if max_initial_timestamp == "model" else max_initial_timestamp
        index = round((ANY_SECONDS if latest is None else float(latest)) / TIME_PRECISION)
        setattr(config, "max_initial_timestamp_index", index)  # noqa: B010
    return config


def _suppressed(asked: str | Sequence[int] | None, config: GenerationConfig) -> list[int]:
    """Ids that are never written: those asked for, and tokens that are no part of a text.

    Raises:
        GenerationError: They are not ids.
    """
    entries = asked.split(",") if isinstance(asked, str) else list(asked or ())
    try:
        ids = [int(entry) for entry in entries if str(entry).strip()]
    except ValueError as error:
        raise GenerationError(f"suppress_tokens={asked!r}: token ids with commas between are needed.") from error
    own = list(config.suppress_tokens or ()) if -1 in ids else []
    structural = [*(getattr(config, "task_to_id", None) or {}).values()]
    start = config.decoder_start_token_id
    structural += [int(start)] if isinstance(start, int) else list(start or ())
    no_timestamps = getattr(config, "no_timestamps_token_id", None)
    if no_timestamps is not None:
        # <|startoflm|>, <|startofprev|> and <|nospeech|> stand before <|notimestamps|> in every vocabulary.
        structural += range(int(no_timestamps) - 3, int(no_timestamps))
    return sorted({token for token in (*ids, *own, *structural) if token >= 0})
