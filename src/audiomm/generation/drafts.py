"""What proposes the tokens that may come next: the text so far, a smaller model, or one that reads the model's states.

Drafts need not be right (see `speculative`), so who makes them may guess. The rows of a batch are texts of lengths of
their own: `Texts` where the host knows these, `Board` where tensors do, so that drafts can be captured (see `rounds`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from ..base.errors import GenerationError
from .decode import Decoder, DecodeRequest, DecodeState, Record, last_logits, start
from .fields import DEFAULTS
from .logits import LogitsProcessorList
from .regions import shelf_of
from .rules import Rules

if TYPE_CHECKING:
    from .step import Workplace

#: Drafts of a captured round where their number is left to how sure the assistant is.
FEW_DRAFTS = 5


@dataclass
class Texts:
    """How far the texts of a batch have come.

    Attributes:
        tokens: (rows, columns) int64, each text from column 0 on.
        lengths: Tokens of each row, prompt included.
        going: Whether a row is not done.
    """

    tokens: Tensor
    lengths: list[int]
    going: list[bool]

    @property
    def longest(self) -> int:
        """Tokens of the longest text that goes on; 0 where none does."""
        return max((length for length, goes in zip(self.lengths, self.going, strict=True) if goes), default=0)

    def columns(self, first: int, count: int) -> Tensor:
        """(rows, count) columns from the `first` one behind each text on; before its end where that is negative."""
        ends = torch.tensor(self.lengths, device=self.tokens.device)[:, None]
        numbers = torch.arange(first, first + count, device=self.tokens.device)
        return (ends + numbers).clamp_(0, self.tokens.shape[1] - 1)

    def newest(self, count: int = 1) -> Tensor:
        """(rows, count) the last tokens of each row."""
        return self.tokens.gather(1, self.columns(-count, count))

    def longer(self, tokens: Tensor) -> Texts:
        """These texts with one more token (rows, 1) each."""
        longer = self.tokens.scatter(1, self.columns(0, 1), tokens)
        return Texts(longer, [length + 1 for length in self.lengths], self.going)

    def ruled(self, rules: LogitsProcessorList, scores: Tensor) -> Tensor:
        """Scores (rows, vocabulary) of the next tokens after the rules, which see texts of one length at a time."""
        lengths = sorted({length for length, goes in zip(self.lengths, self.going, strict=True) if goes})
        if not rules or not lengths:
            return scores
        found: Tensor = rules(self.tokens[:, : lengths[0]], scores)
        own = torch.tensor(self.lengths, device=scores.device)[:, None]
        for length in lengths[1:]:
            found = torch.where(own == length, rules(self.tokens[:, :length], scores), found)
        return found


class Board:
    """Texts of a batch in tensors that stay where they are.

    Args:
        rows, columns: Texts, and the tokens that there is room for in each, drafts included.
        hidden: (rows, 1, width) the state before each newest token, where a drafter reads it.
        device: Where the tensors are to be.

    Attributes:
        tokens: (rows, columns) int64, each text from column 0 on; drafts behind it while there are any.
        lengths: (rows, 1) int64 tokens of each text.
        begin: (1,) int64 the column from which on rules look at the texts.
    """

    def __init__(self, rows: int, columns: int, hidden: Tensor | None, device: torch.device) -> None:
        self.tokens = torch.zeros(rows, columns, dtype=torch.long, device=device)
        self.lengths = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self.begin = torch.zeros(1, dtype=torch.long, device=device)
        self.hidden = None if hidden is None else hidden.clone()

    def places(self, first: int, count: int) -> Tensor:
        """(rows, count) columns from the `first` one behind each text on; before its end where that is negative."""
        return self.lengths + torch.arange(first, first + count, device=self.tokens.device)

    def read(self, first: int, count: int) -> Tensor:
        """(rows, count) the tokens there."""
        return self.tokens.gather(1, self.places(first, count))

    def write(self, first: int, tokens: Tensor) -> None:
        """Put tokens (rows, count) there."""
        self.tokens.scatter_(1, self.places(first, tokens.shape[1]), tokens)


class Drafter(Protocol):
    """Proposes what may come next.

    Attributes:
        cost: What a draft costs, as a share of a step of the model.
        count: Tokens to draft at most.
        cache: What drafts are read into, if not the model's own.
        parts: What `draft` goes by besides the board: drafters of one class with equal ones draft the same.
        steady: How many tokens `draft` is asked for.
    """

    cost: float
    count: int
    cache: Any
    parts: tuple[Any, ...]
    steady: int

    def propose(self, texts: Texts, count: int) -> Tensor:
        """(rows, at most count) int64 tokens that may follow the texts; none is a good answer too."""

    def draft(self, board: Board, rules: Rules, count: int) -> None:
        """`propose` in tensors alone: `count` drafts, written behind the texts; the rules are settled.

        Where there is a `cache`, it holds all of each text but its last two tokens, and count + 1 more afterwards; 2
        more where the count is 0.
        """


class PromptLookup:
    """Drafts what followed the last few tokens when they occurred before.

    Args:
        count: Tokens to draft.
        longest: Most tokens that are looked for; fewer are tried where these are not found.

    Source: prompt lookup decoding, github.com/apoorvumang/prompt-lookup-decoding.
    """

    cost, cache = 0.0, None

    def __init__(self, count: int, longest: int) -> None:
        self.count = self.steady = count
        self.longest, self.parts = longest, (longest,)

    def propose(self, texts: Texts, count: int) -> Tensor:
        last = texts.columns(-1, 1)
        places = self._places(texts.tokens, last, texts.longest)
        if not bool((places > 0).any()):
            return texts.tokens[:, :0]
        index = places + torch.arange(min(count, self.count), device=last.device)
        return texts.tokens.gather(1, torch.minimum(index, last))

    def draft(self, board: Board, rules: Rules, count: int) -> None:
        last = board.lengths - 1
        index = self._places(board.tokens, last, board.tokens.shape[1]) + torch.arange(count, device=last.device)
        board.write(0, board.tokens.gather(1, torch.minimum(index, last)))

    def _places(self, tokens: Tensor, last: Tensor, columns: int) -> Tensor:
        """(rows, 1) the columns behind what was found in so many columns of texts (rows, room), 0 where nothing was.

        Args:
            last: (rows, 1) columns of the newest tokens.
        """
        places = torch.zeros_like(last)
        for size in range(min(self.longest, columns - 1), 0, -1):
            newest = last + torch.arange(1 - size, 1, device=last.device)
            same = tokens[:, :columns].unfold(1, size, 1) == tokens.gather(1, newest.clamp(min=0))[:, None]
            # What was found must be followed by something.
            same = same.all(dim=-1) & (torch.arange(size, columns + 1, device=last.device) <= last)
            # Prefer the first place that is followed by enough tokens: argmax gives the first.
            found = torch.where(same.any(dim=1), same.int().argmax(dim=1) + size, 0)[:, None]
            places = torch.where(places == 0, found, places)
        return places


class AssistantModel:
    """Drafts what a smaller model would write.

    Args:
        own: What the smaller model of the same vocabulary is to read; see `own_request`.
        request: The request whose drafts it makes.
        copies: Rows a prompt becomes.
        place: Where it keeps its cache at fixed addresses; None makes a new one.
    """

    def __init__(self, own: DecodeRequest, request: DecodeRequest, copies: int, place: Workplace | None = None) -> None:
        model = own.model
        _check_vocabulary(request.model, model)
        state, _ = start(own, copies, Record(own.config), place)
        self.model, self.cache, self.quick, self.processors = model, state.cache, state.quick, request.processors
        self.cost = _share_of_weights(model, request.model)
        #: Tokens of each row that the cache holds, those that were not taken included.
        self.read = [state.length] * len(state.tokens)
        self.count = request.config.num_assistant_tokens or 1
        self.threshold = request.config.assistant_confidence_threshold or 0.0
        self.steady = min(self.count, FEW_DRAFTS) if self.threshold else self.count
        self.parts = (self.quick or model, self.cache)

    def propose(self, texts: Texts, count: int) -> Tensor:
        behind = [length - min(read, length - 1) for length, read in zip(texts.lengths, self.read, strict=True)]
        # All rows read so many tokens, some of them anew; the newest one at least.
        count, unread = min(count, self.count), max(n for n, goes in zip(behind, texts.going, strict=True) if goes)
        # Drafts that were not taken are forgotten, and rows that are done.
        wrong = [
            read - length + unread if goes else self.cache.length
            for length, read, goes in zip(texts.lengths, self.read, texts.going, strict=True)
        ]
        self.cache.take_back(torch.tensor(wrong, device=texts.tokens.device), room=unread + count)
        drafts: list[Tensor] = []
        ids = texts.newest(unread)
        while len(drafts) < count:
            if self.quick is not None and ids.shape[1] == 1:
                logits = self.quick(ids, self.cache)
            else:
                logits = last_logits(self.model.step(ids, self.cache))
            scores = texts.ruled(self.processors, logits)
            ids = scores.argmax(dim=-1, keepdim=True)
            texts = texts.longer(ids)
            drafts.append(ids)
            sure = (scores.softmax(dim=-1).gather(1, ids) >= self.threshold)[:, 0].tolist()
            if not any(is_sure and goes for is_sure, goes in zip(sure, texts.going, strict=True)):
                break
        # The last draft has not been read.
        self.read = [length - 1 for length in texts.lengths]
        return torch.cat(drafts, dim=1)

    def draft(self, board: Board, rules: Rules, count: int) -> None:
        # The newest token has not been read, nor the one before where it is the last draft and was right.
        logits = last_logits(self.model.step(board.read(-2, 2), self.cache))
        for place in range(count):
            ids = board.read(place - 1, 1)
            if place:
                quick = self.quick
                logits = last_logits(self.model.step(ids, self.cache)) if quick is None else quick(ids, self.cache)
            rules.look(board.tokens, board.lengths + place, board.begin)
            board.write(place, rules(ids, logits).argmax(dim=-1, keepdim=True))


class StateDrafter:
    """Drafts with a model that was trained to go on from the target model's own states and keys.

    A draft leaves a state behind, which stands in for the target's in the next draft; the place in the text and the
    keys stay those of the newest token for the whole round. Source: multi-token prediction, arXiv:2404.19737, and the
    model cards of Gemma 4's assistants.

    Args:
        model: The drafter; see `models.gemma4.assistant`.
        request: The request whose drafts it makes.
        state: Where the request stands; its cache is read, never written.
    """

    def __init__(self, model: Any, request: DecodeRequest, state: DecodeState) -> None:
        if state.hidden is None:
            raise GenerationError("this drafter reads the target's states, and the model in use does not tell them.")
        _check_vocabulary(request.model, model)
        self.model, self.target, self.state, self.processors = model, request.model, state, request.processors
        own, asked = model.generation_config.num_assistant_tokens, request.config.num_assistant_tokens
        self.count = own if own is not None and asked == DEFAULTS["num_assistant_tokens"] else asked or 1
        # Another shelf as soon as the drafter is not what it was.
        self.steady, self.cache, self.parts = self.count, None, (shelf_of(model),)
        self.cost = _share_of_weights(model, request.model)

    def propose(self, texts: Texts, count: int) -> Tensor:
        view = self._view()
        state, drafts = self.state.hidden, [texts.newest()]
        while len(drafts) <= min(count, self.count):
            logits, state = self._one(drafts[-1], state, view)
            drafts.append(texts.ruled(self.processors, logits).argmax(dim=-1, keepdim=True))
            texts = texts.longer(drafts[-1])
        return torch.cat(drafts[1:], dim=1)

    def draft(self, board: Board, rules: Rules, count: int) -> None:
        view, state = self._view(), board.hidden
        for place in range(count):
            token = board.read(place - 1, 1)
            logits, state = self._one(token, state, view)
            rules.look(board.tokens, board.lengths + place, board.begin)
            board.write(place, rules(token, logits).argmax(dim=-1, keepdim=True))

    def _view(self) -> tuple[Any, Any, Tensor]:
        target: Any = self.target
        view: tuple[Any, Any, Tensor] = target.draft_view(self.state.cache)
        return view

    def _one(self, token: Tensor, state: Any, view: tuple[Any, Any, Tensor]) -> tuple[Tensor, Tensor]:
        """Logits (rows, vocabulary) of what follows `token` (rows, 1), and the state for the next draft."""
        target: Any = self.target
        pairs, masks, place = view
        word = target.embed_drafted(token)
        draft = self.model(
            inputs_embeds=torch.cat((word, state.to(word)), dim=-1),
            position_ids=place,
            attention_mask=masks,
            shared_kv_states=pairs,
        )
        return draft.logits[:, 0].float(), draft.last_hidden_state


def _share_of_weights(model: Any, target: Any) -> float:
    """What a step of `model` costs, as a share of one of `target`, by the weights that a step reads."""
    return _weights_read(model) / max(_weights_read(target), 1)


def _weights_read(model: nn.Module) -> int:
    # Of a table of embeddings a step reads one row; a head tied to it is read whole, and counts.
    modules = [module for module in model.modules() if not isinstance(module, nn.Embedding)]
    weights = {weight for module in modules for weight in module.parameters(recurse=False)}
    return sum(weight.numel() for weight in weights)


def drafts_from_states(own: DecodeRequest) -> bool:
    """Whether the smaller model of `own_request` reads the target's states and not the text."""
    return bool(getattr(own.model, "drafts_from_states", False))


def own_request(request: DecodeRequest, model: Decoder, inputs: dict[str, Any]) -> DecodeRequest:
    """What a smaller model is to read so that it can make drafts for a request.

    Args:
        inputs: What its prefill takes besides the prompt.
    """
    config = request.config.filled()
    names = ("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate")
    config.update(**dict.fromkeys(names, False))
    return replace(request, model=model, model_inputs=inputs, config=config, logprobs=False, past=None)


def _check_vocabulary(model: Decoder, assistant: Decoder) -> None:
    sizes = [_vocabulary_size(each.config) for each in (model, assistant)]
    if None not in sizes and sizes[0] != sizes[1]:
        raise GenerationError(
            f"the assistant's vocabulary has {sizes[1]} tokens and the model's {sizes[0]}: drafts can only be read "
            "when both share a tokenizer. Pass an assistant of the same family."
        )


def _vocabulary_size(config: Any) -> int | None:
    size = getattr(config, "vocab_size", None)
    return size if size is not None else getattr(getattr(config, "text_config", None), "vocab_size", None)
