"""Ask Gemma 4 about a video. Files need the extra "video" (PyAV); a folder of pictures needs "vision" (Pillow).

python examples/video_question.py google/gemma-4-E2B-it holiday.mp4 --ask "What happens at 00:10?"
python examples/video_question.py google/gemma-4-E2B-it frames/ --fps 2
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from audiomm import pipeline
from audiomm.media.image import load_image


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="hub id or folder")
    parser.add_argument("video", type=Path, help="a video file, or a folder of pictures in the order of their names")
    parser.add_argument("--fps", type=float, default=1.0, help="pictures a second, for folders")
    parser.add_argument("--ask", default="What happens in this video?")
    parser.add_argument("--max_new_tokens", type=int, default=200)
    arguments = parser.parse_args(argv)

    pipe = pipeline("any-to-any", model=arguments.model)
    options = {}
    if arguments.video.is_dir():
        frames = [np.asarray(load_image(path)) for path in sorted(arguments.video.iterdir())]
        medium = {"type": "video", "video": np.stack(frames)}
        # Times stand before the frames in the prompt; a file tells them itself.
        options = {"videos_kwargs": {"video_metadata": [{"fps": arguments.fps}]}}
    else:
        medium = {"type": "video", "path": str(arguments.video)}
    messages = [{"role": "user", "content": [medium, {"type": "text", "text": arguments.ask}]}]
    answer = pipe(messages, max_new_tokens=arguments.max_new_tokens, return_full_text=False, **options)
    print(answer[0]["generated_text"])


if __name__ == "__main__":
    main()
