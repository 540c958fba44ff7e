import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from biomedlm_jax import decoding, hlo, sharding
from biomedlm_jax import model as model_lib
from biomedlm_jax.config import MeshConfig


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


def test_weights_over_devices_stay_where_they_are():
    """Activations travel instead, and the tokens' logits stay the same."""
    config = tiny.replace(model={"n_positions": 24, "n_embd": 64}).model
    params = model_lib.init_params(config, 0)
    tokens, lengths = jax.random.randint(jax.random.key(0), (3, 9), 0, config.vocab_size), jnp.array([9, 1, 5])
    mesh = sharding.make_mesh(MeshConfig(fsdp=4), jax.devices()[:4])
    sharded = jax.device_put(params, sharding.tree_shardings(mesh, params))
    found = []
    for weights in (decoding.lay_out(config, params), decoding.lay_out(config, sharded)):
        logits, cache = decoding.prefill(config, weights, tokens, lengths, 24)
        compiled = decoding.decode.lower(config, weights, cache, tokens[:, 0], lengths).compile()
        found.append((logits, decoding.decode(config, weights, cache, tokens[:, 0], lengths)[0]))
    kernel = weights.layers[0]["mlp"]["c_fc"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 4
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), *found)
    gathered = [c for c in hlo.collectives(hlo.parse(compiled.as_text())) if c.kind == "all-gather"]
    assert all(c.bytes < min(4 * 64 * 64, kernel.nbytes) for c in gathered)
