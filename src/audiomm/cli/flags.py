"""The flags of the commands that have many.

Those of `audiomm transcribe` that openai-whisper knows are called as there, and mean the same.
"""

from __future__ import annotations

import argparse
from typing import Literal

OUTPUT_FORMATS = ("txt", "vtt", "srt", "tsv", "json", "all")
DEFAULT_MODEL = "audiomm/whisper-commands"

_Commands = argparse._SubParsersAction


def add_transcribe(commands: _Commands[argparse.ArgumentParser]) -> None:
    """The command that reads files."""
    command = commands.add_parser(
        "transcribe",
        help="speech to text",
        description="Transcribe audio files. Without --output_dir and --output_format the text is printed with its "
        "times and no file is written.",
    )
    command.set_defaults(module="transcribe", usage_error=command.error)
    command.add_argument(
        "audio", nargs="+", metavar="FILE", help="audio files (wav, flac, mp3, ogg, ...) or URLs; - reads a pipe"
    )
    _add_model(command)
    command.add_argument(
        "--batch_size", type=_positive, default=1,
        help="files that are transcribed side by side; for one file, windows of it, cut at pauses",
    )  # fmt: skip
    _add_speech(command)
    _add_output(command)
    _add_decoding(command)


def add_listen(commands: _Commands[argparse.ArgumentParser]) -> None:
    """The command that reads a microphone."""
    command = commands.add_parser(
        "listen",
        help="speech to text while it is spoken",
        description="Transcribe a microphone until it is interrupted. Words are printed when they are settled; in a "
        "terminal those that may still change follow in grey.",
    )
    command.set_defaults(module="listen", usage_error=command.error)
    command.add_argument(
        "source", nargs="?", metavar="FILE",
        help="read 16-bit mono samples from this file instead, - from a pipe, as arecord -t raw -f S16_LE gives them",
    )  # fmt: skip
    command.add_argument("--microphone", metavar="DEVICE", help="number or name of the input device")
    command.add_argument("--rate", type=_positive, default=16000, help="samples a second (default: 16000)")
    command.add_argument("--step", type=float, default=1.0, metavar="SECONDS", help="how often to listen (default: 1)")
    _add_model(command)
    command.add_argument("--task", choices=("transcribe", "translate"), default="transcribe")
    command.add_argument("--language", help="language spoken, as a code or an English name; detected when left out")
    command.add_argument("--beam_size", type=_positive, default=1, help="beams of the search; 1 is greedy (default: 1)")


def add_evaluate(commands: _Commands[argparse.ArgumentParser]) -> None:
    """The command that measures a model."""
    command = commands.add_parser(
        "evaluate",
        help="word error rate of a model on recordings whose text is known",
        description="Transcribe recordings and compare with their texts. Needs jiwer: pip install 'audiomm[eval]'.",
    )
    command.set_defaults(module="evaluate", usage_error=command.error)
    command.add_argument("model", metavar="MODEL", help="a folder, a hub id, or OpenAI's short name of one")
    command.add_argument(
        "data", metavar="DATA",
        help="a folder of recordings with a .txt or .json (key text) beside each, or a .jsonl, .tsv or .csv file with "
        "the columns path (or audio) and text",
    )  # fmt: skip
    command.add_argument("--language", help="language spoken, as a code or an English name; detected when left out")
    command.add_argument("--task", choices=("transcribe", "translate"), default="transcribe")
    command.add_argument(
        "--normalizer", choices=("auto", "english", "basic", "none"), default="auto",
        help="how texts are evened out; auto is Whisper's English one for --language en or an English model, else its "
        "basic one",
    )  # fmt: skip
    command.add_argument("--batch_size", type=_positive, default=8, help="recordings heard side by side (default: 8)")
    command.add_argument("--beam_size", type=_positive, default=1, help="beams of the search; 1 is greedy (default: 1)")
    command.add_argument("--worst", type=int, default=5, metavar="N", help="show so many bad utterances (default: 5)")
    command.add_argument("--output", metavar="FILE", help="write all utterances and the rates as JSON")
    _add_loading(command)


def add_plot(commands: _Commands[argparse.ArgumentParser]) -> None:
    """The command that draws a training run."""
    command = commands.add_parser(
        "plot",
        help="curves of a training run: loss, learning rate, error rates",
        description="Draw log.jsonl of a run of the Trainer. Needs matplotlib: pip install 'audiomm[plot]'.",
    )
    command.set_defaults(module="plot", usage_error=command.error)
    command.add_argument("run", metavar="RUN", help="the output_dir of the run, a checkpoint in it, or its log.jsonl")
    command.add_argument(
        "-o", "--output", metavar="FILE",
        help="a .png or .html file, or a name for both; curves in the folder of the run when left out",
    )  # fmt: skip


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        help="a folder, a hub id like openai/whisper-large-v3-turbo, or OpenAI's short name of one, like turbo; "
        f"{DEFAULT_MODEL} when left out, which comes with the package and knows numbers and some commands",
    )
    _add_loading(command)


def _add_loading(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model_dir", help="folder that downloaded models are kept in; the hub's own when left out")
    command.add_argument("--revision", help="branch, tag or commit of the model on the hub")
    command.add_argument(
        "--local_files_only", type=_boolean, default=False, metavar="BOOL", help="do not ask the hub for anything"
    )
    command.add_argument("--device", help="cpu, cuda, cuda:1, mps; the first accelerator, or the CPU, when left out")
    command.add_argument("--dtype", help="float32, bfloat16 or float16; the checkpoint's when left out")
    command.add_argument("--quantize", help="int8, or auto: the quickest of this machine; nothing when left out")
    command.add_argument("--fp16", type=_boolean, metavar="BOOL", help="OpenAI's way to say --dtype float16 or float32")
    command.add_argument(
        "--compile", type=_boolean, default=False, metavar="BOOL", help="compile the model: slow to start, then faster"
    )
    command.add_argument("--threads", type=_threads, default=0, help="CPU threads; 0 is all (default: 0)")


def _add_speech(command: argparse.ArgumentParser) -> None:
    speech = command.add_argument_group("speech")
    speech.add_argument("--task", choices=("transcribe", "translate"), default="transcribe")
    speech.add_argument("--language", help="language spoken, as a code or an English name; detected when left out")
    speech.add_argument("--initial_prompt", metavar="TEXT", help="what to read before the first window, like names")
    speech.add_argument(
        "--carry_initial_prompt", type=_boolean, default=False, metavar="BOOL", help="read it before every window"
    )
    speech.add_argument("--hotwords", metavar="TEXT", help="what to read before every window")
    speech.add_argument(
        "--clip_timestamps", metavar="SECONDS", help="hear only these parts: start,end,start,end; the last end may lack"
    )
    speech.add_argument("--vad_filter", type=_boolean, metavar="BOOL", help="leave out what is not speech")
    speech.add_argument("--vad_detector", choices=("energy", "silero"), help="what finds speech (default: energy)")
    speech.add_argument("--vad_threshold", type=float, help="silero's probability of speech (default: 0.5)")
    speech.add_argument(
        "--vad_min_silence_duration_ms", type=float, metavar="MS", help="leave out only silence longer than this (2000)"
    )
    speech.add_argument("--vad_speech_pad_ms", type=float, metavar="MS", help="keep this much around speech (400)")


def _add_output(command: argparse.ArgumentParser) -> None:
    output = command.add_argument_group("output")
    output.add_argument("-o", "--output_dir", help="folder for the files; the current one when only a format is given")
    output.add_argument("-f", "--output_format", choices=OUTPUT_FORMATS, help="all when only a folder is given")
    output.add_argument("--verbose", type=_boolean, metavar="BOOL", help="print the text while files are written, too")
    output.add_argument(
        "--word_timestamps", type=_boolean, default=False, metavar="BOOL", help="find the times of words"
    )
    output.add_argument(
        "--prepend_punctuations", metavar="MARKS", help="marks that belong to the word after them (needs words)"
    )
    output.add_argument(
        "--append_punctuations", metavar="MARKS", help="marks that belong to the word before them (needs words)"
    )
    output.add_argument("--max_line_width", type=_positive, help="characters in a subtitle's line (needs words)")
    output.add_argument("--max_line_count", type=_positive, help="lines in a subtitle (needs words)")
    output.add_argument("--max_words_per_line", type=_positive, help="words in a subtitle (needs words)")
    output.add_argument(
        "--highlight_words", type=_boolean, default=False, metavar="BOOL", help="underline each word as it is said"
    )


def _add_decoding(command: argparse.ArgumentParser) -> None:
    decoding = command.add_argument_group(
        "decoding", "A window of 30 s that fails a check is decoded again, warmer. None switches a check off."
    )
    decoding.add_argument("--beam_size", type=_positive, help="beams of the search; 1 is greedy (default: 5)")
    decoding.add_argument("--best_of", type=_positive, default=5, help="texts drawn when warm; the best stands (5)")
    decoding.add_argument("--patience", type=float, help="beams wait for beam_size * patience texts (default: 1)")
    decoding.add_argument("--length_penalty", type=float, help="how a beam's length counts, 0 to 1, as Google's")
    decoding.add_argument("--suppress_tokens", default="-1", metavar="IDS", help="never written; -1 is the model's own")
    decoding.add_argument("--max_new_tokens", type=_positive, help="most tokens of a window")
    decoding.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default: 0)")
    decoding.add_argument(
        "--temperature_increment_on_fallback", type=_optional_float, default=0.2, metavar="NUMBER",
        help="how much warmer, up to 1 (default: 0.2)",
    )  # fmt: skip
    checks: dict[str, tuple[float, str]] = {
        "compression_ratio_threshold": (2.4, "repeats itself: its text compresses better than this"),
        "logprob_threshold": (-1.0, "unsure: its tokens are less likely than this, on average"),
        "no_speech_threshold": (0.6, "silent, if it is unsure as well: no speech is likelier than this"),
    }
    for name, (default, meaning) in checks.items():
        text = f"{meaning} (default: the model's own, {default} where it has none)"
        decoding.add_argument(f"--{name}", type=_threshold, metavar="NUMBER", help=text)
    decoding.add_argument(
        "--condition_on_previous_text", type=_boolean, metavar="BOOL",
        help="begin a window with the text before it (default: the model's own, True where it has none; False where "
        "--batch_size hears windows of one file side by side)",
    )  # fmt: skip
    decoding.add_argument(
        "--hallucination_silence_threshold", type=_optional_float, metavar="SECONDS",
        help="leave out words that look imagined with so much silence around them (needs words)",
    )  # fmt: skip


def _boolean(text: str) -> bool:
    values = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return values[text.lower()]


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _threads(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)


def _optional_float(text: str) -> float | None:
    return None if text == "None" else float(text)


def _threshold(text: str) -> float | Literal["None"]:
    """A number, or the word that switches a check off; flags that are left out are None."""
    return "None" if text == "None" else float(text)


def add_chat(commands: _Commands[argparse.ArgumentParser]) -> None:
    """The flags of `audiomm chat`."""
    chat = commands.add_parser("chat", help="talk with a model, with pictures, recordings and videos")
    chat.add_argument("model", metavar="MODEL", help="a folder or a hub id, like google/gemma-3n-E2B-it")
    chat.add_argument("--prompt", help="ask this and end, instead of reading lines")
    chat.add_argument("--attach", metavar="PATH", nargs="+", default=[], help="files for the first question")
    chat.add_argument("--system", help="what the model is to be")
    chat.add_argument("--max_new_tokens", type=int, default=512, help="the longest answer (default %(default)s)")
    chat.add_argument("--temperature", type=float, help="0 always takes the likeliest token; the model's when left out")
    chat.add_argument("--device", help="cpu, cuda, cuda:1, mps; the first accelerator when left out")
    chat.add_argument("--dtype", help="float32, bfloat16 or float16; the checkpoint's when left out")
    chat.add_argument("--revision", help="branch, tag or commit on the hub")
    chat.set_defaults(module="chat", usage_error=chat.error)


def add_slice(commands: _Commands[argparse.ArgumentParser]) -> None:
    """The flags of `audiomm slice`."""
    parser = commands.add_parser("slice", help="a smaller Gemma 3n out of a larger one's checkpoint")
    parser.add_argument("source", metavar="SOURCE", help="a folder or a hub id, like google/gemma-3n-E4B-it")
    parser.add_argument("output", metavar="OUTPUT", help="the folder to write")
    parser.add_argument("--size", help="a published size, like E2B or E2.54B")
    parser.add_argument("--intermediate_size", help="neurons of every layer's block, or one number a layer with commas")
    parser.add_argument("--skip_layers", help="layers to leave out, like 20-24")
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    parser.set_defaults(module="slice", usage_error=parser.error)
