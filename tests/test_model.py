import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from biomedlm_jax import model as model_lib
from biomedlm_jax.attention import causal_attention
from biomedlm_jax.config import ModelConfig
from biomedlm_jax.errors import UserError
from biomedlm_jax.loss import next_token_loss

SMALL = ModelConfig(vocab_size=61, n_positions=24, n_embd=32, n_layer=3, n_head=4, compute_dtype="float32")


def replace(**changes):
    return dataclasses.replace(SMALL, **changes)


def random_tokens(seed=0, shape=(2, 24)):
    return jax.random.randint(jax.random.key(seed), shape, 0, SMALL.vocab_size)


def attention_in_float64(qkv, scale, mask=None):
    """Brute force: one query at a time."""
    q, k, v = np.split(np.asarray(qkv, np.float64), 3, axis=2)
    out = np.zeros_like(q)
    for b, i, h in np.ndindex(q.shape[:3]):
        scores = scale * k[b, : i + 1, h] @ q[b, i, h]
        if mask is not None:
            scores[~mask[b, : i + 1]] = -np.inf
        weights = np.exp(scores - scores.max())
        out[b, i, h] = weights / weights.sum() @ v[b, : i + 1, h]
    return out


@pytest.mark.parametrize("shape", [(2, 7, 3, 5), (1, 1, 1, 8), (2, 16, 2, 16)])
def test_reference_attention_equals_brute_force(shape):
    batch, seq, heads, head_dim = shape
    qkv = jax.random.normal(jax.random.key(0), (batch, seq, 3 * heads, head_dim)) * 3
    np.testing.assert_allclose(causal_attention(qkv, 0.3), attention_in_float64(qkv, 0.3), atol=1e-5)
    mask = np.ones((batch, seq), bool)
    mask[-1, 1 : seq // 2] = False
    np.testing.assert_allclose(
        causal_attention(qkv, 0.3, mask=jnp.asarray(mask)), attention_in_float64(qkv, 0.3, mask), atol=1e-5
    )


def test_attention_dropout_keeps_the_mean_and_needs_a_key():
    qkv = jax.random.normal(jax.random.key(0), (1, 8, 3, 4))
    sure = causal_attention(qkv, 0.5, dropout_rate=0.4)
    np.testing.assert_array_equal(sure, causal_attention(qkv, 0.5))
    draws = jax.vmap(lambda key: causal_attention(qkv, 0.5, dropout_rate=0.4, dropout_keys=key[None]))(
        jax.random.split(jax.random.key(1), 4000)
    )
    assert float(jnp.std(draws, axis=0).min()) > 0.01
    np.testing.assert_allclose(draws.mean(0), sure, atol=0.08)


def test_cudnn_is_refused_where_it_cannot_run():
    with pytest.raises(UserError, match="attention: cudnn runs on NVIDIA GPUs, and this is a cpu"):
        model_lib.GPT2(replace(attention="cudnn"), jax_rngs())(random_tokens())


def jax_rngs():
    from flax import nnx

    return nnx.Rngs(0)


def test_parameters_are_counted_and_initialised_as_published():
    assert model_lib.param_count(ModelConfig()) == 2_594_247_680
    assert model_lib.flops_per_token(ModelConfig()) == pytest.approx(16.57e9, rel=1e-3)
    config = replace(n_embd=128, n_layer=8, vocab_size=1000)
    params = model_lib.init_params(config, 0)
    assert sum(x.size for x in jax.tree.leaves(params)) == model_lib.param_count(config)
    h = params["h"]
    for kernel, stddev in (
        (h["attn"]["c_attn"]["kernel"], 0.02),
        (h["mlp"]["c_fc"]["kernel"], 0.02),
        (h["attn"]["c_proj"]["kernel"], 0.02 / 4),
        (h["mlp"]["c_proj"]["kernel"], 0.02 / 4),
        (params["wte"]["embedding"], 0.02),
        (params["wpe"]["embedding"], 0.02),
    ):
        assert float(kernel.std()) == pytest.approx(stddev, rel=0.03)
        assert abs(float(kernel.mean())) < stddev / 20
    # No two layers start alike.
    assert len(np.unique(np.asarray(h["mlp"]["c_fc"]["kernel"])[:, 0, 0])) == config.n_layer
    for norm in (h["ln_1"], h["ln_2"], params["ln_f"]):
        assert (norm["scale"] == 1).all() and (norm["bias"] == 0).all()
    for linear in (h["attn"]["c_attn"], h["attn"]["c_proj"], h["mlp"]["c_fc"], h["mlp"]["c_proj"]):
        assert (linear["bias"] == 0).all()
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(params))


def test_initial_weights_are_a_function_of_the_seed():
    first, again, other = (model_lib.init_params(SMALL, seed) for seed in (1, 1, 2))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert not np.array_equal(first["wte"]["embedding"], other["wte"]["embedding"])


def big_params(config):
    """Weights large enough that an error anywhere shows in the logits."""
    params = model_lib.init_params(config, 0)
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(3), len(leaves))
    return treedef.unflatten([x + 0.1 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)])


@pytest.mark.parametrize(
    "changes",
    [
        {"unroll": 3},
        {"unroll": 2},
        {"unroll": 99},
        {"remat": "matmuls"},
        {"remat": "full"},
        {"remat": "full", "unroll": 3},
    ],
)
def test_execution_settings_change_no_numbers(changes):
    params, tokens = big_params(SMALL), random_tokens()

    def value_and_grad(config):
        return jax.jit(jax.value_and_grad(lambda p: jnp.square(model_lib.merge(config, p)(tokens)).mean()))(params)

    (value, grad), (other_value, other_grad) = value_and_grad(SMALL), value_and_grad(replace(**changes))
    assert float(value) == pytest.approx(float(other_value), rel=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(a).max())), grad, other_grad)


def test_remat_keeps_fewer_activations():
    """What the backward pass keeps of the blocks shrinks from policy to policy."""
    params, tokens = big_params(SMALL), random_tokens()

    def saved_bytes(remat):
        config = replace(remat=remat)
        _, vjp = jax.eval_shape(lambda p: jax.vjp(lambda p: model_lib.merge(config, p)(tokens), p), params)
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(vjp))

    none, matmuls, full = (saved_bytes(remat) for remat in ("none", "matmuls", "full"))
    assert none > 1.3 * matmuls and matmuls > 1.3 * full


def test_a_position_sees_only_those_before_it():
    params, tokens = big_params(SMALL), random_tokens()
    model = model_lib.merge(SMALL, params)
    changed = model(tokens.at[:, 10].set(0)), model(tokens.at[:, 10].set(1))
    np.testing.assert_array_equal(changed[0][:, :10], changed[1][:, :10])
    assert float(jnp.abs(changed[0][:, 10:] - changed[1][:, 10:]).max()) > 1e-3


def test_dropout_needs_rates_and_a_key():
    params, tokens = big_params(SMALL), random_tokens()
    keys, others = (jax.random.split(jax.random.key(seed), len(tokens)) for seed in (0, 1))
    plain = model_lib.merge(SMALL, params)(tokens)
    np.testing.assert_array_equal(plain, model_lib.merge(SMALL, params)(tokens, dropout_keys=keys))
    for rate in ("embd_pdrop", "attn_pdrop", "resid_pdrop"):
        model = model_lib.merge(replace(**{rate: 0.2}), params)
        np.testing.assert_array_equal(plain, model(tokens))
        dropped = model(tokens, dropout_keys=keys)
        assert float(jnp.abs(dropped - plain).max()) > 1e-3
        np.testing.assert_array_equal(dropped, model(tokens, dropout_keys=keys))
        assert float(jnp.abs(dropped - model(tokens, dropout_keys=others)).max()) > 1e-3


def test_bfloat16_compute_stays_near_float32_and_gives_float32_logits():
    params, tokens = model_lib.init_params(SMALL, 0), random_tokens()
    exact = model_lib.merge(SMALL, params)(tokens)
    rounded = model_lib.merge(replace(compute_dtype="bfloat16"), params)(tokens)
    assert rounded.dtype == jnp.float32
    assert 0 < float(jnp.abs(rounded - exact).max()) < 0.02 * float(jnp.abs(exact).max()) + 0.01


def test_bfloat16_gradients_stay_near_float32_in_every_parameter():
    """Sums over all tokens, of biases and embeddings, would be tens of percent off if they were taken in bfloat16."""
    config = replace(n_embd=64, n_head=2, n_layer=2, n_positions=128, vocab_size=64)
    params = jax.tree.map(lambda x: 3 * x if x.ndim > 1 else x, model_lib.init_params(config, 0))
    # Some words are far more frequent than others, as in text.
    tokens = jnp.minimum(jax.random.exponential(jax.random.key(0), (128, 128)) * 6, 63).astype(int)

    def gradient(compute_dtype):
        model_config = dataclasses.replace(config, compute_dtype=compute_dtype)

        def loss(params):
            hidden = model_lib.merge(model_config, params).hidden_states(tokens)
            mask = jnp.ones(tokens.shape, bool)
            return next_token_loss(hidden, params["wte"]["embedding"], tokens, mask) / tokens.size

        return jax.jit(jax.grad(loss))(params)

    exact, rounded = gradient("float32"), gradient("bfloat16")
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(exact), jax.tree.leaves(rounded), strict=True):
        error = float(jnp.linalg.norm((a - b).ravel()) / jnp.linalg.norm(a.ravel()))
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        # How a CPU accumulates a product of bfloat16 is the backend's choice: 0.5 % in jax 0.10, 2.6 % in 0.12.
        assert error < (0.05 if name.endswith("kernel") else 0.01), name
