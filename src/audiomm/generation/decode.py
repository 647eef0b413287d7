"""The state of a decoding run and its single steps: what greedy, sampling and beam search share.

The state is one visible dataclass (after gemma's `SamplingState`); a step is tensors in, tensors out. Which rows
are done is read from the device one step late, so that the next step is already under way: the answer is exact,
the step too many is dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from inspect import signature
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ..base.errors import GenerationError, NumericalError
from ..base.outputs import GenerateOutput, ModelOutput
from .config import GenerationConfig
from .logits import LogitsProcessorList
from .sampling import Generators
from .stopping import StoppingCriteriaList

if TYPE_CHECKING:
    from .choice import Choice
    from .step import Workplace

#: (token ids (rows, 1), cache) -> logits (rows, vocabulary), float32: what `Decoder.step` does, without modules.
QuickStep = Callable[[Tensor, Any], Tensor]


class DecoderCache(Protocol):
    """The keys and values of the tokens so far."""

    @property
    def length(self) -> int:
        """Slots in use."""

    def repeat(self, count: int) -> Any:
        """Row i becomes rows i * count ... i * count + count - 1."""

    def reorder(self, index: Tensor) -> Any:
        """Row i becomes what row index[i] was."""

    def take_back(self, counts: Tensor, room: int = 0) -> Any:
        """Forget the newest counts[i] tokens of row i, and have room for so many new ones."""


class Decoder(Protocol):
    """What generation asks of a model."""

    config: Any

    def make_cache(self, batch: int, *, max_length: int | None, fixed: bool) -> Any:
        """An empty cache for `batch` rows, growing or of a fixed size."""

    def prefill(
        self, input_ids: Tensor, cache: Any, *, attention_mask: Tensor | None = None, **model_inputs: Any
    ) -> ModelOutput:
        """Run encoders and the prompt (rows, length); .logits is (rows, 1 or length, vocabulary)."""

    def step(self, input_ids: Tensor, cache: Any, **flags: Any) -> ModelOutput:
        """Run one more token a row (rows, 1); .logits is (rows, 1, vocabulary)."""


@dataclass
class DecodeRequest:
    """Everything a loop needs to know, settled before the first step.

    Attributes:
        model: The decoder.
        prompt: (batch, length) int64 token ids.
        prompt_mask: (batch, length), 0 at left padding; None when nothing is padded.
        model_inputs: What only prefill takes (audio features, encoder outputs, ...).
        config: Options, with defaults filled in.
        processors, warpers: Applied in this order; log-probabilities are taken between the two.
        stopping: Criteria besides the length.
        max_length: Length limit in tokens, prompt included.
        pad_token: What rows that are done go on with.
        streamer: Takes tokens as they come.
        generators: Where random numbers come from.
        logprobs: Whether to sum up the log-probabilities of the chosen tokens.
        past: A cache that holds the first tokens of the prompt already, or None.
    """

    model: Decoder
    prompt: Tensor
    prompt_mask: Tensor | None
    model_inputs: dict[str, Any]
    config: GenerationConfig
    processors: LogitsProcessorList
    warpers: LogitsProcessorList
    stopping: StoppingCriteriaList
    max_length: int
    pad_token: int
    streamer: Any = None
    generators: Generators = None
    logprobs: bool = False
    past: Any = None

    @property
    def hands_out_cache(self) -> bool:
        """Whether the caller may go on from the cache."""
        return self.past is not None or bool(self.config.return_dict_in_generate)

    @property
    def flags(self) -> dict[str, bool]:
        """What prefill and step are asked to hand out besides logits."""
        names = ("output_attentions", "output_hidden_states")
        return {name: True for name in names if getattr(self.config, name)}


@dataclass
class DecodeState:
    """Where a run of `rows` sequences stands. What a step finds out is written down, and added up in the end.

    Attributes:
        tokens: (rows, max_length) int64 buffer, prompt first, then what was generated, then padding.
        length: Tokens in use, the same for all rows.
        prompt_length: Of these, tokens that were given.
        cache: The model's keys and values.
        alive: (steps + 1, rows) bool, whether a row was still going on when a step began.
        picked: (steps, rows) float32 scores of the tokens that were picked; NaN or -inf where none could be.
        chosen: (steps, rows) float32 log-probabilities of these tokens, or None when not asked for.
        trouble: (rows,) int64: 0, or 2 * step + 2 where no token could be chosen, + 1 where that was due to NaN.
        quick: The quick twin of the model's step, where it has one.
    """

    tokens: Tensor
    length: int
    prompt_length: int
    cache: Any
    alive: Tensor
    picked: Tensor
    chosen: Tensor | None
    trouble: Tensor
    #: (rows, 1, width) the last state of the prompt, where the model tells it: what drafters begin with.
    hidden: Tensor | None = None
    quick: QuickStep | None = None
    #: How tokens are chosen; made with the first of them.
    choice: Choice | None = None

    @property
    def ids(self) -> Tensor:
        """(rows, length) the tokens in use, a view."""
        return self.tokens[:, : self.length]

    @property
    def step(self) -> int:
        """Tokens generated so far."""
        return self.length - self.prompt_length

    @property
    def going(self) -> Tensor:
        """(rows,) bool, rows that are not done, a view."""
        return self.alive[self.step]

    @property
    def finished(self) -> Tensor:
        """(rows,) bool, rows that are done."""
        return ~self.going

    @property
    def logprobs(self) -> Tensor | None:
        """(rows,) float32 sums of the log-probabilities of the tokens of each row."""
        if self.chosen is None:
            return None
        return torch.where(self.alive[: self.step], self.chosen[: self.step], 0.0).sum(dim=0)

    def live_steps(self) -> int:
        """Steps that began with a row that was not done: what counts, as a stop may be seen late."""
        return int(self.alive[: self.step].sum(dim=0).max())


#: GenerateOutput field <- the field of a step's output it is collected from.
_PER_STEP = {
    "attentions": "attentions",
    "hidden_states": "hidden_states",
    "decoder_attentions": "decoder_attentions",
    "decoder_hidden_states": "decoder_hidden_states",
    "cross_attentions": "cross_attentions",
}
_ONCE = ("encoder_attentions", "encoder_hidden_states")


@dataclass
class Record:
    """What is collected for the caller on the way, one entry a step."""

    config: GenerationConfig
    steps: dict[str, list[Any]] = field(default_factory=dict)
    once: dict[str, Any] = field(default_factory=dict)

    def add_output(self, output: ModelOutput, copies: int = 1) -> None:
        """Keep the attentions and hidden states of a step; rows of a prefill are repeated `copies` times."""
        for name in _ONCE:
            if output.get(name) is not None:
                self.once[name] = output[name]
        for name, source in _PER_STEP.items():
            layers = output.get(source)
            if layers is not None:
                if copies > 1:
                    # Hidden states may have dimensions before the rows: Gemma 3n's parallel streams.
                    rows = -3 if source.endswith("hidden_states") else 0
                    layers = tuple(layer.repeat_interleave(copies, dim=rows) for layer in layers)
                self.steps.setdefault(name, []).append(layers)

    def add_scores(self, logits: Tensor, scores: Tensor) -> None:
        """Keep a step's scores and logits, (rows, vocabulary) each, where the config asks for them."""
        if self.config.output_scores:
            self.steps.setdefault("scores", []).append(scores)
        if self.config.output_logits:
            self.steps.setdefault("logits", []).append(logits)

    def into(self, output: GenerateOutput, steps: int) -> GenerateOutput:
        """Fill `output` with the first `steps` entries."""
        for name, entries in self.steps.items():
            setattr(output, name, tuple(entries[:steps]))
        for name, value in self.once.items():
            setattr(output, name, value)
        return output


class StopFlag:
    """Tells which rows are done: at once on the CPU, one step late on a device that works ahead."""

    def __init__(self, device: torch.device, at_once: bool) -> None:
        self._lags = device.type == "cuda" and not at_once
        # The answer of one step is read while that of the next is on its way.
        self._answers: list[Tensor] = []
        self._copied: torch.cuda.Event | None = None

    def is_set(self, going: Tensor) -> bool:
        """True when none of `going` (rows,) holds, or none held a step ago."""
        return not any(self.rows(going))

    def rows(self, going: Tensor) -> list[bool]:
        """`going` (rows,), or what it was a step ago; all True where nothing is known yet."""
        return self.read(going) or [True] * len(going)

    def read(self, numbers: Tensor) -> list[Any] | None:
        """`numbers` (n,), or what they were a step ago; None where nothing is known yet."""
        if not self._lags:
            known: list[Any] = numbers.tolist()
            return known
        if not self._answers or self._answers[0].shape != numbers.shape:
            self._answers = [torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True) for _ in range(2)]
            self.forget()
        earlier, later = self._answers
        answer: list[Any] | None = None
        if self._copied is not None:
            self._copied.synchronize()
            answer = earlier.tolist()
        later.copy_(numbers, non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record(torch.cuda.current_stream(numbers.device))
        self._answers = [later, earlier]
        return answer

    def forget(self) -> None:
        """Rows have become others: what is on its way says nothing about them."""
        self._copied = None


def start(
    request: DecodeRequest, copies: int, record: Record, place: Workplace | None = None
) -> tuple[DecodeState, Tensor]:
    """Run the prompt once a batch item and repeat what came out for `copies` rows each.

    Args:
        place: Where cache and buffers are kept at fixed addresses; None makes new ones.

    Returns:
        The state, and the logits (batch * copies, vocabulary) of the first new token, float32.
    """
    prompt, config = request.prompt, request.config
    rows, prompt_length = prompt.shape
    fixed = place is not None or config.cache_implementation not in (None, "dynamic", "dynamic_full")
    # A prompt given as embeddings alone takes slots that its (empty) ids do not count.
    embeddings = request.model_inputs.get("inputs_embeds")
    unseen = 0 if embeddings is None else max(0, embeddings.shape[1] - prompt_length)
    limit = unseen + max(request.max_length, config.max_cache_len or 0)
    cache = request.past if place is None else place.empty_cache(limit)
    known = 0 if request.past is None else request.past.length
    if request.past is not None:
        request.past.make_room(limit)
    if cache is None:
        room = limit if place is None else max(limit, place.capacity)
        cache = request.model.make_cache(rows, max_length=room, fixed=fixed)
        if config.cross_cache_dtype is not None:
            cache.keep_cross_in(config.cross_cache_dtype)
    inputs = dict(request.model_inputs)
    if config.prefill_chunk_size is not None and "prefill_chunk_size" in signature(request.model.prefill).parameters:
        inputs["prefill_chunk_size"] = config.prefill_chunk_size
    if place is None:
        mask = request.prompt_mask
        output = request.model.prefill(prompt[:, known:], cache, attention_mask=mask, **inputs, **request.flags)
    else:
        output = place.read_prompt(request, cache, inputs, limit)
    logits, hidden = last_logits(output), output.get("last_hidden_state")
    hidden = None if hidden is None else hidden[:, -1:].repeat_interleave(copies, dim=0)
    record.add_output(output, copies)
    if copies > 1:
        cache.repeat(copies)
        logits = logits.repeat_interleave(copies, dim=0)
        prompt = prompt.repeat_interleave(copies, dim=0)
    rows, device = rows * copies, logits.device
    make, length = (filled, request.max_length) if place is None else (place.tensor, place.capacity)
    tokens = make("tokens", (rows, length), request.pad_token, device, torch.long)
    tokens[:, :prompt_length] = prompt
    chosen = make("chosen", (length, rows), 0.0, device, torch.float32) if request.logprobs else None
    state = DecodeState(
        tokens=tokens,
        length=prompt_length,
        prompt_length=prompt_length,
        cache=cache,
        alive=make("alive", (length + 1, rows), True, device, torch.bool),
        picked=make("picked", (length, rows), 0.0, device, torch.float32),
        chosen=chosen,
        trouble=torch.zeros(rows, dtype=torch.long, device=device),
        hidden=hidden,
        quick=quick_step(request.model) if not request.flags else None,
    )
    return state, logits


def filled(name: str, shape: tuple[int, ...], value: Any, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A new tensor full of `value`; in runs at fixed addresses `Workplace.tensor` stands for this."""
    return torch.full(shape, value, device=device, dtype=dtype)


def quick_step(model: Any) -> QuickStep | None:
    """The quick twin of the model's step, where it has one and nothing is trained."""
    make = getattr(model, "quick_step", None)
    if make is None or model.training or torch.is_grad_enabled():
        return None
    quick: QuickStep | None = make()
    return quick


def advance(request: DecodeRequest, state: DecodeState, record: Record) -> Tensor:
    """Run the newest token of each row; logits (rows, vocabulary) of the next one, float32."""
    newest = state.tokens[:, state.length - 1 : state.length]
    if state.quick is not None:
        return state.quick(newest, state.cache)
    output = request.model.step(newest, state.cache, **request.flags)
    record.add_output(output)
    return last_logits(output)


def last_logits(output: ModelOutput) -> Tensor:
    """(rows, vocabulary) float32 logits after the last token."""
    return output["logits"][:, -1].float()


def note_trouble(state: DecodeState) -> None:
    """Mark rows that ended because no token could be chosen."""
    steps = state.step
    alive, picked = state.alive[:steps], state.picked[:steps]
    # Such a row ends at once, so it is its last step that tells.
    last = alive.sum(dim=0) - 1
    score = picked.gather(0, last[None])[0]
    code = 2 * last + 2 + score.isnan().long()
    state.trouble = torch.where(score > -torch.inf, 0, code)


def raise_trouble(state: DecodeState) -> None:
    """Complain about the first row in which no token could be chosen.

    Raises:
        NumericalError: The scores held NaN.
        GenerationError: The processors forbade every token.
    """
    codes = state.trouble.tolist()
    row = next((row for row, code in enumerate(codes) if code), None)
    if row is None:
        return
    step, is_nan = codes[row] // 2 - 1, codes[row] % 2
    where = f"row {row} step {step} (after {state.prompt_length + step} tokens)"
    if is_nan:
        raise NumericalError(
            f"{where}: the scores of the next token hold NaN, so no token can be chosen. Check the inputs for NaN or "
            "infinity and the dtype for overflow (bfloat16 or float32 instead of float16)."
        )
    raise GenerationError(
        f"{where}: every token is forbidden, so none can be chosen. Loosen suppress_tokens, bad_words_ids, "
        "no_repeat_ngram_size, min_length or the other rules that were set."
    )
