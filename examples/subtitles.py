"""Write subtitles beside audio files.

python examples/subtitles.py talk.mp3 --format vtt
"""

from __future__ import annotations

import argparse
from pathlib import Path

from audiomm import pipeline
from audiomm.pipelines import get_writer


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("audio", nargs="+")
    parser.add_argument("--model", default="audiomm/whisper-commands", help="hub id or folder")
    parser.add_argument("--format", default="srt", choices=["srt", "vtt", "txt", "tsv", "json"])
    arguments = parser.parse_args(argv)

    pipe = pipeline("automatic-speech-recognition", model=arguments.model)
    for path in arguments.audio:
        # `transcribe` is the call with a typed result: transcript.segments, .language, .duration_seconds, ...
        transcript = pipe.transcribe(path, return_timestamps=True)
        write = get_writer(arguments.format, Path(path).parent)
        for written in write(transcript, path):
            print(written)


if __name__ == "__main__":
    main()
