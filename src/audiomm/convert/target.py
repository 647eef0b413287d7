"""The folder that a conversion ends in: config, weights, generation config, feature extractor and tokenizer.

It is the layout that `from_pretrained` of this package and of transformers read. Everything is written into a folder
beside the target, which takes its name when it is whole: a torn one is never left.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..base.errors import (
    CheckpointMismatchError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    InputError,
    SaveError,
)
from ..base.hub import write_json
from ..base.weights import parse_dtype, save_weights
from ..models import whisper
from ..models.whisper import WhisperConfig, WhisperFeatureExtractor, WhisperTokenizer
from ..models.whisper.config import FRAMES_PER_SECOND
from ..models.whisper.published import ENGLISH_ONLY, generation_fields, special_ids, without_forced
from .foreign import Foreign
from .vocabulary import build_tokenizer, read_tiktoken, suppressed_tokens

logger = logging.getLogger("audiomm.convert")

_TOKENIZER_FILES = ("tokenizer.json", "vocab.json")
_EXTRACTOR_FILES = ("preprocessor_config.json", "processor_config.json")
#: Options for which null is an answer: nothing is suppressed, and any first timestamp is fine.
_MAY_BE_NONE = ("suppress_tokens", "begin_suppress_tokens", "max_initial_timestamp_index")
_IDS = {"bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"}


def write_folder(
    foreign: Foreign, output: Path, dtype: str | torch.dtype, tokenizer: str | os.PathLike[str] | None
) -> None:
    """Write the model as a folder; nothing is left behind if something does not fit.

    Args:
        foreign: What was read.
        output: The folder, which must not exist or be empty.
        dtype: Of the weights; "auto" is the narrowest that holds every stored number as it is.
        tokenizer: Folder, hub id or .tiktoken file to take the tokenizer from, instead of the checkpoint's own.

    Raises:
        CheckpointMismatchError: Weights are missing, unknown or of a wrong shape.
        CorruptCheckpointError: Weights are NaN or infinite.
        InputError: There is no tokenizer, or it is not this model's.
        SaveError: The folder is not empty or cannot be written.
    """
    _refuse_full(output)
    config = WhisperConfig.from_dict(foreign.config, name_or_path=foreign.name)
    weights = _fitting(foreign, config)
    text = _tokenizer(foreign, config, tokenizer) if foreign.model == "WhisperForConditionalGeneration" else None
    generation = {} if text is None else _generation(foreign, config, text)
    extractor = _extractor(foreign, config)
    target = _common_dtype(weights, dtype)
    config.architectures = [foreign.model]
    config.dtype = str(target).removeprefix("torch.")
    config.suppress_tokens = config.begin_suppress_tokens = None
    for name in _IDS & generation.keys():
        setattr(config, name, generation[name])
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        save_weights({name: _cast(name, tensor, target, foreign.name) for name, tensor in weights.items()}, temporary)
        config.save_pretrained(temporary)
        extractor.save_pretrained(temporary)
        if text is not None:
            write_json(temporary / "generation_config.json", generation)
            text.save_pretrained(temporary)
        if output.is_dir():
            output.rmdir()
        temporary.replace(output)
    except OSError as error:
        if isinstance(error, (SaveError, CorruptCheckpointError)):
            raise
        raise SaveError(f"{output} could not be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _refuse_full(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise SaveError(f"{output} exists and is not an empty folder: name another one, or remove it.")


# ---------------------------------------------------------------------- weights


def _fitting(foreign: Foreign, config: WhisperConfig) -> dict[str, Tensor]:
    """The weights in the shapes the model has; single axes that a format drops or adds do not count."""
    with torch.device("meta"):
        model = getattr(whisper, foreign.model)(config)
    needed = {
        name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in model.active_ties()
    }
    found = {name: tensor for name, tensor in foreign.weights.items() if name not in model.active_ties()}
    problems = []
    for word, names in (
        ("missing", needed.keys() - found.keys()),
        ("not part of Whisper", found.keys() - needed.keys()),
    ):
        if names:
            listed = ", ".join(sorted(names)[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
            problems.append(f"{len(names)} are {word}: {listed}")
    for name in sorted(needed.keys() & found.keys()):
        tensor, shape = found[name], needed[name]
        if tuple(tensor.shape) != shape:
            if [axis for axis in tensor.shape if axis != 1] != [axis for axis in shape if axis != 1]:
                problems.append(f"{name} is {list(tensor.shape)}, needed {list(shape)}")
                continue
            found[name] = tensor.reshape(shape)
        if not tensor.is_floating_point():
            problems.append(f"{name} holds numbers of type {tensor.dtype}; floating point is needed")
    if problems:
        raise CheckpointMismatchError(
            f"{foreign.name}: its {len(foreign.weights)} weights do not make a Whisper of the sizes it declares: "
            f"{'; '.join(problems[:8])}."
        )
    return {name: found[name] for name in needed}


def _common_dtype(weights: Mapping[str, Tensor], dtype: str | torch.dtype) -> torch.dtype:
    if dtype != "auto":
        chosen = parse_dtype(dtype)
        return torch.float32 if chosen is None else chosen
    kinds = {tensor.dtype for tensor in weights.values()} - {torch.float64}
    narrow = kinds & {torch.float16, torch.bfloat16}
    if len(narrow) != 1:
        return torch.float32
    candidate = narrow.pop()
    wide = [tensor for tensor in weights.values() if tensor.dtype != candidate]
    exact = all(torch.equal(tensor.to(candidate).to(tensor.dtype), tensor) for tensor in wide)
    return candidate if exact else torch.float32


def _cast(name: str, tensor: Tensor, dtype: torch.dtype, where: str) -> Tensor:
    if not bool(torch.isfinite(tensor).all()):
        bad = int((~torch.isfinite(tensor)).sum())
        raise CorruptCheckpointError(f"{where}: {bad:,} of {tensor.numel():,} numbers of {name} are NaN or infinite.")
    result = tensor.to(dtype)
    if not bool(torch.isfinite(result).all()):
        raise CorruptCheckpointError(f"{where}: {name} goes up to {tensor.abs().max():g}, which {dtype} cannot hold.")
    return result.clone() if result.untyped_storage().nbytes() > result.nbytes else result


# ---------------------------------------------------------------------- text


def _tokenizer(foreign: Foreign, config: WhisperConfig, wanted: str | os.PathLike[str] | None) -> WhisperTokenizer:
    """The tokenizer that was named, else the one that lies beside the weights, else that of the file's vocabulary."""
    tokenizer = _find_tokenizer(foreign, config, wanted)
    _check_tokenizer(tokenizer, config, foreign.name)
    return tokenizer


def _find_tokenizer(foreign: Foreign, config: WhisperConfig, wanted: str | os.PathLike[str] | None) -> WhisperTokenizer:
    if wanted is not None:
        path = Path(wanted)
        if path.suffix == ".tiktoken":
            if not path.is_file():
                raise CheckpointNotFoundError(f"tokenizer={str(wanted)!r}: there is no such file.")
            return build_tokenizer(read_tiktoken(path), config.vocab_size, str(path))
        return WhisperTokenizer.from_pretrained(wanted)
    if foreign.source is not None and any(foreign.source.find(name) is not None for name in _TOKENIZER_FILES):
        options = {name: value for name, value in vars(foreign.source).items() if name != "name" and value}
        return WhisperTokenizer.from_pretrained(foreign.source.name, **options)
    if foreign.tokens is not None:
        return build_tokenizer(foreign.tokens, config.vocab_size, foreign.name)
    raise InputError(
        f"{foreign.name} holds no vocabulary: pass tokenizer= (--tokenizer) with a folder or hub id that has the "
        "model's tokenizer, like openai/whisper-tiny, or openai-whisper's file multilingual.tiktoken or gpt2.tiktoken."
    )


def _check_tokenizer(tokenizer: WhisperTokenizer, config: WhisperConfig, where: str) -> None:
    """Refuse the tokenizer of another model: every text would come out wrong."""
    vocabulary = tokenizer.get_vocab()
    needed = ("<|endoftext|>", "<|startoftranscript|>", "<|startofprev|>", "<|notimestamps|>")
    missing = [token for token in needed if token not in vocabulary]
    if missing:
        raise InputError(f"the tokenizer for {where} has no {', '.join(missing)}; it is not Whisper's.")
    largest = max(vocabulary.values())
    if largest >= config.vocab_size:
        raise InputError(
            f"the tokenizer for {where} has ids up to {largest:,}, but the model knows {config.vocab_size:,} tokens: "
            "it belongs to another model."
        )
    known = special_ids(config.vocab_size)
    found = vocabulary["<|notimestamps|>"]
    if known is not None and known["<|notimestamps|>"] != found:
        raise InputError(
            f"the tokenizer for {where} has <|notimestamps|> at {found:,}; in a model of {config.vocab_size:,} tokens "
            f"it is {known['<|notimestamps|>']:,}: it belongs to another model."
        )


def _generation(foreign: Foreign, config: WhisperConfig, tokenizer: WhisperTokenizer) -> dict[str, Any]:
    """Content of generation_config.json: what the checkpoint says, and else what its kind of model has."""
    multilingual = config.vocab_size != ENGLISH_ONLY
    fields = generation_fields(tokenizer.get_vocab(), config, multilingual)
    space = tokenizer.encode(" ", add_special_tokens=False)
    fields["suppress_tokens"] = suppressed_tokens(tokenizer)
    fields["begin_suppress_tokens"] = [*space, fields["eos_token_id"]]
    said = {
        name: value for name, value in (foreign.generation or {}).items() if value is not None or name in _MAY_BE_NONE
    }
    suppressed = said.get("suppress_tokens")
    if isinstance(suppressed, list) and -1 in suppressed:  # openai-whisper's and CTranslate2's word for the usual ones
        said.pop("suppress_tokens")
    if "alignment_heads" not in fields and "alignment_heads" not in said:
        logger.warning(
            "%s: no alignment heads are known for this size; words are timed by all heads of the decoder's later half.",
            foreign.name,
        )
    return without_forced({**fields, **said}, tokenizer.get_vocab())


def _extractor(foreign: Foreign, config: WhisperConfig) -> WhisperFeatureExtractor:
    """The checkpoint's own feature extractor, else the one for so many mel bins and so long windows."""
    if foreign.source is not None and any(foreign.source.find(name) is not None for name in _EXTRACTOR_FILES):
        options = {name: value for name, value in vars(foreign.source).items() if name != "name" and value}
        return WhisperFeatureExtractor.from_pretrained(foreign.source.name, **options)
    seconds, rest = divmod(config.window_frames, FRAMES_PER_SECOND)
    return WhisperFeatureExtractor(feature_size=config.num_mel_bins, chunk_length=30 if rest else seconds)
