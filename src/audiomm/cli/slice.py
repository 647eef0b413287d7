"""`audiomm slice`: a smaller Gemma 3n out of a larger one's checkpoint."""

from __future__ import annotations

import argparse

from ..models.gemma3n.slicing import slice_checkpoint


def run(arguments: argparse.Namespace) -> int:
    """Write the slice and say what it is."""
    options = {} if arguments.revision is None else {"revision": arguments.revision}
    config = slice_checkpoint(
        arguments.source,
        arguments.output,
        arguments.size,
        intermediate_size=arguments.intermediate_size,
        skipped_layers=arguments.skip_layers,
        **options,
    ).get_text_config()
    sizes = sorted(set(config.intermediate_size))
    widths = " and ".join(f"{size:,}" for size in sizes)
    print(f"{arguments.output}: {config.num_hidden_layers} layers of {widths} neurons")
    return 0


def layer_list(text: str) -> list[int]:
    """Layer numbers and ranges of them: "20-24,30"."""
    layers: list[int] = []
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        layers += range(int(first), int(last or first) + 1)
    return layers


def neuron_counts(text: str) -> int | list[int]:
    """One number, or numbers with commas, "8192x4" standing for four of them."""
    counts: list[int] = []
    for part in text.split(","):
        size, _, times = part.partition("x")
        counts += [int(size)] * int(times or 1)
    return counts[0] if len(counts) == 1 else counts
