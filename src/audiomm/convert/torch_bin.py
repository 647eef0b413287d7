"""What torch.save wrote, read with weights_only: tensors and plain containers, and nothing that names other code.

The one place of the package that opens pickles, for `audiomm convert` and for nothing else. torch's restricted reader
had faults of its own (CVE-2025-32434 before 2.6, which is not supported here; CVE-2026-24747 before 2.10): files of
unknown origin belong into a place where they can do no harm.
"""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..base.errors import CorruptCheckpointError, UnsafeCheckpointError

_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")


def load_torch(path: Path) -> Any:
    """The content of a file of torch.save; tensors stay in the file until they are used where its form allows that.

    Raises:
        UnsafeCheckpointError: It names functions or classes beside tensors and containers; none of it was run.
        CorruptCheckpointError: It is cut short, or no such file.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path) or None)
    except Exception as error:  # the reader raises whatever its parts raise: pickle's, zip's and Python's own errors
        text = str(error)
        named = _GLOBAL.search(text)
        if named or "weights_only" in text.lower() or "weights only" in text.lower():
            what = f"calls {named.group(1)}" if named else "holds more than tensors and containers"
            raise UnsafeCheckpointError(
                f"{path} {what}, which reading it would run; it was not read. Save its weights as safetensors, or as a "
                "plain dictionary of tensors, in a place you trust."
            ) from error
        raise CorruptCheckpointError(
            f"{path} ({path.stat().st_size:,} bytes) is not a whole file of torch.save: {text[:160]}. The download may "
            "be cut short; fetch it again."
        ) from error


def read_torch(path: Path) -> dict[str, Tensor]:
    """The tensors of a pytorch_model.bin.

    Raises:
        UnsafeCheckpointError: Reading it would run code.
        CorruptCheckpointError: It is cut short, or holds something else than named tensors.
    """
    content = load_torch(path)
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CorruptCheckpointError(f"{path} holds a {type(content).__name__}, not tensors by name.")
    return dict(content)
