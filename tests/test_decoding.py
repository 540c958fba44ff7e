import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from biomedlm_jax import decoding
from biomedlm_jax import model as model_lib


@pytest.mark.parametrize("changes", [{}, {"scale_attn_by_inverse_layer_idx": False}, {"compute_dtype": "bfloat16"}])
def test_a_token_at_a_time_equals_all_at_once(changes):
    """Rows of different lengths, each from its own place to the last position of the model."""
    config = tiny.replace(model={"n_positions": 24, "n_layer": 3} | changes).model
    params = jax.tree.map(lambda x: 8 * x if x.ndim > 1 else x, model_lib.init_params(config, 0))
    tokens = jax.random.randint(jax.random.key(0), (3, 24), 0, config.vocab_size)
    expected = np.asarray(jax.jit(lambda tokens: model_lib.merge(config, params)(tokens))(tokens))
    weights = decoding.lay_out(config, params)
    lengths = np.array([9, 1, 5])
    logits, cache = decoding.prefill(config, weights, tokens[:, :9], jnp.asarray(lengths), 24)
    atol = 1e-4 if config.compute_dtype == "float32" else 0.1
    rows = np.arange(3)
    while lengths.min() < 24:
        at = np.minimum(lengths, 24) - 1
        np.testing.assert_allclose(logits, expected[rows, at], atol=atol)
        at = np.minimum(lengths, 23)
        logits, cache = decoding.decode(config, weights, cache, tokens[rows, at], jnp.asarray(at))
        lengths = np.minimum(lengths + 1, 24)
    np.testing.assert_allclose(logits, expected[:, 23], atol=atol)
    assert expected.std() > 0.8
