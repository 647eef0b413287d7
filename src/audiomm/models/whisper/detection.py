"""Which language is spoken, from one window or several: the first that is sure settles it, else most of them do.

Source: faster-whisper's `detect_language`.
"""

from __future__ import annotations

from collections import Counter


class LanguageVote:
    """Collects what windows of one recording sound like.

    Args:
        threshold: Probability from which on a window settles the language alone.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self._heard: list[dict[str, float]] = []

    def add(self, probabilities: dict[str, float]) -> None:
        """Take the next window's {code: probability}."""
        self._heard.append(probabilities)

    @property
    def is_settled(self) -> bool:
        """The last window was sure."""
        return max(self._heard[-1].values()) > self.threshold

    @property
    def language(self) -> str:
        """The code of the language."""
        winners = [max(probabilities, key=probabilities.__getitem__) for probabilities in self._heard]
        if self.is_settled:
            return winners[-1]
        return Counter(winners).most_common(1)[0][0]

    @property
    def probabilities(self) -> dict[str, float]:
        """{code: probability} of the window that is the surest of the language."""
        return max(self._heard, key=lambda probabilities: probabilities[self.language])
