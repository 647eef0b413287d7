"""GenerationMixin.generate(): settles what is to be done and hands it to `generate_tokens`."""

from __future__ import annotations

import copy
import difflib
import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..base.errors import GenerationError
from ..base.hub import Source, read_json
from ..base.outputs import GenerateOutput, ModelOutput
from ..layers.cache import Cache
from ..layers.projection import checked_once
from .arguments import as_ids, check_guests, told_of_errors
from .build import build_processors
from .config import FILE_NAME, GenerationConfig
from .fields import FIELDS
from .logits import LogitsProcessorList
from .sampling import Generators
from .stopping import StoppingCriteriaList
from .tokens import generate_tokens, length_limit, make_request

logger = logging.getLogger("audiomm.generation")

#: How many tokens are generated when nobody says.
DEFAULT_NEW_TOKENS = 20

#: Arguments of forward() that generation makes itself.
_OWN = {"self", "past_key_values", "labels", "use_cache", "cache_position", "return_dict", "kwargs", "cache"}


class GenerationMixin:
    """Gives a model `generate()`; the model brings the methods of `decode.Decoder`."""

    config: Any
    generation_config: GenerationConfig

    def can_generate(self) -> bool:
        """True: this class can."""
        return True

    def logits_processors(self, config: GenerationConfig, prompt_length: int) -> list[Any]:
        """Rules of the model itself, applied after those of the config; families that have some override this."""
        return []

    def load_side_files(self, source: Source) -> None:
        """Read generation_config.json, where the checkpoint has one."""
        path = source.find(FILE_NAME)
        self.generation_config = (
            GenerationConfig.from_model_config(self.config)
            if path is None
            else GenerationConfig.from_dict(read_json(path))
        )

    def save_side_files(self, folder: Path) -> None:
        """Write generation_config.json."""
        self.generation_config.save_pretrained(folder)

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: Iterable[Any] | None = None,
        stopping_criteria: Iterable[Any] | None = None,
        prefix_allowed_tokens_fn: Callable[[int, Tensor], Sequence[int]] | None = None,
        synced_gpus: bool | None = None,
        assistant_model: Any = None,
        streamer: Any = None,
        tokenizer: Any = None,
        generator: Generators = None,
        **kwargs: Any,
    ) -> Tensor | GenerateOutput:
        """Continue prompts token by token.

        The model is put into eval mode for the call; do not move it or change its mode meanwhile.

        Args:
            inputs: Decoder-only: (batch, length) int64 prompt, the same as input_ids=. Encoder-decoder: the
                encoder's main input (for Whisper input_features).
            generation_config: Options; what it leaves unset comes from the model's own generation_config.
            logits_processor: Further rules, applied after those of the options; one of a class takes the place of the
                options' rule of that class.
            stopping_criteria: Further criteria; one of a class takes the place of the options' criterion of that class
                (a MaxLengthCriteria that of max_length and max_new_tokens).
            prefix_allowed_tokens_fn: Function (batch index, tokens so far) -> allowed token ids.
            synced_gpus: Every process must go on until the last one is done; refused where there is more than one.
            assistant_model: A smaller model of the same vocabulary that drafts tokens; the result stays what it is.
            streamer: Takes tokens as they come (see `streamers`).
            tokenizer: Needed for stop_strings.
            generator: Source of random numbers; a list gives every row its own.
            **kwargs: Fields of GenerationConfig (they win over all configs), and inputs of the model. Those that
                only decode take past_key_values of an earlier output (return_dict_in_generate): `inputs` is the whole
                text then, and the media are those of what is new in it.

        Returns:
            (rows, length) int64 token ids, padded at the right, with the prompt for decoder-only models and the
            decoder's start token for encoder-decoders; a GenerateOutput with return_dict_in_generate.

        Raises:
            GenerationError: An option or a combination is impossible, or a keyword is not known.
            NumericalError: The model gave NaN.
        """
        with told_of_errors(streamer), eval_mode(self), eval_mode(assistant_model):
            check_guests(
                generation_config,
                logits_processor,
                stopping_criteria,
                prefix_allowed_tokens_fn,
                streamer,
                assistant_model,
            )
            _check_processes(synced_gpus)
            is_seq2seq = getattr(self.config, "is_encoder_decoder", False)
            past = None if is_seq2seq else kwargs.pop("past_key_values", None)
            config, model_inputs = self._resolve(generation_config, kwargs)
            prompt, mask, model_inputs = self._prepare_prompt(inputs, config, model_inputs)
            if past is not None:
                _check_past(self, past, prompt, model_inputs)
            config = _settle_lengths(config, prompt, model_inputs)
            stopping = StoppingCriteriaList(stopping_criteria or ())
            _heed_own_limit(config, stopping, prompt.shape[-1])
            processors = build_processors(
                config,
                prompt_length=prompt.shape[-1],
                max_length=length_limit(config, prompt.shape[-1]),
                prompt_mask=mask,
                encoder_input_ids=self._encoder_ids(prompt, model_inputs),
                prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
                model_processors=self.logits_processors(config, prompt.shape[-1]),
                user_processors=logits_processor or (),
            )
            request = make_request(
                self,  # type: ignore[arg-type]
                prompt,
                config,
                model_inputs=model_inputs,
                prompt_mask=mask,
                processors=LogitsProcessorList(processors),
                stopping=stopping,
                tokenizer=tokenizer,
                streamer=streamer,
                generator=generator,
                past=past,
            )
            output = generate_tokens(
                request,
                assistant_model=assistant_model,
                assistant_inputs=_inputs_for(assistant_model, model_inputs),
            )
        if not config.use_cache:
            output.past_key_values = None
        if not config.return_dict_in_generate:
            assert output.sequences is not None, "a loop always returns sequences"
            return output.sequences
        return output

    def compute_transition_scores(
        self,
        sequences: Tensor,
        scores: Sequence[Tensor],
        beam_indices: Tensor | None = None,
        normalize_logits: bool = False,
    ) -> Tensor:
        """The score that each generated token had when it was chosen.

        Args:
            sequences: (rows, tokens) as `generate(..., return_dict_in_generate=True, output_scores=True)` gives them.
            scores: Its `scores`, one (rows or beams, vocabulary) tensor a step.
            beam_indices: Its `beam_indices` after a beam search.
            normalize_logits: Make scores log-probabilities first.

        Returns:
            (rows, generated tokens), 0 behind the end of a row's beam.
        """
        steps = torch.stack(tuple(scores))
        steps = steps.log_softmax(dim=-1) if normalize_logits else steps
        if beam_indices is None:
            beam_indices = torch.arange(len(sequences), device=sequences.device)[:, None].expand(-1, len(steps))
        beams = beam_indices[:, : int((beam_indices >= 0).sum(dim=1).max())]
        tokens = sequences[:, sequences.shape[1] - beams.shape[1] :]
        places = torch.arange(beams.shape[1], device=beams.device)
        return steps[places, beams.clamp(min=0), tokens].masked_fill(beams < 0, 0.0)

    def _resolve(
        self, generation_config: GenerationConfig | None, kwargs: dict[str, Any]
    ) -> tuple[GenerationConfig, dict[str, Any]]:
        """Options from call, argument and model, with defaults filled in; and the keywords that are model inputs.

        Raises:
            GenerationError: A keyword is neither an option nor an input of the model.
        """
        config = getattr(self, "generation_config", None) or GenerationConfig.from_model_config(self.config)
        if generation_config is not None:
            config = config.overlaid(generation_config)
        names = input_names(self)
        options = {name: value for name, value in kwargs.items() if name in FIELDS or name not in names}
        config = copy.deepcopy(config)
        unknown = sorted(name for name, value in config.update(**options).items() if value is not None)
        if unknown:
            raise GenerationError(_unknown_keyword(unknown[0], names))
        if config.max_new_tokens is None and config.max_length is None:
            config.max_new_tokens = DEFAULT_NEW_TOKENS
        elif config.max_new_tokens is not None and options.get("max_length") is not None:
            logger.warning(
                "max_new_tokens=%d and max_length=%d are both set; max_new_tokens wins.",
                config.max_new_tokens,
                config.max_length,
            )
        config = config.filled()
        if "top_k" in kwargs and kwargs["top_k"] is None:
            # Said in the call, None is "no limit"; the default is for those who say nothing.
            config.top_k = 0
        config.check_runnable()
        inputs = {name: value for name, value in kwargs.items() if name not in options and value is not None}
        return config, inputs

    def _prepare_prompt(
        self, inputs: Tensor | None, config: GenerationConfig, model_inputs: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
        """The decoder's prompt (batch, length), its mask, and what else prefill is to get."""
        device = next(self.parameters()).device  # type: ignore[attr-defined]
        inputs_left = dict(model_inputs)
        main = getattr(self, "main_input_name", "input_ids")
        if inputs is not None:
            if inputs_left.get(main) is not None:
                raise GenerationError(f"{main} was passed twice, as `inputs` and by name: pass it once.")
            inputs_left[main] = inputs
        is_seq2seq = bool(getattr(self.config, "is_encoder_decoder", False))
        if is_seq2seq:
            # What decoder-only models call attention_mask is the encoder's here.
            if "attention_mask" in inputs_left:
                inputs_left["encoder_attention_mask"] = inputs_left.pop("attention_mask")
            mask = inputs_left.pop("decoder_attention_mask", None)
            prompt = inputs_left.pop("decoder_input_ids", None)
            if prompt is None:
                prompt = _start_tokens(config, _batch_size(inputs_left, main))
        else:
            mask = inputs_left.pop("attention_mask", None)
            prompt = inputs_left.pop("input_ids", None)
            if prompt is None and "inputs_embeds" in inputs_left:
                prompt = torch.zeros((_batch_size(inputs_left, main), 0), dtype=torch.long)
            elif prompt is None:
                prompt = _start_tokens(config, 1)
        prompt = as_ids("decoder_input_ids" if is_seq2seq else "input_ids", prompt, device=device)
        if mask is not None:
            mask = as_ids("attention_mask", mask, device=device)
        elif not is_seq2seq:
            mask = _mask_from_padding(prompt, config)
        return prompt, mask, inputs_left

    def _encoder_ids(self, prompt: Tensor, model_inputs: dict[str, Any]) -> Tensor | None:
        """The token ids that the rules about the encoder's input look at; a decoder-only model's prompt counts."""
        if not getattr(self.config, "is_encoder_decoder", False):
            return prompt
        ids = model_inputs.get("input_ids")
        return ids if isinstance(ids, Tensor) and ids.dim() == 2 and not ids.is_floating_point() else None


def input_names(model: Any) -> set[str]:
    """The keywords that the model's forward() and prefill() take, those that generation makes itself left out."""
    is_seq2seq = getattr(model.config, "is_encoder_decoder", False)
    names = {"decoder_input_ids", "decoder_attention_mask"} if is_seq2seq else {"input_ids", "attention_mask"}
    for method in (getattr(model, "forward", None), getattr(model, "prefill", None)):
        if method is not None:
            names.update(inspect.signature(method).parameters)
    return names - _OWN


def _check_processes(synced_gpus: bool | None) -> None:
    """Refuse a promise that the loops do not keep: processes that share one model must take the same steps."""
    distributed = torch.distributed
    if synced_gpus and distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise GenerationError(
            f"synced_gpus=True with {distributed.get_world_size()} processes: each process ends when its own rows are "
            "done, so a model that is split over processes would wait for ever. Gather the weights before generating, "
            "and pass synced_gpus=False."
        )


def _check_past(model: Any, past: Any, prompt: Tensor, inputs: dict[str, Any]) -> None:
    """See that a cache holds the beginning of a prompt, as far as its size tells.

    Raises:
        GenerationError: It does not, or is another model's.
    """
    if not isinstance(past, Cache):
        raise GenerationError(
            f"past_key_values is a {type(past).__name__}: pass those of an earlier output, which generate(..., "
            "return_dict_in_generate=True) and forward() give."
        )
    if past.specs != model.make_cache(1, max_length=None, fixed=False).specs:
        raise GenerationError("past_key_values are those of a model with other layers: pass this model's own.")
    if "inputs_embeds" in inputs:
        raise GenerationError("past_key_values go with the ids of the whole text: pass input_ids, not inputs_embeds.")
    rows, keys = len(prompt), past.layers[0].keys
    if keys is not None and len(keys) != rows:
        raise GenerationError(f"past_key_values hold {len(keys)} rows, but the prompt has {rows}: they must agree.")
    if past.length >= prompt.shape[1]:
        raise GenerationError(
            f"past_key_values hold {past.length} tokens and the prompt has {prompt.shape[1]}: pass the ids of the "
            "whole text, what was read before and what is new; at least one must be new."
        )


def _inputs_for(assistant: Any, model_inputs: dict[str, Any]) -> dict[str, Any]:
    """Those of the model's inputs that the assistant takes too."""
    names = set() if assistant is None else input_names(assistant)
    return {name: value for name, value in model_inputs.items() if name in names}


def _unknown_keyword(name: str, inputs: set[str]) -> str:
    if name in _OWN:
        return f"{name} cannot be passed to generate(): it makes its own. Leave it out."
    near = difflib.get_close_matches(name, sorted({*FIELDS, *inputs}), n=1)
    hint = f"did you mean {near[0]!r}?" if near else "check the spelling."
    return f"{name!r} is neither a generation option nor an input of this model; {hint}"


def _settle_lengths(config: GenerationConfig, prompt: Tensor, model_inputs: dict[str, Any]) -> GenerationConfig:
    """When the prompt is given as embeddings, limits that count it are lowered by its length."""
    embeddings = model_inputs.get("inputs_embeds")
    if embeddings is None or prompt.shape[-1] or config.max_new_tokens is not None:
        return config
    length = embeddings.shape[1]
    if (config.max_length or 0) <= length:
        raise GenerationError(
            f"the prompt has {length} embeddings, but max_length={config.max_length} counts prompt and new tokens "
            "together: raise max_length, or set max_new_tokens."
        )
    config.max_length = (config.max_length or 0) - length
    config.min_length = max(0, (config.min_length or 0) - length)
    return config


def _heed_own_limit(config: GenerationConfig, stopping: StoppingCriteriaList, prompt_length: int) -> None:
    """Put a length limit among the caller's criteria in the place of the config's; a search keeps its own."""
    limit = stopping.max_length
    if limit is not None and config.num_beams == 1:
        config.max_new_tokens, config.max_length = max(1, limit - prompt_length), None


def _batch_size(inputs: dict[str, Any], main: str) -> int:
    """Items in the batch, from the main input, or the encoder's outputs or embeddings that stand in for it.

    Raises:
        GenerationError: There is no input.
    """
    for name in (main, "inputs_embeds", "encoder_outputs"):
        value = inputs.get(name)
        if isinstance(value, (ModelOutput, tuple, list)) and len(value):
            value = value[0]
        if isinstance(value, Tensor):
            return int(value.shape[0])
    raise GenerationError(f"there is nothing to generate from: pass {main}.")


def _start_tokens(config: GenerationConfig, batch: int) -> Tensor:
    """A prompt of the start token alone, (batch, 1).

    Raises:
        GenerationError: The config has no start token, or a list that does not fit the batch.
    """
    start = config.decoder_start_token_id if config.decoder_start_token_id is not None else config.bos_token_id
    if start is None:
        raise GenerationError(
            "there is no prompt, and neither decoder_start_token_id nor bos_token_id says what to start from: pass "
            "a prompt, or set one of them in the generation config."
        )
    ids = torch.as_tensor(start, dtype=torch.long).flatten()
    if len(ids) not in (1, batch):
        raise GenerationError(
            f"decoder_start_token_id holds {len(ids)} ids for a batch of {batch}: pass one, or {batch} of them."
        )
    return ids.expand(batch).clone()[:, None]


def _mask_from_padding(prompt: Tensor, config: GenerationConfig) -> Tensor | None:
    """A mask that hides pad tokens, where these can be told from end tokens; else None."""
    pad = config.pad_token_id
    if pad is None or pad in config.eos_ids:
        return None
    mask = prompt != pad
    return None if bool(mask.all()) else mask


@contextmanager
def eval_mode(model: Any) -> Iterator[None]:
    """Eval mode inside the block, where nobody changes the model; what was in training mode is so again after it."""
    training = [module for module in model.modules() if module.training] if isinstance(model, nn.Module) else []
    for module in training:
        module.training = False
    try:
        with checked_once():
            yield
    finally:
        for module in training:
            module.training = True
