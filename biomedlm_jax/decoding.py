"""The forward pass with a cache of keys and values: all of the prompts at once, then a token of each at a time.

Prompts of different lengths are padded on the right. No position sees what comes after it, and each row's next token
takes the place of its padding: so no row is computed otherwise than alone, and no kernel needs a mask.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from biomedlm_jax import model as model_lib
from biomedlm_jax.attention import causal_attention
from biomedlm_jax.config import ModelConfig
from biomedlm_jax.loss import head_logits
from biomedlm_jax.model import Attend, Params


class Weights(NamedTuple):
    """Parameters laid out to be read once a token: a layer at a time, in the compute type."""

    wte: Float[Array, "vocab embd"]
    """In float32, to be looked up."""
    head: Float[Array, "vocab embd"]
    """The same in the compute type, the tied head."""
    wpe: Float[Array, "position embd"]
    layers: tuple[Params, ...]
    ln_f: Params


class KeysAndValues(NamedTuple):
    """Of one layer. The heads come before the positions, as products with them want it."""

    keys: Float[Array, "batch heads length head_dim"]
    values: Float[Array, "batch heads length head_dim"]


Cache = tuple[KeysAndValues, ...]


def lay_out(config: ModelConfig, params: Params) -> Weights:
    """The weights of `params`, which `model.init_params` nests."""
    dtype = jnp.dtype(config.compute_dtype)

    def layer_of(path: Any, x: Array, layer: int) -> Array:
        # Biases and LayerNorm stay in float32, which they are used in.
        return x[layer].astype(dtype if path[-1].key == "kernel" else x.dtype)

    wte = params["wte"]["embedding"]
    return Weights(
        wte,
        wte.astype(dtype),
        params["wpe"]["embedding"],
        tuple(
            jax.tree_util.tree_map_with_path(functools.partial(layer_of, layer=layer), params["h"])
            for layer in range(config.n_layer)
        ),
        params["ln_f"],
    )


@functools.partial(jax.jit, static_argnames=("config", "length"))
def prefill(
    config: ModelConfig, weights: Weights, tokens: Int[Array, "batch seq"], lengths: Int[Array, "batch"], length: int
) -> tuple[Float[Array, "batch vocab"], Cache]:
    """Reads the prompts.

    Args:
      tokens: padded on the right with any ids.
      lengths: of the prompts without padding, from 1.
      length: positions that the cache has room for.

    Returns:
      Float32 logits of each prompt's next token, and the cache.
    """
    cache: list[KeysAndValues] = []

    def attend(qkv: Array, scale: Array, dropout_keys: None = None) -> Array:
        _, keys, values = jnp.split(qkv, 3, axis=2)
        room = ((0, 0), (0, 0), (0, length - tokens.shape[1]), (0, 0))
        cache.append(KeysAndValues(*(jnp.pad(x.swapaxes(1, 2), room) for x in (keys, values))))
        return causal_attention(qkv, scale, implementation=config.attention)

    x = _run_blocks(config, weights, tokens, jnp.arange(tokens.shape[1]), attend)
    last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)
    return _logits(config, weights, last), tuple(cache)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
def decode(
    config: ModelConfig, weights: Weights, cache: Cache, tokens: Int[Array, "batch"], positions: Int[Array, "batch"]
) -> tuple[Float[Array, "batch vocab"], Cache]:
    """Reads one more token of each row, at its position.

    Returns:
      Float32 logits of each row's next token, and the cache, which takes the place of the one given.
    """
    rows = jnp.arange(len(tokens))
    read = jnp.arange(cache[0].keys.shape[2]) <= positions[:, None, None]
    written: list[KeysAndValues] = []

    def attend(qkv: Array, scale: Array, dropout_keys: None = None) -> Array:
        query, key, value = jnp.split(qkv[:, 0], 3, axis=1)
        before = cache[len(written)]
        keys = before.keys.at[rows, :, positions].set(key)
        values = before.values.at[rows, :, positions].set(value)
        written.append(KeysAndValues(keys, values))
        scores = jnp.einsum("bhd,bhkd->bhk", query, keys, preferred_element_type=jnp.float32) * scale
        probabilities = jax.nn.softmax(scores, axis=-1, where=read).astype(values.dtype)
        return jnp.einsum("bhk,bhkd->bhd", probabilities, values)[:, None]

    x = _run_blocks(config, weights, tokens[:, None], positions[:, None], attend)
    return _logits(config, weights, x), tuple(written)


def _run_blocks(
    config: ModelConfig, weights: Weights, tokens: Int[Array, "batch seq"], positions: Array, attend: Attend
) -> Float[Array, "batch seq embd"]:
    """The residual stream before the last LayerNorm; `attend` is called for each layer in turn."""
    x = (weights.wte[tokens] + weights.wpe[positions]).astype(config.compute_dtype)
    for layer, params in enumerate(weights.layers):
        x = model_lib.merge_block(config, params)(x, layer, attend)
    return x


def _logits(config: ModelConfig, weights: Weights, last: Float[Array, "batch 1 embd"]) -> Float[Array, "batch vocab"]:
    return head_logits(model_lib.merge_layer_norm(config, weights.ln_f)(last)[:, 0], weights.head)
