"""`audiomm transcribe`: what is printed and written, what happens to bad files, and the exit codes."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from audiomm.base.transcript import Transcript
from audiomm.cli.main import main


def test_the_text_is_printed_with_its_times_and_nothing_is_written(
    fake: Any, wav: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(wav).parent)
    assert main(["transcribe", wav]) == 0
    assert capsys.readouterr() == ("[00:00.500 --> 00:01.250] Grüße\n", "")
    assert [path.name for path in Path(wav).parent.iterdir()] == ["talk.wav"]
    assert fake.loaded_with["model"] == "audiomm/whisper-commands"


def test_several_files_are_told_apart(
    fake: Any, wav: str, make_wav_file: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_wav_file("other.wav", 2.0)
    assert main(["transcribe", wav, other]) == 0
    assert capsys.readouterr().out == (
        f"{wav}:\n[00:00.500 --> 00:01.250] Grüße\n{other}:\n[00:00.500 --> 00:02.000] Grüße\n"
    )


#: What `generate` gets unless a flag says otherwise.
CHECKS = {
    "temperature": (0.0, 0.2, 0.4, 0.6, 0.8, 1.0),
    "compression_ratio_threshold": 2.4,
    "logprob_threshold": -1.0,
    "no_speech_threshold": 0.6,
    "condition_on_prev_tokens": True,
    "best_of": 5,
}


def generate_kwargs(fake: Any) -> dict[str, Any]:
    """What the first call passes to `generate`, without the function that tells texts of tokens."""
    given = dict(fake.calls[0][1]["generate_kwargs"])
    given.pop("text_of", None)
    return given


EXPECTED = {
    "txt": "Grüße\n",
    "srt": "1\n00:00:00,500 --> 00:00:01,250\nGrüße\n\n",
    "vtt": "WEBVTT\n\n00:00.500 --> 00:01.250\nGrüße\n\n",
    "tsv": "start\tend\ttext\n500\t1250\tGrüße\n",
}


@pytest.mark.parametrize("output_format", ["txt", "srt", "vtt", "tsv"])
def test_each_format_is_written_where_it_is_asked_for(
    fake: Any, wav: str, tmp_path: Path, output_format: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    assert main(["transcribe", wav, "-o", str(folder), "-f", output_format]) == 0
    path = folder / f"talk.{output_format}"
    assert capsys.readouterr().out == f"{path}\n"
    assert path.read_text(encoding="utf-8") == EXPECTED[output_format]
    assert list(folder.iterdir()) == [path]


def test_a_folder_alone_gets_all_formats(fake: Any, wav: str, tmp_path: Path) -> None:
    assert main(["transcribe", wav, "--output_dir", str(tmp_path / "out")]) == 0
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".txt", ".srt", ".vtt", ".tsv", ".json"}
    content = json.loads((tmp_path / "out" / "talk.json").read_text())
    assert content["language"] == "de"
    assert content["segments"][0]["start"] == 0.5


def test_a_format_alone_writes_here_and_verbose_prints_too(
    fake: Any, wav: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert main(["transcribe", wav, "--output_format", "txt", "--verbose", "True"]) == 0
    assert capsys.readouterr().out == "[00:00.500 --> 00:01.250] Grüße\ntalk.txt\n"
    assert Path("talk.txt").read_text(encoding="utf-8") == "Grüße\n"


def test_inputs_of_one_name_do_not_overwrite_each_other(fake: Any, make_wav_file: Any, tmp_path: Path) -> None:
    first, second = make_wav_file("a/talk.wav", 1.0), make_wav_file("b/talk.wav", 2.0)
    assert main(["transcribe", first, second, "-o", str(tmp_path / "out"), "-f", "tsv"]) == 0
    assert {path.name: path.read_text(encoding="utf-8").split("\t")[3] for path in (tmp_path / "out").iterdir()} == {
        "talk.wav.tsv": "1000",
        "talk.wav-2.tsv": "2000",
    }


@pytest.mark.parametrize("batch_size", ["1", "2", "4"])
def test_a_bad_file_is_reported_and_the_others_go_on(
    fake: Any, wav: str, broken: str, make_wav_file: Any, batch_size: str, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [wav, broken, "missing.wav", make_wav_file("other.wav", 2.0)]
    assert main(["transcribe", *files, "--batch_size", batch_size]) == 1
    out, err = capsys.readouterr()
    assert out.count("Grüße") == 2
    assert f"audiomm: {broken}: " in err
    assert "audiomm: missing.wav: no such file" in err
    assert err.endswith("audiomm: 2 of 4 files failed\n")
    assert "Traceback" not in err


def test_silence_is_told_and_is_no_failure(
    fake: Any, wav: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fake, "_one", lambda path, kwargs: Transcript(""))
    assert main(["transcribe", wav]) == 0
    assert capsys.readouterr() == ("", f"audiomm: {wav}: no speech found\n")
    assert main(["transcribe", wav, "-o", str(tmp_path / "out"), "-f", "srt"]) == 0
    assert (tmp_path / "out" / "talk.srt").read_text() == ""


def test_one_bad_file_alone_fails(fake: Any, broken: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["transcribe", broken]) == 1
    assert "not an audio file" in capsys.readouterr().err


def test_an_error_nobody_thought_of_does_not_stop_the_others(
    fake: Any, wav: str, make_wav_file: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hear = fake._one

    def fail(path: str, kwargs: dict[str, Any]) -> Any:
        if path == wav:
            raise RuntimeError("out of memory")
        return hear(path, kwargs)

    monkeypatch.setattr(fake, "_one", fail)
    assert main(["transcribe", wav, make_wav_file("other.wav")]) == 1
    out, err = capsys.readouterr()
    assert "Grüße" in out
    assert f"audiomm: {wav}: out of memory" in err


def test_a_folder_that_cannot_be_made_is_told_before_any_work(
    fake: Any, wav: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["transcribe", wav, "-o", wav, "-f", "txt"]) == 1
    assert "cannot save" in capsys.readouterr().err
    assert fake.calls == []


def test_a_file_that_cannot_be_written_fails_alone(
    fake: Any, wav: str, make_wav_file: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out" / "talk.txt").mkdir(parents=True)
    other = make_wav_file("other.wav")
    assert main(["transcribe", wav, other, "-o", str(tmp_path / "out"), "-f", "txt"]) == 1
    out, err = capsys.readouterr()
    assert "could not be written" in err
    assert out == f"{tmp_path / 'out' / 'other.txt'}\n"


def test_batches_go_through_the_model_together(fake: Any, wav: str, make_wav_file: Any) -> None:
    other = make_wav_file("other.wav")
    assert main(["transcribe", wav, other, "--batch_size", "2"]) == 0
    ((_, kwargs),) = fake.calls
    assert kwargs["batch_size"] == 2
    # All files go to the pipeline in one stream, not two by two.
    assert main(["transcribe", wav, other, wav, other, wav, "--batch_size", "2"]) == 0
    assert len(fake.calls) == 2


def test_when_the_model_fails_on_a_batch_every_file_is_tried_alone(
    fake: Any, wav: str, make_wav_file: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hear, heard = fake._one, []

    def fail(audio: Any, kwargs: dict[str, Any]) -> Any:
        heard.append(audio)
        if len(heard) == 2:
            raise RuntimeError("out of memory")
        return hear(audio, kwargs)

    monkeypatch.setattr(fake, "_one", fail)
    files = [wav, make_wav_file("b.wav"), make_wav_file("c.wav")]
    assert main(["transcribe", *files, "--batch_size", "3"]) == 0
    assert capsys.readouterr().out.count("Grüße") == 3
    assert heard[2:] == files[1:]


def test_flags_reach_the_model(fake: Any, wav: str) -> None:
    flags = "--model some/model --revision v2 --device cpu --dtype bfloat16 --language German --task translate"
    decoding = (
        "--beam_size 3 --temperature 0 --temperature_increment_on_fallback 0.4 --compression_ratio_threshold 2 "
        "--logprob_threshold None --no_speech_threshold 0.5 --condition_on_previous_text False --max_new_tokens 9"
    )
    assert main(["transcribe", wav, *flags.split(), *decoding.split(), "--threads", "1"]) == 0
    assert fake.loaded_with == {"model": "some/model", "revision": "v2", "device": "cpu", "dtype": "bfloat16"}
    assert {name: value for name, value in fake.calls[0][1].items() if name != "generate_kwargs"} == {
        "return_timestamps": True,
        "allow_urls": True,
    }
    assert generate_kwargs(fake) == {
        "language": "de",
        "task": "translate",
        "num_beams": 3,
        "temperature": (0.0, 0.4, 0.8),
        "compression_ratio_threshold": 2.0,
        "logprob_threshold": "off",
        "no_speech_threshold": 0.5,
        "condition_on_prev_tokens": False,
        "max_new_tokens": 9,
        "best_of": 5,
    }


def test_flags_of_openai_reach_the_model(fake: Any, wav: str) -> None:
    fake.model.generation_config.suppress_tokens = [5, 6]
    flags = (
        "--best_of 3 --patience 2 --length_penalty 0.5 --suppress_tokens=-1,9 --word_timestamps True "
        "--append_punctuations !? --hallucination_silence_threshold 2 --model_dir models --local_files_only True "
        "--fp16 False --threads 0 --clip_timestamps 0"
    )
    assert main(["transcribe", wav, "--model", "turbo", "--device", "cpu", *flags.split()]) == 0
    assert fake.loaded_with == {
        "model": "openai/whisper-large-v3-turbo",
        "revision": None,
        "device": "cpu",
        "dtype": "float32",
        "model_kwargs": {"cache_dir": "models", "local_files_only": True},
    }
    given = generate_kwargs(fake)
    assert (given["best_of"], given["patience"], given["google_length_penalty"]) == (3, 2.0, 0.5)
    assert given["suppress_tokens"] == [5, 6, 9]
    assert given["punctuation"][1] == "!?"
    assert "(" in given["punctuation"][0]
    assert given["hallucination_silence_threshold"] == 2.0


def test_repetition_is_measured_on_the_text(fake: Any, wav: str) -> None:
    assert main(["transcribe", wav]) == 0
    assert fake.calls[0][1]["generate_kwargs"]["text_of"]([72, 73, 130, 200]) == "HI"
    assert main(["transcribe", wav, "--compression_ratio_threshold", "None"]) == 0
    assert fake.calls[1][1]["generate_kwargs"]["compression_ratio_threshold"] == "off"


def test_checks_left_out_are_the_models_own_or_openais(fake: Any, wav: str) -> None:
    def checks(*flags: str) -> list[Any]:
        assert main(["transcribe", wav, *flags]) == 0
        given = fake.calls[-1][1]["generate_kwargs"]
        names = ("compression_ratio_threshold", "logprob_threshold", "no_speech_threshold", "condition_on_prev_tokens")
        return [given[name] for name in names]

    assert checks() == [2.4, -1.0, 0.6, True]
    assert checks("--batch_size", "2") == [2.4, -1.0, 0.6, False]
    fake.model.generation_config.condition_on_prev_tokens = False
    fake.model.generation_config.compression_ratio_threshold = 9.0
    assert checks() == [9.0, -1.0, 0.6, False]
    assert checks("--condition_on_previous_text", "True") == [9.0, -1.0, 0.6, True]


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("tiny.en", "openai/whisper-tiny.en"),
        ("large", "openai/whisper-large-v3"),
        ("large-v2", "openai/whisper-large-v2"),
        ("openai/whisper-tiny", "openai/whisper-tiny"),
        ("audiomm/whisper-commands", "audiomm/whisper-commands"),
    ],
)
def test_short_names_of_models_are_those_of_openai(fake: Any, wav: str, name: str, model: str) -> None:
    assert main(["transcribe", wav, "--model", name]) == 0
    assert fake.loaded_with["model"] == model


def test_compiling_is_asked_of_both_halves_of_the_model(fake: Any, wav: str) -> None:
    compiled = []
    for name in ("get_encoder", "get_decoder"):
        half = SimpleNamespace(compile=lambda name=name, **_: compiled.append(name))
        setattr(fake.model, name, lambda half=half: half)
    assert main(["transcribe", wav]) == 0
    assert compiled == []
    assert main(["transcribe", wav, "--compile", "True"]) == 0
    assert compiled == ["get_encoder", "get_decoder"]


def test_windows_of_one_file_go_side_by_side(fake: Any, wav: str) -> None:
    assert main(["transcribe", wav, "--batch_size", "4"]) == 0
    assert fake.calls[0][0] == wav
    assert fake.calls[0][1]["batch_size"] == 4


def test_a_dash_reads_a_pipe(
    fake: Any, wav: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe = SimpleNamespace(buffer=io.BytesIO(Path(wav).read_bytes()), isatty=lambda: False)
    monkeypatch.setattr("sys.stdin", pipe)
    assert main(["transcribe", "-", "-o", str(tmp_path / "out"), "-f", "txt"]) == 0
    assert (tmp_path / "out" / "stdin.txt").read_text(encoding="utf-8") == "Grüße\n"
    assert fake.calls[0][0] == Path(wav).read_bytes()


def test_half_precision_on_a_cpu_is_told_and_not_used(fake: Any, wav: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["transcribe", wav, "--device", "cpu", "--fp16", "True"]) == 0
    assert fake.loaded_with["dtype"] == "float32"
    assert "--fp16 True is slow on a CPU" in capsys.readouterr().err


def test_prompts_and_what_is_heard_reach_the_pipeline(fake: Any, wav: str) -> None:
    flags = ["--initial_prompt", "Ørsted", "--carry_initial_prompt", "True", "--hotwords", "Aarhus"]
    assert main(["transcribe", wav, *flags, "--clip_timestamps", "0.5,1"]) == 0
    speech = ["--vad_filter", "True", "--vad_min_silence_duration_ms", "500", "--vad_detector", "energy"]
    assert main(["transcribe", wav, *speech]) == 0
    calls = [kwargs for _, kwargs in fake.calls]
    for call in calls:
        del call["generate_kwargs"]
    same = {"return_timestamps": True, "allow_urls": True}
    prompts = {"initial_prompt": "Ørsted", "carry_initial_prompt": True, "hotwords": "Aarhus"}
    assert calls == [
        same | prompts | {"clip_timestamps": "0.5,1"},
        same | {"vad_filter": True, "vad_parameters": {"min_silence_duration_ms": 500.0, "detector": "energy"}},
    ]


def test_windows_are_checked_and_decoded_again_unless_told_otherwise(fake: Any, wav: str) -> None:
    assert main(["transcribe", wav]) == 0
    assert generate_kwargs(fake) == CHECKS | {"task": "transcribe"}


def test_a_single_temperature_is_no_ladder(fake: Any, wav: str) -> None:
    assert main(["transcribe", wav, "--temperature", "0.3", "--temperature_increment_on_fallback", "None"]) == 0
    assert fake.calls[0][1]["generate_kwargs"]["temperature"] == 0.3


def test_words_on_request(fake: Any, wav: str, tmp_path: Path) -> None:
    arguments = ["transcribe", wav, "-o", str(tmp_path), "-f", "vtt", "--word_timestamps", "True"]
    assert main([*arguments, "--highlight_words", "True"]) == 0
    assert fake.calls[0][1]["return_timestamps"] == "word"
    assert "<u>Grüße</u>" in (tmp_path / "talk.vtt").read_text(encoding="utf-8")


def test_an_english_model_takes_every_language_as_english(
    fake: Any, wav: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.model.generation_config.is_multilingual = False
    assert main(["transcribe", wav, "--language", "de"]) == 0
    assert "knows English only; --language de is taken as en" in capsys.readouterr().err
    assert generate_kwargs(fake) == CHECKS
    assert main(["transcribe", wav, "--language", "en"]) == 0
    assert capsys.readouterr().err == ""
    assert main(["transcribe", wav, "--task", "translate"]) == 2
    assert "cannot translate" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--language", "klingon"], "klingon"),
        (["--device", "tpu9"], "device='tpu9'"),
        (["--dtype", "int8"], "dtype='int8'"),
        (["--batch_size", "0"], "not a whole number of at least 1"),
        (["--beam_size", "many"], "not a whole number"),
        (["--verbose", "maybe"], "neither True nor False"),
        (["--output_format", "doc"], "invalid choice"),
        (["--temperature", "warm"], "invalid float value"),
        (["--highlight_words", "True"], "need --word_timestamps True"),
        (["--max_line_width", "40"], "need --word_timestamps True"),
        (["--no_such_flag"], "unrecognized arguments"),
        (["--clip_timestamps", "3,1"], "the parts must be in order"),
        (["--clip_timestamps", "0,1", "--vad_filter", "True"], "both choose what is heard"),
        (["--vad_speech_pad_ms", "9"], "need --vad_filter True"),
        (["--vad_filter", "True", "--vad_speech_pad_ms", "-9"], "speech_pad_ms=-9"),
        (["--carry_initial_prompt", "True"], "needs an --initial_prompt"),
        (["--fp16", "True", "--dtype", "float32"], "both say the numbers' type"),
        (["--threads", "-1"], "not a whole number of at least 0"),
        (["--suppress_tokens", "a,b"], "token ids with commas"),
        (["--length_penalty", "1.5"], "accepted are 0 to 1"),
        (["--patience", "2", "--beam_size", "1"], "--patience is for a search"),
        (["--append_punctuations", "!"], "needs --word_timestamps True"),
        (["--hallucination_silence_threshold", "2"], "needs --word_timestamps True"),
        (["--batch_size", "2", "--condition_on_previous_text", "True"], "pass one of them"),
        (["-", "-"], "reads audio once"),
    ],
)
def test_wrong_usage_is_refused_before_anything_is_loaded(
    fake: Any, wav: str, flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["transcribe", wav, *flags]) == 2
    assert words in capsys.readouterr().err
    assert fake.loaded_with == {}


def test_a_folder_is_not_a_file(fake: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["transcribe", str(tmp_path)]) == 2
    assert "is a folder; pass the files in it" in capsys.readouterr().err


def test_a_model_that_is_not_there_is_an_error(wav: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["transcribe", wav, "--device", "cpu", "--model", str(tmp_path / "nowhere")]) == 1
    assert "audiomm: error: " in capsys.readouterr().err


def test_interruption_has_its_own_code(
    fake: Any, wav: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fake, "transcribe", interrupt)
    assert main(["transcribe", wav]) == 130
    assert "interrupted" in capsys.readouterr().err
