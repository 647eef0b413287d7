"""Transcribe audio files with their times.

python examples/transcribe.py talk.mp3 --model openai/whisper-tiny
"""

from __future__ import annotations

import argparse

from audiomm import pipeline


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("audio", nargs="+")
    parser.add_argument("--model", default="audiomm/whisper-commands", help="hub id or folder")
    arguments = parser.parse_args(argv)

    transcribe = pipeline("automatic-speech-recognition", model=arguments.model)
    # An iterator in, an iterator out: files are read one after the other, however many there are.
    results = transcribe(iter(arguments.audio), return_timestamps=True)
    for path, result in zip(arguments.audio, results, strict=True):
        print(f"{path}:{result['text']}")
        for chunk in result["chunks"]:
            start, end = chunk["timestamp"]
            print(f"  {start:7.2f} s - {end:7.2f} s {chunk['text']}")


if __name__ == "__main__":
    main()
