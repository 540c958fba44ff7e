"""LayerNorm and GELU with their own gradients, against PyTorch's in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from biomedlm_jax.elementwise import add_bias, gelu, layer_norm

torch = pytest.importorskip("torch")

WIDTH = 48


def draw(*shape, seed=0, dtype=jnp.float32, offset=0.0):
    return (jax.random.normal(jax.random.key(seed), shape) + offset).astype(dtype)


def in_float64(array):
    return torch.tensor(np.asarray(array, np.float64), requires_grad=True)


def assert_near(ours, theirs, dtype):
    """Within the rounding of the type, of the largest value."""
    theirs = theirs.detach().numpy()
    limit = (8e-3 if dtype == jnp.bfloat16 else 1e-5) * np.abs(theirs).max()
    np.testing.assert_allclose(np.asarray(ours, np.float64), theirs, atol=limit, rtol=0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_layer_norm(dtype, offset):
    """Also of a stream whose mean is large, in which a fast variance cancels."""
    x, weight = draw(3, 5, WIDTH, dtype=dtype, offset=offset), draw(3, 5, WIDTH, seed=1, dtype=dtype)
    scale, bias = draw(WIDTH, seed=2), draw(WIDTH, seed=3)
    out, vjp = jax.vjp(lambda *args: layer_norm(*args, 1e-5), x, scale, bias)
    theirs = [in_float64(array) for array in (x, scale, bias)]
    expected = torch.nn.functional.layer_norm(theirs[0], (WIDTH,), *theirs[1:], 1e-5)
    assert out.dtype == dtype
    assert_near(out, expected, dtype)
    expected.backward(in_float64(weight))
    for ours, array in zip(vjp(weight), theirs, strict=True):
        assert_near(ours, array.grad, dtype if ours.ndim == 3 else jnp.float32)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gelu(dtype):
    x = jnp.concatenate([4 * draw(500, dtype=dtype), jnp.array([0, 30, -30, 1e4, -1e4], dtype)])
    weight = draw(505, seed=1, dtype=dtype)
    out, vjp = jax.vjp(gelu, x)
    theirs = in_float64(x)
    expected = torch.nn.functional.gelu(theirs, approximate="tanh")
    assert_near(out[:500], expected[:500], dtype)
    np.testing.assert_array_equal(out[500:], np.asarray([0, 30, 0, 1e4, 0], dtype))
    expected.backward(in_float64(weight))
    [ours] = vjp(weight)
    assert ours.dtype == dtype
    assert_near(ours, theirs.grad, dtype)


def test_the_gradient_of_a_bias_is_summed_in_float32():
    """In bfloat16 a sum of equal terms stops to grow at 256 of them."""
    x, bias = draw(8192, WIDTH, dtype=jnp.bfloat16), draw(WIDTH, seed=1)
    weight = draw(8192, WIDTH, seed=2, dtype=jnp.bfloat16, offset=1.0)
    out, vjp = jax.vjp(add_bias, x, bias)
    assert out.dtype == x.dtype
    assert_near(out, in_float64(x) + in_float64(bias.astype(jnp.bfloat16)), jnp.bfloat16)
    of_x, of_bias = vjp(weight)
    np.testing.assert_array_equal(of_x, weight)
    assert of_bias.dtype == bias.dtype
    assert_near(of_bias, in_float64(weight).sum(0), jnp.float32)


def test_they_keep_what_they_read_and_nothing_else():
    """Of the size of the input, once, in its type."""
    x = draw(4, 64, WIDTH, dtype=jnp.bfloat16)
    for function in (lambda x: layer_norm(x, jnp.ones(WIDTH), jnp.zeros(WIDTH), 1e-5), gelu):
        kept = jax.tree.leaves(jax.eval_shape(lambda x, function=function: jax.vjp(function, x)[1], x))
        assert [leaf.dtype for leaf in kept if leaf.size == x.size] == [jnp.bfloat16]
