"""The fields of a GenerationConfig: their defaults, and what each one accepts.

One table, read by `GenerationConfig`: a rule is a function that answers None for a good value, and otherwise says
in words what would have been one. Names and defaults are those of transformers 5.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

Rule = Callable[[Any], "str | None"]


def _is_integer(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and not math.isnan(float(value))


def _integer(low: int) -> Rule:
    wanted = f"an integer of at least {low}"
    return lambda value: None if _is_integer(value) and value >= low else wanted


def _number(low: float = -math.inf, high: float = math.inf, *, above: bool = False) -> Rule:
    """A real number from `low` (not itself, with `above`) to `high`."""
    if high < math.inf:
        wanted = f"a number above {low:g} and at most {high:g}" if above else f"a number from {low:g} to {high:g}"
    elif low > -math.inf:
        wanted = f"a finite number above {low:g}" if above else f"a finite number of at least {low:g}"
    else:
        wanted = "a finite number"

    def check(value: Any) -> str | None:
        good = _is_number(value) and math.isfinite(value) and low <= value <= high and not (above and value == low)
        return None if good else wanted

    return check


def _flag(value: Any) -> str | None:
    return None if isinstance(value, bool) else "True or False"


def _is_same(value: Any, choice: Any) -> bool:
    return value is choice or (isinstance(choice, str) and value == choice)


def _one_of(*choices: Any) -> Rule:
    wanted = "one of " + ", ".join(repr(choice) for choice in choices)
    return lambda value: None if any(_is_same(value, choice) for choice in choices) else wanted


def _anything(value: Any) -> str | None:
    return None


def _is_ids(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(_is_integer(i) and i >= 0 for i in value)


def _token(value: Any) -> str | None:
    return None if _is_integer(value) and value >= 0 else "a token id of at least 0"


def _tokens(value: Any) -> str | None:
    """One id or several."""
    if isinstance(value, Tensor):
        value = value.flatten().tolist()
    if _is_integer(value):
        value = [value]
    good = isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0
    if good and all(_is_integer(token) and token >= 0 for token in value):
        return None
    return "a token id of at least 0, or a list of them"


def _id_list(value: Any) -> str | None:
    if isinstance(value, Tensor):
        value = value.flatten().tolist()
    return None if _is_ids(value) else "a list of token ids of at least 0"


def _words(value: Any) -> str | None:
    wanted = "a list of words, each a list of one or more token ids of at least 0"
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) == 0:
        return wanted
    return None if all(_is_ids(word) and len(word) > 0 for word in value) else wanted


def _ends(value: Any) -> str | None:
    wrong = None if _is_integer(value) and value == -1 else _tokens(value)
    return wrong and f"{wrong}, or -1 for texts that no token ends"


def _biases(value: Any) -> str | None:
    wanted = "a list of [[token ids], bias] pairs, or a dict from tuples of token ids to a bias"
    pairs = list(value.items()) if isinstance(value, dict) else value
    if not isinstance(pairs, Sequence) or isinstance(pairs, str) or len(pairs) == 0:
        return wanted
    for pair in pairs:
        if not isinstance(pair, Sequence) or len(pair) != 2 or not _is_ids(pair[0]) or len(pair[0]) == 0:
            return wanted
        if not _is_number(pair[1]):
            return wanted
    return None


def _decay(value: Any) -> str | None:
    good = isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2
    if good and _is_integer(value[0]) and value[0] >= 0 and _number(0.0, above=True)(value[1]) is None:
        return None
    return "a pair (start, factor): an integer of at least 0 and a number above 0"


def _strings(value: Any) -> str | None:
    texts = [value] if isinstance(value, str) else value
    good = isinstance(texts, Sequence) and len(texts) > 0 and all(isinstance(text, str) and text for text in texts)
    return None if good else "a string of one or more characters, or a list of them"


CACHES = ("dynamic", "dynamic_full", "static", "sliding_window", "hybrid", "hybrid_chunked")

#: Field -> rule. A value of None is always accepted: it means "not set".
FIELDS: dict[str, Rule] = {
    # how long
    "max_length": _integer(1),
    "max_new_tokens": _integer(1),
    "min_length": _integer(0),
    "min_new_tokens": _integer(0),
    "early_stopping": _one_of(True, False, "never"),
    "max_time": _number(0.0, above=True),
    "stop_strings": _strings,
    # which loop
    "do_sample": _flag,
    "num_beams": _integer(1),
    "use_cache": _flag,
    "cache_implementation": _one_of(*CACHES),
    "cache_config": _anything,
    "max_cache_len": _integer(1),
    "cross_cache_dtype": _one_of("int8", "fp8"),
    # how tokens are chosen
    "temperature": _number(0.0),
    "top_k": _integer(0),
    "top_p": _number(0.0, 1.0),
    "min_p": _number(0.0, 1.0),
    "typical_p": _number(0.0, 1.0, above=True),
    "epsilon_cutoff": _number(0.0, 1.0),
    "eta_cutoff": _number(0.0, 1.0),
    "repetition_penalty": _number(0.0, above=True),
    "encoder_repetition_penalty": _number(0.0, above=True),
    "length_penalty": _number(),
    "google_length_penalty": _number(0.0, 1.0),
    "patience": _number(0.0, above=True),
    "no_repeat_ngram_size": _integer(0),
    "encoder_no_repeat_ngram_size": _integer(0),
    "bad_words_ids": _words,
    "renormalize_logits": _flag,
    "forced_bos_token_id": _token,
    "forced_eos_token_id": _tokens,
    "remove_invalid_values": _flag,
    "exponential_decay_length_penalty": _decay,
    "suppress_tokens": _id_list,
    "begin_suppress_tokens": _id_list,
    "sequence_bias": _biases,
    # what comes back
    "num_return_sequences": _integer(1),
    "output_attentions": _flag,
    "output_hidden_states": _flag,
    "output_scores": _flag,
    "output_logits": _flag,
    "output_logprobs": _flag,
    "return_dict_in_generate": _flag,
    # special tokens
    "pad_token_id": _token,
    "bos_token_id": _token,
    "eos_token_id": _ends,
    "decoder_start_token_id": _tokens,
    # drafting
    "is_assistant": _flag,
    "num_assistant_tokens": _integer(1),
    "num_assistant_tokens_schedule": _one_of("constant", "heuristic", "heuristic_transient"),
    "assistant_confidence_threshold": _number(0.0, 1.0),
    "prompt_lookup_num_tokens": _integer(1),
    "max_matching_ngram_size": _integer(1),
    "assistant_lookbehind": _integer(1),
    "target_lookbehind": _integer(1),
    # how it is run
    "compile_config": _anything,
    "disable_compile": _flag,
    "low_memory": _anything,
    "prefill_chunk_size": _integer(1),
    "continuous_batching_config": _anything,
    # known to transformers, with no counterpart here: see REFUSED
    "top_h": _anything,
    "token_healing": _anything,
    "guidance_scale": _anything,
    "watermarking_config": _anything,
    "use_mtp": _anything,
    "assistant_early_exit": _anything,
    "assistant_ensemble_weight": _anything,
    "speculation_type": _anything,
    "penalty_alpha": _anything,
    "dola_layers": _anything,
    "diversity_penalty": _anything,
    "num_beam_groups": _anything,
    "constraints": _anything,
    "force_words_ids": _anything,
}

#: What a field means while it is None.
DEFAULTS: dict[str, Any] = {
    "max_length": 20,
    "min_length": 0,
    "early_stopping": False,
    "do_sample": False,
    "num_beams": 1,
    "use_cache": True,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "renormalize_logits": False,
    "remove_invalid_values": False,
    "num_return_sequences": 1,
    "output_attentions": False,
    "output_hidden_states": False,
    "output_scores": False,
    "output_logits": False,
    "output_logprobs": False,
    "return_dict_in_generate": False,
    "num_assistant_tokens": 20,
    "num_assistant_tokens_schedule": "constant",
    "assistant_confidence_threshold": 0.4,
    "max_matching_ngram_size": 2,
}

#: Fields of transformers that change the answer and that generate() has no way to honour -> values that mean "off".
REFUSED: dict[str, tuple[Any, ...]] = {
    "top_h": (),
    "token_healing": (False,),
    "guidance_scale": (1, 1.0),
    "watermarking_config": (),
    "use_mtp": (False,),
    "assistant_early_exit": (),
    "assistant_ensemble_weight": (),
    "speculation_type": (),
    "penalty_alpha": (0, 0.0),
    "dola_layers": (),
    "diversity_penalty": (0, 0.0),
    "num_beam_groups": (1,),
    "constraints": ([],),
    "force_words_ids": ([],),
}
