"""keras-hub's names of published models, and the hub's: `from_preset("whisper_tiny_en")` for those who know it.

Weights and vocabularies come from the hub's repositories, not from keras-hub's own.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Any, ClassVar

from typing_extensions import Self

from .errors import CheckpointNotFoundError
from .hub import Source, read_json

#: keras-hub's name -> (family, hub id, what it is).
PRESETS: dict[str, tuple[str, str, str]] = {
    "whisper_tiny_en": ("whisper", "openai/whisper-tiny.en", "4 + 4 layers, English"),
    "whisper_base_en": ("whisper", "openai/whisper-base.en", "6 + 6 layers, English"),
    "whisper_small_en": ("whisper", "openai/whisper-small.en", "12 + 12 layers, English"),
    "whisper_medium_en": ("whisper", "openai/whisper-medium.en", "24 + 24 layers, English"),
    "whisper_tiny_multi": ("whisper", "openai/whisper-tiny", "4 + 4 layers, 99 languages"),
    "whisper_base_multi": ("whisper", "openai/whisper-base", "6 + 6 layers, 99 languages"),
    "whisper_small_multi": ("whisper", "openai/whisper-small", "12 + 12 layers, 99 languages"),
    "whisper_medium_multi": ("whisper", "openai/whisper-medium", "24 + 24 layers, 99 languages"),
    "whisper_large_multi": ("whisper", "openai/whisper-large", "32 + 32 layers, 99 languages"),
    "whisper_large_multi_v2": ("whisper", "openai/whisper-large-v2", "32 + 32 layers, 99 languages, trained longer"),
    "gemma3n_e2b": ("gemma3n", "google/gemma-3n-E2B", "30 layers, 5.4 billion parameters"),
    "gemma3n_e2b_it": ("gemma3n", "google/gemma-3n-E2B-it", "30 layers, 5.4 billion parameters, follows instructions"),
    "gemma3n_e4b": ("gemma3n", "google/gemma-3n-E4B", "35 layers, 7.8 billion parameters"),
    "gemma3n_e4b_it": ("gemma3n", "google/gemma-3n-E4B-it", "35 layers, 7.8 billion parameters, follows instructions"),
    "gemma4_2b": ("gemma4", "google/gemma-4-E2B", "35 layers, text, pictures, video and sound"),
    "gemma4_instruct_2b": ("gemma4", "google/gemma-4-E2B-it", "35 layers, follows instructions"),
    "gemma4_4b": ("gemma4", "google/gemma-4-E4B", "42 layers, text, pictures, video and sound"),
    "gemma4_instruct_4b": ("gemma4", "google/gemma-4-E4B-it", "42 layers, follows instructions"),
    "gemma4_26b_a4b": ("gemma4", "google/gemma-4-26B-A4B", "30 layers, 128 experts, text, pictures and video"),
    "gemma4_instruct_26b_a4b": ("gemma4", "google/gemma-4-26B-A4B-it", "30 layers, 128 experts, follows instructions"),
    "gemma4_31b": ("gemma4", "google/gemma-4-31B", "60 layers, text, pictures and video"),
    "gemma4_instruct_31b": ("gemma4", "google/gemma-4-31B-it", "60 layers, follows instructions"),
    "gemma4_instruct_2b_assistant": ("gemma4", "google/gemma-4-E2B-it-assistant", "4 layers, drafts for E2B"),
    "gemma4_instruct_4b_assistant": ("gemma4", "google/gemma-4-E4B-it-assistant", "4 layers, drafts for E4B"),
    "gemma4_instruct_26b_a4b_assistant": ("gemma4", "google/gemma-4-26B-A4B-it-assistant", "4 layers, drafts for 26B"),
    "gemma4_instruct_31b_assistant": ("gemma4", "google/gemma-4-31B-it-assistant", "4 layers, drafts for 31B"),
}

_PREFIXES = ("hf://",)
_STORES = ("kaggle://", "modelscope://")
_OWN_FORM = "files in keras-hub's own form are not read; pass a preset's name, or a checkpoint in transformers' form."


def hub_id_of(preset: str | os.PathLike[str], families: tuple[str, ...] = ()) -> str:
    """What a preset's name stands for; a folder or a hub id stands for itself.

    Args:
        preset: "whisper_tiny_en", a folder, "openai/whisper-tiny.en" or "hf://openai/whisper-tiny.en".
        families: Families whose presets are meant; all when empty.

    Raises:
        CheckpointNotFoundError: There is no such preset, or it is another family's, or keras-hub's own files are meant.
    """
    name = str(preset)
    if name in PRESETS and not Path(name).is_dir():
        family, hub_id, _ = PRESETS[name]
        if families and family not in families:
            raise CheckpointNotFoundError(
                f"{name!r} is a preset of {family}, but one of {', '.join(families)} is needed."
            )
        return hub_id
    if name.startswith(_STORES):
        raise CheckpointNotFoundError(f"{name!r}: {_OWN_FORM}")
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    if "/" not in name and not Path(name).is_dir():
        known = [known for known, (family, _, _) in PRESETS.items() if not families or family in families]
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise CheckpointNotFoundError(f"there is no preset {name!r}; known are {', '.join(known)}.{hint}")
    return name


def checkpoint_of(preset: str | os.PathLike[str], families: tuple[str, ...] = (), **options: Any) -> str:
    """What `hub_id_of` gives, after a look at whose files lie there.

    Args:
        preset: As for `hub_id_of`.
        families: Families that are wanted; any when empty.
        **options: Of the hub; others are not looked at.

    Raises:
        CheckpointNotFoundError: As of `hub_id_of`, or a folder or repository holds another family's checkpoint, or
            keras-hub's own files.
    """
    name = hub_id_of(preset, families)
    if name != str(preset) and str(preset) in PRESETS:
        return name
    path = Source.take(name, dict(options)).find("config.json")
    config = {} if path is None else read_json(path)
    if "registered_name" in config:
        raise CheckpointNotFoundError(f"{name!r}: {_OWN_FORM}")
    kind = config.get("model_type")
    if families and kind is not None and not str(kind).startswith(families):
        raise CheckpointNotFoundError(
            f"{name!r} is a checkpoint of {kind}, but one of {', '.join(families)} is needed."
        )
    return name


class _Presets:
    """Class attribute: the presets a class can load, {name: {"description", "hub_id"}}."""

    def __get__(self, instance: Any, owner: type[FromPreset]) -> dict[str, dict[str, str]]:
        return {
            name: {"description": description, "hub_id": hub_id}
            for name, (family, hub_id, description) in PRESETS.items()
            if not owner.families or family in owner.families
        }


class FromPreset:
    """A class that loads by keras-hub's names.

    Attributes:
        presets: The names it knows, with a description and the hub id of each.
    """

    families: ClassVar[tuple[str, ...]] = ()
    presets: ClassVar[_Presets] = _Presets()

    @classmethod
    def from_preset(cls, preset: str | os.PathLike[str], **kwargs: Any) -> Self:
        """Load by a preset's name, a folder or a hub id; further options as for `from_pretrained`.

        Raises:
            CheckpointNotFoundError: There is no such preset or checkpoint.
        """
        return cls.from_pretrained(checkpoint_of(preset, cls.families, **kwargs), **kwargs)  # type: ignore[attr-defined]
