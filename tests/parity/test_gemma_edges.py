"""Calls of both Gemmas at the edges, beside the reference's: what the tests of single parts leave out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import audiomm

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

SLIDING, FULL = "sliding_attention", "full_attention"
CASES = {
    "gemma3n/text": "Gemma3nForCausalLM",
    "gemma4/text_dense": "Gemma4ForCausalLM",
    "gemma4/text_ple": "Gemma4ForCausalLM",
    "gemma4/text_moe": "Gemma4ForCausalLM",
}


@pytest.fixture(scope="module", params=list(CASES))
def pair(request: Any, reference: Any, golden: Path) -> tuple[Any, Any]:
    """(The reference's model, ours) of one small checkpoint."""
    folder, name = golden / request.param / "checkpoint", CASES[request.param]
    return tuple(getattr(package, name).from_pretrained(folder).eval() for package in (reference, audiomm))  # type: ignore[return-value]


def tokens(rows: int = 2, length: int = 14) -> torch.Tensor:
    return torch.randint(3, 190, (rows, length), generator=torch.Generator().manual_seed(1))


def far(pair: tuple[Any, Any], **call: Any) -> float:
    theirs, ours = (model(**call).logits for model in pair)
    return float((theirs - ours).abs().max())


@torch.no_grad()
def test_masks_of_one_s_own(pair: tuple[Any, Any]) -> None:
    ids, places = tokens(), torch.arange(14)
    distance = places[:, None] - places[None]
    full = (distance >= 0)[None, None].expand(2, 1, 14, 14)
    near = full & (distance < 5)
    for masks in (full, {FULL: full, SLIDING: near}, {FULL: full, SLIDING: (~near) * torch.finfo(torch.float32).min}):
        assert far(pair, input_ids=ids, attention_mask=masks) < 1e-3


@torch.no_grad()
def test_packed_rows(pair: tuple[Any, Any]) -> None:
    places = torch.cat([torch.arange(9), torch.arange(5)])[None]
    assert far(pair, input_ids=tokens(1), position_ids=places, use_cache=False) < 1e-3
    assert far(pair, input_ids=tokens(1), position_ids=places) < 1e-3


@torch.no_grad()
def test_hidden_states_of_prompts_are_whole(pair: tuple[Any, Any]) -> None:
    call = {"max_new_tokens": 3, "do_sample": False, "output_hidden_states": True, "return_dict_in_generate": True}
    theirs, ours = (model.generate(tokens(), **call).hidden_states for model in pair)
    for one, other in zip(theirs, ours, strict=True):
        assert all(float((a - b).abs().max()) < 1e-3 for a, b in zip(one, other, strict=True))


@torch.no_grad()
def test_chats_go_on_from_the_cache_of_the_turn_before(pair: tuple[Any, Any]) -> None:
    """Longer than the window, and from a pass of forward(), too."""
    call = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "pad_token_id": 0}
    for rows in (1, 2):
        written = []
        for model in pair:
            ids = tokens(rows, 9)
            cache = model(ids, use_cache=True).past_key_values
            for turn in range(3):
                ids = torch.cat([ids, tokens(rows, 20)[:, 5 * turn :]], dim=1)
                output = model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **call)
                ids, cache = output.sequences, output.past_key_values
            written.append(ids)
        assert torch.equal(*written)


@torch.no_grad()
def test_padding_is_learned_unless_labels_say_otherwise(reference: Any, golden: Path) -> None:
    folder, ids = golden / "gemma4" / "multimodal" / "checkpoint", tokens()
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    losses = [
        package.Gemma4ForConditionalGeneration.from_pretrained(folder)(ids, attention_mask=mask, labels=ids).loss
        for package in (reference, audiomm)
    ]
    assert torch.allclose(*losses, atol=1e-4)


@torch.no_grad()
def test_a_model_without_its_head_fills_one_with(reference: Any, golden: Path, tmp_path: Path) -> None:
    reference.Gemma4Model.from_pretrained(golden / "gemma4" / "multimodal" / "checkpoint").save_pretrained(tmp_path)
    one, other = (
        package.Gemma4ForConditionalGeneration.from_pretrained(tmp_path)(tokens()).logits
        for package in (reference, audiomm)
    )
    assert float((one - other).abs().max()) < 1e-3


@pytest.mark.parametrize("kind", ["Gemma3nAudioFeatureExtractor", "Gemma4AudioFeatureExtractor"])
def test_dither_is_the_same_noise(kind: str, reference: Any) -> None:
    clip = np.random.default_rng(0).normal(0, 0.1, 7001).astype(np.float32)
    rows = []
    for package in (reference, audiomm):
        np.random.seed(3)
        made = getattr(package, kind)(dither=0.02, input_scale_factor=2.0, return_attention_mask=False)([clip.copy()])
        rows.append(made["input_features"][0])
        assert "input_features_mask" in made
    assert np.abs(rows[0] - rows[1]).max() < 3e-4


def test_settings_and_nested_fields_are_replaced_alike(reference: Any, golden: Path, tmp_path: Path) -> None:
    folder = golden / "gemma4" / "processor" / "checkpoint"
    found = []
    for package in (reference, audiomm):
        config = package.Gemma4Config.from_pretrained(folder, text_config={"hidden_size": 40}).text_config
        part = package.AutoImageProcessor.from_pretrained(folder, max_soft_tokens=140, do_normalize=True)
        found.append((config.hidden_size, config.num_hidden_layers, part.max_soft_tokens, part.do_normalize))
    assert found[0] == found[1]
    ours = audiomm.Gemma4Processor.from_pretrained(folder, max_soft_tokens=140)
    try:
        theirs = reference.Gemma4Processor.from_pretrained(folder, max_soft_tokens=140)
    except ImportError as error:
        pytest.skip(f"the reference cannot make a processor here: {error}")
    for part in ("image_processor", "video_processor"):
        assert getattr(ours, part).max_soft_tokens == getattr(theirs, part).max_soft_tokens == 140
