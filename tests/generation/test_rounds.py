"""Drafts in captured rounds: what comes out is what the loop writes, and the host is asked for nothing on the way."""

from __future__ import annotations

from copy import deepcopy
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from audiomm import WhisperForCausalLM, WhisperForConditionalGeneration
from audiomm.base.errors import NumericalError
from audiomm.generation import (
    CompileConfig,
    GenerationMixin,
    MaxLengthCriteria,
    TextStreamer,
    WhisperTimeStampLogitsProcessor,
    rounds,
    runners,
)
from audiomm.generation.runners import Runner
from audiomm.models.gemma3n import Gemma3nForCausalLM, Gemma3nTextConfig
from audiomm.models.gemma4 import Gemma4AssistantConfig, Gemma4AssistantForCausalLM

PLAIN = {"disable_compile": True}
SURE = {"assistant_confidence_threshold": 0.0}
EOS = 90


@pytest.fixture
def model(tiny_whisper_config: Any) -> Any:
    """A tiny Whisper with room for 256 tokens, whose texts end at different lengths."""
    torch.manual_seed(7)
    made = WhisperForConditionalGeneration(tiny_whisper_config(max_target_positions=256, init_std=0.5)).eval()
    made.generation_config.update(eos_token_id=EOS, pad_token_id=0, max_new_tokens=60)
    return made


def noisy(model: Any, noise: float) -> Any:
    """A copy whose drafts are right the more often the less noise there is, and which counts as cheap."""
    other, generator = deepcopy(model), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in other.parameters():
            weight += noise * torch.randn(weight.shape, generator=generator) * weight.abs().mean()
    return other


@pytest.fixture(autouse=True)
def _drafts_are_cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    from audiomm.generation import drafts

    monkeypatch.setattr(drafts, "_share_of_weights", lambda model, target: 0.1)


@pytest.fixture
def features() -> torch.Tensor:
    return torch.randn(3, 8, 40, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def hear(model: Any, features: Any) -> Any:
    """Calls generate() as every model has it, on three windows."""
    # The first call moves weights together, and changes the model in this.
    GenerationMixin.generate(model, features, max_new_tokens=2)
    return lambda rows=3, **options: GenerationMixin.generate(model, features[:rows], **options)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"eos_token_id": [EOS, 3, 11, 12]},
    {"suppress_tokens": [4, 5, 6], "begin_suppress_tokens": [7], "pad_token_id": EOS},
    {"remove_invalid_values": True, "max_length": 30, "max_new_tokens": None, "eos_token_id": None},
]


@pytest.mark.parametrize(
    ("rows", "drafts", "options", "noise"),
    [(1, 4, OPTIONS[0], 0.02), (3, 1, OPTIONS[0], 0.02), (3, 4, OPTIONS[0], 1.0)]
    + [(3, 6, options, 0.02) for options in OPTIONS],
)
def test_captured_rounds_write_what_plain_steps_write(hear, model, graphs, rows, drafts, options, noise):
    wanted = hear(rows, **options, **PLAIN)
    drafting = options | SURE | {"assistant_model": noisy(model, noise), "num_assistant_tokens": drafts}
    # The first call changes the assistant.
    for _ in range(2):
        assert torch.equal(hear(rows, **drafting), wanted)
    assert graphs.replays > 10 / drafts


def test_each_row_takes_as_many_drafts_as_are_right(hear, model, graphs):
    options = {"eos_token_id": None, "return_dict_in_generate": True}
    right = hear(**options, **SURE, assistant_model=noisy(model, 0.0), num_assistant_tokens=6)
    # The first token and then seven a round.
    assert right.draft_counts == {"rounds": 9, "drafted": 9 * 3 * 6, "accepted": 3 * 59 - 27}
    other = noisy(model, 0.015)
    drafting = options | SURE | {"assistant_model": other, "num_assistant_tokens": 6}
    captured, plain = hear(**drafting), hear(**drafting, **PLAIN)
    assert torch.equal(captured.sequences, plain.sequences)
    # The loop drafts no further than the longest row may go, which the others need not heed here.
    assert 12 < captured.draft_counts["rounds"] <= plain.draft_counts["rounds"] <= captured.draft_counts["rounds"] + 2
    assert 0 <= captured.draft_counts["accepted"] - plain.draft_counts["accepted"] <= 6


def test_a_second_call_replays_what_the_first_recorded(hear, model, graphs):
    other = noisy(model, 0.0)
    drafting = SURE | {"assistant_model": other, "num_assistant_tokens": 3, "eos_token_id": None}
    hear(**drafting)
    hear(**drafting)
    captures, warm_ups = graphs.captures, graphs.warm_ups
    assert captures >= 1
    wanted = hear(decoder_input_ids=torch.full((3, 2), 7), eos_token_id=None, **PLAIN)
    for _ in range(2):
        # Neither another prompt nor another limit in the same bucket needs other graphs.
        assert torch.equal(hear(**drafting, decoder_input_ids=torch.full((3, 2), 7)), wanted)
        assert torch.equal(hear(**drafting, decoder_input_ids=torch.full((3, 2), 7), max_new_tokens=38), wanted[:, :40])
    assert (graphs.captures, graphs.warm_ups) == (captures, warm_ups)


def test_drafts_that_do_not_pay_pause(hear, model, graphs):
    got = hear(assistant_model=noisy(model, 1.0), num_assistant_tokens=20, eos_token_id=None,
               return_dict_in_generate=True)  # fmt: skip
    counts = got.draft_counts
    # The number of drafts was left to how sure the assistant is: five of them in two times sixteen rounds.
    assert counts["rounds"] + counts["accepted"] / 3 >= 59
    assert 16 * 3 * 5 <= counts["drafted"] <= 34 * 3 * 5 < counts["rounds"] * 3 * 5


@pytest.mark.parametrize("how", ["captured", "compiled"])
def test_timestamps_and_scores_of_a_transcription_are_the_same(model, features, graphs, monkeypatch, how):
    model.generation_config.update(suppress_tokens=[4, 5])
    model.generation_config.no_timestamps_token_id, model.generation_config.is_multilingual = 69, False
    options = {"return_timestamps": True, "return_segments": True, "eos_token_id": 60, "max_new_tokens": 60}

    def hear(**more: Any) -> Any:
        return [one for row in model.generate(features, **options, **more)["segments"] for one in row]

    plain = hear(cache_implementation="dynamic")
    if how == "compiled":
        monkeypatch.setattr(runners, "_can_capture", lambda device: False)
    mode = {} if how == "captured" else {"compile_config": CompileConfig(backend="eager", fullgraph=True, mode=None)}
    # The assistant is a decoder that reads what the model's encoder made.
    assistant, own = WhisperForCausalLM(model.config).eval(), noisy(model, 0.01).state_dict()
    assistant.load_state_dict({name: weight for name, weight in own.items() if ".encoder." not in name})
    quick = hear(**mode, **SURE, assistant_model=assistant, num_assistant_tokens=2)
    assert (graphs.replays > 10) == (how == "captured")
    assert [one["tokens"].tolist() for one in plain] == [one["tokens"].tolist() for one in quick]
    assert [float(one["avg_logprob"]) for one in plain] == pytest.approx(
        [float(one["avg_logprob"]) for one in quick], rel=1e-4
    )


def test_rules_for_timestamps_begin_where_each_prompt_ends(hear, model, graphs):
    ids = SimpleNamespace(no_timestamps_token_id=69, eos_token_id=60, max_initial_timestamp_index=5)
    drafting = SURE | {"assistant_model": noisy(model, 0.01), "num_assistant_tokens": 3}
    counts = []
    for length, begin in ((1, 1), (1, 1), (6, 6), (6, 4), (3, 3)):
        options = {"eos_token_id": 60, "logits_processor": [WhisperTimeStampLogitsProcessor(ids, begin_index=begin)]}
        options["decoder_input_ids"] = torch.tensor([[7, 80, 9, 75, 72, 8][:length]] * 3)
        assert torch.equal(hear(**options, **drafting), hear(**options, **PLAIN))
        counts.append(graphs.captures)
    # Rounds with drafts and without, twice, as the first call changes the assistant; none for a place to begin.
    assert 0 < counts[0] <= 2
    assert counts[2] == counts[-1] <= 4


@pytest.mark.slow
def test_compiled_rounds_write_what_plain_steps_write_and_compile_once(hear, model):
    torch._dynamo.reset()
    other = noisy(model, 0.02)
    config = CompileConfig(backend="aot_eager", fullgraph=True, mode=None)
    wanted = hear(**PLAIN, max_new_tokens=20)
    drafting = SURE | {"assistant_model": other, "num_assistant_tokens": 2, "compile_config": config}
    drafting["max_new_tokens"] = 20
    # The first call changes the assistant; a prompt is compiled at its third.
    for _ in range(4):
        assert torch.equal(hear(**drafting), wanted)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(hear(**drafting), wanted)


def test_prompt_lookup_runs_in_rounds_too(hear, graphs):
    wanted = hear(max_new_tokens=100, eos_token_id=None, **PLAIN)
    for size in (2, 4):
        got = hear(
            max_new_tokens=100, eos_token_id=None, prompt_lookup_num_tokens=4, max_matching_ngram_size=size,
            return_dict_in_generate=True,
        )  # fmt: skip
        assert torch.equal(got.sequences, wanted)
        assert got.draft_counts["rounds"] + got.draft_counts["accepted"] / 3 >= 99 > got.draft_counts["rounds"]
    assert graphs.captures >= 2


# ---------------------------------------------------------------------- Gemma 4

SLIDING, FULL = "sliding_attention", "full_attention"


def gemma_prompt() -> dict[str, Any]:
    prompt = torch.randint(3, 90, (3, 9), generator=torch.Generator().manual_seed(0))
    prompt[1, :4] = 0
    return {
        "inputs": prompt, "attention_mask": prompt != 0, "max_new_tokens": 80, "eos_token_id": [3, 77],
        "pad_token_id": 0,
    }  # fmt: skip


def drafter_for(gemmas: Any, model: Any, **values: Any) -> Any:
    own = {**gemmas._SIZES_4.TEXT, "hidden_size": 16, "num_hidden_layers": 4, "layer_types": [SLIDING] * 3 + [FULL]}
    own |= {"vocab_size_per_layer_input": 0}
    own |= {name: getattr(model.config, name) for name in ("attention_k_eq_v", "num_global_key_value_heads")}
    config = Gemma4AssistantConfig(
        text_config=own, backbone_hidden_size=model.config.hidden_size, num_centroids=8,
        centroid_intermediate_top_k=3, **values,
    )  # fmt: skip
    return gemmas._SIZES_4.widen(Gemma4AssistantForCausalLM(config))


@pytest.mark.parametrize(("kind", "ordered"), [("dense", True), ("per-layer", False), ("experts", False)])
def test_a_drafter_of_states_changes_nothing(gemmas, graphs, kind, ordered):
    gemma = gemmas._SIZES_4.make(kind)
    helper, prompt = drafter_for(gemmas, gemma, use_ordered_embeddings=ordered), gemma_prompt()
    wanted = gemma.generate(**prompt, **PLAIN)
    for _ in range(2):
        got = gemma.generate(**prompt, assistant_model=helper, num_assistant_tokens=3)
        assert torch.equal(got, wanted)
    assert graphs.replays > 30
    # A drafter that was moved is not read where it was.
    assert torch.equal(gemma.generate(**prompt, assistant_model=helper.double(), num_assistant_tokens=3), wanted)


def test_good_drafts_of_states_save_rounds_in_every_row(gemmas, graphs, monkeypatch):
    gemma = gemmas._SIZES_4.make("dense")
    helper, prompt = drafter_for(gemmas, gemma), gemma_prompt() | {"eos_token_id": None}
    wanted = gemma.generate(**prompt, **PLAIN)
    padding, calls = (~prompt["attention_mask"]).sum(1, keepdim=True), count()
    wrong, kind = torch.tensor([[7], [4], [50]]), type(helper)
    inner = kind.forward

    def told(self: Any, **arguments: Any) -> Any:
        # Knows the future, but errs at some places, which are others in each row.
        answer = inner(self, **arguments)
        place = arguments["position_ids"] + padding + 1 + next(calls) % 5
        best = wanted.gather(1, place.clamp(max=wanted.shape[1] - 1))
        best = torch.where(place % wrong == 0, 1, best)
        answer.logits = (torch.arange(answer.logits.shape[-1]) == best[..., None]).float()
        return answer

    monkeypatch.setattr(kind, "forward", told)
    got = gemma.generate(**prompt, assistant_model=helper, num_assistant_tokens=5, return_dict_in_generate=True)
    assert torch.equal(got.sequences, wanted)
    assert graphs.replays > 10
    # As many rounds as the row with most errors needs, which takes four tokens a round; the others are done before.
    assert got.draft_counts["rounds"] <= 24
    assert got.draft_counts["accepted"] > 3 * (79 - got.draft_counts["rounds"])


def gemma3n(gemmas: Any) -> Any:
    text = gemmas._SIZES_3N.TEXT | {"num_hidden_layers": 4, "layer_types": [SLIDING, FULL] * 2}
    text |= {"num_kv_shared_layers": 2, "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0]}
    model = Gemma3nForCausalLM(Gemma3nTextConfig(**text)).eval()
    gemmas._SIZES_3N.scatter(model, 5)
    return model


@pytest.mark.parametrize(("kind", "noise"), [("dense", 0.0), ("dense", 0.05), ("per-layer", 0.05), ("gemma3n", 0.02)])
def test_rows_that_part_see_their_windows(gemmas, graphs, kind, noise):
    gemma, prompt = gemma3n(gemmas) if kind == "gemma3n" else gemmas._SIZES_4.make(kind), gemma_prompt()
    wanted = gemma.generate(**prompt, **PLAIN)
    helper = noisy(gemma, noise)
    for _ in range(2):
        assert torch.equal(gemma.generate(**prompt, **SURE, assistant_model=helper, num_assistant_tokens=5), wanted)
    assert graphs.replays > 4


@torch.no_grad()
def test_a_cache_that_was_handed_out_goes_on_from_where_each_row_is(gemmas, graphs):
    gemma = gemmas._SIZES_4.make("dense")
    prompt = gemma_prompt()
    drafting = {"assistant_model": noisy(gemma, 0.05), "num_assistant_tokens": 4, "return_dict_in_generate": True}
    for eos in (None, [3, 77, 20, 21]):
        prompt["eos_token_id"] = eos
        output = gemma.generate(**prompt, **SURE, **drafting)
        cache, texts = output.past_key_values, []
        for row, mask in zip(output.sequences.tolist(), prompt["attention_mask"].tolist(), strict=True):
            ends = [place + 1 for place, token in enumerate(row) if eos and place >= 9 and token in eos]
            texts.append(row[mask.index(True) : (ends or [len(row)])[0]])
        newest = torch.tensor([text[-1:] for text in texts])
        logits = gemma.step(newest, cache).logits[:, -1]
        for text, scores in zip(texts, logits, strict=True):
            assert (gemma(torch.tensor([text])).logits[0, -1] - scores).abs().max() < 1e-3
    assert graphs.replays > 10


# ---------------------------------------------------------------------- what it costs, and where it does not go


@pytest.mark.parametrize("kind", ["whisper", "drafter", "lookup"])
def test_rounds_need_no_wait_no_new_shape_and_no_new_place(hear, model, gemmas, graphs, launches, monkeypatch, kind):
    seen: list[tuple[Any, list[str], Any]] = []

    class Watched(Runner):
        def run(self, unit: Any) -> None:
            with launches.Launches() as counter:
                unit.whole()
            seen.append((unit._count, counter.waits, (frozenset(counter.shapes), *launches.addresses(unit.cache))))

    monkeypatch.setattr(rounds, "make_runner", lambda *arguments: Watched())
    if kind == "drafter":
        gemma = gemmas._SIZES_4.make("per-layer")
        helper = drafter_for(gemmas, gemma, use_ordered_embeddings=True)
        gemma.generate(**gemma_prompt() | {"eos_token_id": None}, assistant_model=helper, num_assistant_tokens=2)
    else:
        how = {"assistant_model": noisy(model, 0.03)} if kind == "whisper" else {"prompt_lookup_num_tokens": 3}
        hear(**how, **SURE, num_assistant_tokens=3, suppress_tokens=[4], max_new_tokens=100, eos_token_id=None)
    assert len(seen) > 30
    assert not any(waits for _, waits, _ in seen)
    for drafts in {drafts for drafts, _, _ in seen}:
        # Whatever is made once is made in the first round.
        assert len({costs for number, _, costs in seen[1:] if number == drafts}) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"disable_compile": True},
        {"cache_implementation": "dynamic"},
        {"do_sample": True},
        {"renormalize_logits": True},
        {"repetition_penalty": 1.1},
        {"min_new_tokens": 20},
        {"stopping_criteria": [MaxLengthCriteria(15)]},
        {"output_scores": True, "return_dict_in_generate": True},
        {"max_new_tokens": 5},
        {"assistant": "eager"},
        {"assistant": "hooked"},
    ],
    ids="-".join,
)
def test_what_does_not_fit_in_rounds_is_left_to_the_loop(hear, model, graphs, options):
    assistant = noisy(model, 0.02)
    kind = options.pop("assistant", None)
    if kind == "eager":
        assistant.config.attn_implementation = "eager"
    elif kind == "hooked":
        assistant.model.decoder.layers[0].fc1.register_forward_hook(lambda *given: None)
    torch.manual_seed(5)
    plain = hear(**(options | PLAIN))
    torch.manual_seed(5)
    drafted = hear(**options, assistant_model=assistant)
    if "output_scores" in options:
        plain, drafted = plain.sequences, drafted.sequences
    assert options.get("do_sample") or torch.equal(plain, drafted)
    # The decode step of the call without drafts may have been captured; no round was.
    assert graphs.warm_ups == 0


def test_a_streamer_gets_its_tokens_from_the_loop(hear, model, graphs, capsys):
    class Letters:
        def decode(self, ids: Any, **options: Any) -> str:
            return " ".join(str(token) for token in ids)

    wanted = hear(1, **PLAIN)[0].tolist()
    hear(1, streamer=TextStreamer(Letters()), assistant_model=noisy(model, 0.02))
    assert capsys.readouterr().out.split() == [str(token) for token in wanted]
    assert graphs.warm_ups == 0


def test_the_switch_turns_rounds_off(hear, model, graphs, monkeypatch):
    monkeypatch.setenv(runners.SWITCH, "0")
    hear(assistant_model=noisy(model, 0.02))
    assert graphs.warm_ups == 0


def test_a_round_that_cannot_be_captured_goes_on_without_and_says_so(hear, model, graphs, caplog):
    graphs.fails = True
    wanted = hear(**PLAIN)
    assert torch.equal(hear(assistant_model=noisy(model, 0.02)), wanted)
    assert "The round of drafts cannot be captured as a CUDA graph" in caplog.text


def test_errors_of_a_captured_run_name_row_and_step(hear, model, graphs):
    options = SURE | {"assistant_model": noisy(model, 0.0), "num_assistant_tokens": 4, "eos_token_id": None}
    assert hear(**options).shape == (3, 61)
    with torch.no_grad():
        model.model.decoder.embed_positions.weight[12] = float("nan")
    with pytest.raises(NumericalError, match=r"row 0 step 1\d .*NaN"):
        hear(**options)
    with torch.no_grad():
        model.model.decoder.embed_positions.weight[12] = 0.0
    assert torch.equal(hear(**options), hear(eos_token_id=None, **PLAIN))


def test_texts_fill_the_last_place_of_the_decoder(hear, model, graphs):
    options = {"max_length": 256, "max_new_tokens": None, "eos_token_id": None}
    wanted = hear(**options, **PLAIN)
    assert wanted.shape == (3, 256)
    got = hear(**options, **SURE, assistant_model=noisy(model, 0.0), num_assistant_tokens=7)
    assert torch.equal(got, wanted)
    assert graphs.replays > 10
