"""The arguments of a speech pipeline and of its calls: times, languages, windows, generation."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from audiomm.base.errors import InputError


def test_times_and_languages_of_segments(pipe: Any, make_sound: Any) -> None:
    result = pipe(make_sound(5, 1, 3), return_timestamps=True, return_language=True)
    assert result == {
        "text": " w1 w3",
        "chunks": [
            {"language": "french", "timestamp": (1.0, 2.0), "text": " w1"},
            {"language": "french", "timestamp": (3.0, 4.0), "text": " w3"},
        ],
    }


def test_language_without_times_is_one_chunk(pipe: Any, make_sound: Any) -> None:
    result = pipe(make_sound(5, 1, 3), return_language=True)
    assert result == {"text": " w1 w3", "chunks": [{"language": "french", "text": " w1 w3"}]}


def test_whole_segments_on_request(pipe: Any, make_sound: Any) -> None:
    result = pipe(make_sound(5, 1), return_segments=True)
    assert result == {
        "text": " w1",
        "segments": [{"id": 0, "start": 1.0, "end": 2.0, "text": " w1", "tokens": [1], "avg_logprob": -0.25}],
        "language": "fr",
        "duration": 5.0,
    }


def test_word_times_belong_to_their_segments(pipe: Any, make_sound: Any) -> None:
    samples = make_sound(5, 1, 3)
    assert pipe(samples, return_timestamps="word")["chunks"] == [
        {"timestamp": (1.25, 1.75), "text": " w1"},
        {"timestamp": (3.25, 3.75), "text": " w3"},
    ]
    assert pipe.model.calls[-1]["return_token_timestamps"] is True
    transcript = pipe.transcribe(samples, return_timestamps="word")
    assert [[word.text for word in segment.words or ()] for segment in transcript.segments] == [[" w1"], [" w3"]]
    assert [word.start for word in transcript.words] == [1.25, 3.25]


def test_times_end_with_the_audio(pipe: Any, make_sound: Any) -> None:
    samples = make_sound(2.5, 1)
    samples[-8000:] = 0.5
    pipe.model._segment = lambda second: {"start": second, "end": second + 9.0, "tokens": torch.tensor([second])}
    assert [chunk["timestamp"] for chunk in pipe(samples, return_timestamps=True)["chunks"]] == [(1.0, 2.5), (2.0, 2.5)]


def test_long_audio_works_with_and_without_times(pipe: Any, make_sound: Any) -> None:
    samples = make_sound(40, 2, 35)
    assert pipe(samples) == {"text": " w2 w35"}
    assert pipe.model.calls[-1]["shape"] == (1, 1, 4000)
    assert pipe.model.calls[-1]["return_timestamps"] is True
    assert pipe(samples, return_timestamps=True)["chunks"][1] == {"timestamp": (35.0, 36.0), "text": " w35"}


def test_files_of_a_batch_are_padded_together_and_long_ones_apart(pipe: Any, make_sound: Any) -> None:
    items = [make_sound(5, 1), make_sound(40, 2), make_sound(30, 29), make_sound(33, 32)]
    together = pipe(items, batch_size=4)
    assert [(call["shape"], call["lengths"]) for call in pipe.model.calls] == [
        ((2, 1, 4000), [4000, 3300]),
        ((2, 1, 3000), [500, 3000]),
    ]
    assert together == [pipe(item) for item in items] == pipe(items)


def test_one_language_for_each_input(pipe: Any, make_sound: Any) -> None:
    items = [make_sound(40, 1), make_sound(5, 1), make_sound(35, 1)]
    pipe(items, batch_size=3, language=["de", "fr", None])
    assert [call["language"] for call in pipe.model.calls] == [["de"], ["fr"]]
    with pytest.raises(InputError, match="language holds 2 entries, and input 2 has none"):
        pipe(items, generate_kwargs={"language": ["de", "fr"]})


def test_windows_overlap_and_are_merged(pipe: Any, make_sound: Any) -> None:
    result = pipe(
        make_sound(40, 2, 35), chunk_length_s=20, stride_length_s=(4, 2), batch_size=2, return_timestamps=True
    )
    assert [output["stride"] for output in pipe.tokenizer.merged] == [(20, 0, 2), (20, 4, 2), (12, 4, 0)]
    assert [output["tokens"].tolist() for output in pipe.tokenizer.merged] == [[[2]], [[]], [[7]]]
    assert [call["shape"][0] for call in pipe.model.calls] == [2, 1]
    # The merge left the end open: it is that of the audio.
    assert result["chunks"] == [{"timestamp": (0.5, 40.0), "text": " w2 w7"}]
    transcript = pipe.transcribe(make_sound(40, 2), chunk_length_s=20, return_timestamps=True)
    assert [segment.end_is_estimated for segment in transcript.segments] == [True]


def test_windows_share_a_sixth_at_each_side_unless_told(pipe: Any, make_sound: Any) -> None:
    pipe(make_sound(20, 1), chunk_length_s=12)
    assert [output["stride"] for output in pipe.tokenizer.merged] == [(12, 0, 2), (12, 2, 0)]
    pipe(make_sound(20, 1), chunk_length_s=12, stride_length_s=1)
    assert [output["stride"] for output in pipe.tokenizer.merged] == [(12, 0, 1), (10, 1, 0)]


def test_windows_of_many_files_go_back_to_their_files(pipe: Any, make_sound: Any) -> None:
    items = [make_sound(25, 1), make_sound(5, 3), make_sound(15, 14)]
    expected = [pipe(item, chunk_length_s=10) for item in items]
    assert pipe(items, chunk_length_s=10, batch_size=4) == expected


def test_windows_carry_words_and_languages(pipe: Any, make_sound: Any) -> None:
    pipe(make_sound(12, 1), chunk_length_s=10, stride_length_s=0, return_language=True)
    assert [output["tokens"].tolist() for output in pipe.tokenizer.merged] == [[[901, 1]], [[901]]]
    transcript = pipe.transcribe(make_sound(12, 1, 11), chunk_length_s=10, stride_length_s=0, return_timestamps="word")
    assert [(word.text, word.start) for word in transcript.words] == [(" w1", 1.25), (" w1", 1.25)]
    assert [segment.text for segment in transcript.segments] == [" w1 w1"]


def test_silent_windows_give_no_text(pipe: Any, make_sound: Any) -> None:
    assert pipe(make_sound(12), chunk_length_s=10, return_timestamps=True) == {"text": "", "chunks": []}


def test_a_stride_cut_by_the_caller_is_merged(pipe: Any, make_sound: Any) -> None:
    pipe({"raw": make_sound(10, 1), "sampling_rate": 16000, "stride": (16000, 32000)})
    assert [output["stride"] for output in pipe.tokenizer.merged] == [(10, 1, 2)]


def test_generation_arguments_nested_and_flat(make_pipe: Any, make_sound: Any) -> None:
    pipe = make_pipe(generate_kwargs={"language": "de", "task": "translate"}, return_timestamps=True)
    given = {"language": "en", "num_beams": 1}
    result = pipe(make_sound(3, 1), generate_kwargs=given, max_new_tokens=7)
    call = pipe.model.calls[-1]
    assert (call["language"], call["task"], call["num_beams"], call["max_new_tokens"]) == ("en", "translate", 1, 7)
    assert given == {"language": "en", "num_beams": 1}
    assert "chunks" in result
    assert pipe(make_sound(3, 1), return_timestamps=False).keys() == {"text"}


def test_a_call_wins_over_the_pipeline_however_it_is_written(make_pipe: Any, make_sound: Any) -> None:
    pipe = make_pipe(num_beams=3, language="de")
    pipe(make_sound(3, 1), generate_kwargs={"num_beams": 1})
    assert (pipe.model.calls[-1]["num_beams"], pipe.model.calls[-1]["language"]) == (1, "de")


def test_a_generation_config_is_completed_and_passed_on(pipe: Any, make_sound: Any) -> None:
    config = SimpleNamespace(max_new_tokens=9, num_beams=None)
    pipe(make_sound(3, 1), generation_config=config)
    call = pipe.model.calls[-1]
    assert call["generation_config"] is config
    assert (call["num_beams"], "max_new_tokens" in call) == (5, False)


def test_generation_defaults_yield_to_the_models_own(make_pipe: Any, make_sound: Any) -> None:
    def beams_and_tokens(**generation: Any) -> tuple[Any, Any]:
        pipe = make_pipe(generation)
        pipe(make_sound(3, 1))
        return pipe.model.calls[-1].get("num_beams"), pipe.model.calls[-1].get("max_new_tokens")

    assert beams_and_tokens() == (5, 256)
    assert beams_and_tokens(max_length=448) == (5, None)
    assert beams_and_tokens(num_beams=2, max_new_tokens=9) == (None, None)


def test_a_transcript_has_no_loops_unless_they_are_wanted(pipe: Any, make_sound: Any) -> None:
    def breaks(call: Any, **options: Any) -> Any:
        call(make_sound(3, 1), **options)
        return pipe.model.calls[-1].get("break_loops")

    assert (breaks(pipe.transcribe), breaks(pipe.transcribe, generate_kwargs={"num_beams": 1})) == (True, True)
    assert breaks(pipe.transcribe, break_loops=False) is False
    # A call of the pipeline gives what transformers gives.
    assert breaks(pipe) is None


def test_further_hypotheses_stand_beside_the_best_one(pipe: Any, make_sound: Any) -> None:
    inner = pipe.model.generate

    def several(*args: Any, num_return_sequences: int, **kwargs: Any) -> Any:
        found = inner(*args, **kwargs)
        later = [[{**one, "tokens": one["tokens"] + 1} for one in row] for row in found["segments"]]
        pairs = [one for pair in zip(found["segments"], later, strict=True) for one in pair]
        return {**found, "segments": pairs, "languages": ["fr"] * len(pairs)}

    pipe.model.generate = several
    items = [make_sound(3, 1), make_sound(4, 2)]
    found = pipe(items, batch_size=2, num_return_sequences=2, return_timestamps=True)
    assert [(one["text"], one["alternatives"][0]["text"]) for one in found] == [(" w1", " w2"), (" w2", " w3")]
    assert found[0]["alternatives"][0]["chunks"] == [{"timestamp": (1.0, 2.0), "text": " w2"}]
    assert [one.text for one in pipe.transcribe(items[0], num_return_sequences=2).alternatives] == [" w2"]


def test_times_that_the_model_always_gives_are_given(make_pipe: Any, make_sound: Any) -> None:
    assert "chunks" in make_pipe({"return_timestamps": True})(make_sound(3, 1))


def test_a_progress_bar_on_long_audio(pipe: Any, make_sound: Any, capsys: pytest.CaptureFixture[str]) -> None:
    pipe(make_sound(40, 1), progress=True)
    assert "40/40 s" in capsys.readouterr().err
    pipe(make_sound(40, 1))
    pipe(make_sound(40, 1), progress=False)
    pipe(make_sound(10, 1), progress=True)
    assert capsys.readouterr().err == ""
    pipe(make_sound(40, 1), progress=True, monitor_progress=lambda state: None)
    assert capsys.readouterr().err == ""


def test_arguments_of_other_versions_are_accepted(pipe: Any, make_sound: Any) -> None:
    assert pipe(make_sound(3, 1), num_workers=4, ignore_warning=True)["text"] == " w1"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"return_timestamps": "char"}, "no times for characters"),
        ({"return_timestamps": "words"}, "expected False, True"),
        ({"chunk_length_s": -1}, "chunk_length_s=-1"),
        ({"chunk_length_s": 10, "stride_length_s": 6}, "must be longer than both strides"),
        ({"chunk_length_s": 10, "stride_length_s": (5, 5)}, "must be longer than both strides"),
        ({"chunk_length_s": 10, "stride_length_s": (1, 2, 3)}, r"expected a number of seconds, or two"),
        ({"chunk_length_s": 10, "stride_length_s": -1}, "stride_length_s=-1"),
        ({"batch_size": 0}, "batch_size=0"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_read(
    pipe: Any, make_sound: Any, arguments: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        pipe(make_sound(3, 1), **arguments)
    assert pipe.feature_extractor.calls == []
