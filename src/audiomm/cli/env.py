"""`audiomm env`: versions and devices, to be pasted into a report of a problem."""

from __future__ import annotations

import argparse
import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from .. import __version__

PACKAGES = (
    "torch",
    "safetensors",
    "tokenizers",
    "huggingface_hub",
    "numpy",
    "soundfile",
    "soxr",
    "accelerate",
    "jinja2",
    "tqdm",
)


def run(arguments: argparse.Namespace) -> int:
    """Print the facts, one a line."""
    for name, value in facts():
        print(f"{name:16} {value}")
    return 0


def facts() -> list[tuple[str, str]]:
    """Names and values: the platform, the packages, the CPU and the accelerators."""
    found = [("audiomm", __version__), ("python", platform.python_version()), ("platform", platform.platform())]
    found += [(package, _version(package)) for package in PACKAGES]
    capability = torch.backends.cpu.get_cpu_capability()
    found.append(("cpu", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {capability}"))
    found.append(("cuda", torch.version.cuda or "not in this build of torch"))
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        found.append((f"cuda:{index}", f"{properties.name}, {memory:.1f} GiB, {properties.major}.{properties.minor}"))
    found.append(("mps", "available" if torch.backends.mps.is_available() else "not available"))
    return found


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
