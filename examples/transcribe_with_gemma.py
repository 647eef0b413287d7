"""Transcribe or translate recordings of any length with a Gemma that listens.

python examples/transcribe_with_gemma.py google/gemma-3n-E2B-it talk.mp3 --language german --task translate
"""

from __future__ import annotations

import argparse

from audiomm import pipeline


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="hub id or folder")
    parser.add_argument("audio", nargs="+")
    parser.add_argument("--language", help="what is spoken; the model finds out when it is left out")
    parser.add_argument("--task", choices=["transcribe", "translate"], default="transcribe")
    parser.add_argument("--batch_size", type=int, default=4, help="windows of up to 30 s that go through together")
    parser.add_argument("--max_new_tokens", type=int, default=448, help="for a window")
    arguments = parser.parse_args(argv)

    transcribe = pipeline("automatic-speech-recognition", model=arguments.model, batch_size=arguments.batch_size)
    results = transcribe(
        iter(arguments.audio),
        language=arguments.language,
        task=arguments.task,
        return_timestamps=True,
        max_new_tokens=arguments.max_new_tokens,
    )
    for path, result in zip(arguments.audio, results, strict=True):
        print(path)
        for chunk in result["chunks"]:
            start, end = chunk["timestamp"]
            print(f"  {start:7.2f} s - {end:7.2f} s {chunk['text']}")


if __name__ == "__main__":
    main()
