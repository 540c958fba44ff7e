"""LayerNorm and GELU with gradients of their own, which keep what they read and nothing else.

The derivatives that JAX makes keep several float32 arrays of the size of the input for the backward pass: of a block of
GPT-2 more than all of its products. These keep the input in its own type, of LayerNorm also two numbers a position, and
compute the rest again, in float32, where it is read anyway.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Moments = tuple[Float[Array, "*batch 1"], Float[Array, "*batch 1"]]


@jax.custom_vjp
def add_bias(x: Float[Array, "*batch width"], bias: Float[Array, "width"]) -> Float[Array, "*batch width"]:
    """`x` plus the bias, in the type of `x`, so that a product can add it before it is written.

    The gradient of a bias is a sum over all tokens of the batch, in float32. In bfloat16 such a sum stops to grow after
    some hundred terms: it was 20 % off at 16,384 tokens.
    """
    return x + bias.astype(x.dtype)


def _add_bias_forward(x: Array, bias: Array) -> tuple[Array, Array]:
    return add_bias(x, bias), bias


def _add_bias_backward(bias: Array, gradient: Array) -> tuple[Array, Array]:
    return gradient, gradient.sum(axis=range(gradient.ndim - 1), dtype=bias.dtype)


add_bias.defvjp(_add_bias_forward, _add_bias_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(
    x: Float[Array, "*batch width"], scale: Float[Array, "width"], bias: Float[Array, "width"], epsilon: float
) -> Float[Array, "*batch width"]:
    """(x - mean) / sqrt(variance + epsilon) * scale + bias over the last axis, in float32, and in the type of `x`."""
    return _layer_norm_forward(x, scale, bias, epsilon)[0]


def _layer_norm_forward(x: Array, scale: Array, bias: Array, epsilon: float) -> tuple[Array, tuple[Array, ...]]:
    mean, inverse = _moments(x, epsilon)
    return (_normalized(x, mean, inverse) * scale + bias).astype(x.dtype), (x, mean, inverse, scale)


def _moments(x: Array, epsilon: float) -> Moments:
    """The mean, and one over the standard deviation.

    The fast variance, E[x^2] - E[x]^2, cancels where the residual stream's mean is large.
    """
    wide = x.astype(jnp.float32)
    mean = wide.mean(axis=-1, keepdims=True)
    return mean, jax.lax.rsqrt(jnp.square(wide - mean).mean(axis=-1, keepdims=True) + epsilon)


def _normalized(x: Array, mean: Array, inverse: Array) -> Array:
    return (x.astype(jnp.float32) - mean) * inverse


def _layer_norm_backward(epsilon: float, kept: tuple[Array, ...], gradient: Array) -> tuple[Array, Array, Array]:
    x, mean, inverse, scale = kept
    wide, normalized = gradient.astype(jnp.float32), _normalized(x, mean, inverse)
    inner = wide * scale
    along = normalized * (inner * normalized).mean(axis=-1, keepdims=True)
    of_x = inverse * (inner - inner.mean(axis=-1, keepdims=True) - along)
    rows = tuple(range(x.ndim - 1))
    return of_x.astype(x.dtype), (wide * normalized).sum(axis=rows), wide.sum(axis=rows)


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


@jax.custom_vjp
def gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))), Hugging Face's gelu_new."""
    return jax.nn.gelu(x.astype(jnp.float32), approximate=True).astype(x.dtype)


def _gelu_forward(x: Array) -> tuple[Array, Array]:
    return gelu(x), x


def _gelu_backward(x: Array, gradient: Array) -> tuple[Array]:
    wide = x.astype(jnp.float32)
    root, square = math.sqrt(2 / math.pi), jnp.square(wide)
    tanh = jnp.tanh(root * wide * (1 + 0.044715 * square))
    inner = root * (1 + 3 * 0.044715 * square)
    derivative = 0.5 * (1 + tanh) + 0.5 * wide * (1 - jnp.square(tanh)) * inner
    return ((gradient.astype(jnp.float32) * derivative).astype(x.dtype),)


gelu.defvjp(_gelu_forward, _gelu_backward)
