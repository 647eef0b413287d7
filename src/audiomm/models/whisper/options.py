"""What one transcription is to do: languages, start tokens, thresholds and limits, settled before the first window."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ...base.errors import GenerationError
from ...base.languages import LANGUAGES, language_code
from ...generation import GenerationConfig
from ...generation.arguments import as_ids
from .config import WhisperConfig
from .words import APPEND_PUNCTUATIONS, PREPEND_PUNCTUATIONS

#: Above this temperature a text is too free to be the next window's context.
RESET_TEMPERATURE = 0.5

TASKS = ("transcribe", "translate")
#: For a threshold: none, whatever the generation config says.
OFF = "off"


@dataclass(frozen=True)
class Options:
    """Options of one call of generate(), beyond those of GenerationConfig.

    Attributes:
        timestamps: Predict timestamp tokens.
        temperatures: Tried in turn until a window's text is good enough; 0 is greedy or beam search.
        compression_ratio_threshold: Text that compresses better than this repeats itself.
        logprob_threshold: Text whose tokens are on average less likely than this (natural log) is not trusted.
        no_speech_threshold: Windows whose no-speech probability is above this are skipped.
        condition_on_prev_tokens: Each window's prompt is the text before it.
        prompt_ids: (length,) tokens of a prompt, <|startofprev|> first; None without.
        prompt_condition_type: The prompt stands before the "first-segment" or before "all-segments".
        window_frames: Frames of one window.
        return_token_timestamps: Find the time of every token.
        word_tokenizer: Find the time of every word, with this tokenizer to tell words apart; None without.
        num_frames: (batch,) frames of audio that tokens and words lie in, where that is less than what is decoded.
        history_ids: Tokens that stand before the first window as if they had been heard; forgotten like other text.
        batch_size: Recordings under way at once; None has all of them.
        sample_len: New tokens of a window at most, fewer where its prompt leaves less room, as openai-whisper counts;
            None counts as transformers does.
        fixed_windows: Without timestamps, windows follow one another whole, however long the audio is.
        prefix: Tokens that the text of the first window starts with.
        best_of: Texts that are drawn at a temperature above 0, the likeliest of which stands.
        multilingual: Detect the language of every window.
        language_detection_segments: Windows that a language is sought in.
        language_detection_threshold: Probability from which on a window settles the language.
        token_probabilities: Find how likely each token was.
        hallucination_silence_threshold: Seconds of silence around words that look imagined, to leave them out.
        break_loops: A text that repeats itself is not trusted, and cut at last.
        keep_best: Of texts none of which is good enough the likeliest stands, and not the last.
        text_of: Makes text of tokens: what compresses too well is then measured on it, and segments without any are
            left out. None measures token ids, as transformers.
        punctuation: Marks that belong to the word after them, and to the word before them.
        clips: (start, end) in frames of the only parts to be heard; None hears everything.
    """

    timestamps: bool
    temperatures: tuple[float | None, ...]
    compression_ratio_threshold: float | None
    logprob_threshold: float | None
    no_speech_threshold: float | None
    condition_on_prev_tokens: bool
    prompt_ids: Tensor | None
    prompt_condition_type: str
    window_frames: int
    return_token_timestamps: bool = False
    word_tokenizer: Any = None
    num_frames: tuple[int, ...] | None = None
    history_ids: tuple[int, ...] = ()
    batch_size: int | None = None
    sample_len: int | None = None
    fixed_windows: bool = False
    prefix: tuple[int, ...] = ()
    best_of: int | None = None
    multilingual: bool = False
    language_detection_segments: int = 1
    language_detection_threshold: float = 0.5
    token_probabilities: bool = False
    hallucination_silence_threshold: float | None = None
    break_loops: bool = False
    keep_best: bool = False
    text_of: Callable[[list[int]], str] | None = None
    punctuation: tuple[str, str] = (PREPEND_PUNCTUATIONS, APPEND_PUNCTUATIONS)
    clips: tuple[tuple[int, int], ...] | None = None

    def __post_init__(self) -> None:
        if self.prompt_condition_type not in {"first-segment", "all-segments"}:
            raise GenerationError(
                f"prompt_condition_type={self.prompt_condition_type!r}: accepted are 'first-segment' and "
                "'all-segments'."
            )
        if self.prompt_ids is not None and (self.prompt_ids.dim() != 1 or not len(self.prompt_ids)):
            raise GenerationError(
                f"prompt_ids is of shape {tuple(self.prompt_ids.shape)}; tokens of shape (length,) are needed, as "
                "get_prompt_ids(text, return_tensors='pt') gives them."
            )
        if self.batch_size is not None and self.batch_size < 1:
            raise GenerationError(f"batch_size={self.batch_size}: at least 1 is needed, or None for all at once.")
        for name in ("best_of", "language_detection_segments", "sample_len"):
            count = getattr(self, name)
            if count is not None and count < 1:
                raise GenerationError(f"{name}={count}: at least 1 is needed.")
        if not 0 <= self.language_detection_threshold <= 1:
            raise GenerationError(
                f"language_detection_threshold={self.language_detection_threshold}: a probability from 0 to 1 is "
                "needed."
            )
        silence = self.hallucination_silence_threshold
        if silence is not None and silence < 0:
            raise GenerationError(f"hallucination_silence_threshold={silence}: seconds of at least 0 are needed.")
        if silence is not None and self.word_tokenizer is None:
            raise GenerationError(
                f"hallucination_silence_threshold={silence} looks at how long words are and how likely: it needs "
                "word_timestamps=True."
            )
        self._check_numbers()

    def _check_numbers(self) -> None:
        for temperature in self.temperatures:
            if temperature is not None and not 0 <= temperature < math.inf:
                raise GenerationError(f"temperature={temperature}: 0 (greedy) or a number above it is needed.")
        for name in ("compression_ratio_threshold", "logprob_threshold", "no_speech_threshold"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, Real):
                raise GenerationError(f"{name}={value!r}: a number is needed, or None for none.")

    @property
    def has_context(self) -> bool:
        """Text may stand before a window's start tokens."""
        return self.condition_on_prev_tokens or self.prompt_ids is not None or bool(self.history_ids)


def ladder(temperature: Any, config: GenerationConfig) -> tuple[float | None, ...]:
    """The temperatures to try; None stands for what the config alone says."""
    if temperature is None:
        return (None,)
    steps = tuple(temperature) if isinstance(temperature, tuple | list) else (temperature,)
    if not steps:
        raise GenerationError("temperature is an empty list; a number or at least one number is needed.")
    try:
        return tuple(float(step) for step in steps)
    except (TypeError, ValueError) as error:
        raise GenerationError(f"temperature={temperature!r}: a number is needed, or several.") from error


def config_for(
    config: GenerationConfig, temperature: float | None, prompt_length: int, limit: int, best_of: int | None = None
) -> GenerationConfig:
    """The options of one decoding pass.

    Args:
        config: Options of the call, filled in.
        temperature: Of this pass; 0 is greedy or beam search, None leaves sampling to the config.
        prompt_length: Tokens of the prompt, padding included.
        limit: New tokens at most.
        best_of: Texts to draw when sampling.
    """
    config = config.filled()
    if temperature is not None:
        config.do_sample = temperature > 0
        config.temperature = temperature if temperature > 0 else 1.0
    if config.do_sample:
        config.num_beams, config.patience = 1, None
        config.num_return_sequences = best_of or config.num_return_sequences
    config.max_length = prompt_length + limit
    config.max_new_tokens = None
    return config


def new_token_limit(
    config: GenerationConfig,
    model: WhisperConfig,
    options: Options,
    prompt_length: int,
    start_count: int,
    prefix_length: int = 0,
) -> int:
    """New tokens that a pass may generate.

    Args:
        config: Options of the call, filled in.
        model: Says how many positions the decoder has.
        options: Say whether windows have timestamps, and text before them.
        prompt_length: Tokens of the longest prompt of the batch.
        start_count: Of these, start tokens.
        prefix_length: Of these, tokens that the text starts with, which count like new ones.

    Raises:
        GenerationError: max_new_tokens asks for more than the decoder has positions.
    """
    half, room = model.max_target_positions // 2, model.max_target_positions - prompt_length
    if config.max_new_tokens is not None:
        if config.max_new_tokens > room:
            raise GenerationError(
                f"max_new_tokens={config.max_new_tokens} and a prompt of {prompt_length} tokens make "
                f"{config.max_new_tokens + prompt_length}, but the decoder has max_target_positions="
                f"{model.max_target_positions}: at most max_new_tokens={max(room, 0)} fits."
            )
        return config.max_new_tokens
    if options.timestamps and options.has_context:
        # Not what this batch leaves free but what the longest prompt would, so that no row depends on another.
        room = model.max_target_positions - half - start_count - prefix_length
    if config.max_length is not None and config.max_length < model.max_target_positions:
        # As in transformers the start tokens and the text before them do not count.
        return max(1, min(config.max_length, room))
    # With timestamps half the decoder's length is for the new text, as OpenAI has it: 224 tokens.
    return max(1, min(half - prefix_length, room)) if options.timestamps else room


def context_room(config: GenerationConfig, model: WhisperConfig, start_count: int) -> int:
    """Tokens of prompt and earlier text that fit before the start tokens: 223, fewer when max_new_tokens needs room."""
    room = model.max_target_positions // 2 - 1
    if config.max_new_tokens is not None:
        # One more is <|startofprev|>.
        room = min(room, model.max_target_positions - config.max_new_tokens - start_count - 1)
    return max(room, 0)


# ---------------------------------------------------------------------- start tokens


def is_multilingual(config: GenerationConfig, override: bool | None = None) -> bool:
    """Whether prompts hold a language and a task."""
    if override is not None:
        return override
    known = getattr(config, "is_multilingual", None)
    return bool(getattr(config, "lang_to_id", None)) if known is None else bool(known)


def language_ids(config: GenerationConfig) -> dict[str, int]:
    """{language code: token id}.

    Raises:
        GenerationError: The generation config has no lang_to_id.
    """
    table = getattr(config, "lang_to_id", None)
    if not table:
        raise GenerationError(
            "the generation config has no lang_to_id, so languages cannot be named: load one of a multilingual "
            "Whisper, or set lang_to_id."
        )
    return {token.strip("<|>"): int(index) for token, index in table.items()}


def language_token(language: str, config: GenerationConfig) -> int:
    """The token of a language given as code, name or token.

    Raises:
        GenerationError: There is no such language, or this model does not know it.
    """
    try:
        code = language_code(language)
    except ValueError as error:
        raise GenerationError(str(error)) from error
    table = language_ids(config)
    if code not in table:
        known = ", ".join(sorted(table)[:12]) + (", ..." if len(table) > 12 else "")
        raise GenerationError(
            f"language={language!r}: this model does not know {LANGUAGES[code]}; it knows {len(table)} "
            f"language{'s' if len(table) > 1 else ''}: {known}."
        )
    return table[code]


def task_token(task: str, config: GenerationConfig) -> int:
    """The token of a task.

    Raises:
        GenerationError: There is no such task.
    """
    table = getattr(config, "task_to_id", None) or {}
    if task not in TASKS or task not in table:
        raise GenerationError(f"task={task!r}: accepted are {' and '.join(map(repr, table or TASKS))}.")
    return int(table[task])


def languages_per_item(language: Any, batch: int) -> list[str | None]:
    """One language or None for each item of the batch.

    Raises:
        GenerationError: A list has another length than the batch.
    """
    if language is None or isinstance(language, str):
        return [language] * batch
    if not hasattr(language, "__iter__"):
        raise GenerationError(
            f"language={language!r}: a code ('de'), a name ('german') or a token ('<|de|>') is needed, or a list with "
            "one for each recording."
        )
    languages = list(language)
    if len(languages) != batch:
        raise GenerationError(
            f"language holds {len(languages)} entries for a batch of {batch}: pass one for each, or one."
        )
    return languages


def frames_per_item(num_frames: Any, batch: int) -> tuple[int, ...] | None:
    """num_frames for each item of the batch, from one number or several in any form.

    Raises:
        GenerationError: There are more or fewer than items, or one of them is not positive.
    """
    if num_frames is None:
        return None
    counts = torch.as_tensor(num_frames).reshape(-1).tolist()
    counts = counts * batch if len(counts) == 1 else counts
    if len(counts) != batch or any(count < 1 for count in counts):
        raise GenerationError(
            f"num_frames={num_frames}: a positive number of frames is needed for each of the {batch} items."
        )
    return tuple(int(count) for count in counts)


def word_tokenizer(wanted: bool, tokenizer: Any) -> Any:
    """What tells words apart, None where words are not wanted.

    Raises:
        GenerationError: They are, and there is no tokenizer.
    """
    if not wanted:
        return None
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    if not hasattr(tokenizer, "timestamp_begin"):
        raise GenerationError(
            "word_timestamps=True needs tokenizer=, the WhisperTokenizer of the model, to tell words apart; it is "
            f"{type(tokenizer).__name__ if tokenizer is not None else None}."
        )
    return tokenizer


def start_tokens(
    config: GenerationConfig, language: int | None, task: str | None, timestamps: bool, multilingual: bool
) -> list[int]:
    """The tokens every window's text follows: start, language, task, and <|notimestamps|> unless they are wanted."""
    start = config.decoder_start_token_id
    if start is None:
        raise GenerationError(
            "the generation config has no decoder_start_token_id: set it to the id of <|startoftranscript|>."
        )
    tokens = [int(start[0] if isinstance(start, list) else start)]
    if multilingual:
        if language is not None:
            tokens.append(language)
        if getattr(config, "task_to_id", None):
            tokens.append(task_token("transcribe" if task is None else task, config))
    no_timestamps = getattr(config, "no_timestamps_token_id", None)
    if not timestamps and no_timestamps is not None:
        tokens.append(int(no_timestamps))
    return tokens


def forced_start(config: GenerationConfig, model: WhisperConfig) -> dict[int, int | None]:
    """The start tokens that older files fix by position, {} when there are none."""
    forced = getattr(config, "forced_decoder_ids", None) or getattr(model, "forced_decoder_ids", None) or []
    return {int(place): token for place, token in forced}


def prefix_tokens(prefix: Any, model: WhisperConfig) -> tuple[int, ...]:
    """The tokens that a text is to start with.

    Raises:
        GenerationError: They leave no room for a text.
    """
    tokens = prompt_tokens("prefix_ids", prefix, model)
    if tokens is None:
        return ()
    most = model.max_target_positions // 2 - 2
    if tokens.dim() != 1 or len(tokens) > most:
        raise GenerationError(
            f"prefix_ids is of shape {tuple(tokens.shape)}: tokens of shape (length,) are needed, at most {most} of "
            "them, which leaves room for what follows."
        )
    return tuple(tokens.tolist())


def prompt_tokens(name: str, value: Any, model: WhisperConfig) -> Tensor | None:
    """Tokens of a prompt as a CPU tensor, from a tensor, an array or a list.

    Raises:
        GenerationError: They are no tokens of this model.
    """
    if value is None:
        return None
    if isinstance(value, str):
        raise GenerationError(
            f"{name}={value[:40]!r} is a text: pass its tokens, processor.get_prompt_ids(text, return_tensors='pt')."
        )
    return as_ids(name, value, model.vocab_size).to("cpu", torch.long)
