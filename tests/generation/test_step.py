"""The decode step as one unit: compiled or captured it writes what the loop writes, and says so where it cannot."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from audiomm import WhisperForConditionalGeneration
from audiomm.base.errors import GenerationError, NumericalError
from audiomm.generation import (
    CompileConfig,
    GenerationMixin,
    MaxLengthCriteria,
    StoppingCriteria,
    TextStreamer,
    runners,
    step,
)
from audiomm.layers.experts import Experts
from audiomm.models.gemma3n import Gemma3nForCausalLM, Gemma3nTextConfig

EOS = 90


@pytest.fixture
def model(tiny_whisper_config: Any) -> Any:
    """A tiny Whisper with room for 250 tokens, whose texts end at different lengths."""
    torch.manual_seed(7)
    made = WhisperForConditionalGeneration(tiny_whisper_config(max_target_positions=256, init_std=0.5)).eval()
    made.generation_config.update(eos_token_id=EOS, pad_token_id=0, max_new_tokens=40)
    return made


@pytest.fixture
def hear(model: Any) -> Any:
    """Calls generate() as every model has it, on three windows."""
    features = torch.randn(3, 8, 40, generator=torch.Generator().manual_seed(3))
    # The first call moves weights together, and changes the model in this.
    GenerationMixin.generate(model, features, max_new_tokens=2)
    return lambda rows=3, **options: GenerationMixin.generate(model, features[:rows], **options)


PLAIN = {"cache_implementation": "dynamic"}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"suppress_tokens": [4, 5, 6], "begin_suppress_tokens": [7]},
    {"min_new_tokens": 20, "forced_eos_token_id": EOS},
    {"renormalize_logits": True, "pad_token_id": EOS},
    {"eos_token_id": [EOS, 3, 11, 12], "max_new_tokens": 25},
    {"remove_invalid_values": True, "max_length": 30, "max_new_tokens": None},
]


@pytest.mark.parametrize(
    ("rows", "options"),
    [(1, OPTIONS[0]), *((3, options) for options in OPTIONS)],
    ids=lambda value: str(value) if isinstance(value, int) else ",".join(value) or "none",
)
def test_captured_steps_write_what_plain_ones_write(hear, graphs, options, rows):
    plain = hear(rows, **options, **PLAIN)
    assert graphs.warm_ups == 0
    for _ in range(2):
        assert torch.equal(hear(rows, **options), plain)
    assert graphs.replays > 10


def test_a_second_call_replays_what_the_first_recorded(hear, graphs):
    hear(min_new_tokens=40)
    assert (graphs.captures, graphs.warm_ups, graphs.replays) == (1, 2, 39 - 2 - 0)
    hear(min_new_tokens=40)
    assert (graphs.captures, graphs.warm_ups) == (1, 2)
    # Another number of rows, and another length of cache, have graphs of their own.
    hear(2, min_new_tokens=40)
    assert graphs.captures == 2
    hear(max_new_tokens=100, min_new_tokens=100)
    assert graphs.captures == 3


def test_captured_steps_draw_from_the_generator_that_was_given(hear, graphs):
    def draw(**options):
        generator = torch.Generator().manual_seed(5)
        return hear(do_sample=True, top_k=20, temperature=1.5, generator=generator, **options), generator

    plain, _ = draw(**PLAIN)
    captured, generator = draw()
    assert torch.equal(plain, captured)
    assert graphs.captures == 1
    assert graphs.generators == [generator]
    rows = [torch.Generator().manual_seed(seed) for seed in range(3)]
    hear(do_sample=True, generator=rows)
    assert graphs.generators == rows


def test_several_samples_of_a_prompt_are_captured_too(hear, graphs):
    def draw(**options):
        torch.manual_seed(1)
        return hear(2, do_sample=True, num_return_sequences=3, **options)

    assert torch.equal(draw(**PLAIN), draw())
    assert graphs.replays > 10


@pytest.mark.parametrize("how", ["captured", "compiled"])
def test_timestamps_and_scores_of_a_transcription_are_the_same(model, graphs, monkeypatch, how):
    model.generation_config.update(suppress_tokens=[4, 5])
    model.generation_config.no_timestamps_token_id, model.generation_config.is_multilingual = 69, False
    features = torch.randn(2, 8, 40, generator=torch.Generator().manual_seed(3))

    def hear(**options):
        options |= {"return_timestamps": True, "return_segments": True, "eos_token_id": 60, "max_new_tokens": 60}
        return model.generate(features, **options)["segments"]

    plain = hear(**PLAIN)
    if how == "compiled":
        monkeypatch.setattr(runners, "_can_capture", lambda device: False)
    quick = hear() if how == "captured" else hear(compile_config={"backend": "aot_eager"})
    assert (graphs.replays > 10) == (how == "captured")
    for one, other in zip(plain, quick, strict=True):
        assert [s["tokens"].tolist() for s in one] == [s["tokens"].tolist() for s in other]
        assert [s["avg_logprob"] for s in one] == pytest.approx([s["avg_logprob"] for s in other], rel=1e-5)


@pytest.mark.parametrize("kind", ["dense", "per-layer", "experts", "gemma3n"])
def test_gemmas_write_the_same_captured(gemmas, graphs, kind):
    if kind == "gemma3n":
        text = gemmas._SIZES_3N.TEXT | {
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        }
        text |= {
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
        }
        gemma = Gemma3nForCausalLM(Gemma3nTextConfig(**text)).eval()
        gemmas._SIZES_3N.scatter(gemma, 5)
    else:
        gemma = gemmas._SIZES_4.make(kind)
    prompt = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    prompt[1, :4] = 0
    options = {"attention_mask": prompt != 0, "max_new_tokens": 90, "eos_token_id": None, "pad_token_id": 0}
    plain = gemma.generate(prompt, **options, **PLAIN)
    assert torch.equal(gemma.generate(prompt, **options), plain)
    # Shorter, and in the same place as before.
    options["max_new_tokens"] = 60
    assert torch.equal(gemma.generate(prompt, **options), plain[:, : 9 + 60])
    assert graphs.captures == 1


class Nothing(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.mark.parametrize(
    "options",
    [
        {"disable_compile": True},
        {"cache_implementation": "dynamic"},
        {"cache_implementation": "static", "disable_compile": True},
        {"logits_processor": [lambda ids, scores: scores]},
        {"stopping_criteria": [Nothing()]},
        {"output_scores": True, "return_dict_in_generate": True},
        {"output_attentions": True, "return_dict_in_generate": True},
        {"repetition_penalty": 1.1},
        {"num_beams": 2},
    ],
    ids=lambda options: ",".join(options),
)
def test_what_is_more_than_tensors_runs_step_by_step(hear, graphs, options):
    hear(**options)
    assert (graphs.captures, graphs.warm_ups) == (0, 0)


def test_a_streamer_gets_its_tokens_step_by_step(hear, graphs, capsys):
    class Letters:
        def decode(self, ids, **options):
            return " ".join(str(token) for token in ids)

    wanted = hear(1, **PLAIN)[0].tolist()
    hear(1, streamer=TextStreamer(Letters()))
    assert capsys.readouterr().out.split() == [str(token) for token in wanted]
    assert graphs.warm_ups == 0


def test_the_switch_turns_capture_off(hear, graphs, monkeypatch):
    monkeypatch.setenv(runners.SWITCH, "0")
    hear()
    assert graphs.warm_ups == 0


def test_without_a_device_that_captures_nothing_is_captured(hear, monkeypatch):
    monkeypatch.setattr(runners, "Graphs", None)
    hear()


def test_a_step_that_cannot_be_captured_goes_on_without_and_says_so(hear, graphs, caplog):
    graphs.fails = True
    plain = hear(**PLAIN)
    assert torch.equal(hear(), plain)
    assert "cannot be captured as a CUDA graph" in caplog.text
    caplog.clear()
    assert torch.equal(hear(), plain)
    assert caplog.text == ""


def test_a_model_without_a_quick_step_is_not_captured(hear, graphs, model):
    model.config.attn_implementation = "eager"
    assert model.quick_step() is None
    hear()
    assert graphs.warm_ups == 0


def test_what_moved_or_changed_its_shape_is_named_with_the_way_out():
    runner = runners.Runner()
    keys = torch.zeros(2, 3)
    runner.check({"keys of layer 0": keys})
    runner.check({"keys of layer 0": keys})
    with pytest.raises(
        GenerationError, match=r"keys of layer 0 of shape \(2, 3\), but it is of shape \(2, 4\).*AUDIOMM_CA"
    ):
        runner.check({"keys of layer 0": torch.zeros(2, 4)})
    with pytest.raises(GenerationError, match="has moved from"):
        runner.check({"keys of layer 0": torch.zeros(2, 3)})


def test_changed_weights_are_seen(hear, graphs, model):
    hear()
    with torch.no_grad():
        model.proj_out.weight.mul_(-1.0)
    assert torch.equal(hear(), hear(**PLAIN))
    model.double()
    assert torch.equal(hear(), hear(**PLAIN))


def test_threads_on_one_model_do_not_meet(hear, graphs):
    plain = [hear(rows, **PLAIN) for rows in (1, 2, 3)] * 3
    with ThreadPoolExecutor(6) as pool:
        got = list(pool.map(hear, [1, 2, 3] * 3))
    assert all(torch.equal(one, other) for one, other in zip(plain, got, strict=True))


@pytest.mark.parametrize("has_quick_step", [True, False])
def test_copies_and_pickles_of_a_model_start_without_workplaces(hear, model, monkeypatch, has_quick_step):
    if not has_quick_step:
        monkeypatch.setattr(type(model), "quick_step", lambda self: None)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    names = set(model.state_dict())
    hear(compile_config={}, max_new_tokens=12)
    keeper = model.quick_step() or model
    assert len(vars(keeper)["_workplaces"]._free) == 1
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        kept = vars(other.quick_step() or other).get("_workplaces", runners.Shelf())
        assert len(kept._free) == 0
        assert set(other.state_dict()) == names


def test_few_workplaces_are_kept():
    places = runners.Shelf()
    made = [step.Workplace("captured", 64, True) for _ in range(runners.KEPT + 1)]
    for number, place in enumerate(made):
        places.give_back(number, place)
    assert places.take(0) is None
    assert places.take(runners.KEPT) is made[-1]
    assert places.take(runners.KEPT) is None


def test_a_cache_that_was_handed_out_is_not_used_again(hear, graphs):
    one = hear(return_dict_in_generate=True)
    assert graphs.replays > 10
    keys = one.past_key_values.view(0)[0].clone()
    hear(return_dict_in_generate=True, do_sample=True)
    assert torch.equal(one.past_key_values.view(0)[0], keys)


def test_time_and_length_end_captured_runs(hear, graphs):
    assert hear(max_time=1e-9, eos_token_id=None).shape == (3, 2)
    assert hear(stopping_criteria=[MaxLengthCriteria(15)], eos_token_id=None).shape == (3, 15)
    assert graphs.replays > 5


def test_errors_of_a_captured_run_name_row_and_step(hear, graphs, model):
    assert hear().shape[1] > 20
    with torch.no_grad():
        model.model.decoder.embed_positions.weight[12] = float("nan")
    with pytest.raises(NumericalError, match=r"row 0 step 12 .*NaN"):
        hear(min_new_tokens=30, eos_token_id=None)
    with torch.no_grad():
        model.model.decoder.embed_positions.weight[12] = 0.0
    assert torch.equal(hear(), hear(**PLAIN))


def test_room_comes_in_powers_of_two_up_to_the_models_positions(model):
    assert [step._bucket(length, model) for length in (5, 64, 65, 200, 256, 257)] == [64, 64, 128, 256, 256, 512]


# ---------------------------------------------------------------------- compiled


def graph_count() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def test_a_compiled_step_writes_what_plain_ones_write_and_compiles_once(hear):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    options = {"max_new_tokens": 100, "min_new_tokens": 100, "suppress_tokens": [4, 5]}
    plain = hear(**options)
    config = CompileConfig(backend="aot_eager", fullgraph=True, mode=None)
    for _ in range(2):
        assert torch.equal(hear(**options, compile_config=config), plain)
    assert graph_count() == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch.equal(hear(**options, compile_config=config, disable_compile=True), plain)
    # The prompt is compiled at the third call of its bucket.
    hear(**options, compile_config=config)
    assert graph_count() == 2
    with torch.compiler.set_stance("fail_on_recompile"):
        for length in (1, 2, 3):
            ids = torch.full((3, length), 7)
            wanted = hear(**options, decoder_input_ids=ids)
            assert torch.equal(hear(**options, decoder_input_ids=ids, compile_config=config), wanted)


def test_a_compiled_step_is_captured_too_where_that_is_possible(hear, graphs):
    plain = hear(**PLAIN)
    for _ in range(2):
        assert torch.equal(hear(compile_config={"backend": "aot_eager"}), plain)
    assert graphs.captures == 1
    assert graphs.replays > 10


def test_a_compiled_step_draws_the_same_tokens_from_a_seed(hear):
    def draw(**options):
        return hear(do_sample=True, top_k=20, generator=torch.Generator().manual_seed(5), **options)

    assert torch.equal(draw(), draw(compile_config={"backend": "eager"}))


def test_where_compiling_is_switched_off_a_compiled_step_runs_as_it_is(hear):
    options = {"max_new_tokens": 100, "min_new_tokens": 100}
    plain = hear(**options)
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(hear(**options, compile_config=CompileConfig()), plain)


def test_mode_and_options_of_a_compile_config_exclude_each_other(hear):
    with pytest.raises(GenerationError, match="mode='max-autotune' and options="):
        hear(compile_config={"mode": "max-autotune", "options": {"max_autotune": True}})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_inductor_compiles_the_step_once_for_calls_of_200_steps(hear):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    options = {"max_new_tokens": 200, "min_new_tokens": 200}
    plain = hear(**options)
    for _ in range(2):
        assert torch.equal(hear(**options, compile_config=CompileConfig(mode="default")), plain)
    assert graph_count() == 1


def test_a_step_that_would_wait_for_the_device_is_not_captured(gemmas, graphs, monkeypatch):
    model = gemmas._SIZES_4.make("experts")
    ids = torch.randint(5, 90, (2, 6))
    options = {"max_new_tokens": 20, "eos_token_id": None, "do_sample": False}
    wanted = model.generate(ids, **options, **PLAIN)
    monkeypatch.setattr(Experts, "waits", lambda experts, tokens: tokens > 1)
    assert torch.equal(model.generate(ids, **options), wanted)
    assert graphs.captures == graphs.warm_ups == 0
    model.generate(ids[:1], **options)
    assert graphs.captures == 1


def test_a_model_with_weights_in_several_places_is_not_captured(model, monkeypatch):
    monkeypatch.setattr(step, "quick_step", lambda model: object())
    assert step._can_be_captured(model, 1)
    model.proj_out.register_parameter("elsewhere", torch.nn.Parameter(torch.zeros(1, device="meta")))
    assert not step._can_be_captured(model, 1)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ["dense", "gemma3n"])
def test_the_default_type_of_new_tensors_does_not_matter(gemmas, graphs, kind, default):
    if kind == "gemma3n":
        model: Any = Gemma3nForCausalLM(Gemma3nTextConfig(**gemmas._SIZES_3N.TEXT)).eval()
    else:
        model = gemmas._SIZES_4.make(kind)
    ids = torch.tensor([[5, 6, 7, 5, 6, 7, 5]])
    options: list[dict[str, Any]] = [{}, {"prompt_lookup_num_tokens": 3}, {"num_beams": 2}]
    options = [{**one, "max_new_tokens": 20, "eos_token_id": None, "do_sample": False} for one in options]
    wanted = [model.generate(ids, **one) for one in options]
    torch.set_default_dtype(default)
    try:
        found = [copy.deepcopy(model).generate(ids, **one) for one in options]
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
