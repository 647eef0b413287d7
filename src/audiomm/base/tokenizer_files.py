"""The files of a tokenizer: tokenizer.json and its neighbours, read and written.

The layout is that of transformers: tokenizer.json (the `tokenizers` library's own format) holds the vocabulary,
tokenizer_config.json the settings; special_tokens_map.json and added_tokens.json are older neighbours, still read.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from .errors import ConfigError
from .hub import Source, atomic_write, make_folder, pointer_hint, read_json, write_json

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
#: Folder of the chat templates that go by another name than "default", a file each.
TEMPLATES_FOLDER = "additional_chat_templates"

#: A vocabulary of 262,144 entries with its merges takes 34 MB; anything far beyond is not a tokenizer.
MAX_TOKENIZER_BYTES = 64 * 2**20

#: Settings that say where the files were, not what the tokenizer is.
_NOT_SAVED = frozenset(
    {"added_tokens_decoder", "vocab_file", "merges_file", "normalizer_file", "tokenizer_file"}
    | {"special_tokens_map_file", "name_or_path", "is_local", "local_files_only", "_commit_hash", "backend"}
    | {"extra_special_tokens"}  # written as additional_special_tokens, which older readers know
)


def read_settings(source: Source) -> dict[str, Any]:
    """Everything the JSON files beside the vocabulary say, special tokens as plain strings.

    tokenizer_config.json wins over special_tokens_map.json; `added_tokens_decoder` collects the added tokens of both
    that file and added_tokens.json as {id: AddedToken}.

    Raises:
        ConfigError: A file is not JSON, or its added tokens are not tokens.
    """
    config_path = source.find(CONFIG_FILE)
    settings = read_json(config_path) if config_path else {}
    map_path = source.find("special_tokens_map.json")
    if map_path:
        settings = {**read_json(map_path), **settings}
    special = _contents(settings)
    try:
        added = {int(number): added_token(token) for number, token in settings.pop("added_tokens_decoder", {}).items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"{config_path}: added_tokens_decoder must map ids to tokens: {error}") from error
    added_path = source.find("added_tokens.json")
    for token, number in (read_json(added_path) if added_path else {}).items():
        added.setdefault(number, AddedToken(token, normalized=False, special=token in special))
    settings = {name: token_text(value) for name, value in settings.items()}
    settings["added_tokens_decoder"] = dict(sorted(added.items()))
    template_path = source.find(TEMPLATE_FILE)
    if template_path:
        named = settings.get("chat_template")
        listed = {item["name"]: item["template"] for item in named} if isinstance(named, list) else {}
        files = [template_path, *sorted((template_path.parent / TEMPLATES_FOLDER).glob("*.jinja"))]
        texts = [path.read_text(encoding="utf-8") for path in files]
        found = listed | dict(zip(["default", *(path.stem for path in files[1:])], texts, strict=True))
        settings["chat_template"] = found if len(found) > 1 else texts[0]
    return settings


def read_backend(path: Path | str) -> Tokenizer:
    """The `tokenizers.Tokenizer` in a tokenizer.json.

    Raises:
        ConfigError: The file is too large, or not a tokenizer.
    """
    size = Path(path).stat().st_size
    if size > MAX_TOKENIZER_BYTES:
        raise ConfigError(f"{path} has {size:,} bytes; a tokenizer has at most {MAX_TOKENIZER_BYTES:,}.")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for whatever is wrong inside
        raise ConfigError(f"{path} is not a readable tokenizer: {pointer_hint(path) or str(error)[:200]}") from error


def byte_level_bpe(vocab: str | dict[str, int], merges: str | list[Any], add_prefix_space: bool) -> Tokenizer:
    """The backend from the older pair of files, vocab.json and merges.txt.

    Raises:
        ConfigError: The files are not readable or do not fit together.
    """
    entries = vocab if isinstance(vocab, dict) else read_json(vocab)
    pairs = merges if isinstance(merges, list) else _read_merges(merges)
    try:
        tuples: list[Any] = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in pairs]
        model = BPE(vocab=entries, merges=tuples)
    except Exception as error:  # the library raises bare Exception for whatever does not fit
        raise ConfigError(f"vocabulary and merges do not make a tokenizer: {error}") from error
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    backend.decoder = decoders.ByteLevel()
    return backend


def write_tokenizer(folder: str | os.PathLike[str], backend: Tokenizer, settings: dict[str, Any]) -> list[str]:
    """Write tokenizer.json, tokenizer_config.json and chat templates, the default one to chat_template.jinja.

    Raises:
        SaveError: The folder cannot be made or written.
    """
    place = make_folder(folder)
    with atomic_write(place / TOKENIZER_FILE) as temporary:
        temporary.write_text(backend.to_str(pretty=True), encoding="utf-8")
    settings = {name: value for name, value in settings.items() if name not in _NOT_SAVED}
    written = [place / TOKENIZER_FILE, place / CONFIG_FILE]
    template = settings.pop("chat_template", None)
    templates = {"default": template} if isinstance(template, str) else template or {}
    if templates and not isinstance(template, str):  # what is on the hub cannot be looked through for files
        settings["chat_template"] = [{"name": name, "template": text} for name, text in templates.items()]
    for name, text in templates.items():
        if Path(name).name != name or "default" not in templates:
            continue
        path = place / TEMPLATE_FILE if name == "default" else make_folder(place / TEMPLATES_FOLDER) / f"{name}.jinja"
        with atomic_write(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
        written.append(path)
    write_json(place / CONFIG_FILE, _checked_json(settings))
    return [str(path) for path in written]


def token_text(value: Any) -> Any:
    """A special token's text, whether written as a string, as {"content": ...} or as an AddedToken; lists likewise."""
    if isinstance(value, AddedToken):
        return value.content
    if isinstance(value, dict) and isinstance(value.get("content"), str):
        return value["content"]
    if isinstance(value, (list, tuple)):
        return [token_text(item) for item in value]
    return value


def added_token(value: Any, special: bool = False) -> AddedToken:
    """An AddedToken from its text, its JSON form or itself.

    Raises:
        TypeError: `value` is none of those.
    """
    if isinstance(value, AddedToken):
        return value
    if isinstance(value, str):
        return AddedToken(value, normalized=not special, special=special)
    if isinstance(value, dict) and isinstance(value.get("content"), str):
        flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
        return AddedToken(value["content"], **{flag: bool(value[flag]) for flag in flags if flag in value})
    raise TypeError(f"a token to add must be a string or an AddedToken, not {type(value).__name__}.")


def _contents(settings: dict[str, Any]) -> set[str]:
    """The texts of all special tokens named in `settings`."""
    texts = set()
    for name, value in settings.items():
        values = token_text(value)
        if name.endswith("_token") and isinstance(values, str):
            texts.add(values)
        elif name.endswith("special_tokens") and isinstance(values, (list, dict)):
            texts.update(values if isinstance(values, list) else values.values())
    return texts


def _checked_json(settings: dict[str, Any]) -> dict[str, Any]:
    for name, value in settings.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"the tokenizer's setting {name}={value!r} cannot be written as JSON: {error}") from error
    return settings


def _read_merges(path: str) -> list[str]:
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    return [line for line in lines if line and not line.startswith("#version")]
