"""Speculative decoding: cheap drafts of several tokens, checked by the model in one pass.

The model chooses at every drafted place exactly as it would have without a draft, and goes on while its choice is
the draft's: so the result is that of the main loop, greedy or sampled, only sooner (arXiv:2211.17192, with drafts
that are certain). Rows of a batch advance together, as far as all of them agree with their drafts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..base.errors import GenerationError
from ..base.outputs import CausalLMOutput, GenerateOutput, ModelOutput
from ..layers.cache import SPARE
from .choice import choose
from .decode import Decoder, DecodeRequest, DecodeState, Record, StopFlag, last_logits, start
from .fields import DEFAULTS
from .sample import finish


class Drafter(Protocol):
    """Proposes what may come next.

    Attributes:
        cost: What a draft costs, as a share of a step of the model.
    """

    cost: float

    def propose(self, ids: Tensor, count: int) -> Tensor:
        """(rows, at most count) int64 tokens that may follow ids (rows, length); none is a good answer too."""


class PromptLookup:
    """Drafts what followed the last few tokens when they occurred before.

    Args:
        count: Tokens to draft.
        longest: Most tokens that are looked for; fewer are tried where these are not found.

    Source: prompt lookup decoding, github.com/apoorvumang/prompt-lookup-decoding.
    """

    cost = 0.0

    def __init__(self, count: int, longest: int) -> None:
        self.count, self.longest = count, longest

    def propose(self, ids: Tensor, count: int) -> Tensor:
        rows, length = ids.shape
        count = min(count, self.count)
        places = torch.zeros(rows, dtype=torch.long, device=ids.device)  # 0: nothing found yet
        for size in range(min(self.longest, length - 1), 0, -1):
            earlier = ids.unfold(1, size, 1)[:, :-1]
            same = (earlier == ids[:, None, length - size :]).all(dim=-1)
            # Prefer the first place that is followed by enough tokens: argmax gives the first.
            found = torch.where(same.any(dim=1), same.int().argmax(dim=1) + size, 0)
            places = torch.where(places == 0, found, places)
        if not bool((places > 0).any()):
            return ids[:, :0]
        index = places[:, None] + torch.arange(count, device=ids.device)
        return ids.gather(1, index.clamp(max=length - 1))


class AssistantModel:
    """Drafts what a smaller model would write.

    Args:
        model: The smaller model; same vocabulary.
        inputs: What its prefill takes besides the prompt.
        request: The request whose drafts it makes.
        copies: Rows a prompt becomes.
    """

    def __init__(self, model: Decoder, inputs: dict[str, Any], request: DecodeRequest, copies: int) -> None:
        _check_vocabulary(request.model, model)
        config = replace_outputs(request)
        own = replace(request, model=model, model_inputs=inputs, config=config, logprobs=False)
        state, _ = start(own, copies, Record(config))
        self.model, self.cache, self.quick, self.processors = model, state.cache, state.quick, request.processors
        self.cost = _share_of_weights(model, request.model)
        # Slots of a prompt that was given as embeddings alone, whose ids are not known.
        self.unseen = state.cache.length - state.length
        self.count = request.config.num_assistant_tokens or 1
        self.threshold = request.config.assistant_confidence_threshold or 0.0

    def propose(self, ids: Tensor, count: int) -> Tensor:
        length = ids.shape[1]
        # Drafts that were not taken are forgotten; the newest token at least has to be read.
        if self.cache.length > self.unseen + length - 1:
            self.cache.crop(self.unseen + length - 1)
        unread = ids[:, self.cache.length - self.unseen :]
        for _ in range(min(count, self.count)):
            if self.quick is not None and unread.shape[1] == 1:
                logits = self.quick(unread, self.cache)
            else:
                logits = last_logits(self.model.step(unread, self.cache))
            scores = self.processors(ids, logits)
            unread = scores.argmax(dim=-1, keepdim=True)
            ids = torch.cat((ids, unread), dim=1)
            sure = scores.softmax(dim=-1).gather(1, unread)
            if bool((sure < self.threshold).all()):
                break
        return ids[:, length:]


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
        _check_vocabulary(request.model, model)
        self.model, self.target, self.state, self.processors = model, request.model, state, request.processors
        own, asked = model.generation_config.num_assistant_tokens, request.config.num_assistant_tokens
        self.count = own if own is not None and asked == DEFAULTS["num_assistant_tokens"] else asked or 1
        self.cost = _share_of_weights(model, request.model)

    def propose(self, ids: Tensor, count: int) -> Tensor:
        if self.state.hidden is None:
            raise GenerationError("this drafter reads the target's states, and the model in use does not tell them.")
        target: Any = self.target
        pairs, masks, place = target.draft_view(self.state.cache)
        drafted, state = ids, self.state.hidden
        while drafted.shape[1] < ids.shape[1] + min(count, self.count):
            word = target.embed_drafted(drafted[:, -1:])
            draft = self.model(
                inputs_embeds=torch.cat((word, state.to(word)), dim=-1),
                position_ids=place,
                attention_mask=masks,
                shared_kv_states=pairs,
            )
            scores = self.processors(drafted, draft.logits[:, 0].float())
            drafted, state = torch.cat((drafted, scores.argmax(dim=-1)[:, None]), dim=1), draft.last_hidden_state
        return drafted[:, ids.shape[1] :]


class Balance:
    """Whether drafts are worth what they cost, by how many were accepted; pauses them while they are not.

    It counts and does not measure, so that a run can be repeated to the last bit. Drafts that are hardly ever right
    are tried again after pauses of growing length.

    Args:
        cost: What a draft costs, as a share of a step of the model.
    """

    #: Rounds that are looked at together, and the first pause.
    ROUNDS = 16

    def __init__(self, cost: float) -> None:
        self.cost = cost
        self.rounds = self.pause = 0
        self.gain = 0.0
        self._next_pause = self.ROUNDS

    def wants_drafts(self) -> bool:
        """Whether the round that begins is to have drafts."""
        if self.pause > 0:
            self.pause -= 1
            return False
        return True

    def note(self, drafted: int, accepted: int) -> None:
        """A round with drafts is over: each accepted one saved a step, and each drafted one cost a part of it."""
        self.gain += accepted - drafted * self.cost
        self.rounds += 1
        if self.rounds == self.ROUNDS:
            pays = self.gain >= 0
            self.pause = 0 if pays else self._next_pause
            self._next_pause = self.ROUNDS if pays else 2 * self._next_pause
            self.rounds, self.gain = 0, 0.0


def _share_of_weights(model: Any, target: Any) -> float:
    """What a step of `model` costs, as a share of one of `target`, by the weights that a step reads."""
    return _weights_read(model) / max(_weights_read(target), 1)


def _weights_read(model: nn.Module) -> int:
    # Of a table of embeddings a step reads one row; a head tied to it is read whole, and counts.
    modules = [module for module in model.modules() if not isinstance(module, nn.Embedding)]
    weights = {weight for module in modules for weight in module.parameters(recurse=False)}
    return sum(weight.numel() for weight in weights)


def replace_outputs(request: DecodeRequest) -> Any:
    """The request's config without what it wants recorded."""
    config = request.config.filled()
    config.update(output_attentions=False, output_hidden_states=False, output_scores=False, output_logits=False)
    return config


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


def speculate(
    request: DecodeRequest, drafter: Drafter, state: DecodeState, logits: Tensor, record: Record
) -> GenerateOutput:
    """Continue every prompt with the help of drafts; see `sample.sample` for what comes back.

    Args:
        request, state, logits, record: As `decode.start` left them.
        drafter: Makes the drafts.
    """
    flag = StopFlag(logits.device, at_once=True)
    counts = {"rounds": 0, "drafted": 0, "accepted": 0}
    balance = Balance(drafter.cost)
    _choose_and_show(request, state, logits, record)
    while state.length < request.max_length and not flag.is_set(state.going):
        # So many tokens can be taken back by layers with a window.
        room = min(request.max_length - state.length - 1, SPARE)
        has_drafts = room > 0 and balance.wants_drafts()
        drafts = drafter.propose(state.ids, room) if has_drafts else state.ids[:, :0]
        newest = state.tokens[:, state.length - 1 : state.length]
        begin, read = state.length, state.cache.length
        if drafts.shape[1] == 0 and state.quick is not None and state.hidden is None:
            output: ModelOutput = CausalLMOutput(logits=state.quick(newest, state.cache)[:, None])
        else:
            output = request.model.step(torch.cat((newest, drafts), dim=1), state.cache, **request.flags)
        _take_agreed(request, state, output, drafts, record)
        taken = state.length - begin
        state.cache.crop(read + taken)
        last = output.get("last_hidden_state")
        state.hidden = None if last is None else last[:, taken - 1 : taken]
        if has_drafts:
            balance.note(drafts.shape[1], taken - 1)
        for name, count in (("rounds", 1), ("drafted", drafts.shape[1]), ("accepted", taken - 1)):
            counts[name] += count
    result = finish(state, record)
    result.draft_counts = counts
    return result


def _take_agreed(
    request: DecodeRequest, state: DecodeState, output: ModelOutput, drafts: Tensor, record: Record
) -> None:
    """Choose tokens place by place, until a choice is not the draft's."""
    for place in range(drafts.shape[1] + 1):
        record.add_output(_at(output, place))
        _choose_and_show(request, state, output["logits"][:, place].float(), record)
        if place == drafts.shape[1]:
            return
        agreed = state.finished | (state.ids[:, -1] == drafts[:, place])
        if not bool(agreed.all()) or not bool(state.going.any()):
            return


def _choose_and_show(request: DecodeRequest, state: DecodeState, logits: Tensor, record: Record) -> None:
    choose(request, state, logits, record)
    if request.streamer is not None:
        request.streamer.put(state.ids[:, -1].cpu())


def _at(output: ModelOutput, place: int) -> ModelOutput:
    """A step's output as it would be for the token at `place` alone; queries are the second last dimension."""
    kept = {}
    for name in ("attentions", "decoder_attentions", "cross_attentions", "hidden_states", "decoder_hidden_states"):
        layers = output.get(name)
        if layers is not None:
            kept[name] = tuple(layer[..., place : place + 1, :] for layer in layers)
    return type(output)(**kept)
