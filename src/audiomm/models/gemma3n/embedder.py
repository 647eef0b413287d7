"""From the towers' spaces into that of the text: the embedder of pictures, and that of sounds."""

from __future__ import annotations

from torch import Tensor, nn

from ...base.errors import ShapeError
from ...layers.embedding import empty_embedding
from ...layers.norm import RMSNorm


class Gemma3nMultimodalEmbedder(nn.Module):
    """Projects a tower's features (soft), and a few token ids of its kind that have rows of their own (hard).

    Args:
        offset: The first token id that has a row.
        rows: How many token ids do.
        tower_width: Width of the tower's features.
        text_width: Width of the text decoder.
        scale: What features are multiplied by before they are normed, which cancels but for the norm's epsilon: it is
            divided by the square instead, and float16 cannot overflow.
    """

    def __init__(
        self, offset: int, rows: int, tower_width: int, text_width: int, eps: float, scale: float = 1.0
    ) -> None:
        super().__init__()
        self.vocab_offset, self.vocab_size = offset, rows
        self.embedding = empty_embedding(rows, tower_width)
        self.hard_embedding_norm = RMSNorm(tower_width, eps)
        self.soft_embedding_norm = RMSNorm(tower_width, eps / scale**2)
        self.embedding_projection = nn.Linear(tower_width, text_width, bias=False)
        self.embedding_post_projection_norm = RMSNorm(text_width, eps, scaled=False)

    def forward(self, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None) -> Tensor:
        """Token ids (...) or features (..., tower_width) -> (..., text_width).

        Raises:
            ShapeError: Both or none were passed.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ShapeError("the embedder takes either input_ids or inputs_embeds: pass exactly one of the two.")
        if inputs_embeds is not None:
            return self._project(self.soft_embedding_norm(inputs_embeds.to(self.embedding.weight.dtype)))
        assert input_ids is not None, "one of the two was passed"
        return self._project(self.hard_embedding_norm(self.embedding(input_ids - self.vocab_offset)))

    def rows(self) -> Tensor:
        """(vocab_size, text_width) what `forward` gives for all ids that have a row."""
        return self._project(self.hard_embedding_norm(self.embedding.weight))

    def _project(self, normed: Tensor) -> Tensor:
        projected: Tensor = self.embedding_post_projection_norm(self.embedding_projection(normed))
        return projected
