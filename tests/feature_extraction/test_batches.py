"""BatchFeature moves as a whole; pad() collates what was extracted."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch

import audiomm
from audiomm.base.errors import InputError
from audiomm.feature_extraction import BatchFeature, WhisperFeatureExtractor


@pytest.fixture
def batch() -> BatchFeature:
    return BatchFeature({"input_features": np.zeros((2, 3), np.float32), "mask": [[1, 0], [1, 1]]}, tensor_type="pt")


@pytest.mark.parametrize("wanted", ["bfloat16", torch.bfloat16])
def test_only_floating_tensors_take_a_dtype(wanted, batch):
    moved = batch.to("cpu", wanted)
    assert moved is batch
    assert batch.input_features.dtype == torch.bfloat16
    assert batch["mask"].dtype == torch.int64


def test_the_device_may_be_first_named_or_left_out(batch):
    assert batch.to(torch.device("meta")).mask.device.type == "meta"
    assert batch.to(device="meta", dtype=torch.float16, non_blocking=True).input_features.dtype == torch.float16
    assert batch.to(torch.float64).input_features.dtype == torch.float64


def test_to_refuses_what_is_neither(batch):
    with pytest.raises(TypeError, match=r"not 1\.5"):
        batch.to(1.5)
    with pytest.raises(TypeError, match="memory_format"):
        batch.to(memory_format=torch.channels_last)


def test_a_missing_entry_is_named(batch):
    with pytest.raises(AttributeError, match=r"no entry 'pixel_values'; it holds \['input_features', 'mask'\]"):
        _ = batch.pixel_values
    assert dict(**batch).keys() == batch.data.keys()


def test_copies_are_batches(batch):
    for other in (copy.copy(batch), copy.deepcopy(batch), pickle.loads(pickle.dumps(batch))):
        assert isinstance(other, BatchFeature)
        assert torch.equal(other.mask, batch.mask)


def test_rows_of_one_shape_become_one_tensor():
    rows = BatchFeature({"rows": [np.ones(3), np.zeros(3)], "tensors": [torch.ones(2), torch.ones(2)]})
    assert rows.convert_to_tensors("np").rows.shape == (2, 3)
    assert rows.tensors.shape == (2, 2)


def test_pad_collates_single_features():
    extractor = WhisperFeatureExtractor(chunk_length=1)
    clips = [np.full(size, 0.1, np.float32) for size in (16_000, 8000)]
    examples = [{"input_features": extractor(clip, sampling_rate=16000).input_features[0]} for clip in clips]
    batch = extractor.pad(examples, return_tensors="pt")
    assert batch.input_features.shape == (2, 80, 100)
    assert list(batch) == ["input_features"]
    # Data sets hand out lists, which numpy reads as float64.
    lists = [{"input_features": example["input_features"].tolist()} for example in examples]
    assert torch.equal(extractor.pad(lists, return_tensors="pt").input_features, batch.input_features)


def test_pad_extends_time_and_marks_it():
    extractor = WhisperFeatureExtractor(padding_value=-1.0)
    examples = {"input_features": [np.ones((80, 5), np.float32), np.ones((80, 3), np.float32)]}
    batch = extractor.pad(examples, return_attention_mask=True, pad_to_multiple_of=4, return_tensors="np")
    assert batch.input_features.shape == (2, 80, 8)
    assert batch.input_features[1, 0].tolist() == [1, 1, 1, -1, -1, -1, -1, -1]
    assert batch.attention_mask.sum(-1).tolist() == [5, 3]
    cut = extractor.pad(examples, padding="max_length", max_length=4, truncation=True, return_tensors="np")
    assert cut.input_features.shape == (2, 80, 4)


def test_pad_says_what_it_misses():
    extractor = WhisperFeatureExtractor()
    with pytest.raises(InputError, match="at least one clip's 'input_features'; got nothing"):
        extractor.pad([])
    with pytest.raises(InputError, match="need max_length="):
        extractor.pad({"input_features": [np.ones((80, 5))]}, padding="max_length")


@pytest.mark.parametrize(
    "name",
    ["WhisperFeatureExtractor", "Gemma3nAudioFeatureExtractor", "Gemma4AudioFeatureExtractor",
     "Gemma4UnifiedAudioFeatureExtractor", "SiglipImageProcessor", "Gemma4ImageProcessor", "Gemma4VideoProcessor"],
)  # fmt: skip
def test_arguments_that_name_no_setting_come_back_on_request(name, tmp_path):
    kind = getattr(audiomm, name)
    setting = "sampling_rate" if "Extractor" in name else "rescale_factor"
    kind().save_pretrained(tmp_path)
    made, unused = kind.from_pretrained(tmp_path, return_unused_kwargs=True, other=1, **{setting: 8000})
    assert unused == {"other": 1}
    assert getattr(made, setting) == 8000
    assert "other" not in made.to_dict()
    assert kind.from_pretrained(tmp_path, other=1).to_dict()["other"] == 1


def test_milliseconds_are_settings_too():
    kind = audiomm.Gemma4AudioFeatureExtractor
    made, unused = kind.from_dict(kind().to_dict(), return_unused_kwargs=True, hop_length_ms=20.0, hop=1)
    assert (made.hop_length, unused) == (320, {"hop": 1})
