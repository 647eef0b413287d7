"""Speculative decoding: cheap drafts of several tokens, checked by the model in one pass.

The model chooses at every drafted place exactly as it would have without a draft, and goes on while its choice is
the draft's: so the result is that of the main loop, greedy or sampled, only sooner (arXiv:2211.17192, with drafts
that are certain). Rows of a batch advance together, as far as all of them agree with their drafts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ..base.errors import GenerationError
from ..base.outputs import GenerateOutput, ModelOutput
from ..layers.cache import SPARE
from .decode import Decoder, DecodeRequest, DecodeState, Record, StopFlag, last_logits, start
from .fields import DEFAULTS
from .sample import choose, finish


class Drafter(Protocol):
    """Proposes what may come next."""

    def propose(self, ids: Tensor, count: int) -> Tensor:
        """(rows, at most count) int64 tokens that may follow ids (rows, length); none is a good answer too."""


class PromptLookup:
    """Drafts what followed the last few tokens when they occurred before.

    Args:
        count: Tokens to draft.
        longest: Most tokens that are looked for; fewer are tried where these are not found.

    Source: prompt lookup decoding, github.com/apoorvumang/prompt-lookup-decoding.
    """

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
        self.model, self.cache, self.processors = model, state.cache, request.processors
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
            logits = last_logits(self.model.step(unread, self.cache))
            scores = self.processors(ids, logits)
            unread = scores.argmax(dim=-1, keepdim=True)
            ids = torch.cat((ids, unread), dim=1)
            sure = scores.softmax(dim=-1).gather(1, unread)
            if bool((sure < self.threshold).all()):
                break
        return ids[:, length:]


class StateDrafter:
    """Drafts what a drafter trained on the target model's own states and keys makes of them.

    Source: multi-token prediction, arXiv:2404.19737, as in Gemma 4's assistants: all drafts of a round are made at the
    position of the newest token, each from the state that the one before it handed on.

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

    def propose(self, ids: Tensor, count: int) -> Tensor:
        length, hidden = ids.shape[1], self.state.hidden
        if hidden is None:
            raise GenerationError("this drafter reads the target's states, and the model in use does not tell them.")
        pairs, masks, place = self.target.draft_view(self.state.cache)  # type: ignore[attr-defined]
        for _ in range(min(count, self.count)):
            embedded = self.target.embed_drafted(ids[:, -1:])  # type: ignore[attr-defined]
            output = self.model(
                inputs_embeds=torch.cat((embedded, hidden.to(embedded)), dim=-1),
                position_ids=place,
                attention_mask=masks,
                shared_kv_states=pairs,
            )
            hidden = output.last_hidden_state
            scores = self.processors(ids, output.logits[:, -1].float())
            ids = torch.cat((ids, scores.argmax(dim=-1, keepdim=True)), dim=1)
        return ids[:, length:]


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
    _choose_and_show(request, state, logits, record)
    while state.length < request.max_length and not flag.is_set(state.finished):
        # So many tokens can be taken back by layers with a window.
        room = min(request.max_length - state.length - 1, SPARE)
        drafts = drafter.propose(state.ids, room) if room else state.ids[:, :0]
        newest = state.tokens[:, state.length - 1 : state.length]
        begin, read = state.length, state.cache.length
        output = request.model.step(torch.cat((newest, drafts), dim=1), state.cache, **request.flags)
        _take_agreed(request, state, output, drafts, record)
        taken = state.length - begin
        state.cache.crop(read + taken)
        last = output.get("last_hidden_state")
        state.hidden = None if last is None else last[:, taken - 1 : taken]
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
        if not bool(agreed.all()) or bool(state.finished.all()):
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
