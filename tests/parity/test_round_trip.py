"""Checkpoints go both ways: what one package saves, the other loads, and both then compute the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import audiomm

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

KINDS = [
    pytest.param("WhisperForConditionalGeneration", {}, id="conditional-generation"),
    pytest.param("WhisperModel", {}, id="model"),
    pytest.param("WhisperForAudioClassification", {"num_labels": 5}, id="classification"),
    pytest.param(
        "WhisperForAudioClassification", {"num_labels": 5, "use_weighted_layer_sum": True}, id="weighted-classification"
    ),
    pytest.param("WhisperForCausalLM", {}, id="causal"),
]
CLOSE = 1e-5


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, by name."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as handle:
            found.update({name: handle.get_tensor(name) for name in handle.keys()})  # noqa: SIM118
    return found


@torch.no_grad()
def difference(first: Any, second: Any, inputs: dict[str, Any]) -> float:
    """Largest difference of logits, or of the last hidden state where there are none, and of all hidden states."""
    one, other = (model(**inputs, output_hidden_states=True) for model in (first, second))
    main = "logits" if "logits" in one else "last_hidden_state"
    pairs = [(one[main], other[main])]
    for name in ("encoder_hidden_states", "decoder_hidden_states", "hidden_states"):
        if name in one and one[name] is not None:
            assert len(one[name]) == len(other[name])
            pairs += list(zip(one[name], other[name], strict=True))
    assert all(a.shape == b.shape for a, b in pairs)
    return max(float((a.float() - b.float()).abs().max()) for a, b in pairs)


@pytest.mark.parametrize(("kind", "overrides"), KINDS)
def test_what_the_reference_saves_computes_the_same_here(
    kind: str, overrides: dict[str, Any], reference_model: Any, inputs_for: Any, tmp_path: Path
) -> None:
    theirs = reference_model(kind, seed=1, **overrides)
    theirs.save_pretrained(tmp_path)
    ours, report = getattr(audiomm, kind).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert not ours.training
    assert difference(theirs, ours, inputs_for(kind)) <= CLOSE


@pytest.mark.parametrize(("kind", "overrides"), KINDS)
def test_what_is_saved_here_computes_the_same_in_the_reference(
    kind: str, overrides: dict[str, Any], reference: Any, randomise: Any, inputs_for: Any, tmp_path: Path
) -> None:
    from_conftest = {**_tiny(), **overrides}
    ours = randomise(getattr(audiomm, kind)(audiomm.WhisperConfig(**from_conftest)), 2)
    ours.save_pretrained(tmp_path)
    theirs, report = getattr(reference, kind).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert difference(ours, theirs.eval(), inputs_for(kind)) <= CLOSE


@pytest.mark.parametrize(("kind", "overrides"), KINDS)
def test_both_write_the_same_tensors(
    kind: str, overrides: dict[str, Any], reference_model: Any, tmp_path: Path
) -> None:
    theirs = reference_model(kind, seed=3, **overrides)
    theirs.save_pretrained(tmp_path / "theirs")
    getattr(audiomm, kind).from_pretrained(tmp_path / "theirs").save_pretrained(tmp_path / "ours")
    first, second = stored(tmp_path / "theirs"), stored(tmp_path / "ours")
    assert sorted(first) == sorted(second)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("limit", ["20KB", "60KB"])
def test_shards_of_the_reference_are_read(limit: str, reference_model: Any, inputs_for: Any, tmp_path: Path) -> None:
    theirs = reference_model(seed=4)
    theirs.save_pretrained(tmp_path, max_shard_size=limit)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ours = audiomm.WhisperForConditionalGeneration.from_pretrained(tmp_path)
    assert difference(theirs, ours, inputs_for("WhisperForConditionalGeneration")) <= CLOSE


@pytest.mark.parametrize("limit", ["20KB", "60KB"])
def test_shards_are_read_by_the_reference(
    limit: str, reference: Any, pair: Any, inputs_for: Any, tmp_path: Path
) -> None:
    _, ours = pair(seed=5)
    folder = tmp_path / "shards"
    ours.save_pretrained(folder, max_shard_size=limit)
    assert len(list(folder.glob("*.safetensors"))) > 1
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(stored(folder))
    theirs = reference.WhisperForConditionalGeneration.from_pretrained(folder)
    assert difference(ours, theirs, inputs_for("WhisperForConditionalGeneration")) <= CLOSE


def test_sharded_variants_go_both_ways(reference: Any, pair: Any, tmp_path: Path) -> None:
    kind = "WhisperForConditionalGeneration"
    for saved, package in zip(pair(kind, seed=11), (audiomm, reference), strict=True):
        folder = tmp_path / package.__name__
        saved.save_pretrained(folder, max_shard_size="20KB", variant="fp16")
        loaded = getattr(package, kind).from_pretrained(folder, variant="fp16").state_dict()
        assert all(torch.equal(value, loaded[name]) for name, value in saved.state_dict().items())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_keeps_every_bit_both_ways(
    dtype: str, reference: Any, reference_model: Any, inputs_for: Any, tmp_path: Path
) -> None:
    theirs = reference_model(seed=6).to(getattr(torch, dtype))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = audiomm.WhisperForConditionalGeneration.from_pretrained(tmp_path / "theirs")
    assert ours.dtype == theirs.dtype == getattr(torch, dtype)
    ours.save_pretrained(tmp_path / "ours")
    back = reference.WhisperForConditionalGeneration.from_pretrained(tmp_path / "ours", dtype="auto")
    assert back.dtype == theirs.dtype
    first, second = stored(tmp_path / "theirs"), stored(tmp_path / "ours")
    assert all(torch.equal(first[name], second[name]) for name in first) and sorted(first) == sorted(second)
    inputs = inputs_for("WhisperForConditionalGeneration")
    assert difference(theirs.float(), ours.float(), inputs) <= CLOSE


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_computes_alike(dtype: str, pair: Any, inputs_for: Any) -> None:
    """As near to the reference in half precision as that is to itself in float32."""
    theirs, ours = pair(seed=7)
    inputs = inputs_for("WhisperForConditionalGeneration")
    with torch.no_grad():
        exact = theirs(**inputs).logits
        theirs, ours = theirs.to(getattr(torch, dtype)), ours.to(getattr(torch, dtype))
        inputs["input_features"] = inputs["input_features"].to(getattr(torch, dtype))
        reference_error = float((theirs(**inputs).logits.float() - exact).abs().mean())
        own_error = float((ours(**inputs).logits.float() - exact).abs().mean())
    assert own_error <= 1.5 * reference_error


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attentions_and_losses_agree(attention: str, pair: Any, inputs_for: Any) -> None:
    theirs, ours = pair(seed=8)
    theirs.set_attn_implementation("eager")
    ours.set_attn_implementation(attention)
    inputs = inputs_for("WhisperForConditionalGeneration")
    labels = inputs.pop("decoder_input_ids").clone()
    labels[1, 5:] = -100
    with torch.no_grad():
        one, other = (model(**inputs, labels=labels, output_attentions=True) for model in (theirs, ours))
    assert abs(float(one.loss) - float(other.loss)) <= CLOSE
    for name in ("encoder_attentions", "decoder_attentions", "cross_attentions"):
        assert len(one[name]) == len(other[name]) > 0
        assert all(float((a - b).abs().max()) <= CLOSE for a, b in zip(one[name], other[name], strict=True)), name


@pytest.mark.parametrize("padding", ["left", "right"])
def test_padded_prompts_agree(padding: str, pair: Any, inputs_for: Any) -> None:
    """Given positions, as generate() gives them; without, the reference counts the padding in a forward pass."""
    theirs, ours = pair(seed=9)
    inputs = inputs_for("WhisperForConditionalGeneration", batch=3)
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[1, :3] = 0
    mask[2, :6] = 0
    if padding == "right":
        mask = mask.flip(1)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = theirs(**inputs, decoder_attention_mask=mask, decoder_position_ids=positions).logits
        found = ours(**inputs, decoder_attention_mask=mask, decoder_position_ids=positions).logits
        derived = ours(**inputs, decoder_attention_mask=mask).logits
    scale = max(1.0, float(expected.abs().max()))
    assert float((expected - found)[mask.bool()].abs().max()) <= CLOSE * scale
    assert float((derived - found)[mask.bool()].abs().max()) <= CLOSE * scale


def test_the_cache_continues_what_the_whole_sequence_gives(pair: Any, inputs_for: Any) -> None:
    theirs, ours = pair(seed=10)
    inputs = inputs_for("WhisperForConditionalGeneration")
    ids = inputs.pop("decoder_input_ids")
    with torch.no_grad():
        whole = theirs(**inputs, decoder_input_ids=ids).logits
        first = ours(**inputs, decoder_input_ids=ids[:, :4], use_cache=True)
        second = ours(
            encoder_outputs=(first.encoder_last_hidden_state,),
            decoder_input_ids=ids[:, 4:],
            past_key_values=first.past_key_values,
            use_cache=True,
        )
    assert float((torch.cat((first.logits, second.logits), dim=1) - whole).abs().max()) <= CLOSE


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        ("WhisperModel", "WhisperForConditionalGeneration"),
        ("WhisperForConditionalGeneration", "WhisperModel"),
        ("WhisperForConditionalGeneration", "WhisperForAudioClassification"),
        ("WhisperForConditionalGeneration", "WhisperForCausalLM"),
    ],
)
def test_a_checkpoint_of_one_class_fills_another_as_in_the_reference(
    saved: str, loaded: str, reference: Any, reference_model: Any, inputs_for: Any, tmp_path: Path
) -> None:
    reference_model(saved, seed=11).save_pretrained(tmp_path)
    theirs, said = getattr(reference, loaded).from_pretrained(tmp_path, output_loading_info=True)
    ours, report = getattr(audiomm, loaded).from_pretrained(tmp_path, output_loading_info=True)
    assert sorted(report["missing_keys"]) == sorted(said["missing_keys"])
    fresh = set(report["missing_keys"])
    names = [name for name in theirs.state_dict() if name not in fresh]
    assert names and all(torch.equal(theirs.state_dict()[name], ours.state_dict()[name]) for name in names)
    if not fresh:
        assert difference(theirs.eval(), ours, inputs_for(loaded)) <= CLOSE


def test_the_configuration_says_the_same_in_both(reference: Any, reference_model: Any, tmp_path: Path) -> None:
    theirs = reference_model("WhisperForAudioClassification", num_labels=3, dropout=0.1, apply_spec_augment=True)
    theirs.config.a_key_of_tomorrow = {"kept": [1, 2]}
    theirs.save_pretrained(tmp_path / "theirs")
    ours = audiomm.WhisperConfig.from_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    first, second = (json.loads((tmp_path / side / "config.json").read_text()) for side in ("theirs", "ours"))
    lost = {key: value for key, value in first.items() if second.get(key) != value}
    assert lost == {}
    back = reference.WhisperConfig.from_pretrained(tmp_path / "ours")
    assert back.to_dict().items() >= {key: value for key, value in theirs.config.to_dict().items() if key in first
                                      and key not in ("id2label", "transformers_version")}.items()  # fmt: skip
    assert back.id2label == theirs.config.id2label == ours.id2label


def test_default_configurations_are_equal(reference: Any) -> None:
    theirs, ours = reference.WhisperConfig().to_dict(), audiomm.WhisperConfig()
    # The reference's defaults join the multilingual vocabulary with the ids of the English one; here they fit it.
    ids = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "begin_suppress_tokens")
    skipped = ("dtype", "id2label", "label2id", "architectures", *ids)
    names = [name for name in audiomm.WhisperConfig.field_names() if name in theirs and name not in skipped]
    assert len(names) > 25
    assert {name: getattr(ours, name) for name in names} == {name: theirs[name] for name in names}
    english = reference.WhisperConfig(vocab_size=51864).to_dict()
    assert {name: getattr(audiomm.WhisperConfig(vocab_size=51864), name) for name in ids[:-1]} == {
        name: english[name] for name in ids[:-1]
    }


def test_the_generation_config_goes_both_ways(reference: Any, pair: Any, tmp_path: Path) -> None:
    theirs, ours = pair(seed=12)
    ours.save_pretrained(tmp_path / "ours")
    back = reference.GenerationConfig.from_pretrained(tmp_path / "ours")
    for name, value in theirs.generation_config.to_diff_dict().items():
        if name not in ("transformers_version", "_from_model_config"):
            assert getattr(ours.generation_config, name) == value, name
            assert getattr(back, name) == value, name


def _tiny() -> dict[str, Any]:
    """Sizes that differ from those of the reference's checkpoints in one point only: three labels fewer."""
    return {
        "vocab_size": 142, "num_mel_bins": 8, "d_model": 48, "encoder_layers": 2, "encoder_attention_heads": 4,
        "encoder_ffn_dim": 80, "decoder_layers": 3, "decoder_attention_heads": 6, "decoder_ffn_dim": 72,
        "max_source_positions": 30, "max_target_positions": 64, "pad_token_id": 100, "bos_token_id": 100,
        "eos_token_id": 100, "decoder_start_token_id": 101,
    }  # fmt: skip
