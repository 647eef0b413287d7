"""PreTrainedModel: from a folder to a model and back.

The road in is straight: files -> config -> module on the meta device -> names and shapes compared with the files'
headers -> tensors copied once into place -> tied weights tied -> eval. Nothing is read before everything fits.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from .config import PreTrainedConfig
from .errors import ConfigError, SaveError, UnsafeCheckpointError
from .hub import Source, make_folder
from .loading import compare, fill, has_untied, initialise, pick_dtype
from .placement import dispatch, plan_devices
from .quantization import (
    apply_torchao,
    fill_tied,
    quantised_linears,
    quantised_parts,
    refuse_quantised,
    settle_scheme,
    stand_in,
)
from .staging import staged
from .weights import GivenWeights, find_checkpoint, parse_dtype, save_weights, weight_files

# Weights of checkpoints up to this size are looked through for NaN and infinity while loading.
_VERIFY_BYTES = 2 * 2**30

# Accepted for the sake of calls written for transformers; they ask for what is always done here, or for nothing.
_NO_EFFECT = (
    "low_cpu_mem_usage", "trust_remote_code", "code_revision", "resume_download", "weights_only", "disable_mmap",
    "_fast_init",
)  # fmt: skip


class PreTrainedModel(nn.Module):
    """Base of all models.

    A family's class declares:

    Attributes:
        config_class: Its configuration.
        base_model_prefix: Name under which a model with a head keeps the model without; checkpoints of either load
            into the other.
        main_input_name: Name of the first argument of `forward`.
        tied_weights: {name: the name whose tensor it shares}, when config.tie_word_embeddings is set.
        new_weights: Prefixes of weights that a checkpoint may lack: a task head, initialised with a warning.
        ignored_weights: Patterns of names in a checkpoint that this class has no use for.
        renamed_weights: (pattern, replacement) for names that other classes of the family give to the same weights.
        quantized_linear: What takes the place of linear maps in a model of 8-bit weights.
        quantized_parts: What takes the place of other modules there, by class.
        float_linears: Patterns of the names of linear maps that are never quantised.
        quantization: The scheme this model was quantised by, or None.
    """

    config_class: ClassVar[type[PreTrainedConfig]] = PreTrainedConfig
    base_model_prefix: ClassVar[str] = "model"
    main_input_name: ClassVar[str] = "input_ids"
    tied_weights: ClassVar[dict[str, str]] = {}
    new_weights: ClassVar[tuple[str, ...]] = ()
    ignored_weights: ClassVar[tuple[str, ...]] = ()
    renamed_weights: ClassVar[tuple[tuple[str, str], ...]] = ()
    no_split_modules: ClassVar[tuple[str, ...]] = ()
    quantized_linear: ClassVar[Any] = None
    quantized_parts: ClassVar[dict[type[nn.Module], Any]] = {}
    float_linears: ClassVar[tuple[str, ...]] = ()
    quantization: str | None = None

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        if not isinstance(config, self.config_class):
            raise ConfigError(
                f"{type(self).__name__} is built from a {self.config_class.__name__}, not from a "
                f"{type(config).__name__}. To load a folder or hub id use {type(self).__name__}.from_pretrained(...)."
            )
        self.config = config
        self.name_or_path = config.name_or_path

    # ------------------------------------------------------------------ initial weights

    def post_init(self) -> None:
        """Give this model's weights their initial values and tie those that are shared; the end of every __init__.

        Models inside this one have done so for theirs.
        """
        if self.device.type != "meta":
            for module in self._own_modules(self):
                self.init_module(module)
        self.tie_weights()

    def init_weights(self) -> None:
        """Give all weights their initial values anew."""
        for module in reversed(list(self.modules())):
            self.init_module(module)

    @classmethod
    def _own_modules(cls, module: nn.Module) -> Iterator[nn.Module]:
        """The module and what is in it; parts come first, so that a module may override what its parts were given."""
        for child in module.children():
            if not isinstance(child, PreTrainedModel):
                yield from cls._own_modules(child)
        yield module

    @torch.no_grad()
    def init_module(self, module: nn.Module) -> None:
        """Initial values of one module's own weights; a family overrides this."""

    def tie_weights(self) -> None:
        """Make shared weights one tensor."""
        for name, source in self.active_ties().items():
            parent, _, leaf = name.rpartition(".")
            module = self.get_submodule(parent)
            if self.quantization is None or leaf in module._parameters:
                setattr(module, leaf, self.get_parameter(source))

    def active_ties(self) -> dict[str, str]:
        """`tied_weights` if the configuration ties them, else nothing."""
        return self.tied_weights if self.config.tie_word_embeddings else {}

    # ------------------------------------------------------------------ facts

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(parameter.dtype for parameter in self.parameters() if parameter.is_floating_point())

    def num_parameters(self, only_trainable: bool = False) -> int:
        """Number of weights, shared ones counted once."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not only_trainable)

    def get_memory_footprint(self) -> int:
        """Bytes of all weights and buffers, shared ones counted once."""
        return sum(t.numel() * t.element_size() for t in (*self.parameters(), *self.buffers()))

    @property
    def base_model(self) -> nn.Module:
        """The model without its head; the model itself when it has none."""
        return getattr(self, self.base_model_prefix, self)

    def set_attn_implementation(self, attn_implementation: str | dict[str, str]) -> None:
        """Choose "sdpa" or "eager" attention for all further calls, or for parts: {"vision_config": "eager"}.

        Raises:
            ConfigError: Another name was given.
        """
        self.config.choose_attention(attn_implementation)

    # ------------------------------------------------------------------ embeddings and training switches

    def get_input_embeddings(self) -> nn.Embedding:
        """The table of token embeddings."""
        raise AttributeError(f"{type(self).__name__} reads no tokens, so it has no token embeddings.")

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        raise AttributeError(f"{type(self).__name__} reads no tokens, so it has no token embeddings.")

    def get_output_embeddings(self) -> nn.Linear | None:
        """The language-model head, or None."""
        return None

    def set_output_embeddings(self, value: nn.Linear) -> None:
        raise AttributeError(f"{type(self).__name__} has no language-model head.")

    @torch.no_grad()
    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """Grow or shrink the vocabulary; kept rows keep their values.

        Args:
            new_num_tokens: Rows wanted; None for as many as there are.
            pad_to_multiple_of: Round the rows up to a multiple of this.
            mean_resizing: New rows are the mean of the old ones. False gives them a new model's initial values.
        """
        refuse_quantised(self, "given another vocabulary")
        old = self.get_input_embeddings()
        rows = old.num_embeddings if new_num_tokens is None else new_num_tokens
        if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
            raise ConfigError(f"new_num_tokens={rows!r}: a whole number of at least 1 is needed, like len(tokenizer).")
        if pad_to_multiple_of:
            rows = -(-rows // pad_to_multiple_of) * pad_to_multiple_of
        table = nn.Embedding(rows, old.embedding_dim, old.padding_idx, device="meta")
        table.weight = nn.Parameter(self._resized_rows(table, old.weight, mean_resizing))
        self.set_input_embeddings(table)
        head = self.get_output_embeddings()
        if head is not None:
            wider = nn.Linear(head.in_features, rows, bias=False, device="meta")
            wider.weight = nn.Parameter(self._resized_rows(wider, head.weight, mean_resizing))
            self.set_output_embeddings(wider)
        self.config.get_text_config().vocab_size = rows
        self.tie_weights()
        return table

    def _resized_rows(self, module: nn.Embedding | nn.Linear, old: Tensor, by_mean: bool) -> Tensor:
        """The rows of `old`, as many as `module` has; new ones are the mean or those that init_module gives."""
        rows = len(module.weight)
        if rows <= len(old):
            return old[:rows].clone()
        if by_mean:
            new = old.float().mean(0, keepdim=True).to(old.dtype).expand(rows - len(old), -1)
        else:
            module.to_empty(device=old.device).to(old.dtype)
            self.init_module(module)
            new = module.weight[len(old) :]
        return torch.cat((old, new))

    #: How often training began: copies made of weights are made anew then, as not every optimizer says what it changed.
    trainings: int = 0

    def train(self, mode: bool = True) -> Self:
        """Switch dropout and its kin on or off.

        Raises:
            ConfigError: The model is quantised, and on was asked for.
        """
        if mode:
            refuse_quantised(self, "trained")
            self.trainings += 1
        return super().train(mode)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """Recompute the layers' activations in the backward pass instead of keeping them."""
        self._set_checkpointing(True)

    def gradient_checkpointing_disable(self) -> None:
        self._set_checkpointing(False)

    @property
    def is_gradient_checkpointing(self) -> bool:
        return any(getattr(module, "gradient_checkpointing", False) for module in self.modules())

    def _set_checkpointing(self, on: bool) -> None:
        for module in self.modules():
            if "gradient_checkpointing" in vars(module):
                vars(module)["gradient_checkpointing"] = on

    def enable_input_require_grads(self) -> None:
        """Let gradients flow through frozen embeddings, as adapters under gradient checkpointing need."""
        self.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_(True))

    # ------------------------------------------------------------------ in

    @classmethod
    def _from_config(cls, config: PreTrainedConfig, **kwargs: Any) -> Self:
        """A model with initial weights; kwargs: dtype, attn_implementation."""
        if kwargs.get("attn_implementation"):
            config.choose_attention(kwargs["attn_implementation"])
        model = cls(config)
        dtype = parse_dtype(kwargs.get("dtype", kwargs.get("torch_dtype")))
        return model if dtype is None else model.to(dtype)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | None,
        *,
        config: PreTrainedConfig | str | os.PathLike[str] | None = None,
        state_dict: dict[str, Tensor] | None = None,
        key_mapping: dict[str, str] | None = None,
        dtype: str | torch.dtype | None = "auto",
        device: str | torch.device | None = None,
        device_map: Any = None,
        attn_implementation: str | dict[str, str] | None = None,
        output_loading_info: bool = False,
        ignore_mismatched_sizes: bool = False,
        strict: bool = True,
        verify: bool | None = None,
        variant: str | None = None,
        use_safetensors: bool | None = None,
        max_memory: dict[int | str, int | str] | None = None,
        offload_folder: str | os.PathLike[str] | None = None,
        quantize: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load a model from a folder, a hub id or the name of a bundled model, in eval mode.

        Args:
            pretrained_model_name_or_path: Folder with config.json and safetensors, or hub id; None with a
                configuration and a state_dict.
            config: Configuration to use instead of the checkpoint's.
            state_dict: Weights to load instead of the checkpoint's.
            key_mapping: Patterns (as of `re.sub`) of names in the checkpoint, and what to write instead.
            dtype: Type of the weights: "auto" is the one they are saved in; None is float32.
            device: Where the model goes.
            device_map: Placement by accelerate instead: "auto", a device, or {module name: device}.
            attn_implementation: "sdpa" (default) or "eager"; or a dict of these by part ("text_config", ...; "" is
                the whole).
            output_loading_info: Return (model, report of names) instead of the model.
            ignore_mismatched_sizes: Initialise weights of another shape anew, with a warning, instead of failing.
            strict: False initialises missing weights anew and skips unknown ones, with a warning, instead of failing.
            verify: Refuse NaN and infinite weights; None looks when the checkpoint is smaller than 2 GiB.
            variant: Reads model.<variant>.safetensors.
            use_safetensors: Only None and True are accepted; pickled weights are never read.
            max_memory, offload_folder: For device_map.
            quantize: "int8" keeps the weights of linear maps in 8 bits, on the CPU, where that is the quickest and
                takes a quarter of the memory; "auto" does what is quickest on this machine: "int8" or bfloat16 where
                the processor is made for it, nothing on a GPU. "int8wo", "int4wo", "fp8wo" and "fp8" are torchao's.
                A quantised model is for inference only.
            **kwargs: Options of the hub (revision, token, cache_dir, local_files_only, subfolder, force_download) and
                fields of the configuration to override.

        Raises:
            CheckpointError: Its subclasses say what is wrong with the files.
            ConfigError: The configuration is wrong.
            TypeError: An argument is not known.
        """
        if use_safetensors is False:
            raise UnsafeCheckpointError("use_safetensors=False: pickled weights can run code and are never read.")
        for name in _NO_EFFECT:
            kwargs.pop(name, None)
        dtype = kwargs.pop("torch_dtype", dtype)
        if pretrained_model_name_or_path is None and not (isinstance(config, PreTrainedConfig) and state_dict):
            raise ConfigError("from_pretrained(None) needs config=, a configuration, and state_dict=, the weights.")
        source = Source.take(pretrained_model_name_or_path or "", kwargs)
        config = cls._load_config(source, config, attn_implementation, kwargs)
        checkpoint = find_checkpoint(source, variant) if state_dict is None else GivenWeights.of(state_dict)
        with torch.device("meta"):
            model = cls(config)
        if has_untied(model, checkpoint, key_mapping):
            config.tie_word_embeddings = False
            with torch.device("meta"):
                model = cls(config)
        model.name_or_path = str(source.name)
        report = compare(model, checkpoint, key_mapping)
        fresh = report.settle(ignore_mismatched_sizes=ignore_mismatched_sizes, strict=strict)
        target = pick_dtype(dtype, config, checkpoint)
        devices = plan_devices(model, device_map, device, target, max_memory)
        if verify is None:
            verify = checkpoint.bytes_on_disk < _VERIFY_BYTES
        scheme, target = settle_scheme(quantize, dtype, target, devices)
        linears = quantised_linears(model, fresh) if scheme is not None else {}
        if scheme == "int8":
            stand_in(model, linears, quantised_parts(model, fresh))
        fill(model, checkpoint, report.sources, target, devices, verify)
        initialise(model, fresh, target, devices)
        model.tie_weights()
        if scheme == "int8":
            fill_tied(model, next(iter(devices.values())), target)
        elif scheme is not None:
            apply_torchao(model, scheme, linears)
        if scheme is not None:
            model.requires_grad_(False)
        model.config.dtype = str(target).removeprefix("torch.")
        if source.name:
            model.load_side_files(source)
        model.eval()
        dispatch(model, devices, offload_folder)
        return (model, report.to_dict()) if output_loading_info else model

    @classmethod
    def _load_config(
        cls, source: Source, config: Any, attn_implementation: Any, overrides: dict[str, Any]
    ) -> PreTrainedConfig:
        if isinstance(config, PreTrainedConfig):
            config = config.copy()
            if overrides:
                config.update(overrides)
        else:
            options = {name: value for name, value in vars(source).items() if name != "name" and value}
            name = source.name if config is None else config
            config, unknown = cls.config_class.from_pretrained(name, return_unused_kwargs=True, **options, **overrides)
            if unknown:
                raise TypeError(
                    f"from_pretrained() got {', '.join(map(repr, unknown))}, which is neither one of its arguments "
                    f"nor a field of {cls.config_class.__name__}."
                )
        if attn_implementation is not None:
            config.choose_attention(attn_implementation)
        return config

    def load_side_files(self, source: Source) -> None:
        """Read what lies beside the weights (generation_config.json); models that generate override this."""

    def save_side_files(self, folder: Path) -> None:
        """Write what lies beside the weights; models that generate override this."""

    # ------------------------------------------------------------------ out

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        max_shard_size: int | str = "50GB",
        variant: str | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Write config.json and safetensors into a folder that `from_pretrained` here and in transformers reads.

        Args:
            save_directory: The folder; made if need be.
            is_main_process: False writes nothing, for all but one process of a distributed job.
            state_dict: Weights to save instead of the model's own.
            max_shard_size: Largest file, in bytes or as "5GB"; larger checkpoints are split and get an index.
            variant: Writes model.<variant>.safetensors.
            push_to_hub: Upload the folder afterwards; kwargs: repo_id, token, private, commit_message.

        Raises:
            SaveError: The folder cannot be written. What stood there before stays whole.
        """
        refuse_quantised(self, "saved", SaveError)
        if not is_main_process:
            return
        folder = make_folder(save_directory)
        weights = self._weights_to_save() if state_dict is None else dict(state_dict)
        for name in self.active_ties():
            weights.pop(name, None)
        strange = next(
            (name for name, value in weights.items() if not isinstance(value, Tensor) or value.is_meta), None
        )
        if strange is not None:
            raise SaveError(
                f"{strange} cannot be saved: it is {type(weights[strange]).__name__} without values in memory. A model "
                "on the meta device, or spread over disks or processes, is gathered first: pass state_dict=."
            )
        config = self.config.copy()
        config.architectures = [type(self).__name__]
        config.dtype = str(self.dtype).removeprefix("torch.")
        with staged(folder, weight_files(folder, variant)) as stage:
            save_weights(weights, stage, max_shard_size, variant)
            self.save_side_files(stage)
            config.save_pretrained(stage)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", folder.name), folder=folder, **kwargs)

    def _weights_to_save(self) -> dict[str, Tensor]:
        """The weights by name.

        Raises:
            SaveError: Weights that are one in the file are two in the model.
        """
        weights: dict[str, Tensor] = self.state_dict()
        for name, source in self.active_ties().items():
            one, other = weights.get(name), weights.get(source)
            if one is None or other is None or one.is_meta or one.data_ptr() == other.data_ptr():
                continue
            if one.shape != other.shape or not torch.equal(one.to(other), other):
                raise SaveError(
                    f"{name} and {source} hold different values, but config.tie_word_embeddings=True says that they "
                    "are one: a file would lose one of them. Set it to False to keep both, or call tie_weights()."
                )
        return weights

    def push_to_hub(
        self,
        repo_id: str,
        *,
        folder: str | os.PathLike[str] | None = None,
        token: str | None = None,
        private: bool = False,
        commit_message: str = "Upload model",
    ) -> str:
        """Upload the model to the hub, making the repository if need be.

        Returns:
            Address of the commit.
        """
        import tempfile

        from huggingface_hub import HfApi

        if folder is None:
            with tempfile.TemporaryDirectory() as temporary:
                self.save_pretrained(temporary)
                return self.push_to_hub(
                    repo_id, folder=temporary, token=token, private=private, commit_message=commit_message
                )
        api = HfApi(token=token)
        repo = api.create_repo(repo_id, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repo.repo_id, folder_path=Path(folder), commit_message=commit_message))
