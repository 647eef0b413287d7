"""Models with random weights that say the same words in every window, in the formats of all sides.

A random model babbles to the limit, each in its own way, and no two programs could be compared from audio to text. In
these models what comes next depends on the place only: the embedding of a place is a multiple of the embedding of the
token that shall follow, far above what the layers add. Every window is <|0.00|>, so many words, <|30.00|> and the end,
in any number format and on all sides, while shapes, types and memory traffic are those of the real models.
"""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import torch
from common import SIZES
from torch import Tensor

#: Its tokenizer is used when there is no other; its words are few.
BUNDLED = "audiomm/whisper-commands"
#: The next token's logit, about; its rivals come to half of that. The height of a place's embedding above the layers'.
TOKEN_LOGIT, PLACE_HEIGHT = 45.0, 8.0
#: Ends at the last place of the decoder: the model never stops by itself.
ENDLESS = 440


def make(size: str, words: int, tokenizer_folder: Path | None, folder: Path) -> Path:
    """Save a model, its tokenizer, feature extractor and generation config.

    Args:
        size: A key of SIZES.
        words: Words in each window; with timestamps, 3 further tokens. ENDLESS never ends.
        tokenizer_folder: See `tokenizer`.
        folder: Where to; made.
    """
    import audiomm

    words_of = tokenizer(tokenizer_folder)
    ids = words_of.convert_tokens_to_ids
    config = audiomm.WhisperConfig(**config_values(size))
    torch.manual_seed(0)
    model = audiomm.WhisperForConditionalGeneration(config)
    script = _script(words_of, words, config.max_target_positions)
    with torch.no_grad():
        tokens = model.model.decoder.embed_tokens.weight
        std = TOKEN_LOGIT / config.d_model
        tokens.normal_(std=std)
        model.model.decoder.embed_positions.weight.copy_(PLACE_HEIGHT / std * tokens[script])
    end = ids("<|endoftext|>")
    values = {
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": end,
        "decoder_start_token_id": ids("<|startoftranscript|>"),
        "prev_sot_token_id": ids("<|startofprev|>"),
        "no_timestamps_token_id": ids("<|notimestamps|>"),
        "max_initial_timestamp_index": 50,
        "max_length": config.max_target_positions,
        "is_multilingual": True,
        "lang_to_id": {"<|en|>": ids("<|en|>")},
        "task_to_id": {task: ids(f"<|{task}|>") for task in ("transcribe", "translate")},
        # As many heads as the published models have at these sizes, in the last layers.
        "alignment_heads": [[config.decoder_layers - 1, head] for head in range(config.decoder_attention_heads)],
    }
    for name, value in values.items():
        setattr(model.generation_config, name, value)
        if hasattr(config, name) and name != "max_length":
            setattr(config, name, value)
    model.save_pretrained(folder)
    words_of.save_pretrained(folder)
    audiomm.WhisperFeatureExtractor(feature_size=config.num_mel_bins).save_pretrained(folder)
    return folder


def config_values(size: str) -> dict[str, int]:
    """Arguments of WhisperConfig for a key of SIZES."""
    values = dict(SIZES[size])
    heads = values.pop("heads", None)
    if heads is not None:
        values |= {"encoder_attention_heads": heads, "decoder_attention_heads": heads}
        values |= {"encoder_ffn_dim": 4 * values["d_model"], "decoder_ffn_dim": 4 * values["d_model"]}
    return values


def tokenizer(folder: Path | None) -> Any:
    """The tokenizer in the folder; with None openai-whisper's multilingual one, else the bundled model's."""
    import audiomm

    package = importlib.util.find_spec("whisper")
    if folder is None and package is not None and package.origin is not None:
        from audiomm.convert.vocabulary import build_tokenizer, read_tiktoken

        path = Path(package.origin).parent / "assets" / "multilingual.tiktoken"
        return build_tokenizer(read_tiktoken(path), 51865, path.name)
    return audiomm.WhisperTokenizer.from_pretrained(BUNDLED if folder is None else folder)


def is_multilingual(folder: Path) -> bool:
    """Whether the folder's tokenizer is OpenAI's: CTranslate2 and openai-whisper know no other."""
    return bool(tokenizer(folder).convert_tokens_to_ids("<|endoftext|>") == 50257)


def _script(words_of: Any, count: int, places: int) -> Tensor:
    """The token that follows each place of a window."""
    ids = words_of.convert_tokens_to_ids
    end = ids("<|endoftext|>")
    texts = words_of.batch_decode([[number] for number in range(end)])
    words = [number for number, text in enumerate(texts) if text[:1] == " " and text[1:].isalpha() and text.isascii()]
    words = [number for number in words if len(texts[number]) > 3] or list(range(end))
    # Far apart in the vocabulary, so that no text looks like a loop.
    chosen = [words[place * 97 % len(words)] for place in range(min(count, places))]
    script = [ids("<|en|>"), ids("<|transcribe|>"), ids("<|0.00|>"), *chosen, ids("<|30.00|>")]
    return torch.tensor([*script, *[end] * places][:places])


def convert(source: Path, folder: Path) -> Path:
    """Convert a folder to CTranslate2's format; needs transformers."""
    from ctranslate2.converters import TransformersConverter

    TransformersConverter(str(source), low_cpu_mem_usage=True).convert(str(folder))
    for name in ("tokenizer.json", "preprocessor_config.json"):
        shutil.copyfile(source / name, folder / name)
    return folder


def as_openai(folder: Path) -> Any:
    """The model of a folder as an object of openai-whisper."""
    from safetensors.torch import load_file
    from whisper.model import ModelDimensions, Whisper

    import audiomm
    from audiomm.convert.openai_whisper import DIMENSIONS, RULES

    config = audiomm.WhisperConfig.from_pretrained(folder)
    sizes = {name: getattr(config, field) for name, field in DIMENSIONS.items()}
    model = Whisper(ModelDimensions(**sizes, n_text_state=config.d_model))
    weights = {}
    for name, value in load_file(folder / "model.safetensors").items():
        theirs = name.removeprefix("model.")
        for foreign, hub in reversed(RULES):
            theirs = theirs.replace(hub, foreign)
        weights[theirs] = value
    missing = model.load_state_dict(weights, strict=False)
    if missing.missing_keys or set(missing.unexpected_keys) - {"proj_out.weight"}:
        raise RuntimeError(f"openai-whisper's weights do not fit: {missing}")
    import json

    heads = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))["alignment_heads"]
    mask = torch.zeros(config.decoder_layers, config.decoder_attention_heads, dtype=torch.bool)
    mask[tuple(torch.tensor(heads).T)] = True
    model.register_buffer("alignment_heads", mask.to_sparse(), persistent=False)
    return model.eval()
