"""Greedy decoding and sampling: results, ends, padding, records and errors."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from audiomm.base.errors import GenerationError, NumericalError, ShapeError
from audiomm.base.hub import Source
from audiomm.base.outputs import GenerateOutput
from audiomm.generation import (
    DecodeRequest,
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteria,
    SuppressTokensLogitsProcessor,
    build_stopping,
    build_warpers,
    generate_tokens,
    make_request,
)
from audiomm.generation.choice import choose
from audiomm.generation.decode import Record, advance, start
from audiomm.generation.sampling import BLOCK, best_in_blocks


def greedy_twin(model, prompt, new, ends=(1,), pad=0):
    """One row at a time, one list at a time."""
    ids = prompt.tolist()
    out = list(ids)
    for _ in range(new):
        token = int(model(torch.tensor([out]))[0, -1].argmax())
        out.append(token)
        if token in ends:
            break
    return out + [pad] * (len(ids) + new - len(out))


def test_greedy_equals_the_slow_twin(toy, prompts):
    for seed in range(4):
        model = toy(seed).eval()
        got = model.generate(prompts, max_new_tokens=9)
        wanted = torch.tensor([greedy_twin(model, row, 9) for row in prompts])
        longest = got.shape[1]
        assert torch.equal(got, wanted[:, :longest])
        assert (wanted[:, longest:] == 0).all()


def test_the_prompt_runs_once_and_each_further_token_takes_one_step(toy, prompts):
    model = toy(eos_token_id=None)
    model.generate(prompts, max_new_tokens=6)
    assert model.calls == {"prefill": 1, "step": 5}


def test_left_padding_changes_nothing(toy, prompts):
    model = toy(2)
    alone = model.generate(prompts[:1], max_new_tokens=6)
    padded = torch.cat((torch.zeros(1, 3, dtype=torch.long), prompts[:1]), dim=1)
    mask = (padded != 0).long()
    assert torch.equal(model.generate(padded, attention_mask=mask, max_new_tokens=6)[:, 3:], alone)
    # Without a mask, pad tokens that are no end tokens are taken for padding.
    assert torch.equal(model.generate(padded, max_new_tokens=6)[:, 3:], alone)


def test_rows_that_end_go_on_with_the_pad_token_and_generation_stops_with_the_last(toy, prompts):
    model = toy(0)
    free = model.generate(prompts, max_new_tokens=8, eos_token_id=None)
    ends = sorted({int(free[0, 6]), int(free[1, 7]), int(free[2, 5])})
    got = model.generate(prompts, max_new_tokens=8, eos_token_id=ends, pad_token_id=23)
    wanted = [greedy_twin(model.eval(), row, 8, ends, 23) for row in prompts]
    assert got.tolist() == [row[: got.shape[1]] for row in wanted]
    assert (got[:, -1] != 23).any()


def test_without_a_pad_token_the_first_end_token_pads(toy, prompts):
    model = toy(0, pad_token_id=None)
    free = model.generate(prompts, max_new_tokens=8, eos_token_id=None)
    end = int(free[0, 5])
    got = model.generate(prompts, max_new_tokens=8, eos_token_id=[end, 1])
    assert (got[0, 5:] == end).all()


def test_minus_one_as_the_end_token_is_none(toy, prompts):
    wanted = toy(eos_token_id=None).generate(prompts, max_new_tokens=8)
    end = int(wanted[0, 7])
    assert torch.equal(toy(eos_token_id=end).generate(prompts, max_new_tokens=8, eos_token_id=-1), wanted)


def test_nobody_saying_how_long_gives_twenty_new_tokens(toy, prompts):
    assert toy(eos_token_id=None).generate(prompts).shape == (3, 25)


def test_max_length_counts_the_prompt_and_max_new_tokens_wins_over_it(toy, prompts, caplog):
    model = toy(eos_token_id=None)
    assert model.generate(prompts, max_length=8).shape == (3, 8)
    assert model.generate(prompts, max_length=8, max_new_tokens=2).shape == (3, 7)
    assert "max_new_tokens wins" in caplog.text


def test_a_prompt_that_fills_max_length_is_refused(toy, prompts):
    with pytest.raises(GenerationError, match="the prompt has 5 tokens, but max_length=5"):
        toy().generate(prompts, max_length=5)


def test_the_call_wins_over_the_argument_and_that_over_the_model(toy, prompts):
    model = toy(eos_token_id=None, max_new_tokens=4, suppress_tokens=[5])
    config = GenerationConfig(max_new_tokens=3)
    assert model.generate(prompts).shape[1] == 9
    assert model.generate(prompts, config).shape[1] == 8
    assert model.generate(prompts, generation_config=config, max_new_tokens=2).shape[1] == 7
    assert not (model.generate(prompts, config)[:, 5:] == 5).any()
    assert (config.max_new_tokens, config.suppress_tokens) == (3, None)
    assert model.generation_config.max_new_tokens == 4


def test_sampling_repeats_with_the_seed_and_takes_generators(toy, prompts):
    model = toy(eos_token_id=None)
    options = {"do_sample": True, "max_new_tokens": 8, "temperature": 1.5}
    torch.manual_seed(4)
    first = model.generate(prompts, **options)
    torch.manual_seed(4)
    assert torch.equal(model.generate(prompts, **options), first)
    own = model.generate(prompts, generator=torch.Generator().manual_seed(4), **options)
    assert torch.equal(own, first)
    assert not torch.equal(model.generate(prompts, **options), first)


def test_a_row_with_its_own_generator_draws_what_it_draws_alone(toy, prompts):
    model = toy(eos_token_id=None)
    options = {"do_sample": True, "max_new_tokens": 8, "temperature": 1.5}
    together = model.generate(prompts, generator=[torch.Generator().manual_seed(i) for i in range(3)], **options)
    for i in range(3):
        alone = model.generate(prompts[i : i + 1], generator=torch.Generator().manual_seed(i), **options)
        assert torch.equal(together[i], alone[0])


def test_the_wrong_number_of_generators_is_refused(toy, prompts):
    with pytest.raises(GenerationError, match="2 generators were passed for 3 rows"):
        toy().generate(prompts, do_sample=True, generator=[torch.Generator(), torch.Generator()])


def test_samples_follow_the_distribution(toy):
    model = toy(3, eos_token_id=None).eval()
    prompt = torch.tensor([[4, 7]])
    torch.manual_seed(0)
    got = model.generate(prompt, do_sample=True, top_k=0, max_new_tokens=1, num_return_sequences=4000)
    seen = torch.bincount(got[:, 2], minlength=24) / 4000
    assert (seen - model(prompt)[0, -1].softmax(-1)).abs().max() < 0.03


def test_several_sequences_are_sampled_from_one_prefill(toy, prompts):
    model = toy(eos_token_id=None)
    got = model.generate(prompts, do_sample=True, num_return_sequences=4, max_new_tokens=6, temperature=3.0)
    assert got.shape == (12, 11)
    assert torch.equal(got[:, :5], prompts.repeat_interleave(4, 0))
    assert len({tuple(row) for row in got[:4].tolist()}) > 1
    assert model.calls["prefill"] == 1


def test_scores_logits_and_logprobs_are_recorded(toy, prompts):
    model = toy(1)
    out = model.generate(
        prompts,
        max_new_tokens=6,
        suppress_tokens=[3],
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        output_logprobs=True,
    )
    assert isinstance(out, GenerateOutput)
    steps = out.sequences.shape[1] - 5
    assert len(out.scores) == len(out.logits) == steps
    assert torch.isinf(out.scores[0][:, 3]).all()
    assert not torch.isinf(out.logits[0]).any()
    total = torch.zeros(3)
    for row in range(3):
        for step in range(steps):
            token = int(out.sequences[row, 5 + step])
            total[row] += out.scores[step][row].log_softmax(-1)[token]
            if token == 1:
                break
    assert torch.allclose(out.logprobs, total, atol=1e-5)


def test_logprobs_are_taken_at_temperature_one(toy, prompts):
    model = toy(1, eos_token_id=None)
    torch.manual_seed(0)
    config = GenerationConfig(max_new_tokens=4, do_sample=True, temperature=5.0)
    out = generate_tokens(make_request(model.eval(), prompts, config, logprobs=True))
    logs = model(out.sequences[:, :-1]).log_softmax(-1)[:, 4:]
    chosen = logs.gather(-1, out.sequences[:, 5:, None])[:, :, 0].sum(1)
    assert torch.allclose(out.logprobs, chosen, atol=1e-4)


def test_a_plain_call_returns_a_tensor_with_grad_off(toy, prompts):
    got = toy().generate(prompts, max_new_tokens=2, output_scores=True)
    assert isinstance(got, torch.Tensor)
    assert got.dtype == torch.long


def test_generate_works_in_eval_mode_and_puts_the_mode_back(toy, prompts):
    model = toy(5)
    model.train()
    model.dropout.eval()
    first = model.generate(prompts, max_new_tokens=8)
    assert torch.equal(first, model.generate(prompts, max_new_tokens=8))
    assert model.training
    assert not model.dropout.training
    with pytest.raises(GenerationError):
        model.generate(prompts, num_beams=0)
    assert model.training


def test_nan_is_an_error_that_names_row_and_step(toy, prompts):
    for options in ({}, {"do_sample": True}, {"num_beams": 2}):
        model = toy(eos_token_id=None)
        model.nan_at = 7
        row = 5 if options.get("num_beams") else 2
        with pytest.raises(NumericalError, match=rf"row {row} step 2 \(after 7 tokens\)"):
            model.generate(prompts, max_new_tokens=6, **options)


def test_nan_is_replaced_where_asked_for(toy, prompts):
    model = toy(eos_token_id=None)
    model.nan_at = 7
    assert model.generate(prompts, max_new_tokens=6, remove_invalid_values=True).shape == (3, 11)


def test_no_token_left_to_choose_is_an_error(toy, prompts):
    for options in ({}, {"do_sample": True}, {"num_beams": 2}):
        with pytest.raises(GenerationError, match="row 0 step 0 .* every token is forbidden"):
            toy().generate(prompts, suppress_tokens=list(range(24)), max_new_tokens=3, **options)


def test_a_mask_that_ends_in_padding_is_refused(toy, prompts):
    mask = torch.ones_like(prompts)
    mask[1, -2:] = 0
    with pytest.raises(GenerationError, match="row 1 of attention_mask ends in 0"):
        toy().generate(prompts, attention_mask=mask)


def test_a_mask_of_another_shape_is_refused(toy, prompts):
    with pytest.raises(ShapeError, match=r"attention_mask has shape \(3, 4\), but the prompt has \(3, 5\)"):
        toy().generate(prompts, attention_mask=torch.ones(3, 4))


@pytest.mark.parametrize("prompt", [torch.zeros(0, 3, dtype=torch.long), torch.zeros(1, 3), torch.tensor([1, 2])])
def test_a_prompt_that_is_no_batch_of_ids_is_refused(toy, prompt):
    with pytest.raises(ShapeError, match="pass token ids"):
        toy().generate(prompt, attention_mask=torch.ones_like(prompt))


def test_an_unknown_keyword_is_refused_with_the_nearest_name(toy, prompts):
    with pytest.raises(GenerationError, match="'max_new_token' is neither .* did you mean 'max_new_tokens'"):
        toy().generate(prompts, max_new_token=3)
    with pytest.raises(GenerationError, match="did you mean 'attention_mask'"):
        toy().generate(prompts, atention_mask=3)
    with pytest.raises(GenerationError, match="'zzz' is neither .* check the spelling"):
        toy().generate(prompts, zzz=3)
    assert toy().generate(prompts, zzz=None, past_key_values=None, max_new_tokens=1).shape == (3, 6)
    with pytest.raises(GenerationError, match="cache_position cannot be passed"):
        toy().generate(prompts, cache_position=3)


def test_the_input_given_twice_is_refused(toy, prompts):
    with pytest.raises(GenerationError, match="input_ids was passed twice"):
        toy().generate(prompts, input_ids=prompts)


def test_the_prompt_may_be_named_or_come_from_the_start_token(toy, prompts):
    model = toy(bos_token_id=6)
    assert torch.equal(model.generate(input_ids=prompts, max_new_tokens=3), model.generate(prompts, max_new_tokens=3))
    assert model.generate(max_new_tokens=2)[0, 0] == 6
    with pytest.raises(GenerationError, match="there is no prompt, and neither decoder_start_token_id nor bos"):
        toy().generate(max_new_tokens=2)


def test_processes_that_must_stay_in_step_are_refused(toy, prompts, monkeypatch):
    assert toy().generate(prompts, synced_gpus=True, max_new_tokens=1).shape == (3, 6)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(GenerationError, match="synced_gpus=True with 2 processes"):
        toy().generate(prompts, synced_gpus=True, max_new_tokens=1)


def test_a_prompt_may_be_a_list(toy, prompts):
    model = toy()
    assert torch.equal(model.generate(prompts.tolist(), max_new_tokens=3), model.generate(prompts, max_new_tokens=3))


def test_the_cache_comes_back_unless_it_is_not_wanted(toy, prompts):
    model = toy()
    wanted = {"return_dict_in_generate": True, "max_new_tokens": 3, "eos_token_id": None}
    assert model.generate(prompts, **wanted).past_key_values.length == 7
    assert model.generate(prompts, use_cache=False, **wanted).past_key_values is None


def test_own_processors_and_criteria_are_used(toy, prompts):
    class AfterThree(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 8)

    model = toy(eos_token_id=None)
    free = model.generate(prompts, max_new_tokens=6)
    banned = free[0, 5].item()
    got = model.generate(
        prompts,
        max_new_tokens=6,
        logits_processor=[SuppressTokensLogitsProcessor([banned])],
        stopping_criteria=[AfterThree()],
    )
    assert got.shape == (3, 8)
    assert not (got[:, 5:] == banned).any()


def test_an_own_rule_of_a_class_takes_the_place_of_the_options_rule(toy, prompts):
    model = toy(eos_token_id=None)
    plain = model.generate(prompts, max_new_tokens=6)
    own = [SuppressTokensLogitsProcessor([4])]
    replaced = model.generate(prompts, max_new_tokens=6, suppress_tokens=plain.unique().tolist(), logits_processor=own)
    assert torch.equal(replaced, model.generate(prompts, max_new_tokens=6, suppress_tokens=[4]))
    longer = model.generate(prompts, max_new_tokens=6, stopping_criteria=[MaxLengthCriteria(prompts.shape[1] + 9)])
    assert torch.equal(longer, model.generate(prompts, max_new_tokens=9))
    end = int(plain[0, -3])
    ended = model.generate(prompts[:1], max_new_tokens=6, eos_token_id=2, stopping_criteria=[EosTokenCriteria(end)])
    assert torch.equal(ended, model.generate(prompts[:1], max_new_tokens=6, eos_token_id=end))


def test_top_k_none_in_the_call_means_no_limit(toy, prompts):
    model = toy(eos_token_id=None)
    model.generation_config.top_k = 1

    def draw(**options):
        return model.generate(prompts, do_sample=True, generator=torch.Generator().manual_seed(3), **options)

    assert torch.equal(draw(top_k=None), draw(top_k=0))
    assert not torch.equal(draw(top_k=None), draw())


def test_a_model_may_bring_rules_of_its_own(toy, prompts):
    class Careful(toy):
        def logits_processors(self, config, prompt_length):
            assert prompt_length == 5
            return [SuppressTokensLogitsProcessor(list(range(1, 20)))]

    got = Careful(0).generate(prompts, max_new_tokens=4)[:, 5:]
    assert set(got.flatten().tolist()) <= {0, 20, 21, 22, 23}


def test_allowed_tokens_may_be_named_by_a_function(toy, prompts):
    got = toy(eos_token_id=None).generate(
        prompts, max_new_tokens=5, prefix_allowed_tokens_fn=lambda item, ids: [10 + item, 15 + item]
    )
    for item, row in enumerate(got[:, 5:].tolist()):
        assert set(row) <= {10 + item, 15 + item}
    with pytest.raises(GenerationError, match="allows no token for batch item 0 after 5 tokens"):
        toy().generate(prompts, prefix_allowed_tokens_fn=lambda item, ids: [])


def test_a_static_cache_is_asked_for_with_its_length(toy, prompts):
    model = toy(eos_token_id=None)
    model.generate(prompts, max_new_tokens=4)
    assert (model.cache.fixed, model.cache.max_length) == (False, 9)
    model.generate(prompts, max_new_tokens=4, cache_implementation="static", disable_compile=True)
    assert (model.cache.fixed, model.cache.max_length) == (True, 9)
    model.generate(prompts, max_new_tokens=4, cache_implementation="static", max_cache_len=32)
    assert model.cache.max_length == 32


def test_max_time_ends_generation(toy, prompts):
    assert toy(eos_token_id=None).generate(prompts, max_new_tokens=50, max_time=1e-9).shape == (3, 6)


def test_encoder_decoders_start_from_their_start_token(seq2seq):
    model = seq2seq(1, eos_token_id=None)
    features = torch.randn(2, 24, generator=torch.Generator().manual_seed(0))
    got = model.generate(features, max_new_tokens=4)
    assert got.shape == (2, 5)
    assert (got[:, 0] == 2).all()
    assert torch.equal(model.generate(input_features=features, max_new_tokens=4), got)
    assert torch.equal(model.generate(encoder_outputs=(features,), max_new_tokens=4), got)
    longer = model.generate(features, decoder_input_ids=torch.tensor([[2, 5, 6]] * 2), max_new_tokens=4)
    assert longer[:, :3].tolist() == [[2, 5, 6]] * 2
    each = model.generate(features, decoder_start_token_id=[3, 4], max_new_tokens=4)
    assert each[:, 0].tolist() == [3, 4]


def test_encoder_decoders_without_input_or_start_say_so(seq2seq):
    with pytest.raises(GenerationError, match="there is nothing to generate from: pass input_features"):
        seq2seq().generate(max_new_tokens=2)
    with pytest.raises(GenerationError, match="holds 3 ids for a batch of 2"):
        seq2seq().generate(torch.zeros(2, 24), decoder_start_token_id=[3, 4, 5], max_new_tokens=2)


def test_attentions_are_one_entry_a_step_with_the_rows_of_the_beams(seq2seq):
    model = seq2seq(1, eos_token_id=None)
    out = model.generate(
        torch.zeros(2, 24), max_new_tokens=3, num_beams=3, output_attentions=True, return_dict_in_generate=True
    )
    assert [layers[0].shape[0] for layers in out.cross_attentions] == [6, 6, 6]
    assert len(out.decoder_attentions) == 3
    assert out.attentions is None


def test_a_stop_that_is_seen_a_step_late_changes_nothing(toy, prompts, monkeypatch):
    """What happens on a device that works ahead of the host."""

    class LateFlag:
        def __init__(self, device, at_once):
            self.pending = False

        def is_set(self, going):
            was, self.pending = self.pending, not bool(going.any())
            return was

    wanted = {"return_dict_in_generate": True, "output_scores": True, "output_logprobs": True}
    for seed in range(4):
        for new in (3, 9):
            plain = toy(seed, eos_token_id=[1, 2, 3, 4, 5]).generate(prompts, max_new_tokens=new, **wanted)
            with monkeypatch.context() as patch:
                patch.setattr("audiomm.generation.sample.StopFlag", LateFlag)
                late = toy(seed, eos_token_id=[1, 2, 3, 4, 5]).generate(prompts, max_new_tokens=new, **wanted)
            assert torch.equal(plain.sequences, late.sequences)
            assert torch.equal(plain.logprobs, late.logprobs)
            assert len(plain.scores) == len(late.scores) == plain.sequences.shape[1] - 5


def test_infinite_scores_are_an_error_when_sampling(toy, prompts):
    with pytest.raises(NumericalError, match="row 0 step 0"):
        toy().generate(
            prompts, do_sample=True, max_new_tokens=2, logits_processor=[lambda ids, scores: scores + float("inf")]
        )


def test_embeddings_may_stand_for_the_prompt(toy):
    class Embedding(toy):
        def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None):
            return super().forward(input_ids, attention_mask)

        def prefill(self, input_ids, cache, *, attention_mask=None, inputs_embeds=None, **flags):
            assert input_ids.shape == (inputs_embeds.shape[0], 0)
            return super().prefill(inputs_embeds[:, :, 0].long(), cache, attention_mask=attention_mask)

    prompt = torch.tensor([[5, 9, 4], [11, 3, 20]])
    wanted = toy(0, eos_token_id=None).generate(prompt, max_length=7)[:, 3:]
    model = Embedding(0, eos_token_id=None)
    embeddings = prompt[:, :, None].float()
    assert torch.equal(model.generate(inputs_embeds=embeddings, max_length=7), wanted)
    mask = torch.ones(2, 3)
    assert torch.equal(model.generate(inputs_embeds=embeddings, attention_mask=mask, max_new_tokens=4), wanted)
    with pytest.raises(GenerationError, match="the prompt has 3 embeddings, but max_length=3"):
        model.generate(inputs_embeds=embeddings, max_length=3)


def test_generation_files_are_read_and_written_beside_the_weights(toy, tmp_path):
    model = toy(0, lang_to_id={"<|en|>": 3})
    model.save_side_files(tmp_path)
    other = toy(1, eos_token_id=5)
    other.load_side_files(Source(tmp_path))
    assert other.generation_config == model.generation_config


@pytest.mark.parametrize("sampling", [False, True])
def test_choosing_a_token_does_not_wait_for_the_device(toy, prompts, sampling):
    """Tensors without values: whatever read one on the host would fail."""
    config = GenerationConfig(do_sample=sampling, eos_token_id=[1, 2], max_new_tokens=4).filled()
    warpers, stopping = build_warpers(config), build_stopping(config)
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        request = DecodeRequest(
            model=toy().eval(),
            prompt=mode.from_tensor(prompts),
            prompt_mask=None,
            model_inputs={},
            config=config,
            processors=LogitsProcessorList(),
            warpers=warpers,
            stopping=stopping,
            max_length=9,
            pad_token=0,
            logprobs=True,
        )
        record = Record(config)
        state, logits = start(request, 2, record)
        for _ in range(3):
            choose(request, state, logits, record)
            logits = advance(request, state, record)
    assert state.length == 8
    assert state.logprobs.shape == (6,)


@pytest.mark.parametrize("size", [BLOCK, BLOCK + 1, 2 * BLOCK, 1000])
def test_the_best_by_blocks_is_the_first_of_the_best(size):
    scores = torch.randn(6, size).round(decimals=1)
    scores[0, -1] = scores[1, size // 2] = scores[1, 7] = 9.0
    scores[2, size - 3] = float("nan")
    scores[3] = -float("inf")
    best, token = best_in_blocks(scores)
    wanted = scores.max(dim=-1)
    assert torch.equal(token, wanted.indices)
    assert torch.equal(best.nan_to_num(7.7), wanted.values.nan_to_num(7.7))


def test_large_vocabularies_and_batches_are_searched_by_blocks(toy, prompts, monkeypatch):
    monkeypatch.setattr("audiomm.generation.sampling.BLOCK", 8)
    options = [{}, {"do_sample": True}]
    for seed in range(3):
        wanted = [toy(seed).generate(prompts, generator=torch.Generator().manual_seed(1), **each) for each in options]
        with monkeypatch.context() as patch:
            patch.setattr("audiomm.generation.sampling.MANY_SCORES", 1)
            got = [toy(seed).generate(prompts, generator=torch.Generator().manual_seed(1), **each) for each in options]
        assert all(torch.equal(one, other) for one, other in zip(wanted, got, strict=True))


@pytest.fixture
def quick_toy(toy):
    """The toy with a quick twin of its step, and a count of its calls."""

    class Quick(toy):
        quick_calls = 0

        def quick_step(self):
            def quick(input_ids, cache):
                self.quick_calls += 1
                cache.add(input_ids)
                return self._output(cache, 1).logits[:, -1]

            return quick

    return Quick


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True}])
def test_a_quick_step_is_used_where_it_says_as_much_as_the_slow_one(toy, quick_toy, prompts, options):
    def run(model):
        return model.generate(prompts, max_new_tokens=6, generator=torch.Generator().manual_seed(1), **options)

    model = quick_toy(3, eos_token_id=None)
    assert torch.equal(run(model), run(toy(3, eos_token_id=None)))
    assert (model.quick_calls, model.calls["step"]) == (5, 0)
    model.generate(prompts, max_new_tokens=6, output_attentions=True, return_dict_in_generate=True)
    assert (model.quick_calls, model.calls["step"]) == (5, 5)


def test_drafts_and_rounds_without_drafts_take_the_quick_step(toy, quick_toy, prompts):
    wanted = toy(3).generate(prompts, max_new_tokens=12)
    model, assistant = quick_toy(3), quick_toy(4)
    assert torch.equal(model.generate(prompts, max_new_tokens=12, assistant_model=assistant), wanted)
    assert assistant.quick_calls > 0
    assert torch.equal(model.generate(prompts, max_new_tokens=12, prompt_lookup_num_tokens=3), wanted)
    assert model.quick_calls > 0
