"""Keys and values of cross-attention in 8 bits: near the exact ones, in every cache, step and loop."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from audiomm import WhisperConfig, WhisperForConditionalGeneration, pipeline
from audiomm.base.errors import GenerationError
from audiomm.layers import rounded
from audiomm.models.whisper import step

KINDS = ["int8", "fp8"]
#: Largest error of what is read, against the exact result: a number in e4m3 has 4 significant bits, in int8 up to 7.
LIMITS = {"int8": 0.01, "fp8": 0.05}
HEADS, POSITIONS, WIDTH = 3, 13, 8


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


def kept(values: torch.Tensor, kind: str) -> torch.Tensor:
    """Values (rows, heads, positions, head_dim) in 8 bits."""
    return rounded.store(rounded.room(values[0].transpose(0, 1), len(values), rounded.KINDS[kind]), values)


def random_values(rows: int) -> torch.Tensor:
    """Vectors of very different sizes."""
    values = torch.randn(rows, HEADS, POSITIONS, WIDTH)
    return values * 10.0 ** torch.randint(-4, 5, (rows, HEADS, POSITIONS, 1))


# ---------------------------------------------------------------------- the numbers


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("positions", "width"), [(1500, 64), (1, 4), (13, 8), (30, 64), (7, 12)])
def test_every_vector_is_kept_with_a_scale_of_its_own(kind, positions, width):
    values = torch.randn(2, 3, positions, width) * 10.0 ** torch.randint(-6, 7, (2, 3, positions, 1))
    found = kept(values, kind)
    assert found.element_size() == 1
    assert found.nbytes <= values.nbytes / 4 * (1 + 4 / width + 1 / positions)
    error = (rounded.exact(found, torch.float32) - values).abs().amax(-1) / values.abs().amax(-1)
    assert error.max() < {"int8": 0.5 / 127 + 1e-6, "fp8": 1 / 16}[kind]
    assert error.max() > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_stay_zeros_and_nan_stays_nan(kind):
    values = random_values(1)
    values[0, 0, 0], values[0, 1, 2, 3] = 0.0, float("nan")
    found = rounded.exact(kept(values, kind), torch.float32)
    assert not found[0, 0, 0].any()
    assert found[0, 1, 2].isnan().all()
    assert found.isnan().sum() == WIDTH


def test_heads_that_scales_cannot_follow_are_refused():
    with pytest.raises(
        GenerationError, match="heads 6 wide cannot be kept in 8 bits.*multiple of 4.*cross_cache_dtype"
    ):
        rounded.room_shape(torch.zeros(5, 2, 6), 1, torch.int8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("folds", [1, 3])
def test_reading_gives_what_the_numbers_that_are_kept_give(kind, dtype, folds):
    queries = torch.randn(2 * folds, HEADS, WIDTH).to(dtype)
    keys, values = kept(random_values(2).clamp(-20, 20), kind), kept(torch.randn(2, HEADS, POSITIONS, WIDTH), kind)
    found = rounded.read_rounded(queries, keys, values, None, scale=0.3)
    exact = [rounded.exact(one, torch.float32).repeat_interleave(folds, dim=0) for one in (keys, values)]
    weights = (queries.float()[:, :, None] @ exact[0].transpose(-1, -2) * 0.3).softmax(-1)
    wanted = (weights @ exact[1])[:, :, 0].flatten(1)
    assert found.dtype == dtype
    assert relative(found, wanted) < {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]


@pytest.mark.parametrize("kind", KINDS)
def test_sums_for_a_compiler_are_the_products(kind):
    queries = torch.randn(2, HEADS, 3, WIDTH)
    opened = [
        *rounded._opened(kept(random_values(2).clamp(-20, 20), kind)),
        *rounded._opened(kept(random_values(2), kind)),
    ]
    wanted = rounded._by_products(queries, *opened)
    assert relative(rounded._by_sums(queries, *opened), wanted) < 1e-5


# ---------------------------------------------------------------------- the model


@pytest.fixture(scope="module")
def model() -> WhisperForConditionalGeneration:
    return make(3)


def make(layers: int) -> WhisperForConditionalGeneration:
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=120, num_mel_bins=8, d_model=64, encoder_layers=1, decoder_layers=layers, encoder_attention_heads=2,
        decoder_attention_heads=4, encoder_ffn_dim=96, decoder_ffn_dim=160, max_source_positions=30,
        max_target_positions=60, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3, init_std=0.1,
    )  # fmt: skip
    return WhisperForConditionalGeneration(config).eval()


def steps(model, kind, quick, fixed=False, rows=2, beams=1, count=40):
    """Logits (rows, count, vocabulary) of the same tokens."""
    torch.manual_seed(1)
    encoded = torch.randn(rows, 30, 64).to(model.dtype)
    cache = model.make_cache(rows, max_length=50, fixed=fixed)
    if kind is not None:
        cache.keep_cross_in(kind)
    advance = model.quick_step() if quick else lambda ids, cache: model.step(ids, cache).logits[:, -1].float()
    model.prefill(torch.tensor([[3, 4]] * rows), cache, encoder_outputs=encoded)
    cache.repeat(beams)
    tokens = torch.randint(4, 120, (rows * beams, count), generator=torch.Generator().manual_seed(2))
    return torch.stack([advance(column[:, None], cache) for column in tokens.T], dim=1), cache


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("beams", [1, 2])
@torch.no_grad()
def test_quick_and_slow_steps_give_the_same_near_the_exact_ones(model, kind, fixed, beams):
    options = {"fixed": fixed, "beams": 1 if fixed else beams}
    exact, _ = steps(model, None, True, **options)
    quick, cache = steps(model, kind, True, **options)
    slow, _ = steps(model, kind, False, **options)
    assert (quick - slow).abs().max() <= 1e-5 * float(slow.abs().max())
    assert 1e-5 < relative(quick, exact) < LIMITS[kind]
    assert all(rounded.is_rounded(part.dtype) for pair in cache.cross_pairs for part in pair)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_row_gives_alone_what_it_gives_in_a_batch(model, kind):
    together, _ = steps(model, kind, True, rows=2)
    alone, _ = steps(model, kind, True, rows=1)
    # The first token is the same in both.
    assert torch.allclose(together[:1, :1], alone[:, :1], atol=1e-5 * float(alone.abs().max()))


@torch.no_grad()
def test_a_fixed_cache_is_used_again_without_moving_and_rows_that_stay_keep_their_pairs(model):
    _, cache = steps(model, "int8", True, fixed=True)
    places = [part.data_ptr() for pair in cache.cross_pairs for part in pair]
    cache.reset()
    torch.manual_seed(1)
    model.prefill(torch.tensor([[3, 4]] * 2), cache, encoder_outputs=torch.randn(2, 30, 64))
    assert [part.data_ptr() for pair in cache.cross_pairs for part in pair] == places
    _, growing = steps(model, "int8", True, count=1)
    second = growing.cross(0)[0][1].clone()
    growing.keep([1])
    assert torch.equal(growing.cross(0)[0], second[None])


@torch.no_grad()
def test_tuples_of_older_programs_hold_plain_numbers(model):
    _, exact = steps(model, None, False, count=1)
    _, cache = steps(model, "int8", False, count=1)
    for found, wanted in zip(cache.to_legacy_cache(), exact.to_legacy_cache(), strict=True):
        assert found[2].dtype == torch.float32
        assert relative(found[2], wanted[2]) < 0.01


# ---------------------------------------------------------------------- whole calls


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}, {"do_sample": True}])
def test_every_loop_reads_what_is_kept_in_eight_bits(model, options, monkeypatch):
    read: list[torch.dtype] = []

    def spy(queries, keys, *rest, **scale):
        read.append(keys.dtype)
        return rounded.read_rounded(queries, keys, *rest, **scale)

    monkeypatch.setattr(step, "read_rounded", spy)
    features = torch.randn(2, 8, 60, generator=torch.Generator().manual_seed(3))
    assert model.generate(features, cross_cache_dtype="int8", max_new_tokens=12, **options).shape[0] == 2
    assert read
    assert set(read) == {torch.int8}


def test_a_step_that_is_one_unit_writes_the_same_tokens_whatever_ran_before():
    model = make(1)
    features = torch.randn(2, 8, 60, generator=torch.Generator().manual_seed(3))
    options = {"max_new_tokens": 20, "eos_token_id": 119}
    wanted = {kind: model.generate(features, cross_cache_dtype=kind, **options) for kind in (None, "int8")}
    unit = {"compile_config": {"backend": "eager", "mode": None}, **options}
    for kind in (None, "int8", None):
        assert torch.equal(model.generate(features, cross_cache_dtype=kind, **unit), wanted[kind]), kind


@torch.no_grad()
def test_a_step_waits_for_nothing_and_makes_no_new_shapes(model, launches, monkeypatch):
    quick, seen, newest = model.quick_step(), [], torch.tensor([[5], [6]])
    for name in ("by_products", "attends_by_products"):
        monkeypatch.setattr(quick, name, False)
    _, cache = steps(model, "int8", True, fixed=True, count=1)
    for _ in range(3):
        with launches.Launches() as count:
            quick(newest, cache)
        assert count.waits == []
        seen.append(count.shapes)
    assert seen[0] == seen[1] == seen[2]


def test_eager_attention_and_attentions_that_are_handed_out_take_it(model):
    features = torch.randn(1, 8, 60)
    options = {"max_new_tokens": 5, "return_dict_in_generate": True, "output_attentions": True}
    exact, found = (model.generate(features, cross_cache_dtype=kind, **options) for kind in (None, "int8"))
    assert torch.equal(exact.sequences, found.sequences)
    weights = [torch.cat([layer for step in one.cross_attentions for layer in step], dim=2) for one in (exact, found)]
    assert 0 < float((weights[0] - weights[1]).abs().max()) < 0.01


def test_wrong_kinds_and_models_without_an_encoder_are_named(model, gemmas):
    with pytest.raises(GenerationError, match="cross_cache_dtype='int4' is not accepted: pass one of 'int8', 'fp8'"):
        model.generate(torch.randn(1, 8, 60), cross_cache_dtype="int4")
    gemma = gemmas.gemma4_model(gemmas.processor_4(), "dense")
    with pytest.raises(GenerationError, match="cross_cache_dtype='int8' is for decoders that attend to an encoder's"):
        gemma.generate(torch.randint(5, 30, (1, 4)), max_new_tokens=2, cross_cache_dtype="int8")


@pytest.mark.parametrize("kind", KINDS)
def test_the_bundled_model_hears_the_same_words_at_the_same_times(kind):
    file = sorted((Path(__file__).parents[3] / "examples" / "audio").glob("*.flac"))[0]
    listen = pipeline("automatic-speech-recognition", device="cpu")
    exact, found = (
        listen.transcribe(file, return_timestamps="word", generate_kwargs={"cross_cache_dtype": one})
        for one in (None, kind)
    )
    assert found.text == exact.text
    assert len(found.text.split()) >= 7
    times = [[(word.start, word.end) for one in each.segments for word in one.words] for each in (exact, found)]
    assert len(times[0]) == len(times[1]) >= 7
    assert max(abs(a - b) for left, right in zip(*times, strict=True) for a, b in zip(left, right, strict=True)) <= 0.1
