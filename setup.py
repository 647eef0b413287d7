"""Metadata of the package; tool settings stand in pyproject.toml."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (ROOT / "src/audiomm/__init__.py").read_text(encoding="utf-8")).group(1)

EXTRAS = {
    "video": ["av>=14.2"],
    "vad": ["silero-vad>=5"],
    "vision": ["pillow>=10"],
    "microphone": ["sounddevice>=0.4.6"],
    "convert": ["msgpack>=1.0", "h5py>=3.8"],
    "eval": ["jiwer>=3.0"],
    "plot": ["matplotlib>=3.7"],
    "peft": ["peft>=0.17"],
    "torchao": ["torchao>=0.18"],
    "test": [
        "pytest>=8",
        "pytest-xdist>=3.5",
        "pillow>=10",
        "av>=14.2",
        "msgpack>=1.0",
        "h5py>=3.8",
        "jiwer>=3.0",
        "matplotlib>=3.7",
        "tensorboard>=2.15",
        "pyyaml>=6",
    ],
    "lint": ["ruff>=0.6", "mypy>=1.11"],
    # The reference implementations that parity tests and benchmarks compare with; never imported by the package.
    # (openai-whisper and timm are installed without their own needs, which are large and not used: see the Makefile.)
    "parity": ["transformers==5.23.0", "peft>=0.17", "tiktoken", "more-itertools", "numba"],
    "bench": [
        "transformers==5.23.0",
        "faster-whisper>=1.2",
        "tiktoken",
        "more-itertools",
        "numba",
        "matplotlib>=3.7",
    ],
}

setup(
    name="audiomm",
    version=VERSION,
    description="Models that listen, in PyTorch: load, transcribe, fine-tune.",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    package_dir={"": "src"},
    packages=find_packages("src"),
    package_data={"audiomm": ["py.typed", "data/*", "data/*/*"]},
    install_requires=[
        "torch>=2.6",
        "safetensors>=0.4.3",
        "tokenizers>=0.20",
        "huggingface_hub>=0.30",
        "numpy>=1.24",
        "soundfile>=0.12.1",
        "accelerate>=1.0",
        "soxr>=0.4",
        "jinja2>=3.1.6",
        "tqdm>=4.60",
        "typing_extensions>=4.10",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["audiomm = audiomm.cli.main:main"]},
)
