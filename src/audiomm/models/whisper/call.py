"""What a call of generate() asks for: its arguments checked, and the transcription that does it, ready to start."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...base.errors import GenerationError, ShapeError
from ...generation import GenerationConfig
from ...generation.arguments import as_ids, check_guests, told_of_errors
from .decoding import Guests
from .modeling import as_encoder_output, not_features
from .options import (
    OFF,
    Options,
    frames_per_item,
    ladder,
    prefix_tokens,
    prompt_tokens,
    word_tokenizer,
)
from .options import (
    is_multilingual as knows_languages,
)
from .published import named_ids, without_forced
from .transcription import Transcription

#: Arguments of `generate` that a generation config may settle, too.
_FROM_CONFIG = (
    "compression_ratio_threshold",
    "logprob_threshold",
    "no_speech_threshold",
    "condition_on_prev_tokens",
    "prompt_condition_type",
)
#: Arguments of `generate` that settle `Options`, besides those that other things depend on.
_OPTIONS = (
    *_FROM_CONFIG,
    "return_timestamps",
    "prompt_ids",
    "history_ids",
    "prefix_ids",
    "num_segment_frames",
    "return_token_timestamps",
    "token_probabilities",
    "batch_size",
    "best_of",
    "multilingual",
    "language_detection_segments",
    "language_detection_threshold",
    "hallucination_silence_threshold",
    "break_loops",
    "keep_best",
    "fixed_windows",
    "sample_len",
    "text_of",
    "punctuation",
    "clips",
)


def begin(
    model: Any,
    input_features: Tensor | None,
    generation_config: GenerationConfig | None,
    *,
    streamer: Any = None,
    **asked: Any,
) -> tuple[Transcription, GenerationConfig]:
    """What a call asks for, checked: its transcription, ready to start, and its options.

    The arguments are those of `generate`; further ones are the rest of `Options` and fields of GenerationConfig.
    """
    with told_of_errors(streamer):
        return _begin(model, input_features, generation_config, streamer=streamer, **asked)


def _begin(
    model: Any,
    input_features: Tensor | None,
    generation_config: GenerationConfig | None,
    *,
    logits_processor: Iterable[Any] | None = None,
    stopping_criteria: Iterable[Any] | None = None,
    prefix_allowed_tokens_fn: Callable[[int, Tensor], Sequence[int]] | None = None,
    task: str | None = None,
    language: str | list[str | None] | None = None,
    is_multilingual: bool | None = None,
    temperature: float | Sequence[float] | None = None,
    attention_mask: Tensor | None = None,
    num_frames: int | Sequence[int] | Tensor | None = None,
    word_timestamps: bool = False,
    tokenizer: Any = None,
    return_dict_in_generate: bool | None = None,
    encoder_outputs: Any = None,
    assistant_model: Any = None,
    streamer: Any = None,
    generator: Any = None,
    **kwargs: Any,
) -> tuple[Transcription, GenerationConfig]:
    check_guests(
        generation_config, logits_processor, stopping_criteria, prefix_allowed_tokens_fn, streamer, assistant_model
    )
    if kwargs.get("inputs") is not None and input_features is None:
        input_features = kwargs.pop("inputs")
    kwargs.pop("synced_gpus", None)
    chosen = {name: kwargs.pop(name, None) for name in _OPTIONS}
    forced = kwargs.pop("forced_decoder_ids", None)
    own = {
        "temperature": temperature if isinstance(temperature, int | float) and temperature > 0 else None,
        "return_dict_in_generate": return_dict_in_generate,
    }
    kwargs.update({name: value for name, value in own.items() if value is not None})
    if all(source is None or source.top_k is None for source in (generation_config, model.generation_config)):
        # Unless someone chose a top_k, Whisper samples from all tokens.
        kwargs.setdefault("top_k", 0)
    config, extra = model._resolve(generation_config, kwargs)
    if extra:
        hint = ": language, task, prompt_ids and prefix_ids make the prompt" if "decoder_input_ids" in extra else ""
        raise GenerationError(f"{sorted(extra)[0]!r} cannot be passed to Whisper's generate(); leave it out{hint}.")
    features, lengths = _features(model, input_features, attention_mask, encoder_outputs)
    is_long = int(lengths.max()) > model.config.window_frames if encoder_outputs is None else False
    if config.decoder_start_token_id is not None:
        as_ids("decoder_start_token_id", config.decoder_start_token_id, model.config.vocab_size)
    options = _options(
        model,
        config,
        is_long=is_long,
        temperature=temperature,
        word_tokenizer=word_tokenizer(word_timestamps, tokenizer),
        num_frames=frames_per_item(num_frames, len(lengths)),
        **chosen,
    )
    if streamer is not None and (options.best_of or 1) > 1:
        raise GenerationError(
            f"a streamer cannot follow best_of={options.best_of} texts at once: pass best_of=1, or no streamer."
        )
    if streamer is not None and len(options.temperatures) > 1:
        raise GenerationError(
            f"a streamer cannot take back what a fallback through temperature={temperature!r} replaces: pass "
            "one temperature, or no streamer."
        )
    guests = Guests(
        logits_processor=list(logits_processor or ()),
        stopping_criteria=list(stopping_criteria or ()),
        prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
        assistant=assistant_model,
        streamer=streamer,
        generator=generator,
    )
    encoded = None if encoder_outputs is None else as_encoder_output(encoder_outputs)
    run = Transcription(model, config, options, features, guests, encoded)
    if language is None and task is None:
        language, task = _forced_names(model, generation_config, config, forced)
    language, task = _language_and_task(config, language, task, is_multilingual)
    run.open(lengths, language, task, is_multilingual)
    return run, config


def _forced_names(model: Any, given: GenerationConfig | None, config: GenerationConfig, forced: Any) -> Any:
    """The language and the task of forced tokens, which older programs pass to the call or write to a config.

    Raises:
        GenerationError: The call forces tokens that stand for something else.
    """
    places = [getattr(place, "forced_decoder_ids", None) for place in (given, model.generation_config, model.config)]
    tokens = next((tokens for tokens in (forced, *places) if tokens), None)
    names = {} if tokens is None else without_forced({"forced_decoder_ids": tokens}, named_ids(config))
    if "forced_decoder_ids" in names and forced:
        raise GenerationError(
            f"forced_decoder_ids={str(forced)[:80]} are not just a language, a task and <|notimestamps|> of this "
            "model: pass language= and task=, and prefix_ids= for the beginning of the text."
        )
    return names.get("language"), names.get("task")


def _language_and_task(config: GenerationConfig, language: Any, task: str | None, override: bool | None) -> Any:
    """Language and task of the call, else those that a fine-tuned checkpoint's generation config settles."""
    if not knows_languages(config, override):
        return language, task
    if language is None:
        language = getattr(config, "language", None)
    return language, getattr(config, "task", None) if task is None else task


def _features(
    model: Any, features: Tensor | None, mask: Tensor | None, encoder_outputs: Any
) -> tuple[Tensor | None, Tensor]:
    """The features, and the frames of audio in each item."""
    window = model.config.window_frames
    if features is None:
        if encoder_outputs is None:
            raise GenerationError("there is nothing to transcribe: pass input_features (batch, mel bins, frames).")
        rows = len(as_encoder_output(encoder_outputs)[0])
        return None, torch.full((rows,), window)
    # Features of recordings that are made as they are read are no tensor, but look like one.
    if not hasattr(features, "dim"):
        raise ShapeError(not_features(features))
    if features.dim() != 3 or features.shape[1] != model.config.num_mel_bins or not features.shape[0]:
        raise ShapeError(
            f"input_features is of shape {tuple(features.shape)}; (batch, {model.config.num_mel_bins}, frames) is "
            "needed."
        )
    batch, _, frames = features.shape
    if mask is not None:
        mask = as_ids("attention_mask", mask)
        if tuple(mask.shape) != (batch, frames):
            raise ShapeError(
                f"attention_mask is of shape {tuple(mask.shape)}; (batch, frames) = {(batch, frames)} is needed."
            )
        return features, mask.long().sum(dim=1).cpu()
    if batch > 1 and frames > window:
        raise GenerationError(
            f"a batch of {batch} items longer than one window ({frames} frames, a window has {window}) needs "
            "attention_mask, to tell audio from padding: WhisperFeatureExtractor(..., return_attention_mask=True) "
            "gives it."
        )
    return features, torch.full((batch,), frames)


def _options(
    model: Any,
    config: GenerationConfig,
    *,
    is_long: bool,
    temperature: Any,
    num_segment_frames: int | None,
    word_tokenizer: Any,
    num_frames: tuple[int, ...] | None,
    **chosen: Any,
) -> Options:
    wanted = chosen.pop("return_timestamps")
    if wanted is None:
        wanted = True if is_long else bool(getattr(config, "return_timestamps", False))
    if is_long and not wanted and not chosen["fixed_windows"]:
        raise GenerationError(
            f"return_timestamps=False with audio longer than one window of {model.config.window_frames} frames: the "
            "next window starts where timestamps say the last one ended. Leave it unset, and drop the timestamps "
            "from the text with skip_special_tokens=True."
        )
    if wanted and getattr(config, "no_timestamps_token_id", None) is None:
        raise GenerationError(
            "return_timestamps needs no_timestamps_token_id in the generation config; this one has none."
        )
    window = num_segment_frames or model.config.window_frames
    if not 2 <= window <= model.config.window_frames:
        raise GenerationError(
            f"num_segment_frames={num_segment_frames}: accepted are 2 to {model.config.window_frames}."
        )
    for name in _FROM_CONFIG:
        value = getattr(config, name, None) if chosen[name] is None else chosen[name]
        chosen[name] = None if isinstance(value, str) and value == OFF else value
    return Options(
        timestamps=wanted,
        temperatures=ladder(temperature, config),
        compression_ratio_threshold=chosen.pop("compression_ratio_threshold"),
        logprob_threshold=chosen.pop("logprob_threshold"),
        no_speech_threshold=chosen.pop("no_speech_threshold"),
        condition_on_prev_tokens=bool(chosen.pop("condition_on_prev_tokens")),
        prompt_ids=prompt_tokens("prompt_ids", chosen.pop("prompt_ids"), model.config),
        prompt_condition_type=chosen.pop("prompt_condition_type") or "first-segment",
        history_ids=tuple(chosen.pop("history_ids") or ()),
        prefix=prefix_tokens(chosen.pop("prefix_ids"), model.config),
        window_frames=window,
        word_tokenizer=word_tokenizer,
        num_frames=num_frames,
        **{name: value for name, value in chosen.items() if value is not None},
    )
