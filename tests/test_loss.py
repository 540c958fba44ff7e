import jax
import jax.numpy as jnp
import numpy as np
import pytest

from biomedlm_jax.loss import next_token_loss, target_count


def inputs(batch=3, seq=12, embd=8, vocab=29):
    keys = jax.random.split(jax.random.key(0), 4)
    return (
        jax.random.normal(keys[0], (batch, seq, embd)),
        jax.random.normal(keys[1], (vocab, embd)),
        jax.random.randint(keys[2], (batch, seq), 0, vocab),
        jax.random.bernoulli(keys[3], 0.7, (batch, seq)),
    )


def loss_in_float64(hidden, wte, tokens, mask):
    total, count = 0.0, 0
    hidden, wte = np.asarray(hidden, np.float64), np.asarray(wte, np.float64)
    for row, position in np.ndindex(tokens.shape[0], tokens.shape[1] - 1):
        if mask[row, position + 1]:
            logits = wte @ hidden[row, position]
            total += np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[tokens[row, position + 1]]
            count += 1
    return total, count


@pytest.mark.parametrize("chunk", [0, 1, 4, 12])
def test_equals_float64(chunk):
    hidden, wte, tokens, mask = inputs()
    total, count = loss_in_float64(hidden, wte, tokens, mask)
    assert float(next_token_loss(hidden, wte, tokens, mask, chunk)) == pytest.approx(total, rel=1e-6)
    assert float(target_count(mask)) == count


@pytest.mark.parametrize("chunk", [1, 3, 6])
def test_chunks_have_the_same_gradient(chunk):
    hidden, wte, tokens, mask = inputs()
    whole = jax.grad(next_token_loss, argnums=(0, 1))(hidden, wte, tokens, mask)
    parts = jax.grad(lambda h, w: next_token_loss(h, w, tokens, mask, chunk), argnums=(0, 1))(hidden, wte)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), whole, parts)


@pytest.mark.parametrize("chunk", [0, 4])
def test_the_gradient_is_that_of_a_derived_loss(chunk):
    """The one that JAX makes of the formula, also of a multiple of the loss."""
    hidden, wte, tokens, mask = inputs()

    def formula(hidden, wte):
        log_p = jax.nn.log_softmax(hidden[:, :-1] @ wte.T)
        return -jnp.sum(jnp.take_along_axis(log_p, tokens[:, 1:, None], -1)[..., 0] * mask[:, 1:])

    expected = jax.grad(lambda h, w: 3 * formula(h, w), argnums=(0, 1))(hidden, wte)
    found = jax.grad(lambda h, w: 3 * next_token_loss(h, w, tokens, mask, chunk), argnums=(0, 1))(hidden, wte)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), expected, found)


def test_chunks_bound_the_logits():
    """No array of the chunked loss is as large as the logits of all positions."""
    hidden, wte, tokens, mask = inputs(batch=2, seq=64, vocab=512)

    def largest(chunk):
        jaxpr = jax.make_jaxpr(jax.grad(lambda h, w: next_token_loss(h, w, tokens, mask, chunk), argnums=(0, 1)))(
            hidden, wte
        )
        return max(np.prod(var.aval.shape) for var in all_vars(jaxpr.jaxpr))

    assert largest(0) >= 2 * 64 * 512
    assert largest(8) <= 2 * 64 * 512 // 4


def all_vars(jaxpr):
    for equation in jaxpr.eqns:
        yield from (var for var in equation.outvars if hasattr(var.aval, "shape"))
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from all_vars(inner)


def test_masked_hidden_states_get_no_gradient():
    hidden, wte, tokens, _ = inputs()
    mask = jnp.ones(tokens.shape, bool).at[1, 5:].set(False)
    gradient = jax.grad(next_token_loss)(hidden, wte, tokens, mask)
    assert (gradient[1, 4:] == 0).all() and (gradient[:, -1] == 0).all()
    assert (jnp.abs(gradient[1, :4]).max(-1) > 0).all()
