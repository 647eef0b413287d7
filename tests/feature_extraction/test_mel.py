"""Filter banks and spectrograms: the fast form against the obvious one, and both against what is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from audiomm.base.errors import ConfigError, EmptyAudioError
from audiomm.feature_extraction import mel


def bank(mels: int = 80, **options) -> np.ndarray:
    options = {"norm": "slaney", "mel_scale": "slaney", **options}
    return mel.mel_filter_bank(201, mels, 0.0, 8000.0, 16000, **options)


def filters(mels: int = 80) -> torch.Tensor:
    return torch.from_numpy(bank(mels)).float()


def fast_log_mel(clips, lengths, weights=None, n_fft: int = 400, hop: int = 160):
    return mel.log_mel(clips, lengths, mel.MelFilters.of(filters() if weights is None else weights), n_fft, hop)


@pytest.mark.parametrize("scale", ["htk", "slaney"])
def test_mel_and_hertz_undo_each_other(scale):
    hertz = np.linspace(0, 8000, 97)
    np.testing.assert_allclose(mel.mel_to_hertz(mel.hertz_to_mel(hertz, scale), scale), hertz, atol=1e-9)
    assert mel.hertz_to_mel(1000, scale) == pytest.approx(15.0 if scale == "slaney" else 999.9855, abs=1e-4)


def test_slaney_bands_have_one_area_and_htk_bands_one_peak():
    width_hz = 16000 / 2 / 200
    areas = bank().sum(axis=0) * width_hz
    np.testing.assert_allclose(areas[40:], 1.0, atol=0.1)
    peaks = mel.mel_filter_bank(4001, 40, 125.0, 7600.0, 16000).max(axis=0)
    np.testing.assert_allclose(peaks, 1.0, atol=0.1)


def test_a_filter_bank_is_the_callers_own():
    bank()[:] = 7
    assert bank().max() < 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": "area"}, "norm='area'"),
        ({"mel_scale": "bark"}, "mel_scale='bark'"),
        ({"num_mel_filters": 0}, "0 mel bands"),
        ({"min_frequency": 9000}, "from 9000 to 8000"),
    ],
)
def test_impossible_filter_banks_are_refused(change, message):
    good = {
        "num_frequency_bins": 201,
        "num_mel_filters": 80,
        "min_frequency": 0,
        "max_frequency": 8000,
        "sampling_rate": 16000,
    }
    with pytest.raises(ConfigError, match=message):
        mel.mel_filter_bank(**{**good, **change})


@pytest.mark.parametrize("length", [201, 399, 400, 1600, 15_999, 16_000, 16_001, 170_000])
@pytest.mark.parametrize("extra", [0, 1, 159, 160, 250, 40_000])
def test_the_fast_form_equals_the_obvious_one(length, extra):
    clip = torch.from_numpy(np.random.default_rng(length).standard_normal(length).astype(np.float32)) * 0.1
    whole = torch.nn.functional.pad(clip, (0, extra))
    (fast,) = fast_log_mel([clip], [length + extra])
    slow = mel.plain_log_mel(whole[None], filters(), 400, 160)[0]
    assert fast.shape == slow.shape == (80, (length + extra) // 160)
    torch.testing.assert_close(fast, slow, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("n_fft", "hop"), [(512, 200), (320, 160), (401, 128), (400, 400)])
def test_other_windows_too(n_fft, hop):
    clip = torch.randn(5000, generator=torch.Generator().manual_seed(0)) * 0.1
    weights = torch.from_numpy(mel.mel_filter_bank(1 + n_fft // 2, 40, 0, 8000, 16000)).float()
    (fast,) = fast_log_mel([clip], [9000], weights, n_fft, hop)
    slow = mel.plain_log_mel(torch.nn.functional.pad(clip, (0, 4000))[None], weights, n_fft, hop)[0]
    torch.testing.assert_close(fast, slow, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("n_fft", "bands"), [(64, 128), (400, 3), (400, 1), (16, 7)])
def test_banks_of_any_shape(n_fft, bands):
    """Also those with bands so narrow that they see no bin at all."""
    clip = torch.randn(3000, generator=torch.Generator().manual_seed(2)) * 0.1
    weights = torch.from_numpy(mel.mel_filter_bank(1 + n_fft // 2, bands, 0, 8000, 16000)).float()
    (fast,) = fast_log_mel([clip], [3000], weights, n_fft, 10)
    slow = mel.plain_log_mel(clip[None], weights, n_fft, 10)[0]
    torch.testing.assert_close(fast, slow, atol=1e-6, rtol=0)


def test_clips_of_one_length_are_one_tensor_and_others_a_list():
    clips = [torch.randn(size, generator=torch.Generator().manual_seed(size)) for size in (900, 1600)]
    together = fast_log_mel(clips, [3200, 3200])
    apart = fast_log_mel(clips, [3200, 1600])
    assert together.shape == (2, 80, 20)
    assert [row.shape for row in apart] == [(80, 20), (80, 10)]
    torch.testing.assert_close(together[0], apart[0], atol=0, rtol=0)


@pytest.mark.parametrize("frames", [mel._BLOCK_FRAMES + 1, 2 * mel._BLOCK_FRAMES - 1, 2 * mel._BLOCK_FRAMES + 2])
def test_blocks_may_overlap(frames):
    """A clip is cut into equal blocks, and the last one begins early enough to be as long as the others."""
    clip = torch.randn(frames * 160, generator=torch.Generator().manual_seed(frames)) * 0.1
    (fast,) = fast_log_mel([clip], [len(clip)])
    torch.testing.assert_close(fast, mel.plain_log_mel(clip[None], filters(), 400, 160)[0], atol=1e-6, rtol=0)


def test_rows_do_not_see_each_other():
    generator = torch.Generator().manual_seed(1)
    clips = [
        torch.randn(size, generator=generator) * gain for size, gain in ((16_000, 1.0), (400, 1e-3), (33_333, 0.1))
    ]
    together = fast_log_mel(clips, [48_000] * 3)
    for clip, row in zip(clips, together, strict=True):
        torch.testing.assert_close(row, fast_log_mel([clip], [48_000])[0], atol=0, rtol=0)


def test_the_batched_form_of_accelerators_agrees():
    clips = [torch.randn(size, generator=torch.Generator().manual_seed(size)) * 0.1 for size in (16_000, 700, 20_000)]
    lengths = [32_000, 32_000, 20_000]
    batched = mel._log_mel_on_accelerator(clips, lengths, filters(128), 400, 160)
    for one, other in zip(batched, fast_log_mel(clips, lengths, filters(128)), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


def test_one_length_on_an_accelerator_is_one_tensor():
    clips = [torch.randn(900), torch.randn(1600)]
    assert mel._log_mel_on_accelerator(clips, [3200, 3200], filters(), 400, 160).shape == (2, 80, 20)


def test_silence_is_the_floor():
    (row,) = fast_log_mel([torch.zeros(1000)], [16_000])
    assert row.unique().tolist() == [-1.5]


def test_the_range_is_eighty_decibels(speech):
    (row,) = fast_log_mel([torch.from_numpy(speech)], [len(speech)])
    assert float(row.max() - row.min()) <= 2.0


def test_a_clip_without_room_for_a_mirror_is_refused():
    with pytest.raises(
        EmptyAudioError, match="200 samples without padding is too short for a window of 400: at least 201"
    ):
        fast_log_mel([torch.zeros(200)], [200])
