"""Generated tokens are transformers' own, token for token."""

import numpy as np
import pytest

from biomedlm_jax import decoding
from biomedlm_jax.errors import UserError
from biomedlm_jax.generation import Rows, generate, process, warp
from biomedlm_jax.generation_config import GenerationConfig
from biomedlm_jax.load import load_model

EOS = 100


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A model of transformers, and ours of the same weights: its configuration and its weights."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=101,
        n_positions=64,
        n_embd=32,
        n_layer=3,
        n_head=4,
        initializer_range=0.3,
        scale_attn_by_inverse_layer_idx=True,
        bos_token_id=EOS,
        eos_token_id=EOS,
    )
    theirs = transformers.GPT2LMHeadModel(config).eval()
    # Ends of texts come now and then.
    theirs.transformer.ln_f.bias.data += 0.5 * theirs.transformer.wte.weight.data[EOS]
    folder = tmp_path_factory.mktemp("gpt2")
    theirs.save_pretrained(folder)
    ours = load_model(folder, compute_dtype="float32")
    return theirs, ours.config, decoding.lay_out(ours.config, ours.params)


def prompts(count, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, EOS, rng.integers(1, 33)).tolist() for _ in range(count)]


def theirs(model, prompt, **settings):
    """Of one prompt, without the end of the text."""
    import torch

    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=EOS, do_sample=False, **settings)
    new = out[0, len(prompt) :].tolist()
    return new[: new.index(EOS)] if EOS in new else new


# Of 200 prompts, CI's longer part sees all.
@pytest.mark.parametrize("count", [40, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "settings",
    [
        {"max_new_tokens": 30},
        {"max_new_tokens": 31, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        {"max_new_tokens": 20, "num_beams": 5, "length_penalty": -0.5, "no_repeat_ngram_size": 6},
        {"max_new_tokens": 31, "num_beams": 3, "length_penalty": 0.0},
    ],
)
def test_tokens_equal_transformers(both, settings, count):
    """Prompts of 1 to 32 tokens, in batches of mixed lengths."""
    model, config, weights = both
    texts = prompts(count)
    ours = []
    for start in range(0, count, count // 4):
        ours += generate(config, weights, texts[start : start + count // 4], GenerationConfig(**settings), EOS)
    expected = [theirs(model, prompt, **settings) for prompt in texts]
    assert [result.tokens for result in ours] == expected
    ended = sum(result.ended for result in ours)
    assert [result.ended for result in ours] == [len(tokens) < settings["max_new_tokens"] for tokens in expected]
    assert ended > count // 10


@pytest.mark.parametrize("settings", [{"top_k": 7}, {"top_p": 0.6}, {"top_k": 20, "top_p": 0.9}, {"top_p": 1e-9}])
def test_what_may_be_drawn_equals_transformers(settings):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    scores = np.random.default_rng(0).normal(0, 3, (50, 101)).astype(np.float32)
    expected = torch.tensor(scores) / 0.7
    if "top_k" in settings:
        expected = transformers.TopKLogitsWarper(settings["top_k"])(None, expected)
    if "top_p" in settings:
        expected = transformers.TopPLogitsWarper(settings["top_p"])(None, expected)
    ours = warp(GenerationConfig(temperature=0.7, **settings), scores)
    np.testing.assert_allclose(ours, expected.numpy(), rtol=1e-6)
    assert 0 < np.isfinite(ours).mean() < 1


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_limits_on_repetition_equal_transformers(size):
    """Of rows shorter than the n-gram, too, among others in a batch."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    rng = np.random.default_rng(size)
    tokens, lengths = rng.integers(0, 4, (40, 16)).astype(np.int32), rng.integers(1, 17, 40).astype(np.int32)
    scores = rng.normal(0, 3, (40, 5)).astype(np.float32)
    ours = process(GenerationConfig(repetition_penalty=1.5, no_repeat_ngram_size=size), scores, Rows(tokens, lengths))
    for row, length, before, after in zip(tokens, lengths, scores, np.asarray(ours), strict=True):
        ids, expected = torch.tensor(row[None, :length]).long(), torch.tensor(before[None])
        expected = transformers.RepetitionPenaltyLogitsProcessor(1.5)(ids, expected)
        expected = transformers.NoRepeatNGramLogitsProcessor(size)(ids, expected)
        np.testing.assert_allclose(after, expected[0].numpy(), rtol=1e-6)


def test_draws_depend_on_the_prompt_alone(both):
    _, config, weights = both
    settings = GenerationConfig(max_new_tokens=20, temperature=1.0, top_k=50, seed=3)
    texts = prompts(6)
    together = generate(config, weights, texts, settings, EOS)
    apart = [generate(config, weights, [text], settings, EOS, first_id=i)[0] for i, text in enumerate(texts)]
    assert together == apart
    assert generate(config, weights, [texts[0]] * 2, settings, EOS)[1] != together[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, not 0"),
        ({"temperature": -1.0}, "temperature must be at least 0"),
        ({"top_p": 1.5}, r"top_p must be in \[0, 1\], not 1.5"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"num_beams": 0}, "num_beams must be at least 1"),
        ({"num_beams": 2, "temperature": 1.0}, "num_beams and temperature exclude each other"),
        ({"max_new_tokens": 60}, "prompt 2 has 5 tokens, and with max_new_tokens 60 is longer than the 64"),
    ],
)
def test_mistakes_are_named(both, settings, message):
    _, config, weights = both
    with pytest.raises(UserError, match=message):
        generate(config, weights, [[1, 2, 3], [1, 2, 3, 4, 5]], GenerationConfig(**settings), EOS)


def test_an_empty_prompt_is_refused(both):
    _, config, weights = both
    with pytest.raises(UserError, match="prompt 2 is empty"):
        generate(config, weights, [[1], []], GenerationConfig(max_new_tokens=5), EOS)
