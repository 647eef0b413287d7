"""Rows that are done leave a run on the CPU, where a step costs less the fewer rows it has.

What comes out is what would have come out with them: rows do not depend on each other. On a GPU a step with fewer rows
takes as long as one with more, and must keep its shape to be captured.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ..layers.cache import Cache
from .decode import DecodeRequest, DecodeState
from .stopping import EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria


class Leaving:
    """The rows of one run.

    Args:
        request, state: The run; at least one token has been chosen.
    """

    def __init__(self, request: DecodeRequest, state: DecodeState) -> None:
        config, cache = request.config, state.cache
        #: Of all rows; those that have not left are written to it when others leave, and in the end.
        self._whole = state
        self._rows = list(range(len(state.tokens)))
        same_for_all = {EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria}
        # What is drawn, collected or handed out goes by the number of the row.
        goes_by_row = config.do_sample or config.output_scores or config.output_logits or request.hands_out_cache
        self._may_leave = (
            state.tokens.device.type == "cpu"
            and len(self._rows) > 1
            and isinstance(cache, Cache)
            and not cache.fixed
            and not (goes_by_row or request.flags or request.streamer is not None)
            and all(type(rule) in same_for_all for rule in request.stopping)
        )

    def without_done(self, state: DecodeState) -> DecodeState:
        """The state of the rows that go on: `state` itself where none is done, or none may leave now."""
        if not self._may_leave or state.choice is None:
            return state
        going = state.going.tolist()
        # Rules of the caller's own may count on the rows that there were.
        if all(going) or not any(going) or state.choice.key() is None:
            return state
        self.whole(state)
        stays = [place for place, goes_on in enumerate(going) if goes_on]
        count = len(stays)
        # Rows from the end take the places of those that are done: what is large then stays where it is.
        late = iter([place for place in stays if place >= count])
        kept = [place if going[place] else next(late) for place in range(count)]
        gone = [row for row, goes_on in zip(self._rows, going, strict=True) if not goes_on]
        self._whole.alive[state.step :, gone] = False
        self._rows = [self._rows[place] for place in kept]
        state.cache.keep(kept)
        rows = torch.tensor(kept)
        return replace(
            state,
            tokens=state.tokens.index_select(0, rows),
            alive=state.alive.index_select(1, rows),
            picked=state.picked.index_select(1, rows),
            chosen=None if state.chosen is None else state.chosen.index_select(1, rows),
            trouble=state.trouble.index_select(0, rows),
            hidden=None if state.hidden is None else state.hidden.index_select(0, rows),
            choice=None,
        )

    def whole(self, state: DecodeState) -> DecodeState:
        """The state of all rows, those that have left among them."""
        whole, rows = self._whole, self._rows
        if state is not whole:
            whole.length = state.length
            whole.tokens[rows] = state.tokens
            whole.alive[:, rows], whole.picked[:, rows] = state.alive, state.picked
            if whole.chosen is not None and state.chosen is not None:
                whole.chosen[:, rows] = state.chosen
        return whole
