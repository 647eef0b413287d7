"""Imports go downward only: the table of docs/house.md, read from the source with ast.

Imports inside functions and under TYPE_CHECKING count too: no late import may hide a circle.
"""

from __future__ import annotations

import ast

import pytest

# place -> what it may import besides itself; "base.errors" is that one module, "base" is everything in it.
FLOORS: dict[str, tuple[str, ...]] = {
    "base": (),
    "layers": ("base.errors",),
    "media": ("base.errors",),
    "feature_extraction": ("media", "base"),
    "generation": ("layers.cache", "layers.projection", "layers.regions", "base"),
    "training": ("base", "layers.language_head", "feature_extraction.base", "generation.config"),
    "models": ("layers", "generation", "feature_extraction", "base"),
    "auto": ("models", "base"),
    "convert": ("models", "base"),
    "presets": ("auto", "models", "feature_extraction", "base"),
    "pipelines": ("auto", "generation.streamers", "media", "base"),
    "serve": ("pipelines", "base"),
    "batch": ("pipelines", "base"),
    "__init__": ("pipelines", "presets", "training", "base"),
    "cli": (
        "serve",
        "batch",
        "pipelines",
        "auto",
        "convert",
        "models",
        "training",
        "generation",
        "feature_extraction",
        "layers",
        "media",
        "base",
        "__init__",
    ),
    "__main__": ("cli",),
}

# (importer, imported) -> why it stands although the table forbids it.
EXCEPTIONS: dict[tuple[str, str], str] = {}

WAY_OUT = "move what both need down to a floor that both may import, or pass it in as an argument"


def module_name(path: str) -> str:
    """models/whisper/config.py -> models.whisper.config; a package's __init__.py is the package."""
    return path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")


def imports_of(path: str, tree: ast.Module) -> set[str]:
    """Modules of this package that a file imports, without the package's own name."""
    package = ["audiomm", *path.removesuffix(".py").split("/")[:-1]]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names if alias.name.split(".")[0] == "audiomm")
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            if module.split(".")[0] == "audiomm":
                # "from . import mel" names modules; "from .mel import log_mel" names what is in one.
                names = [f"{module}.{alias.name}" for alias in node.names]
                found.update(names if node.module is None else [module])
    return {name.removeprefix("audiomm").removeprefix(".") or "__init__" for name in found}


def place_of(module: str) -> str:
    head = module.split(".")[0]
    return head if head in FLOORS else "__init__"


def complaint(importer: str, imported: str) -> str | None:
    """What is wrong with one import, or None."""
    start, end = place_of(importer), place_of(imported)
    if start == end == "models":
        family, other = importer.split(".")[1:2], imported.split(".")[1:2]
        if family and other and family != other:
            wrong = f"audiomm.{importer} imports audiomm.{imported}"
            return f"{wrong}: families share through layers/, not through each other"
        return None
    if start == end:
        return None
    allowed = FLOORS[start]
    if any(imported == name or imported.startswith(name + ".") or end == name for name in allowed if "." not in name):
        return None
    if any(imported == name or imported.startswith(name + ".") for name in allowed if "." in name):
        return None
    return (
        f"audiomm.{importer} imports audiomm.{imported}: {start} may import {', '.join(allowed) or 'nothing else'}; "
        f"{WAY_OUT}"
    )


def test_every_file_imports_downward_only(source_trees: dict[str, ast.Module]) -> None:
    wrong = []
    for path, tree in source_trees.items():
        importer = module_name(path)
        for imported in sorted(imports_of(path, tree)):
            said = complaint(importer, imported)
            if said and (importer, imported) not in EXCEPTIONS:
                wrong.append(said)
    assert not wrong, "\n".join(wrong)


def test_every_place_has_a_row(source_trees: dict[str, ast.Module]) -> None:
    places = {module_name(path).split(".")[0] for path in source_trees}
    assert places <= set(FLOORS), f"no row in FLOORS for {sorted(places - set(FLOORS))}"


def test_no_exception_is_stale(source_trees: dict[str, ast.Module]) -> None:
    made = {(module_name(path), name) for path, tree in source_trees.items() for name in imports_of(path, tree)}
    stale = [pair for pair in EXCEPTIONS if pair not in made]
    assert not stale, f"these exceptions are not needed any more: {stale}"


def test_the_table_itself_has_no_circle() -> None:
    done: list[str] = []
    while len(done) < len(FLOORS):
        ready = [
            place
            for place, below in FLOORS.items()
            if place not in done and all(name.split(".")[0] in done for name in below)
        ]
        assert ready, f"these places import each other: {sorted(set(FLOORS) - set(done))}"
        done.extend(ready)


@pytest.mark.parametrize(
    ("path", "code", "words"),
    [
        ("models/one/text.py", "from ..two.text import X", "families share through layers/"),
        ("base/hub.py", "def f():\n    from ..auto import FAMILIES", "audiomm.base.hub imports audiomm.auto"),
        ("layers/cache.py", "from ..base.hub import Source", "layers may import base.errors"),
        ("media/audio.py", "import audiomm.pipelines", "audiomm.media.audio imports audiomm.pipelines"),
        (
            "generation/beam.py",
            "from ..layers.masks import Mask",
            "generation may import layers.cache, layers.projection, layers.regions, base",
        ),
        (
            "pipelines/base.py",
            "from .. import generation",
            "pipelines may import auto, generation.streamers, media, base",
        ),
        ("training/trainer.py", "if TYPE_CHECKING:\n    from ..models.whisper import X", WAY_OUT),
    ],
)
def test_an_import_upward_is_named_with_both_ends_and_the_way_out(path: str, code: str, words: str) -> None:
    importer = module_name(path)
    said = [complaint(importer, imported) for imported in imports_of(path, ast.parse(code))]
    assert any(words in (text or "") for text in said), said


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("models/one/text.py", "from .config import X\nfrom ...layers.masks import Y"),
        ("layers/cache.py", "from ..base.errors import E\nfrom .masks import M"),
        ("cli/main.py", "from .. import __version__\nfrom ..base.languages import L"),
        ("auto.py", "from .models.whisper import W"),
    ],
)
def test_an_import_downward_is_fine(path: str, code: str) -> None:
    found = imports_of(path, ast.parse(code))
    assert found
    assert [complaint(module_name(path), name) for name in found] == [None] * len(found)
