"""What one call of a speech pipeline asks for: its keywords, checked and sorted before anything is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..base.errors import InputError
from ..base.transcript import Timestamps
from ..media.speech import SpeechFinder
from .clips import LOAD_OPTIONS, clip_times

#: Used where neither the call, nor the pipeline, nor the model's generation config says otherwise.
GENERATION_DEFAULTS = {"max_new_tokens": 256, "num_beams": 5}
_DRAFTING = ("assistant_model", "prompt_lookup_num_tokens")


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
        at_once: Windows of one long recording that go through the model side by side, cut at pauses; None goes through
            it sequentially.
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
    at_once: int | None = None
    load_options: dict[str, Any] = field(default_factory=dict)
    generate_kwargs: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_keywords(
        cls,
        asked: dict[str, Any],
        *,
        tokenizer: Any,
        generation_config: Any,
        read_again: bool,
        at_once: int | None,
    ) -> Request:
        """The request that keywords describe.

        Args:
            asked: The keywords of a call, those of `generate` among them; it is used up.
            tokenizer: Makes tokens of prompts.
            generation_config: The model's own.
            read_again: How words are found where `word_timestamps` does not say it.
            at_once: Windows side by side, where the input is one recording.

        Raises:
            InputError: A keyword is wrong, or two of them exclude each other.
        """
        asked.pop("ignore_warning", None)
        chunk, stride = asked.pop("chunk_length_s", None), asked.pop("stride_length_s", None)
        words = asked.pop("word_timestamps", None)
        timestamps = _timestamps(asked.pop("return_timestamps", None), words, generation_config)
        speech = speech_finder(asked.pop("vad_filter", None), asked.pop("vad_parameters", None))
        parts = clip_times(asked.pop("clip_timestamps", None))
        if speech is not None and parts:
            raise InputError("vad_filter and clip_timestamps both choose what is heard; pass one of them.")
        at_once = None if chunk else at_once
        if at_once is not None and asked.get("condition_on_prev_tokens"):
            raise InputError(
                f"condition_on_prev_tokens=True goes through a recording window by window, and batch_size={at_once} "
                "hears windows side by side; pass one of them."
            )
        asked.update(_prompt(tokenizer, asked))
        return cls(
            chunk_length_s=_seconds("chunk_length_s", chunk or 0),
            stride_length_s=_stride_seconds(chunk or 0, stride),
            timestamps=timestamps,
            read_again=timestamps == "word" and not chunk and (read_again if words is None else bool(words)),
            language=bool(asked.pop("return_language", None)),
            segments=bool(asked.pop("return_segments", None)),
            progress=asked.pop("progress", None),
            speech=speech,
            clip_times=parts,
            at_once=at_once,
            load_options={name: asked.pop(name) for name in LOAD_OPTIONS if name in asked},
            generate_kwargs=_with_defaults(asked, generation_config),
        )


def flat(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords with those in generate_kwargs beside the others."""
    rest = {name: value for name, value in kwargs.items() if name != "generate_kwargs"}
    nested = kwargs.get("generate_kwargs") or {}
    if not isinstance(nested, Mapping):
        raise InputError(f"generate_kwargs is a {type(nested).__name__}; a dict of options of generate() is needed.")
    return {**nested, **rest}


def _with_defaults(generate_kwargs: dict[str, Any], own: Any) -> dict[str, Any]:
    """Add the pipelines' defaults for what neither the call nor the model's own generation config sets."""
    given = {**_set_fields(own), **_set_fields(generate_kwargs.get("generation_config")), **generate_kwargs}
    defaults = {name: value for name, value in GENERATION_DEFAULTS.items() if name not in given}
    if "max_length" in given:
        defaults.pop("max_new_tokens", None)
    if any(given.get(name) for name in _DRAFTING):
        # Drafts are for greedy decoding and sampling; nobody asked for a search.
        defaults.pop("num_beams", None)
    return {**defaults, **generate_kwargs}


def _set_fields(config: Any) -> dict[str, Any]:
    """The fields of a generation config that are set."""
    if config is not None and not hasattr(config, "__dict__"):
        raise InputError(f"generation_config is a {type(config).__name__}; a GenerationConfig is needed.")
    return {} if config is None else {name: value for name, value in vars(config).items() if value is not None}


def _timestamps(asked: Any, words: Any, generation_config: Any) -> Timestamps:
    """The times that are wanted: False, True or "word"."""
    timestamps: Any = "word" if words else asked
    if not timestamps:
        timestamps = bool(getattr(generation_config, "return_timestamps", False))
    if timestamps == "char":
        raise InputError(
            "return_timestamps='char': Whisper gives no times for characters; pass 'word' for words or True for "
            "segments."
        )
    if timestamps not in (True, False, "word"):
        raise InputError(f"return_timestamps={timestamps!r}: expected False, True (segments) or 'word'.")
    return "word" if timestamps == "word" else bool(timestamps)


def speech_finder(wanted: Any, parameters: Any) -> SpeechFinder | None:
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
