"""What can be passed to a speech pipeline, and what comes back for it."""

from __future__ import annotations

import io
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from audiomm.base.errors import AudioError, AudioLayoutError, InputError, NonFiniteAudioError, SampleRateError

RATE = 16000
HEARD = {"text": " w1 w3"}


@pytest.fixture
def five_seconds(make_sound: Any) -> np.ndarray:
    return make_sound(5, 1, 3)


@pytest.fixture
def wav(tmp_path: Path, five_seconds: np.ndarray) -> Path:
    path = tmp_path / "talk.wav"
    soundfile.write(path, five_seconds, RATE)
    return path


def test_paths_bytes_and_open_files_are_one_input_each(pipe: Any, wav: Path) -> None:
    assert pipe(str(wav)) == HEARD
    assert pipe(wav) == HEARD
    assert pipe(wav.read_bytes()) == HEARD
    with wav.open("rb") as file:
        assert pipe(file) == HEARD
    assert pipe(io.BytesIO(wav.read_bytes())) == HEARD


@pytest.mark.parametrize("kind", ["float32", "float64", "int16", "tensor", "channels first", "channels last"])
def test_arrays_of_any_kind_are_heard_alike(pipe: Any, five_seconds: np.ndarray, kind: str) -> None:
    forms = {
        "float32": five_seconds,
        "float64": five_seconds.astype(np.float64),
        "int16": (five_seconds * 32767).astype(np.int16),
        "tensor": torch.from_numpy(five_seconds),
        "channels first": np.stack([five_seconds, five_seconds]),
        "channels last": np.stack([five_seconds, five_seconds], axis=1),
    }
    assert pipe(forms[kind]) == HEARD


@pytest.mark.parametrize("key", ["raw", "array"])
def test_dicts_are_resampled_passed_through_and_not_changed(pipe: Any, make_sound: Any, key: str) -> None:
    samples = np.repeat(make_sound(5, 1, 3), 2)  # the same five seconds at 32 kHz
    item = {key: samples, "sampling_rate": 32000, "id": 7, "partial": False}
    before = dict(item)
    assert pipe(item) == {**HEARD, "id": [7], "partial": [False]}
    assert item.keys() == before.keys()
    assert item[key] is samples


def test_a_path_beside_an_array_is_dropped_as_in_datasets(pipe: Any, five_seconds: np.ndarray) -> None:
    assert pipe({"array": five_seconds, "sampling_rate": RATE, "path": "talk.wav"}) == HEARD
    assert pipe({"raw": five_seconds, "sampling_rate": RATE, "path": "talk.wav"}) == {**HEARD, "path": ["talk.wav"]}


def test_undecoded_rows_of_datasets_are_read(pipe: Any, wav: Path) -> None:
    assert pipe({"path": str(wav), "bytes": None}) == HEARD
    assert pipe({"path": None, "bytes": wav.read_bytes()}) == HEARD


def test_decoders_of_datasets_are_read(pipe: Any, five_seconds: np.ndarray) -> None:
    decoded = SimpleNamespace(data=torch.from_numpy(five_seconds)[None], sample_rate=RATE)
    assert pipe(SimpleNamespace(get_all_samples=lambda: decoded)) == HEARD


def test_a_list_gives_a_list_in_order(pipe: Any, make_sound: Any, wav: Path) -> None:
    results = pipe([make_sound(2, 0), str(wav), {"raw": make_sound(3, 2), "sampling_rate": RATE}], batch_size=2)
    assert results == [{"text": " w0"}, HEARD, {"text": " w2"}]
    assert pipe([]) == []


def test_an_iterator_is_read_only_as_far_as_results_are_asked_for(pipe: Any, make_sound: Any) -> None:
    read = []

    def stream() -> Any:
        for second in range(5):
            read.append(second)
            yield make_sound(6, second)

    results = pipe(stream(), batch_size=2)
    assert read == []
    assert next(results) == {"text": " w0"}
    assert read == [0, 1]
    assert [result["text"] for result in results] == [" w1", " w2", " w3", " w4"]


def test_a_dataset_with_a_length_and_indices_is_streamed(pipe: Any, make_sound: Any) -> None:
    class Rows:
        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> np.ndarray:
            return make_sound(3, index)

    assert list(pipe(Rows())) == [{"text": " w0"}, {"text": " w1"}]


@pytest.mark.parametrize("seconds", [0.0, 0.05])
def test_empty_and_hardly_any_audio_gives_no_text_and_a_warning(
    pipe: Any, make_sound: Any, seconds: float, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "audiomm.pipelines"):
        assert pipe(make_sound(seconds), return_timestamps=True) == {"text": "", "chunks": []}
    assert "less than 0.1 s" in caplog.text
    assert pipe.model.calls == []


def test_empty_audio_in_a_batch_leaves_the_others_alone(pipe: Any, make_sound: Any) -> None:
    empty, heard = {"text": ""}, {"text": " w1"}
    assert pipe([make_sound(0), make_sound(2, 1), make_sound(0)], batch_size=3) == [empty, heard, empty]


@pytest.mark.parametrize(
    ("item", "error", "words"),
    [
        ([0.1, 0.2], InputError, "input 0 is a float"),
        ([[0.1, 0.2]], InputError, "pass the samples of one clip as an array"),
        ([None], InputError, "input 0 is a NoneType"),
        (None, InputError, "inputs is a NoneType"),
        (3.5, InputError, "inputs is a float"),
        ({"samples": np.zeros(9)}, InputError, "this one holds 'samples'"),
        ({}, InputError, "holds nothing"),
        ({"audio": {"array": np.zeros(9)}, "text": "x"}, InputError, r"pass row\['audio'\]"),
        ("", AudioError, "'' is not a file"),
        ("file:///talk.wav", InputError, "only http and https ones are fetched. Pass the path"),
        ({"raw": np.zeros(RATE)}, SampleRateError, "input 0"),
        ({"raw": np.zeros(RATE), "sampling_rate": -1}, SampleRateError, "input 0"),
        ([np.zeros(RATE), np.full(RATE, np.nan)], NonFiniteAudioError, "input 1"),
        (np.zeros((90, 90, 2), np.float32), InputError, "input 0"),
        (np.zeros((300, 700), np.float32), AudioLayoutError, "input 0"),
        ("nothing/there.wav", AudioError, "nothing/there.wav"),
        (b"not audio at all", AudioError, "input 0"),
        ({"raw": np.zeros(RATE), "sampling_rate": RATE, "stride": (1,)}, InputError, "left and right"),
        ({"raw": np.zeros(RATE), "sampling_rate": RATE, "stride": (RATE, 1)}, InputError, "longer than its 16000"),
    ],
)
def test_what_cannot_be_heard_is_named(pipe: Any, item: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        pipe(item)


def test_urls_are_only_fetched_when_allowed(pipe: Any) -> None:
    with pytest.raises(InputError, match="allow_urls"):
        pipe("http://127.0.0.1:9/talk.wav")


def test_the_length_limit_of_audio_can_be_set(pipe: Any, make_sound: Any) -> None:
    with pytest.raises(AudioError, match="2 s are allowed"):
        pipe(make_sound(3), max_seconds=2)


def test_transcribe_gives_the_typed_twin(pipe: Any, five_seconds: np.ndarray) -> None:
    transcript = pipe.transcribe(five_seconds, return_timestamps=True)
    assert transcript.text == " w1 w3"
    assert [(segment.start, segment.end, segment.tokens) for segment in transcript.segments] == [
        (1.0, 2.0, (1,)),
        (3.0, 4.0, (3,)),
    ]
    assert transcript.language == "fr"
    assert transcript.duration_seconds == 5.0
    assert transcript.words == ()
    assert transcript.to_dict() == pipe(five_seconds, return_timestamps=True)
    assert [item.text for item in pipe.transcribe([five_seconds, five_seconds])] == [" w1 w3"] * 2
