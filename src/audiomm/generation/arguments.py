"""What a caller of generate() brings along, checked before anything runs: configs, rules, criteria, streamers, ids."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..base.errors import GenerationError


def check_guests(
    generation_config: Any = None,
    logits_processor: Any = None,
    stopping_criteria: Any = None,
    prefix_allowed_tokens_fn: Any = None,
    streamer: Any = None,
    assistant_model: Any = None,
) -> None:
    """Refuse objects of the wrong kind; the arguments are those of `generate`.

    Raises:
        GenerationError: Names the argument, what it is, and what is accepted.
    """
    if generation_config is not None and not hasattr(generation_config, "to_dict"):
        raise _not_a("generation_config", generation_config, "a GenerationConfig; or pass its fields as keywords")
    for name, members in (("logits_processor", logits_processor), ("stopping_criteria", stopping_criteria)):
        if members is None:
            continue
        if not hasattr(members, "__iter__"):
            raise _not_a(name, members, f"a list: {name}=[...]")
        strange = [member for member in members if not callable(member)] if isinstance(members, (list, tuple)) else []
        if strange:
            raise _not_a(f"an entry of {name}", strange[0], "a function of (tokens so far, scores)")
    if prefix_allowed_tokens_fn is not None and not callable(prefix_allowed_tokens_fn):
        raise _not_a("prefix_allowed_tokens_fn", prefix_allowed_tokens_fn, "a function of (batch index, tokens so far)")
    if streamer is not None and not (hasattr(streamer, "put") and hasattr(streamer, "end")):
        raise _not_a("streamer", streamer, "an object with put(tokens) and end(), like TextStreamer(tokenizer)")
    if assistant_model is not None and not hasattr(assistant_model, "config"):
        raise _not_a("assistant_model", assistant_model, "a model, as from_pretrained() gives it")


@contextmanager
def told_of_errors(streamer: Any) -> Iterator[None]:
    """After an error in the block the streamer is ended: who reads from it in another thread would wait for ever."""
    try:
        yield
    except BaseException:
        if hasattr(streamer, "end"):
            streamer.end()
        raise


def as_ids(name: str, value: Any, vocabulary: int | None = None, device: Any = None) -> Tensor:
    """Token ids from a tensor, an array or lists, as they are but for the device.

    Args:
        name: Of the argument.
        value: What was passed.
        vocabulary: Refuse ids that are not below it.
        device: Where they are to be; None leaves them where they are.

    Raises:
        GenerationError: These are no numbers, or ids that the model does not have.
    """
    try:
        ids = torch.as_tensor(value, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise _not_a(
            name, value, "a tensor of numbers; the answer of a tokenizer or processor is passed as generate(**answer)"
        ) from error
    if vocabulary is not None and ids.numel():
        if ids.is_floating_point() or ids.dtype == torch.bool:
            raise GenerationError(f"{name} is of dtype {ids.dtype}: token ids are whole numbers.")
        low, high = torch.stack(torch.aminmax(ids)).tolist()
        if low < 0 or high >= vocabulary:
            raise GenerationError(
                f"{name} holds {low if low < 0 else high}: ids of this model are 0 to {vocabulary - 1}. Were they made "
                "by the tokenizer of another model?"
            )
    return ids


def _not_a(name: str, value: Any, wanted: str) -> GenerationError:
    shown = f" ({value[:40]!r})" if isinstance(value, str) else ""
    return GenerationError(f"{name} is a {type(value).__name__}{shown}: pass {wanted}.")
