"""The public names: each can be looked up, says what it is for and has type hints."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import audiomm

NAMES = sorted(name for names in audiomm._PUBLIC.values() for name in names)


def unhinted(function: Callable[..., Any], name: str) -> list[str]:
    """Parameters, and "return", that have no annotation."""
    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())
    if parameters and parameters[0].name in ("self", "cls"):
        parameters = parameters[1:]
    bare = [parameter.name for parameter in parameters if parameter.annotation is inspect.Parameter.empty]
    if signature.return_annotation is inspect.Signature.empty and not name.endswith("__init__"):
        bare.append("return")
    return [f"{name}({argument})" for argument in bare]


def own_functions(kind: type) -> Iterator[tuple[str, Callable[..., Any]]]:
    """The public functions that a class, or a parent of it in this package, defines."""
    for parent in kind.__mro__:
        if not parent.__module__.startswith("audiomm"):
            continue
        for name, member in vars(parent).items():
            if name.startswith("_") and name not in ("__init__", "__call__"):
                continue
            member = member.__func__ if isinstance(member, (staticmethod, classmethod)) else member
            member = member.fget if isinstance(member, property) else member
            # dataclasses write their own __init__
            if inspect.isfunction(member) and member.__qualname__.startswith(f"{parent.__name__}."):
                yield f"{parent.__module__}.{parent.__name__}.{name}", inspect.unwrap(member)


def test_no_name_is_given_by_two_modules() -> None:
    assert len(NAMES) == len(set(NAMES))
    assert audiomm.__all__ == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_the_name_resolves_and_says_what_it_is_for(name: str) -> None:
    value = getattr(audiomm, name)
    own = vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__
    assert own, f"audiomm.{name} has no docstring of its own"
    # The docstring that dataclass writes is the signature.
    assert not own.startswith(f"{name}("), f"audiomm.{name} has no docstring of its own"
    assert value.__module__.startswith("audiomm."), f"audiomm.{name} belongs to {value.__module__}"


@pytest.mark.parametrize("name", NAMES)
def test_all_public_functions_of_the_name_have_type_hints(name: str) -> None:
    value = getattr(audiomm, name)
    functions = own_functions(value) if inspect.isclass(value) else [(name, inspect.unwrap(value))]
    bare = [text for where, function in functions for text in unhinted(function, where)]
    assert not bare, f"no type hint: {bare}"


def test_every_module_name_in_the_table_is_the_home_of_its_names() -> None:
    import importlib

    for module, names in audiomm._PUBLIC.items():
        home = importlib.import_module(f"audiomm.{module}")
        missing = [name for name in names if not hasattr(home, name)]
        assert not missing, f"audiomm.{module} lacks {missing}"


def test_a_name_is_looked_up_once_and_dir_lists_all() -> None:
    first = audiomm.WhisperConfig
    assert vars(audiomm)["WhisperConfig"] is first
    assert set(NAMES) <= set(dir(audiomm))
    assert "__version__" in dir(audiomm)


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'audiomm' has no attribute 'WhisperModle'"):
        _ = audiomm.WhisperModle


def test_the_checks_above_can_fail() -> None:
    def bare(self, first, second: int = 0): ...

    assert unhinted(bare, "x.bare") == ["x.bare(first)", "x.bare(return)"]
