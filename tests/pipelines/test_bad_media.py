"""Media that cannot be used, at the doors of the models that answer: what each of them says."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from audiomm.base.errors import AudiommError
from audiomm.pipelines import pipeline

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 2, "return_full_text": False}


@pytest.fixture(scope="module", params=["gemma3n", "gemma4"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def pipe(family: str, gemma_folders: dict[str, Path]) -> Any:
    return pipeline("any-to-any", model=str(gemma_folders[family]), device="cpu")


def chat(kind: str, medium: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": kind, kind: medium}, {"type": "text", "text": "hello"}]}]


def tone(samples: int) -> np.ndarray:
    return np.full(samples, 0.1, np.float32)


def spoilt(value: float) -> np.ndarray:
    clip = tone(8000)
    clip[100] = value
    return clip


def png(image: np.ndarray) -> bytes:
    pillow = pytest.importorskip("PIL.Image")
    file = io.BytesIO()
    pillow.fromarray(image).save(file, "PNG")
    return file.getvalue()


def corrupt() -> bytes:
    data = png(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    return data[:60] + b"xxxx" + data[64:]


@pytest.mark.parametrize(
    ("kind", "make", "message"),
    [
        ("audio", lambda: tone(0), r"clip 0 of 1 has 0 samples, too few for a frame"),
        ("audio", lambda: tone(100), r"clip 0 of 1 has 100 samples, too few for a frame"),
        ("audio", lambda: tone(31 * 16_000), r"clip 0 .*(has 3097 log-mel frames|lasts 31.0 s and has 775 tokens)"),
        ("audio", lambda: spoilt(np.nan), r"sample 100 is nan"),
        ("audio", lambda: spoilt(np.inf), r"sample 100 is inf"),
        ("audio", lambda: tone(8000) * 1e6, r"samples are to lie in \[-1, 1\]"),
        ("audio", lambda: np.stack([tone(8000)] * 2), r"clip 0 has shape \(2, 8000\): a clip of a batch is mono"),
        ("audio", lambda: {"array": tone(8000)}, r"sampling_rate"),
        ("audio", lambda: "https://example.org/a.wav", r"URLs are not fetched"),
        ("image", lambda: np.broadcast_to(np.uint8(0), (20_000, 20_000, 3)), r"400,000,000 pixels; 80,000,000 are"),
        ("image", lambda: np.zeros((0, 4, 3), np.uint8), r"has no pixels"),
        ("image", lambda: corrupt(), r"is a broken picture file"),
        ("image", lambda: corrupt()[:200], r"is a broken picture file"),
        ("image", lambda: b"hello world", r"is not a picture file"),
        ("image", lambda: "missing.png", r"missing.png: no such file"),
        ("image", lambda: "https://example.org/a.png", r"URLs are not fetched"),
    ],
)
def test_sound_and_pictures_that_cannot_be_used_are_told(
    pipe: Any, kind: str, make: Callable[[], Any], message: str
) -> None:
    with pytest.raises(AudiommError, match=message):
        pipe(chat(kind, make()), **GREEDY)


@pytest.mark.parametrize("side", [(1, 1), (3, 20_000), (20_000, 3)])
def test_pictures_of_one_pixel_and_of_twenty_thousand_are_seen(pipe: Any, side: tuple[int, int]) -> None:
    image = np.full((*side, 3), 200, np.uint8)
    (found,) = pipe(chat("image", png(image)), **GREEDY)
    assert isinstance(found["generated_text"], str)


def test_marks_and_media_must_agree(pipe: Any, family: str, gemmas: Any) -> None:
    marks, picture, clip = gemmas.MARKS[family], gemmas.picture(), gemmas.noise()
    for text, media, message in (
        (marks["image"] * 2, {"images": picture}, r"text 0 holds 2 of the mark .* but 1 images were passed"),
        ("hello", {"images": [picture]}, r"text 0 holds 0 of the mark .* but 1 images were passed"),
        (marks["audio"], {}, r"the text holds 1 of the mark .* but 0 clips were passed"),
        (marks["audio"], {"images": picture}, r"text 0 holds 0 of the mark .* but 1 images were passed"),
        (marks["audio"], {"audio": [clip, clip]}, r"text 0 holds 1 of the mark .* but 2 clips were passed"),
    ):
        with pytest.raises(AudiommError, match=message):
            pipe(text, **media, **GREEDY)
    with pytest.raises(AudiommError, match=r"the text holds 1 of the mark .* but 0 images were passed"):
        pipe([{"role": "user", "content": [{"type": "image"}]}], **GREEDY)


def test_a_clip_of_another_rate_is_refused_and_a_file_of_another_rate_is_not(pipe, family, gemmas, tmp_path) -> None:
    import soundfile

    with pytest.raises(AudiommError, match=r"sampling_rate=8000: Gemma.* needs 16000 Hz"):
        pipe(gemmas.MARKS[family]["audio"], audio=gemmas.noise(), sampling_rate=8000, **GREEDY)
    path = tmp_path / "a.wav"
    soundfile.write(path, gemmas.noise(), 44_100)
    assert pipe(chat("audio", str(path)), **GREEDY)


def frames(count: int) -> np.ndarray:
    return np.zeros((count, 8, 8, 3), np.uint8)


@pytest.fixture(scope="module")
def watcher(gemma_folders: dict[str, Path]) -> Any:
    return pipeline("any-to-any", model=str(gemma_folders["gemma4"]), device="cpu")


def test_videos_of_one_and_of_ten_thousand_frames_are_watched(watcher: Any) -> None:
    for count in (1, 10_000):
        assert watcher(chat("video", frames(count)), **GREEDY)


@pytest.mark.parametrize(
    ("video", "metadata", "message"),
    [
        (frames(0), None, r"the video has no frames"),
        ([], None, r"there are no videos"),
        (frames(4), {"fps": 0}, r"fps=0: a number above 0"),
        (frames(4), {"fps": -3}, r"fps=-3: a number above 0"),
        (frames(4), {"fps": float("nan")}, r"fps=nan: a number above 0"),
        (b"hello world", None, r"video|picture"),
    ],
)
def test_videos_that_cannot_be_watched_are_told(watcher: Any, video: Any, metadata: Any, message: str) -> None:
    options = {} if metadata is None else {"videos_kwargs": {"video_metadata": [metadata]}}
    with pytest.raises(AudiommError, match=message):
        watcher(chat("video", video), **options, **GREEDY)
