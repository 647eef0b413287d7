"""`audiomm slice`: a smaller Gemma 3n out of a larger one's checkpoint."""

from __future__ import annotations

import argparse
import re

from ..base.errors import ConfigError
from ..models.gemma3n.slicing import slice_checkpoint


def run(arguments: argparse.Namespace) -> int:
    """Write the slice and say what it is.

    Raises:
        ConfigError: There is no such slice, or nothing is to be left out.
    """
    if arguments.size is None and arguments.intermediate_size is None and arguments.skip_layers is None:
        raise ConfigError("nothing to leave out: say --size E2B, or --intermediate_size, or --skip_layers.")
    options = {} if arguments.revision is None else {"revision": arguments.revision}
    config = slice_checkpoint(
        arguments.source,
        arguments.output,
        arguments.size,
        intermediate_size=None if arguments.intermediate_size is None else neuron_counts(arguments.intermediate_size),
        skipped_layers=() if arguments.skip_layers is None else layer_list(arguments.skip_layers),
        **options,
    ).get_text_config()
    widths = " and ".join(f"{size:,}" for size in sorted(set(config.intermediate_size)))
    print(f"{arguments.output}: {config.num_hidden_layers} layers of {widths} neurons")
    return 0


def layer_list(text: str) -> list[int]:
    """Layer numbers and ranges of them: "20-24,30".

    Raises:
        ConfigError: The text is something else.
    """
    layers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        if match is None:
            raise ConfigError(f"--skip_layers {text!r}: layers and ranges with commas are needed, as in 20-24,30.")
        layers += range(int(match[1]), int(match[2] or match[1]) + 1)
    return layers


def neuron_counts(text: str) -> int | list[int]:
    """One number, or one a layer with commas, where "8192x4" stands for four of them.

    Raises:
        ConfigError: The text is something else.
    """
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:x(\d+))?", part.strip())
        if match is None:
            raise ConfigError(f"--intermediate_size {text!r}: a number, or numbers with commas as in 8192x20,16384x5.")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts[0] if len(counts) == 1 else counts
