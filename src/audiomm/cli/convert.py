"""`audiomm convert`: a checkpoint of another program to a folder of this one's form."""

from __future__ import annotations

import argparse

from ..convert import convert


def run(arguments: argparse.Namespace) -> int:
    """Convert, and print the folder."""
    folder = convert(
        arguments.source,
        arguments.output,
        format=arguments.format,
        dtype=arguments.dtype,
        tokenizer=arguments.tokenizer,
    )
    print(folder)
    return 0
