"""How wrong a transcript is: word and character error rates, and how sure one can be of them.

The rates are jiwer's (extra `eval`); texts are compared after a normalizer, such as Whisper's, that the caller brings.

Source: bootstrap intervals over utterances, Bisani and Ney, "Bootstrap estimates for confidence intervals in ASR
performance evaluation", ICASSP 2004.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..base.errors import InputError, MissingExtra
from .evaluation import EvalPrediction
from .loss import IGNORE

logger = logging.getLogger("audiomm.training")

Normalizer = Callable[[str], str]


@dataclass(frozen=True)
class Utterance:
    """Errors of one transcript.

    Attributes:
        place: Which of the texts it is.
        reference, hypothesis: What was said and what was written, both normalized.
        errors: Substitutions, deletions and insertions.
        units: Words (or characters) of the reference.
    """

    place: int
    reference: str
    hypothesis: str
    errors: int
    units: int

    @property
    def rate(self) -> float:
        """Errors a unit; without any unit, the number of errors."""
        return self.errors / max(self.units, 1)


@dataclass(frozen=True)
class ErrorRate:
    """An error rate over many utterances.

    Attributes:
        rate: Errors a word (or character) of the references; above 1 when much was made up.
        substitutions, deletions, insertions, units: The counts behind it.
        utterances: Those that were compared.
        skipped: Utterances whose reference is empty once normalized; they do not count, and nothing of them is here.
    """

    rate: float
    substitutions: int
    deletions: int
    insertions: int
    units: int
    utterances: list[Utterance]
    skipped: int

    def interval(self, confidence: float = 0.95, rounds: int = 1000, seed: int = 0) -> tuple[float, float]:
        """Between which rates the true one lies, by drawing as many utterances anew `rounds` times."""
        counts = np.array([(one.errors, one.units) for one in self.utterances])
        draws = np.random.default_rng(seed).integers(0, len(counts), (rounds, len(counts)))
        errors, units = counts[:, 0][draws].sum(1), counts[:, 1][draws].sum(1)
        low, high = np.quantile(errors / units, [(1 - confidence) / 2, (1 + confidence) / 2])
        return float(low), float(high)

    def worst(self, count: int = 10) -> list[Utterance]:
        """The utterances with the most errors, those of the highest rate first among equals."""
        wrong = [one for one in self.utterances if one.errors]
        return sorted(wrong, key=lambda one: (-one.errors, -one.rate, one.place))[:count]


def error_rate(
    references: Sequence[str],
    hypotheses: Sequence[str],
    normalizer: Normalizer | None = None,
    unit: str = "word",
) -> ErrorRate:
    """Compare transcripts with what was said.

    Args:
        references: What was said.
        hypotheses: What was written, in the same order.
        normalizer: Applied to both; None compares the texts as they are.
        unit: "word" or "character".

    Raises:
        InputError: The lists differ in length, or no reference holds anything.
        MissingExtra: jiwer is not installed.
    """
    jiwer = _jiwer()
    if len(references) != len(hypotheses):
        raise InputError(f"{len(references)} references and {len(hypotheses)} hypotheses: one for each is needed.")
    if unit not in ("word", "character"):
        raise InputError(f"unit={unit!r}: accepted are 'word' and 'character'.")
    process = jiwer.process_words if unit == "word" else jiwer.process_characters
    change = normalizer or str
    utterances, skipped, totals = [], 0, np.zeros(4, int)
    for place, (said, written) in enumerate(zip(references, hypotheses, strict=True)):
        said, written = " ".join(change(said).split()), " ".join(change(written).split())
        if not said:
            skipped += 1
            continue
        found = process(said, written)
        units = found.hits + found.substitutions + found.deletions
        totals += (found.substitutions, found.deletions, found.insertions, units)
        utterances.append(Utterance(place, said, written, _errors_of(found), units))
    if not utterances:
        raise InputError(f"none of the {len(references)} references holds a {unit} once normalized.")
    if skipped:
        logger.warning("%d of %d references are empty once normalized and do not count.", skipped, len(references))
    substitutions, deletions, insertions, units = (int(value) for value in totals)
    rate = (substitutions + deletions + insertions) / units
    return ErrorRate(rate, substitutions, deletions, insertions, units, utterances, skipped)


def _errors_of(found: Any) -> int:
    """All errors of one comparison of jiwer."""
    return int(found.substitutions + found.deletions + found.insertions)


def wer(references: Sequence[str], hypotheses: Sequence[str], normalizer: Normalizer | None = None) -> float:
    """Word error rate; see `error_rate`."""
    return error_rate(references, hypotheses, normalizer).rate


def cer(references: Sequence[str], hypotheses: Sequence[str], normalizer: Normalizer | None = None) -> float:
    """Character error rate; see `error_rate`."""
    return error_rate(references, hypotheses, normalizer, "character").rate


class SpeechMetrics:
    """compute_metrics of a Trainer with predict_with_generate: "wer" and "cer" of the texts.

    Args:
        tokenizer: Decodes predictions and labels; a processor is fine, too.
        normalizer: As in `error_rate`.
    """

    def __init__(self, tokenizer: Any, normalizer: Normalizer | None = None) -> None:
        self.tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        self.normalizer = normalizer
        _jiwer()

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        pad = self.tokenizer.pad_token_id
        said, written = (
            self.tokenizer.batch_decode(np.where(ids == IGNORE, pad, ids), skip_special_tokens=True)
            for ids in (prediction.label_ids, prediction.predictions)
        )
        return {"wer": wer(said, written, self.normalizer), "cer": cer(said, written, self.normalizer)}


def _jiwer() -> Any:
    try:
        import jiwer
    except ImportError as error:
        raise MissingExtra("counting errors of transcripts", "jiwer", "eval") from error
    return jiwer
