"""A progress bar on standard error: seconds of audio done, and how much faster than listening that goes."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from tqdm import tqdm

#: Frames of features are 10 ms apart.
SECONDS_PER_FRAME = 0.01

_LAYOUT = "{percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s [{elapsed}<{remaining}{postfix}]"


@contextmanager
def progress_bar(generate_kwargs: dict[str, Any], mask: Tensor, is_long: bool, progress: bool | None) -> Iterator[None]:
    """Show how far `generate` is, while the block runs.

    Args:
        generate_kwargs: Of the call in the block; gets "monitor_progress", and with that of the caller's own there is
            no bar.
        mask: (batch, frames), 1 where there is audio.
        is_long: There is more than one window.
        progress: Show it; None shows it in a terminal.
    """
    shown = sys.stderr.isatty() if progress is None else progress
    if not (shown and is_long) or "monitor_progress" in generate_kwargs:
        yield
        return
    begun = time.monotonic()
    with tqdm(total=float(mask.sum()) * SECONDS_PER_FRAME, bar_format=_LAYOUT) as bar:

        def show(done: Tensor) -> None:
            # More recordings may have come.
            bar.total = float(done[:, 1].sum()) * SECONDS_PER_FRAME
            tell(float(done.amin(dim=-1).sum()) * SECONDS_PER_FRAME)

        def tell(seconds: float) -> None:
            elapsed = max(time.monotonic() - begun, 1e-6)
            bar.set_postfix_str(f"{seconds / elapsed:.1f}x real time", refresh=False)
            bar.update(max(0.0, seconds - bar.n))

        generate_kwargs["monitor_progress"] = show
        yield
        tell(bar.total)
