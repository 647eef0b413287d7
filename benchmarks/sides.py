"""The same Whisper on all sides: loaded in each number format, and its parts as plain functions.

What a side is called is its package and its number format, like "audiomm int8"; int8 means int8 weights and, as in
CTranslate2, activations that are quantised on the way.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import apart
import numpy as np
import torch
from checkpoints import as_openai
from common import Setting

FLOATS = ("float32", "bfloat16")
#: What the rows of the targets call audiomm's choice for this machine.
AUTO = "auto"


def own(folder: Path, kind: str) -> Any:
    """The model of audiomm in a number format, or in that which quantize="auto" picks.

    Raises:
        LookupError: This audiomm does not know the format.
    """
    import audiomm

    load = audiomm.WhisperForConditionalGeneration.from_pretrained
    if kind in FLOATS:
        return load(folder, dtype=getattr(torch, kind))
    if "quantize" not in inspect.signature(load).parameters:
        raise LookupError(f"this audiomm has no quantize={kind!r}: left out")
    return load(folder, quantize=kind)


def own_models(setting: Setting, words: int = 100, kinds: tuple[str, ...] = ("float32", "bfloat16", "int8")) -> Any:
    """{name of the side: model} for the formats that this audiomm knows."""
    models = {}
    for kind in kinds:
        try:
            models[f"audiomm {kind}"] = own(setting.checkpoint(words), kind)
        except LookupError as error:
            setting.note(str(error))
    return models


def automatic(setting: Setting) -> str:
    """The number format that audiomm picks for this machine."""
    try:
        model = own(setting.checkpoint(), AUTO)
    except LookupError as error:
        setting.note(str(error))
        return "float32"
    return "int8" if any("Int8" in type(part).__name__ for part in model.modules()) else str(model.dtype)[6:]


def pipeline_of(package: Any, folder: Path, model: Any) -> Any:
    """The speech recognition pipeline of audiomm or transformers around a loaded model."""
    return package.pipeline(
        "automatic-speech-recognition",
        model=model,
        tokenizer=package.AutoTokenizer.from_pretrained(folder),
        feature_extractor=package.WhisperFeatureExtractor.from_pretrained(folder),
        device="cpu",
    )


def transformers_model(setting: Setting, words: int = 100, kind: str = "float32") -> Any:
    """The model of transformers with SDPA, its default."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    load = transformers.WhisperForConditionalGeneration.from_pretrained
    return load(setting.checkpoint(words), dtype=getattr(torch, kind))


def openai_model(setting: Setting, words: int = 100) -> Any:
    return as_openai(setting.checkpoint(words))


def ctranslate2_kinds() -> list[str]:
    """The number formats that CTranslate2 has for this processor, float32 first."""
    import ctranslate2

    known = ctranslate2.get_supported_compute_types("cpu")
    return [kind for kind in ("float32", "int8", "bfloat16") if kind in known]


def ctranslate2_model(setting: Setting, words: int, kind: str) -> Any:
    """CTranslate2's Whisper, the engine of faster-whisper: an `apart.Engine`."""
    return apart.start(setting.converted(words), kind, setting.threads)


def faster_model(setting: Setting, words: int, kind: str) -> Any:
    """faster-whisper's model: an `apart.Engine`."""
    return apart.start(setting.converted(words), kind, setting.threads, as_program=True)


def hub_encoder(model: Any, features: torch.Tensor) -> Callable[[], Any]:
    """The encoder of audiomm or transformers."""
    encoder, inputs = model.get_encoder(), features.to(model.dtype)

    def run() -> Any:
        with torch.inference_mode():
            return encoder(inputs).last_hidden_state

    return run


def openai_encoder(model: Any, features: torch.Tensor) -> Callable[[], Any]:
    def run() -> Any:
        with torch.inference_mode():
            return model.encoder(features)

    return run


def ctranslate2_encoder(model: Any, features: torch.Tensor) -> Callable[[], Any]:
    model.take(np.ascontiguousarray(features.numpy()))
    return model.encode  # type: ignore[no-any-return]


def hub_decoder(model: Any, hidden: Any, count: int, **options: Any) -> Callable[[], list[list[int]]]:
    """generate() of audiomm or transformers from the encoder's output on: `count` tokens for each row."""

    def run() -> list[list[int]]:
        tokens = model.generate(
            encoder_outputs=hidden,
            max_new_tokens=count,
            language="en",
            task="transcribe",
            return_timestamps=False,
            **options,
        )
        return [row[-count:] for row in tokens.tolist()]

    return run


def transformers_decoder(model: Any, hidden: torch.Tensor, count: int, **options: Any) -> Callable[[], list[list[int]]]:
    from transformers.modeling_outputs import BaseModelOutput

    def run() -> list[list[int]]:
        # A fresh object each time: generate() may write into it.
        return hub_decoder(model, BaseModelOutput(last_hidden_state=hidden.to(model.dtype)), count, **options)()

    return run


def compiled_options() -> dict[str, Any]:
    """Options with which transformers' generate() compiles its steps on the CPU, too, over a static cache."""
    from transformers import CompileConfig

    compile_config = CompileConfig(mode="default", fullgraph=False)
    compile_config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": compile_config}


def own_decoder(model: Any, hidden: torch.Tensor, count: int, **options: Any) -> Callable[[], list[list[int]]]:
    return hub_decoder(model, (hidden.to(model.dtype),), count, **options)


def own_decoder_compiled(model: Any, hidden: torch.Tensor, count: int) -> Callable[[], list[list[int]]]:
    """`own_decoder` whose step is compiled as a whole: the quickest kind for small models."""
    from audiomm import CompileConfig

    return own_decoder(model, hidden, count, compile_config=CompileConfig(regional=False))


def openai_decoder(model: Any, hidden: torch.Tensor, count: int) -> Callable[[], list[list[int]]]:
    import whisper

    options = whisper.DecodingOptions(language="en", without_timestamps=True, sample_len=count, fp16=False)
    return lambda: [found.tokens[:count] for found in whisper.decode(model, hidden, options)]


def ctranslate2_decoder(model: Any, prompt: list[int], hidden: torch.Tensor, count: int) -> Callable[[], Any]:
    model.take(np.ascontiguousarray(hidden.numpy()))
    return lambda: model.decode(prompt, count)


def faster_transcriber(model: Any, batched: bool = False, **options: Any) -> Callable[[np.ndarray], str]:
    """Recording to text by faster-whisper; a recording is handed over once."""

    def run(audio: np.ndarray) -> str:
        if getattr(model, "taken", None) is not audio:
            model.take(audio)
            model.taken = audio
        text: str = model.transcribe(batched, options)
        return text

    return run
