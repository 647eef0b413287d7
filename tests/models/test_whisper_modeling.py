"""The Whisper networks: fast paths equal slow ones, arguments have effect, wrong shapes are named."""

from __future__ import annotations

import pytest
import torch

from audiomm import (
    GenerationError,
    ShapeError,
    WhisperForAudioClassification,
    WhisperForConditionalGeneration,
    WhisperModel,
)
from audiomm.layers.embedding import sinusoids
from audiomm.models.whisper.augment import spec_augment
from audiomm.models.whisper.config import ACTIVATIONS
from audiomm.models.whisper.layers import activation

PREFIX = torch.tensor([[3, 10, 11, 12, 13], [3, 20, 21, 22, 23]])


@pytest.fixture
def features():
    return torch.randn(2, 8, 40, generator=torch.Generator().manual_seed(5))


def test_activations_are_what_their_names_say():
    values = torch.linspace(-8, 8, 101)
    gelu, silu = torch.nn.functional.gelu(values), values * torch.sigmoid(values)
    wanted = {
        "gelu": gelu, "gelu_python": gelu, "silu": silu, "swish": silu,
        "quick_gelu": values * (1.702 * values).sigmoid(),
        "relu": values.clamp(min=0), "relu2": values.clamp(min=0) ** 2, "relu6": values.clamp(0, 6), "linear": values,
        "leaky_relu": values.clamp(min=0) + 0.01 * values.clamp(max=0), "sigmoid": values.sigmoid(),
        "tanh": values.tanh(), "mish": values * torch.log(1 + values.exp()).tanh(),
        **dict.fromkeys(
            ("gelu_new", "gelu_fast", "gelu_pytorch_tanh"),
            values / 2 * (1 + (0.7978845608 * (values + 0.044715 * values**3)).tanh()),
        ),
    }  # fmt: skip
    assert wanted.keys() == set(ACTIVATIONS)
    for name, expected in wanted.items():
        torch.testing.assert_close(activation(name)(values), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_attention_implementations_agree(tiny_whisper, features):
    expected = tiny_whisper(features, decoder_input_ids=PREFIX).logits
    tiny_whisper.set_attn_implementation("eager")
    assert torch.allclose(tiny_whisper(features, decoder_input_ids=PREFIX).logits, expected, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("fixed", [False, True])
def test_step_by_step_equals_all_at_once(tiny_whisper, features, fixed):
    expected = tiny_whisper(features, decoder_input_ids=PREFIX).logits
    cache = tiny_whisper.make_cache(2, fixed=fixed)
    found = [tiny_whisper.prefill(PREFIX[:, :2], cache, input_features=features, logits_to_keep=2).logits]
    found += [tiny_whisper.step(PREFIX[:, place : place + 1], cache).logits for place in range(2, 5)]
    assert torch.allclose(torch.cat(found, 1), expected, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("fixed", [False, True])
def test_left_padding_does_not_change_a_row(tiny_whisper, features, fixed):
    expected = tiny_whisper(features, decoder_input_ids=PREFIX[:, :3]).logits[:, -1]
    expected_step = tiny_whisper(features, decoder_input_ids=PREFIX[:, :4]).logits[:, -1]
    padded = torch.cat([torch.zeros(2, 2, dtype=torch.long), PREFIX[:, :3]], 1)
    mask = torch.tensor([[0, 0, 1, 1, 1]]).expand(2, 5)
    cache = tiny_whisper.make_cache(2, fixed=fixed)
    found = tiny_whisper.prefill(padded, cache, attention_mask=mask, input_features=features).logits[:, -1]
    assert torch.allclose(found, expected, atol=1e-5)
    assert torch.allclose(tiny_whisper.step(PREFIX[:, 3:4], cache).logits[:, -1], expected_step, atol=1e-5)


@torch.no_grad()
def test_rows_over_one_audio_read_one_cross_attention_pair(tiny_whisper, features):
    expected = tiny_whisper(features.repeat_interleave(3, 0), decoder_input_ids=PREFIX.repeat_interleave(3, 0)).logits
    cache = tiny_whisper.make_cache(2)
    tiny_whisper.prefill(PREFIX[:, :4], cache, input_features=features)
    cache.repeat(3)
    found = tiny_whisper.step(PREFIX[:, 4:].repeat_interleave(3, 0), cache).logits
    assert cache.cross(0)[0].shape[0] == 2
    assert torch.allclose(found[:, 0], expected[:, -1], atol=1e-5)


@torch.no_grad()
def test_older_tuples_of_keys_and_values_go_in_and_come_out(tiny_whisper, features):
    first = tiny_whisper(features, decoder_input_ids=PREFIX[:, :4], use_cache=True)
    tuples = first.past_key_values.to_legacy_cache()
    assert [len(layer) for layer in tuples] == [4, 4]
    second = tiny_whisper(
        encoder_outputs=(first.encoder_last_hidden_state,), decoder_input_ids=PREFIX[:, 4:], past_key_values=tuples
    )
    expected = tiny_whisper(features, decoder_input_ids=PREFIX).logits[:, -1]
    assert torch.allclose(second.logits[:, -1], expected, atol=1e-5)
    with pytest.raises(GenerationError, match="holds 1 layers; the decoder has 2"):
        tiny_whisper(features, decoder_input_ids=PREFIX, past_key_values=tuples[:1])


@torch.no_grad()
def test_outputs_are_dataclasses_mappings_and_tuples(tiny_whisper, features):
    call = {
        "input_features": features,
        "decoder_input_ids": PREFIX,
        "output_attentions": True,
        "output_hidden_states": True,
    }
    output = tiny_whisper(**call)
    assert output.logits is output["logits"] is output[0]
    assert output.keys()[:2] == ["logits", "past_key_values"]
    assert "loss" not in output
    assert [tuple(layer.shape) for layer in output.cross_attentions] == [(2, 4, 5, 20)] * 2
    assert [tuple(layer.shape) for layer in output.encoder_attentions] == [(2, 3, 20, 20)] * 2
    assert len(output.decoder_hidden_states) == len(output.encoder_hidden_states) == 3
    assert output.encoder_hidden_states[-1] is output.encoder_last_hidden_state
    as_tuple = tiny_whisper(**call, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], output.logits)
    with pytest.raises(KeyError, match="it holds logits"):
        output["nothing"]


@torch.no_grad()
def test_head_masks_silence_heads_and_ones_change_nothing(tiny_whisper, features):
    expected = tiny_whisper(features, decoder_input_ids=PREFIX).logits
    for name, heads in {"head_mask": 3, "decoder_head_mask": 4, "cross_attn_head_mask": 4}.items():
        mask = torch.ones(2, heads)
        same = tiny_whisper(features, decoder_input_ids=PREFIX, **{name: mask}).logits
        assert torch.allclose(same, expected, atol=1e-5)
        mask[1, 2] = 0
        assert not torch.allclose(
            tiny_whisper(features, decoder_input_ids=PREFIX, **{name: mask}).logits, expected, atol=1e-3
        )


@torch.no_grad()
def test_embeddings_and_encoder_outputs_stand_in_for_tokens_and_features(tiny_whisper, features):
    expected = tiny_whisper(features, decoder_input_ids=PREFIX).logits
    encoded = tiny_whisper.get_encoder()(features)
    embeddings = tiny_whisper.get_input_embeddings()(PREFIX)
    for form in (encoded, encoded.last_hidden_state, (encoded.last_hidden_state,), [encoded.last_hidden_state]):
        assert torch.allclose(
            tiny_whisper(encoder_outputs=form, decoder_inputs_embeds=embeddings).logits, expected, atol=1e-5
        )
    with pytest.raises(ShapeError, match="encoder_outputs is a str"):
        tiny_whisper(encoder_outputs="hidden", decoder_input_ids=PREFIX)


@torch.no_grad()
def test_scaled_embeddings_have_effect(tiny_whisper, features, tiny_whisper_config):
    scaled = WhisperForConditionalGeneration(tiny_whisper_config(scale_embedding=True)).eval()
    scaled.load_state_dict(tiny_whisper.state_dict())
    expected = tiny_whisper(
        features, decoder_inputs_embeds=tiny_whisper.get_input_embeddings()(PREFIX) * 24**0.5
    ).logits
    assert torch.allclose(scaled(features, decoder_input_ids=PREFIX).logits, expected, atol=1e-5)


def test_labels_give_the_loss_of_their_tokens(tiny_whisper, features):
    labels = torch.tensor([[10, 11, 2, -100], [20, 21, 22, 2]])
    output = tiny_whisper(features, labels=labels)
    logits = tiny_whisper(features, decoder_input_ids=torch.tensor([[3, 10, 11, 2], [3, 20, 21, 22]])).logits
    chosen = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    assert torch.allclose(output.loss, -chosen[labels != -100].mean(), atol=1e-5)
    with pytest.raises(ShapeError, match="33 tokens long; at most max_target_positions=32"):
        tiny_whisper(features, labels=torch.ones(2, 33, dtype=torch.long))


def test_gradient_checkpointing_gives_the_same_gradients(tiny_whisper, features):
    labels = torch.tensor([[10, 11, 2], [20, 21, 22]])
    gradients = []
    for switch in (tiny_whisper.gradient_checkpointing_disable, tiny_whisper.gradient_checkpointing_enable):
        switch()
        tiny_whisper.train().zero_grad()
        tiny_whisper(features, labels=labels).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in tiny_whisper.named_parameters() if p.grad is not None})
    assert tiny_whisper.is_gradient_checkpointing
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.allclose(gradients[0][name], gradients[1][name], atol=1e-6) for name in gradients[0])


def test_freezing_the_encoder_leaves_the_decoder_trainable(tiny_whisper, features):
    tiny_whisper.freeze_encoder()
    tiny_whisper(features, labels=torch.tensor([[10, 2], [20, 2]])).loss.backward()
    assert tiny_whisper.model.encoder.conv1.weight.grad is None
    assert tiny_whisper.model.decoder.layers[0].fc1.weight.grad.abs().sum() > 0


def test_spec_augment_hides_spans_of_a_copy_and_follows_the_seed():
    features = torch.ones(3, 8, 200)
    options = {"time_probability": 0.2, "time_length": 10, "time_minimum": 2,
               "bin_probability": 0.3, "bin_length": 2, "bin_minimum": 1}  # fmt: skip
    torch.manual_seed(1)
    first = spec_augment(features, **options, frame_counts=torch.tensor([200, 100, 12]))
    torch.manual_seed(1)
    assert torch.equal(first, spec_augment(features, **options, frame_counts=torch.tensor([200, 100, 12])))
    assert torch.equal(features, torch.ones(3, 8, 200))
    hidden = (first == 0).all(dim=1)
    assert 10 <= hidden[0].sum() <= 50
    assert not hidden[1, 100:].any()
    assert not hidden[2, 12:].any()
    assert ((first == 0).all(dim=2).sum(dim=1) >= 2).all()


def test_spec_augment_is_part_of_training_only(tiny_whisper, features):
    tiny_whisper.config.apply_spec_augment = True
    tiny_whisper.config.mask_time_prob = 0.5
    labels = torch.tensor([[10, 2], [20, 2]])
    plain = tiny_whisper.eval()(features, labels=labels).loss
    assert torch.equal(plain, tiny_whisper(features, labels=labels).loss)
    assert not torch.equal(plain, tiny_whisper.train()(features, labels=labels).loss)


@torch.no_grad()
def test_audio_classification_averages_over_time(tiny_whisper_config, features):
    model = WhisperForAudioClassification(tiny_whisper_config(num_labels=4, use_weighted_layer_sum=True)).eval()
    output = model(features, labels=torch.tensor([1, 3]), output_hidden_states=True)
    mixed = sum(state / 3 for state in output.hidden_states)
    assert torch.allclose(output.logits, model.classifier(model.projector(mixed).mean(1)), atol=1e-5)
    assert output.loss > 0


@pytest.mark.parametrize("shape", [(2, 8, 39), (2, 7, 40), (8, 40)])
def test_features_of_another_shape_are_named(tiny_whisper, shape):
    with pytest.raises(ShapeError, match=r"\(batch, 8, 40\) is needed"):
        tiny_whisper(torch.zeros(shape), decoder_input_ids=PREFIX)


def test_too_many_tokens_or_none_are_named(tiny_whisper, features):
    with pytest.raises(ShapeError, match="33 tokens were given to a decoder of max_target_positions=32"):
        tiny_whisper(features, decoder_input_ids=torch.ones(2, 33, dtype=torch.long))
    with pytest.raises(ShapeError, match="exactly one of the two"):
        tiny_whisper(features)
    with pytest.raises(ShapeError, match="both are None"):
        tiny_whisper(decoder_input_ids=PREFIX)
    with pytest.raises(ShapeError, match="mask is of shape"):
        tiny_whisper(features, decoder_input_ids=PREFIX, decoder_attention_mask=torch.ones(2, 1, 5, 5))


@torch.no_grad()
def test_the_step_compiles_as_one_graph(tiny_whisper, features):
    eager, compiled = [], []
    for answers, compile_it in ((eager, False), (compiled, True)):
        cache = tiny_whisper.make_cache(2, fixed=True)
        tiny_whisper.prefill(PREFIX[:, :2], cache, input_features=features)
        graphs = []

        def count(graph, inputs, graphs=graphs):
            graphs.append(graph)
            return graph.forward

        torch._dynamo.reset()
        step = torch.compile(tiny_whisper.step, backend=count, fullgraph=True) if compile_it else tiny_whisper.step
        for place in range(2, 5):
            answers.append(step(PREFIX[:, place : place + 1].clone(), cache).logits)
            if compile_it:
                cache.note(1)
        assert len(graphs) == int(compile_it)
    for one, other in zip(eager, compiled, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_a_new_encoder_starts_with_sinusoidal_positions(tiny_whisper_config):
    config = tiny_whisper_config()
    expected = sinusoids(config.max_source_positions, config.d_model)
    for cls in (WhisperModel, WhisperForConditionalGeneration):
        model = cls(config)
        assert torch.equal(model.base_model.encoder.embed_positions.weight, expected)
        model.init_weights()
        assert torch.equal(model.base_model.encoder.embed_positions.weight, expected)
