"""The decode steps of Gemma 3n and 4 without modules: what the modules say, in few launches, for models as they are."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from audiomm import LoraConfig, add_lora
from audiomm.layers import fused, heads, projection
from audiomm.models.gemma3n import Gemma3nForCausalLM, Gemma3nTextConfig
from audiomm.models.gemma3n import step as gemma3n_step

KINDS = ["dense", "per-layer", "experts", "gemma3n"]
STEPS = 44
#: Two roads in float32 to one number: in models as small as these each is up to 1e-5 from float64.
LIMIT = 3e-5


def make(gemmas: Any, kind: str) -> Any:
    """A tiny model of a kind, with weights at which all parts count."""
    if kind != "gemma3n":
        return gemmas._SIZES_4.make(kind)
    model = Gemma3nForCausalLM(Gemma3nTextConfig(**gemmas._SIZES_3N.TEXT)).eval()
    gemmas._SIZES_3N.scatter(model, 3)
    return model


@pytest.fixture(scope="module", params=KINDS)
def model(gemmas: Any, request: pytest.FixtureRequest) -> Any:
    return make(gemmas, request.param)


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.no_grad():
        yield


def prompt(rows: int, padded: bool) -> tuple[Tensor, Tensor | None]:
    ids, mask = torch.randint(5, 90, (rows, 9)), torch.ones(rows, 9, dtype=torch.long)
    mask[0, :4] = 0
    return ids, mask if padded else None


def caches(model: Any, count: int, rows: int = 2, *, fixed: bool = False, padded: bool = False) -> list[Any]:
    """Caches that hold the same prompt."""
    ids, mask = prompt(rows, padded)
    made = [model.make_cache(rows, max_length=9 + STEPS, fixed=fixed) for _ in range(count)]
    for cache in made:
        model.prefill(ids, cache, attention_mask=mask)
    return made


def distance(model: Any, step: Any, steps: int = 14, **options: Any) -> float:
    """How far the logits of a step are from those of the modules, at most: relative error in the L2 norm."""
    slow, quick = caches(model, 2, **options)
    worst = 0.0
    for _ in range(steps):
        ids = torch.randint(5, 90, (options.get("rows", 2), 1))
        wanted, got = model.step(ids, slow).logits[:, -1], step(ids, quick)
        assert got.dtype == torch.float32
        worst = max(worst, float((got - wanted).norm() / wanted.norm()))
    assert quick.length == slow.length
    return worst


@pytest.mark.parametrize(
    ("rows", "padded", "fixed"),
    [
        (1, False, False),
        (5, True, False),
        (1, True, True),
        (5, False, True),
        *(pytest.param(*each, marks=pytest.mark.slow)
          for each in ((1, True, False), (5, False, False), (1, False, True), (5, True, True))),
    ],
)  # fmt: skip
def test_a_quick_step_gives_the_logits_of_the_modules(model, rows, padded, fixed):
    assert distance(model, model.quick_step(), STEPS, rows=rows, padded=padded, fixed=fixed) < LIMIT


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("padded", [pytest.param(False, marks=pytest.mark.slow), True])
def test_as_built_for_a_gpu_it_gives_them_too(model, as_gpu, kernels, padded):
    as_gpu(kernels)
    assert distance(model, copy.deepcopy(model).quick_step(), padded=padded, fixed=True) < LIMIT


def test_a_kernel_for_many_slots_reads_what_attention_reads(model, as_gpu, monkeypatch):
    as_gpu(kernels=True)
    monkeypatch.setattr(heads, "LONG", 20)
    seen = []
    monkeypatch.setattr(fused, "attended", lambda *parts, read=fused.attended: seen.append(1) or read(*parts))
    assert distance(model, copy.deepcopy(model).quick_step(), padded=True, fixed=True) < LIMIT
    assert seen


def test_positions_beyond_the_known_ones_are_worked_out(model, monkeypatch):
    monkeypatch.setattr(heads, "KNOWN_POSITIONS", 20)
    other = copy.deepcopy(model)
    assert distance(other, other.quick_step()) < LIMIT
    assert distance(other, other.quick_step(), fixed=True, padded=True) < LIMIT


@pytest.mark.parametrize(
    ("beams", "cache"),
    [(1, "static"), (3, "dynamic"), *(pytest.param(*each, marks=pytest.mark.slow)
                                      for each in ((1, "dynamic"), (3, "static")))],
)  # fmt: skip
def test_generation_writes_the_same_tokens_with_it_and_without(model, monkeypatch, beams, cache):
    ids, mask = prompt(3, padded=True)
    options = {"attention_mask": mask, "max_new_tokens": STEPS // 2, "num_beams": beams, "cache_implementation": cache}
    options |= {"do_sample": False, "eos_token_id": None, "no_repeat_ngram_size": 2}
    quick, taken = model.quick_step(), []
    monkeypatch.setattr(type(model), "quick_step", lambda self: taken.append(1) or quick)
    found = model.generate(ids, **options)
    assert taken
    monkeypatch.setattr(type(model), "quick_step", lambda self: None)
    assert torch.equal(model.generate(ids, **options), found)


@pytest.mark.parametrize("place", ["cpu", "gpu", "gpu with kernels"])
def test_in_bfloat16_it_is_as_near_to_float32_as_the_modules(model, as_gpu, monkeypatch, place):
    if place != "cpu":
        as_gpu(kernels=place != "gpu")
        monkeypatch.setattr(projection, "_PACKED_BYTES", 0)
    rounded = copy.deepcopy(model).bfloat16()
    precise = copy.deepcopy(rounded).float()
    # Many rows: where a router is near to choosing another expert, rounding is a matter of luck.
    rows = 24
    ids, _ = prompt(rows, padded=False)
    exact, slow, quick = precise.make_cache(rows), rounded.make_cache(rows), rounded.make_cache(rows)
    for part, cache in ((precise, exact), (rounded, slow), (rounded, quick)):
        part.prefill(ids, cache)
    step, errors = rounded.quick_step(), torch.zeros(2)
    for _ in range(STEPS // 3):
        ids = torch.randint(5, 90, (rows, 1))
        wanted = precise.step(ids, exact).logits[:, -1]
        found = rounded.step(ids, slow).logits[:, -1].float(), step(ids, quick)
        errors += torch.stack([(each - wanted).square().sum() / wanted.square().sum() for each in found])
    slow_error, quick_error = (errors / (STEPS // 3)).sqrt().tolist()
    assert quick_error <= 1.25 * slow_error + 1e-4


@pytest.mark.parametrize("rows", [1, 2])
def test_sparse_layers_read_what_their_gates_let_through_and_no_more(gemmas, monkeypatch, rows):
    model = make(gemmas, "gemma3n")
    monkeypatch.setattr(gemma3n_step, "LARGE", 0)
    up = model.model.layers[0].mlp.up_proj
    step = model.quick_step()
    assert all(weight.is_contiguous() for weight in model.parameters()), "as optimizers made their moments"
    assert model.quick_step() is step
    if rows == 1:
        hidden = torch.randn(1, model.config.hidden_size)
        wanted = model.model.layers[0].mlp(hidden)
        # Without the rows that the gates leave out, the answer is the same.
        gate = model.model.layers[0].mlp.gate_proj(hidden)
        closed = gate_strength(gate, model.model.layers[0].mlp.deviations) == 0
        assert closed.float().mean() > 0.5
        up.weight.data[closed[0]] = torch.nan
        assert torch.allclose(step.layers[0].mlp(hidden, None)[0], wanted, atol=1e-5)
    assert distance(model, model.quick_step(), rows=rows) < LIMIT


def gate_strength(gate: Tensor, deviations: float) -> Tensor:
    return (gate - gate.mean() - deviations * gate.std(correction=0)).clamp(min=0)


def test_ids_that_stand_for_media_have_rows_of_their_own(gemmas):
    model = gemmas.gemma3n_model(gemmas.processor_3n())
    size = model.get_decoder().embed_tokens.num_embeddings
    ids = torch.arange(size - 20, size - 4)[:, None]
    slow, quick = (model.make_cache(len(ids)) for _ in range(2))
    for cache in (slow, quick):
        model.prefill(torch.arange(5, 21)[:, None] + torch.arange(3), cache)
    wanted, got = model.step(ids, slow).logits[:, -1], model.quick_step()(ids, quick)
    assert (got - wanted).norm() < LIMIT * wanted.norm()


def test_marks_of_media_that_gemma_4_wrote_are_read_as_padding(gemmas):
    model = gemmas.gemma4_model(gemmas.processor_4())
    config = model.config
    marks = [config.image_token_id, config.video_token_id, config.audio_token_id]
    ids = torch.tensor([*marks, 7])[:, None]
    slow, quick = (model.make_cache(len(ids)) for _ in range(2))
    for cache in (slow, quick):
        model.prefill(torch.arange(5, 9)[:, None] + torch.arange(3), cache)
    wanted, got = model.step(ids, slow).logits[:, -1], model.quick_step()(ids, quick)
    assert (got - wanted).norm() < LIMIT * wanted.norm()
    assert not torch.allclose(got[0], got[3])


def test_a_changed_weight_is_seen(gemmas):
    model = make(gemmas, "per-layer")
    before = model.quick_step()
    assert model.quick_step() is before
    layer = model.model.layers[1]
    layer.self_attn.q_norm.weight.mul_(1.5)
    layer.layer_scalar.mul_(0.5)
    layer.mlp.up_proj.weight.mul_(0.5)
    assert model.quick_step() is not before
    assert distance(model, model.quick_step()) < LIMIT


def test_copies_and_saved_weights_are_those_of_a_model_without(gemmas):
    model = make(gemmas, "gemma3n")
    wanted = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert model.quick_step() is not None
    state = model.state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in wanted.items())
    other = copy.deepcopy(model)
    other.model.layers[0].mlp.up_proj.weight.zero_()
    assert model.model.layers[0].mlp.up_proj.weight.any()
    assert distance(other, other.quick_step()) < LIMIT


def test_attention_on_another_stream_than_the_first_has_none(gemmas):
    model = Gemma3nForCausalLM(Gemma3nTextConfig(**gemmas._SIZES_3N.TEXT | {"altup_active_idx": 1})).eval()
    assert model.quick_step() is None
    assert model.generate(torch.tensor([[5, 6]]), max_new_tokens=2, eos_token_id=None).shape == (1, 4)


def hooked(model: Any) -> None:
    model.get_decoder().layers[1].mlp.register_forward_hook(lambda module, inputs, output: output)


def replaced(model: Any) -> None:
    model.get_decoder().norm.forward = lambda hidden: hidden


def adapted(model: Any) -> None:
    add_lora(model, LoraConfig(target_modules=["q_proj"]))


def wrapped(model: Any) -> None:
    model.get_decoder().layers[0].self_attn.o_proj = nn.Sequential(model.get_decoder().layers[0].self_attn.o_proj)


CHANGES = {
    "training": lambda model: model.train(),
    "eager": lambda model: model.set_attn_implementation("eager"),
    "float16": lambda model: model.half(),
    "mixed types": lambda model: model.get_decoder().norm.double(),
    "hook": hooked,
    "replaced forward": replaced,
    "adapter": adapted,
    "other linear": wrapped,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["dense", "gemma3n"])
def test_a_model_that_must_be_walked_through_has_none(gemmas, kind, change):
    model = make(gemmas, kind)
    assert model.quick_step() is not None
    CHANGES[change](model)
    assert model.quick_step() is None
