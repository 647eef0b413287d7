"""Ask about a picture and a recording, then go on with the conversation. Pictures need the extra "vision" (Pillow).

python examples/chat_image_audio.py google/gemma-3n-E2B-it --image cat.jpg --audio question.wav
"""

from __future__ import annotations

import argparse

from audiomm import pipeline


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="hub id or folder")
    parser.add_argument("--image", action="append", default=[])
    parser.add_argument("--audio", action="append", default=[])
    parser.add_argument("--ask", default="What do you see and hear?")
    parser.add_argument("--then", default="Say it in one sentence.")
    parser.add_argument("--max_new_tokens", type=int, default=200)
    arguments = parser.parse_args(argv)

    pipe = pipeline("any-to-any", model=arguments.model)
    media = [{"type": "image", "path": path} for path in arguments.image]
    media += [{"type": "audio", "path": path} for path in arguments.audio]
    messages = [{"role": "user", "content": [*media, {"type": "text", "text": arguments.ask}]}]
    # The conversation comes back with the answer at its end.
    messages = pipe(messages, max_new_tokens=arguments.max_new_tokens)[0]["generated_text"]
    print(messages[-1]["content"])
    messages.append({"role": "user", "content": [{"type": "text", "text": arguments.then}]})
    for piece in pipe.stream(messages, max_new_tokens=arguments.max_new_tokens):
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
