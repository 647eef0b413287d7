"""The package's source files, parsed once."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "audiomm"


@pytest.fixture(scope="session")
def source_root() -> Path:
    return SOURCE


@pytest.fixture(scope="session")
def source_trees() -> dict[str, ast.Module]:
    """{path below src/audiomm: parsed module}."""
    files = sorted(SOURCE.rglob("*.py"))
    assert len(files) > 40, f"only {len(files)} files were found below {SOURCE}"
    return {path.relative_to(SOURCE).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in files}
