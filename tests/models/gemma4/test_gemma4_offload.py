"""Parts of a model on disk or in the computer's memory: slower, and the same tokens."""

from __future__ import annotations

import pytest
import torch

from audiomm import ConfigError
from audiomm.models.gemma4 import Gemma4ForConditionalGeneration

GREEDY = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 5}


def places(model, on_disk):
    """A device map that puts every part on the CPU but those `on_disk` names."""
    text = "model.language_model"
    parts = ["lm_head", *(f"model.{name}" for name, _ in model.model.named_children() if name != "language_model")]
    parts += [f"{text}.{name}" for name, _ in model.get_decoder().named_children() if name != "layers"]
    for number, layer in enumerate(model.get_decoder().layers):
        parts += [f"{text}.layers.{number}.{name}" for name, _ in layer.named_children()]
        parts.append(f"{text}.layers.{number}.layer_scalar")
    return {part: "disk" if on_disk(part) else "cpu" for part in parts}


@pytest.mark.filterwarnings("ignore:The following device_map keys")
@pytest.mark.parametrize(
    ("kind", "on_disk", "options"),
    [
        ("experts", lambda part: part.endswith(".experts"), {}),
        ("dense", lambda part: "layers.1." in part and not part.endswith("scalar"), {}),
        ("per-layer", lambda part: "layers.0.mlp" in part, {"per_layer_embeddings": "disk"}),
    ],
    ids=["experts", "a layer", "per-layer embeddings"],
)
def test_parts_on_disk_change_nothing(tiny, tmp_path, kind, on_disk, options):
    model, inputs = tiny.whole(kind), {**tiny.prompt(), **tiny.media()}
    model.save_pretrained(tmp_path / "model")
    spread = places(model, on_disk)
    assert "disk" in spread.values()
    loaded = Gemma4ForConditionalGeneration.from_pretrained(
        tmp_path / "model", device_map=spread, offload_folder=tmp_path / "parts", **options
    )
    away = [name for name, weight in loaded.named_parameters() if weight.is_meta]
    assert away and all(on_disk(name.rsplit(".", 1)[0]) or on_disk(name) for name in away)
    assert torch.equal(loaded.generate(**inputs, **GREEDY), model.generate(**inputs, **GREEDY))


def test_a_map_to_disk_needs_a_folder(tiny, tmp_path):
    model = tiny.whole("experts")
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="pass offload_folder="):
        Gemma4ForConditionalGeneration.from_pretrained(
            tmp_path, device_map=places(model, lambda part: part.endswith(".experts"))
        )
