"""generate_tokens: from a prompt and settled options to tokens; what generate() and Whisper's windows call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..base.errors import GenerationError, ShapeError
from ..base.outputs import GenerateOutput
from .beam import beam_search
from .build import build_stopping, build_warpers
from .config import GenerationConfig
from .decode import Decoder, DecodeRequest, Record, start
from .drafts import AssistantModel, Drafter, PromptLookup, StateDrafter, drafts_from_states, own_request
from .logits import LogitsProcessorList
from .patience import patient_beam_search
from .rounds import fits, round_places, run_rounds
from .sample import sample
from .sampling import Generators
from .speculative import speculate
from .stopping import StoppingCriteriaList


@torch.no_grad()
def generate_tokens(
    request: DecodeRequest,
    *,
    stream_goes_on: bool = False,
    assistant_model: Decoder | None = None,
    assistant_inputs: dict[str, Any] | None = None,
) -> GenerateOutput:
    """Continue prompts token by token: greedy, sampling or beam search, as the request's config says.

    A search with `patience` follows the rules of OpenAI's Whisper (see `patience.py`), one without those of
    transformers.

    Args:
        request: Made by `make_request`.
        stream_goes_on: This call is a part of a longer stream: the caller puts the prompt and calls `end()` itself.
        assistant_model: A smaller model of the same vocabulary that drafts tokens; the result stays what it is.
        assistant_inputs: Passed on to its prefill.

    Returns:
        Output with `sequences` (rows, length), prompt included; rows = batch x num_return_sequences.

    Raises:
        GenerationError: The options do not fit together or leave no token to choose.
        NumericalError: The model gave NaN.
    """
    config, streamer = request.config, request.streamer
    drafts = assistant_model is not None or config.prompt_lookup_num_tokens is not None
    if config.num_beams == 1:
        if streamer is not None and not stream_goes_on:
            streamer.put(request.prompt.repeat_interleave(config.num_return_sequences or 1, dim=0).cpu())
        output = _speculate(request, assistant_model, assistant_inputs or {}) if drafts else sample(request)
        if streamer is not None and not stream_goes_on:
            streamer.end()
        return output
    if drafts or streamer is not None:
        name = "an assistant or prompt_lookup_num_tokens" if drafts else "a streamer"
        raise GenerationError(
            f"{name} cannot follow a search with num_beams={config.num_beams}, which may still change its mind about "
            "earlier tokens: pass num_beams=1, or leave it out."
        )
    return beam_search(request) if config.patience is None else patient_beam_search(request)


def make_request(
    model: Decoder,
    prompt: Tensor,
    config: GenerationConfig,
    *,
    model_inputs: dict[str, Any] | None = None,
    prompt_mask: Tensor | None = None,
    processors: LogitsProcessorList | None = None,
    stopping: StoppingCriteriaList | None = None,
    tokenizer: Any = None,
    streamer: Any = None,
    generator: Generators = None,
    logprobs: bool = False,
    past: Any = None,
) -> DecodeRequest:
    """What the loops are given, checked.

    End tokens, max_time and stop_strings of the config are heeded, and when sampling its warpers are applied after
    `processors`; of the other rules only those in `processors` are (see `build.build_processors`).

    Args:
        model: The decoder; see `decode.Decoder`.
        prompt: (batch, length) int64 token ids, left-padded where they differ in length.
        config: Options; defaults are filled in here.
        model_inputs: Passed on to `model.prefill` (audio features, encoder outputs, ...).
        prompt_mask: (batch, length), 0 at padding.
        processors: Rules applied to the scores of every step.
        stopping: Criteria besides those of the config.
        tokenizer: Needed for stop_strings.
        streamer: Takes the prompt and then the tokens as they come.
        generator: Source of random numbers; a list gives every row its own.
        logprobs: Fill `logprobs` of the output: the sum of the log-probabilities of the chosen tokens, the end token
            included, after `processors` and before the warpers (so at temperature 1). The config's
            `output_logprobs` asks for the same.
        past: A cache that holds the first tokens of the prompt already.

    Raises:
        GenerationError: The options do not fit together.
        ShapeError: Prompt and mask do not fit.
    """
    config = config.filled()
    config.check_runnable()
    prompt_mask = _check_prompt(prompt, prompt_mask, (model_inputs or {}).get("inputs_embeds"))
    request = DecodeRequest(
        model=model,
        prompt=prompt,
        prompt_mask=prompt_mask,
        model_inputs=dict(model_inputs or {}),
        config=config,
        processors=LogitsProcessorList(processors or ()),
        warpers=build_warpers(config),
        stopping=build_stopping(config, tokenizer, stopping or ()),
        max_length=length_limit(config, prompt.shape[1]),
        pad_token=_pad_token(config),
        streamer=streamer,
        generators=generator,
        logprobs=logprobs or bool(config.output_logprobs),
        past=past,
    )
    _check_generators(request)
    return request


def _speculate(request: DecodeRequest, assistant: Decoder | None, inputs: dict[str, Any]) -> GenerateOutput:
    config, copies = request.config, request.config.num_return_sequences or 1
    own = None if assistant is None else own_request(request, assistant, inputs)
    drafter: Drafter
    record = Record(config)
    with round_places(request, own) as (place, own_place):
        state, logits = start(request, copies, record, place)
        if own is None:
            drafter = PromptLookup(config.prompt_lookup_num_tokens or 1, config.max_matching_ngram_size or 2)
        elif drafts_from_states(own):
            drafter = StateDrafter(own.model, request, state)
        else:
            drafter = AssistantModel(own, request, copies, own_place)
        if place is None or not fits(request, state):
            return speculate(request, drafter, state, logits, record)
        return run_rounds(request, drafter, state, logits, place)


def length_limit(config: GenerationConfig, prompt_length: int) -> int:
    """The length limit in tokens, prompt included; max_new_tokens wins over max_length.

    Raises:
        GenerationError: The prompt leaves no room for a token.
    """
    if config.max_new_tokens is not None:
        return prompt_length + config.max_new_tokens
    limit = config.max_length or 20
    if prompt_length >= limit:
        raise GenerationError(
            f"the prompt has {prompt_length} tokens, but max_length={limit} counts prompt and new tokens together: "
            "raise max_length, or set max_new_tokens."
        )
    return limit


def _check_prompt(prompt: Tensor, mask: Tensor | None, embeddings: Tensor | None) -> Tensor | None:
    """The mask as bool, or None when it hides nothing; it covers the embeddings when they stand for the prompt."""
    if prompt.dim() != 2 or prompt.is_floating_point() or prompt.shape[0] == 0:
        raise ShapeError(
            f"the prompt has shape {tuple(prompt.shape)} and dtype {prompt.dtype}: pass token ids, integers, shaped "
            "(batch, length) with a batch of at least 1."
        )
    if mask is None:
        return None
    shape = prompt.shape if embeddings is None else embeddings.shape[:2]
    if mask.shape != shape:
        raise ShapeError(
            f"attention_mask has shape {tuple(mask.shape)}, but the prompt has {tuple(shape)}: one entry per prompt "
            "token is needed."
        )
    mask = mask.to(device=prompt.device, dtype=torch.bool)
    if bool(mask.all()):
        return None
    if not bool(mask[:, -1].all()):
        row = int((~mask[:, -1]).nonzero()[0])
        raise GenerationError(
            f"row {row} of attention_mask ends in 0: prompts of different lengths are padded at the left for "
            "generation. Tokenize with padding_side='left'."
        )
    return mask


def _pad_token(config: GenerationConfig) -> int:
    """What rows that are done go on with: the pad token, else the first end token, else 0."""
    if config.pad_token_id is not None:
        return int(config.pad_token_id)
    return config.eos_ids[0] if config.eos_ids else 0


def _check_generators(request: DecodeRequest) -> None:
    """A list of generators must hold one per row."""
    if not isinstance(request.generators, (list, tuple)):
        return
    rows = request.prompt.shape[0] * (request.config.num_return_sequences or 1)
    if len(request.generators) != rows or request.config.num_beams != 1:
        raise GenerationError(
            f"{len(request.generators)} generators were passed for {rows} rows: pass one per row (beams take a single "
            "one), or a single generator for all."
        )
