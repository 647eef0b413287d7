"""From a config to what it asks for: the lists of processors, warpers and stopping criteria.

Their order is that of transformers 5, since it decides the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor

from .config import GenerationConfig
from .lengths import (
    ExponentialDecayLengthPenalty,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
)
from .logits import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    LogitsProcessorList,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensLogitsProcessor,
)
from .stopping import EosTokenCriteria, MaxTimeCriteria, StoppingCriteriaList, StopStringCriteria
from .warpers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)


def build_processors(
    config: GenerationConfig,
    *,
    prompt_length: int,
    max_length: int,
    prompt_mask: Tensor | None = None,
    encoder_input_ids: Tensor | None = None,
    prefix_allowed_tokens_fn: Callable[[int, Tensor], Sequence[int]] | None = None,
    model_processors: Iterable[Any] = (),
    user_processors: Iterable[Any] = (),
) -> LogitsProcessorList:
    """Everything that is applied before the warpers.

    Args:
        config: Options with defaults filled in.
        prompt_length: In tokens.
        max_length: Length limit in tokens, prompt included.
        prompt_mask: (batch, length), 0 at left padding, which is not taken for text that must not be repeated.
        encoder_input_ids: (batch, length) token ids the encoder reads, for the two rules about them.
        prefix_allowed_tokens_fn: Names the tokens allowed after a prefix.
        model_processors: Rules of the model, after those of the config.
        user_processors: Rules of the caller, last; one of a class takes the place of the config's rule of that class.
    """
    own = list(user_processors)
    rules = _repetition_rules(config, prompt_mask, encoder_input_ids)
    if config.bad_words_ids is not None:
        rules.append(NoBadWordsLogitsProcessor(config.bad_words_ids, config.eos_ids or None))
    rules.extend(_length_rules(config, prompt_length))
    if prefix_allowed_tokens_fn is not None:
        rules.append(PrefixConstrainedLogitsProcessor(prefix_allowed_tokens_fn, copies(config)))
    rules.extend(_forced_and_suppressed(config, prompt_length, max_length))
    return LogitsProcessorList([*_not_replaced(rules, own), *model_processors, *own])


def _not_replaced(rules: Iterable[Any], own: Iterable[Any]) -> list[Any]:
    """Those of the config's rules of whose class the caller brings none."""
    replaced = {type(rule) for rule in own}
    return [rule for rule in rules if type(rule) not in replaced]


def _repetition_rules(
    config: GenerationConfig, prompt_mask: Tensor | None, encoder_ids: Tensor | None
) -> LogitsProcessorList:
    rules = LogitsProcessorList()
    if config.sequence_bias is not None:
        rules.append(SequenceBiasLogitsProcessor(config.sequence_bias))
    if config.encoder_repetition_penalty != 1.0 and encoder_ids is not None:
        rules.append(EncoderRepetitionPenaltyLogitsProcessor(config.encoder_repetition_penalty or 1.0, encoder_ids))
    if config.repetition_penalty != 1.0:
        padding = None if prompt_mask is None else (prompt_mask != 0).int().argmax(dim=1)
        rules.append(RepetitionPenaltyLogitsProcessor(config.repetition_penalty or 1.0, padding))
    if config.no_repeat_ngram_size:
        rules.append(NoRepeatNGramLogitsProcessor(config.no_repeat_ngram_size))
    if config.encoder_no_repeat_ngram_size and encoder_ids is not None:
        rules.append(EncoderNoRepeatNGramLogitsProcessor(config.encoder_no_repeat_ngram_size, encoder_ids))
    return rules


def _length_rules(config: GenerationConfig, prompt_length: int) -> LogitsProcessorList:
    rules = LogitsProcessorList()
    ends = config.eos_ids
    # Like max_new_tokens and max_length: the one that counts new tokens wins.
    if config.min_new_tokens is None and config.min_length and ends:
        rules.append(MinLengthLogitsProcessor(config.min_length, ends))
    if config.min_new_tokens and ends:
        rules.append(MinNewTokensLengthLogitsProcessor(prompt_length, config.min_new_tokens, ends))
    return rules


def _forced_and_suppressed(config: GenerationConfig, prompt_length: int, max_length: int) -> LogitsProcessorList:
    rules = LogitsProcessorList()
    if config.forced_bos_token_id is not None:
        rules.append(ForcedBOSTokenLogitsProcessor(config.forced_bos_token_id))
    if config.forced_eos_token_id is not None:
        rules.append(ForcedEOSTokenLogitsProcessor(max_length, config.forced_eos_token_id))
    if config.remove_invalid_values:
        rules.append(InfNanRemoveLogitsProcessor())
    if config.exponential_decay_length_penalty is not None and config.eos_ids:
        decay = config.exponential_decay_length_penalty
        rules.append(ExponentialDecayLengthPenalty((decay[0], decay[1]), config.eos_ids, prompt_length))
    if config.suppress_tokens is not None and len(config.suppress_tokens):
        rules.append(SuppressTokensLogitsProcessor(config.suppress_tokens))
    if config.begin_suppress_tokens is not None and len(config.begin_suppress_tokens):
        # A forced first token comes before what the rule means by the beginning.
        forced = prompt_length == 1 and config.forced_bos_token_id is not None
        begin = prompt_length + int(forced)
        rules.append(SuppressTokensAtBeginLogitsProcessor(config.begin_suppress_tokens, begin))
    return rules


#: Field, the warper it asks for, and which values of it change anything; in the order they are applied.
_FILTERS: tuple[tuple[str, Callable[..., Any], Callable[[Any], bool]], ...] = (
    ("top_k", TopKLogitsWarper, lambda value: value > 0),
    ("top_p", TopPLogitsWarper, lambda value: value < 1),
    ("min_p", MinPLogitsWarper, lambda value: True),
    ("typical_p", TypicalLogitsWarper, lambda value: value < 1),
    ("epsilon_cutoff", EpsilonLogitsWarper, lambda value: 0 < value < 1),
    ("eta_cutoff", EtaLogitsWarper, lambda value: 0 < value < 1),
)


def build_warpers(config: GenerationConfig) -> LogitsProcessorList:
    """What shapes the distribution when sampling, and the last renormalisation if asked for.

    Args:
        config: Options with defaults filled in.
    """
    rules = LogitsProcessorList()
    if config.do_sample:
        # A beam needs something to go on with besides the end tokens.
        keep = 1 if config.num_beams == 1 else max(2, len(config.eos_ids) + 1)
        if config.temperature is not None and config.temperature != 1.0:
            rules.append(TemperatureLogitsWarper(config.temperature))
        for name, warper, changes in _FILTERS:
            value = getattr(config, name)
            if value is not None and changes(value):
                rules.append(warper(value, min_tokens_to_keep=keep))
    if config.renormalize_logits:
        rules.append(LogitNormalization())
    return rules


def build_stopping(config: GenerationConfig, tokenizer: Any = None, extra: Iterable[Any] = ()) -> StoppingCriteriaList:
    """What ends a row besides the length limit.

    Args:
        config: Options with defaults filled in.
        tokenizer: Needed for stop_strings.
        extra: Criteria of the caller; one of a class takes the place of the config's criterion of that class.

    Raises:
        GenerationError: stop_strings without a tokenizer.
    """
    own = list(extra)
    criteria = StoppingCriteriaList()
    if config.max_time is not None:
        criteria.append(MaxTimeCriteria(config.max_time))
    if config.stop_strings is not None:
        criteria.append(StopStringCriteria(tokenizer, config.stop_strings))
    if config.eos_ids:
        criteria.append(EosTokenCriteria(config.eos_ids))
    return StoppingCriteriaList([*_not_replaced(criteria, own), *own])


def copies(config: GenerationConfig) -> int:
    """Rows a prompt becomes: its beams, or the sequences sampled from it."""
    beams = config.num_beams or 1
    return beams if beams > 1 else (config.num_return_sequences or 1)
