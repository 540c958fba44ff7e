"""GPT-2 in Flax NNX, as Hugging Face's GPT2LMHeadModel computes it. Knows nothing of training.

Blocks are stacked along a leading layer axis and scanned, so that the program's size does not grow with depth.
Parameter names follow Hugging Face's, `h.attn.c_attn` and so on, with Flax's names for the leaves.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int, Key

from biomedlm_jax import fp8
from biomedlm_jax.attention import causal_attention, dropout
from biomedlm_jax.config import ModelConfig
from biomedlm_jax.elementwise import add_bias, gelu, layer_norm
from biomedlm_jax.finetune_config import LoraConfig
from biomedlm_jax.kernels.documents import documents
from biomedlm_jax.kernels.flash_attention import CHECKPOINT_NAME
from biomedlm_jax.loss import head_logits
from biomedlm_jax.sharding import GATHERED, GATHERED_AND_KEPT, constrain_rows

# A nested dictionary of arrays: parameters, or anything of their structure.
Params = dict[str, Any]

# What `jax.checkpoint` knows the results of a block's products by, each with its bias.
PRODUCT = "product"

# From the packed projection, [batch, seq, 3*heads, head_dim], the scale of scores, and dropout_keys, to what each
# position takes from the others, [batch, seq, heads, head_dim]; `attention.causal_attention`, or one with a cache.
Attend = Callable[..., Float[Array, "batch seq heads head_dim"]]


class Linear(nnx.Linear):
    """A product and a bias in the compute type, perhaps with a low-rank product beside it."""

    lora: nnx.LoRA | None = None
    lora_scale: float = 1.0
    fp8: bool = False

    def __call__(self, x: Float[Array, "*batch width_in"]) -> Float[Array, "*batch width_out"]:  # type: ignore[override]
        """`x` times the kernel plus the bias, in the type of `x`."""
        kernel = self.kernel[...].astype(x.dtype)
        product = fp8.product(x, kernel) if self.fp8 else x @ kernel
        if self.lora is not None:
            # Apart from the frozen kernel, whose gradient would be the dearest product of all.
            product = product + self.lora(x) * self.lora_scale
        return checkpoint_name(add_bias(product, self.bias[...]), PRODUCT)  # type: ignore[index]


def _linear(config: ModelConfig, width_in: int, width_out: int, stddev: float, rngs: nnx.Rngs) -> Linear:
    made = Linear(width_in, width_out, kernel_init=nnx.initializers.normal(stddev), rngs=rngs)
    made.fp8 = config.fp8
    return made


class LayerNorm(nnx.LayerNorm):
    """LayerNorm whose backward pass keeps its input only."""

    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:  # type: ignore[override]
        """`x` normalized over the last axis, in its own type."""
        return layer_norm(x, self.scale[...], self.bias[...], self.epsilon)  # type: ignore[index]


def _layer_norm(config: ModelConfig, rngs: nnx.Rngs) -> LayerNorm:
    return LayerNorm(config.n_embd, epsilon=config.layer_norm_epsilon, rngs=rngs)


class Attention(nnx.Module):
    """Causal multi-head self-attention with a packed query-key-value projection."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        width, stddev = config.n_embd, config.initializer_range
        self.c_attn = _linear(config, width, 3 * width, stddev, rngs)
        self.c_proj = _linear(config, width, width, stddev / math.sqrt(2 * config.n_layer), rngs)

    def __call__(
        self,
        x: Float[Array, "batch seq embd"],
        layer: Int[Array, ""] | int,
        attend: Attend,
        keys: Key[Array, "batch"] | None = None,
    ) -> Float[Array, "batch seq embd"]:
        """Mixes positions as `attend` says; `layer` counts from 0, and `keys`, one a row, turn dropout on."""
        config = self.config
        head_dim = config.n_embd // config.n_head
        # https://huggingface.co/stanford-crfm/BioMedLM: scale_attn_by_inverse_layer_idx divides by i + 1.
        scale = jnp.float32(1 / math.sqrt(head_dim))
        if config.scale_attn_by_inverse_layer_idx:
            scale = scale / (layer + 1)
        qkv = self.c_attn(x).reshape(*x.shape[:2], 3 * config.n_head, head_dim)
        out = attend(qkv, scale, dropout_keys=keys)
        return self.c_proj(out.reshape(x.shape))


class MLP(nnx.Module):
    """Two projections around GELU's tanh approximation (Hugging Face's gelu_new)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        width, stddev = config.n_embd, config.initializer_range
        self.c_fc = _linear(config, width, 4 * width, stddev, rngs)
        self.c_proj = _linear(config, 4 * width, width, stddev / math.sqrt(2 * config.n_layer), rngs)

    def __call__(self, x: Float[Array, "batch seq embd"]) -> Float[Array, "batch seq embd"]:
        """The same function of each position."""
        return self.c_proj(gelu(self.c_fc(x)))


class Block(nnx.Module):
    """A pre-LayerNorm transformer block."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.resid_pdrop = config.resid_pdrop
        self.ln_1 = _layer_norm(config, rngs)
        self.attn = Attention(config, rngs)
        self.ln_2 = _layer_norm(config, rngs)
        self.mlp = MLP(config, rngs)

    def __call__(
        self,
        x: Float[Array, "batch seq embd"],
        layer: Int[Array, ""] | int,
        attend: Attend,
        keys: Key[Array, "batch"] | None = None,
    ) -> Float[Array, "batch seq embd"]:
        """The residual stream after the block; arguments as of `Attention`."""
        attn_keys, attn_out_keys, mlp_out_keys = (None if keys is None else _fold_in(keys, i) for i in range(3))
        x = _add(x, dropout(self.attn(self.ln_1(x), layer, attend, attn_keys), self.resid_pdrop, attn_out_keys))
        return _add(x, dropout(self.mlp(self.ln_2(x)), self.resid_pdrop, mlp_out_keys))


def _add(x: Array, y: Array) -> Array:
    """x + y, rounded once; spelled in float32 so that a product does not add it.

    For that cuBLAS would copy x to where it writes, while LayerNorm reads both for its mean anyway.
    """
    return (x.astype(jnp.float32) + y.astype(jnp.float32)).astype(x.dtype)


def _add_lora(block: Block, lora: LoraConfig, dtype: Any, rngs: nnx.Rngs) -> Block:
    """Adds what LoRA trains, 0 at first: https://github.com/huggingface/peft, LoraLayer.reset_lora_parameters."""
    a_init = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
    layers = {"c_attn": [block.attn.c_attn], "c_proj": [block.attn.c_proj, block.mlp.c_proj], "c_fc": [block.mlp.c_fc]}
    for name in lora.modules:
        for layer in layers[name]:
            width_in, width_out = layer.in_features, layer.out_features
            layer.lora = nnx.LoRA(width_in, lora.rank, width_out, dtype=dtype, a_initializer=a_init, rngs=rngs)
            layer.lora_scale = lora.scale
    return block


def _fold_in(keys: Key[Array, "batch"], number: Int[Array, ""] | int) -> Key[Array, "batch"]:
    return jax.vmap(jax.random.fold_in, (0, None))(keys, number)


def _save_all_but_gathered(primitive: Any, *operands: Any, **params: Any) -> bool:
    """The policy that saves everything but gathered weights.

    To a policy, `sharding.gather_kernels` is one operation with a gradient of its own, then the naming of its result;
    it is the only one of that sort whose first argument is a matrix.
    """
    if primitive.name == "name":
        return params["name"] != GATHERED
    return not (primitive.name.startswith("custom_vjp_call") and operands[0].ndim == 2)


# What the backward pass finds saved of a block, and need not compute again. Weights that were gathered from other
# devices are saved only where they are to be kept: 2 bytes a parameter, on every device.
REMAT_POLICIES = {
    "none": _save_all_but_gathered,
    # To the policy, a kernel is no matrix product: its result, and what its backward pass needs, are saved by name.
    "matmuls": jax.checkpoint_policies.save_only_these_names(PRODUCT, CHECKPOINT_NAME, GATHERED_AND_KEPT),
    "full": jax.checkpoint_policies.save_only_these_names(GATHERED_AND_KEPT),
}


class GPT2(nnx.Module):
    """The language model: embeddings, scanned blocks, a last LayerNorm, and a head tied to the embedding."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, lora: LoraConfig | None = None):
        self.config = config
        embedding = functools.partial(
            nnx.Embed,
            features=config.n_embd,
            embedding_init=nnx.initializers.normal(config.initializer_range),
            rngs=rngs,
        )
        self.wte = embedding(config.vocab_size)
        self.wpe = embedding(config.n_positions)

        def block(rngs: nnx.Rngs) -> Block:
            made = Block(config, rngs)
            return _add_lora(made, lora, jnp.dtype(config.compute_dtype), rngs) if lora and lora.rank else made

        self.h = nnx.vmap(block)(rngs.split(config.n_layer))
        self.ln_f = _layer_norm(config, rngs)

    def hidden_states(
        self,
        tokens: Int[Array, "batch seq"],
        *,
        attention_mask: Bool[Array, "batch seq"] | None = None,
        position_ids: Int[Array, "batch seq"] | None = None,
        segment_ids: Int[Array, "batch seq"] | None = None,
        dropout_keys: Key[Array, "batch"] | None = None,
        gather: Callable[[Params], Params] | None = None,
    ) -> Float[Array, "batch seq embd"]:
        """The residual stream after the last LayerNorm, in the compute type.

        Args:
          tokens: ids in [0, vocab_size).
          attention_mask: true for tokens, false for padding, which is never attended to.
          position_ids: where each token stands; by default 0, 1, 2, ..., from the start of its segment.
          segment_ids: documents packed in a row, as runs of equal ids, which do not attend to each other.
          dropout_keys: turn dropout on, at the configuration's rates; a key for each row.
          gather: makes one block's parameters whole, of which this model holds shards; `sharding.gather_kernels`.
        """
        config = self.config
        positions = jnp.arange(tokens.shape[1]) if position_ids is None else position_ids
        if segment_ids is not None and position_ids is None:
            positions = positions - documents(segment_ids).starts
        # Looked up in float32, so that the gradients of a word's and a position's many occurrences are summed in it.
        x = constrain_rows((self.wte(tokens) + self.wpe(positions)).astype(config.compute_dtype))
        if dropout_keys is not None:
            x = dropout(x, config.embd_pdrop, _fold_in(dropout_keys, config.n_layer))
        block_def, block_state = nnx.split(self.h)
        attend = functools.partial(
            causal_attention,
            implementation=config.attention,
            segment_ids=segment_ids,
            mask=attention_mask,
            dropout_rate=config.attn_pdrop,
        )

        def block(x: Array, inputs: tuple[Params, Array]) -> tuple[Array, None]:
            params, layer = inputs
            keys = None if dropout_keys is None else _fold_in(dropout_keys, layer)
            params = params if gather is None else gather(params)
            return constrain_rows(nnx.merge(block_def, params)(x, layer, attend, keys)), None

        # A loop keeps its iterations apart, so that the compiler cannot merge what is recomputed with what was computed
        # first; one iteration is no loop. (XLA for CPUs merges it all the same.)
        prevent_cse = config.n_layer // config.unroll <= 1
        block = jax.checkpoint(block, policy=REMAT_POLICIES[config.remat], prevent_cse=prevent_cse)
        inputs = (nnx.to_pure_dict(block_state), jnp.arange(config.n_layer))
        x, _ = jax.lax.scan(block, x, inputs, unroll=min(config.unroll, config.n_layer))
        return self.ln_f(x)

    def __call__(
        self,
        tokens: Int[Array, "batch seq"],
        *,
        attention_mask: Bool[Array, "batch seq"] | None = None,
        position_ids: Int[Array, "batch seq"] | None = None,
        segment_ids: Int[Array, "batch seq"] | None = None,
        dropout_keys: Key[Array, "batch"] | None = None,
    ) -> Float[Array, "batch seq vocab"]:
        """Logits of the next token, float32; arguments as in `hidden_states`."""
        hidden = self.hidden_states(
            tokens,
            attention_mask=attention_mask,
            position_ids=position_ids,
            segment_ids=segment_ids,
            dropout_keys=dropout_keys,
        )
        return head_logits(hidden, self.wte.embedding[...])


def init_params(config: ModelConfig, seed: int, lora: LoraConfig | None = None) -> Params:
    """Initial float32 parameters, N(0, initializer_range) as GPT-2's; a pure function of its arguments."""
    return to_params(GPT2(config, nnx.Rngs(seed), lora))


def to_params(model: GPT2) -> Params:
    """The model's parameters as a nested dictionary of arrays."""
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


@functools.cache
def _graphdef(part: Callable[..., Any], config: ModelConfig, *options: Any) -> nnx.GraphDef[Any]:
    return nnx.graphdef(nnx.eval_shape(lambda: part(config, nnx.Rngs(0), *options)))


def merge(config: ModelConfig, params: Params, lora: LoraConfig | None = None) -> GPT2:
    """The model with these parameters; cheap, for use inside a traced function.

    Args:
      lora: what the parameters of LoRA are among `params` for, if they are.
    """
    return nnx.merge(_graphdef(GPT2, config, lora), params)


def combine(*parts: Params) -> Params:
    """Parameters of which each part holds some."""
    flat: dict[tuple[str, ...], Any] = {}
    for part in parts:
        flat |= traverse_util.flatten_dict(part)
    return traverse_util.unflatten_dict(flat)


def merge_block(config: ModelConfig, params: Params) -> Block:
    """One block with its parameters, of which a model has a stack; cheap, for use inside a traced function."""
    return nnx.merge(_graphdef(Block, config), params)


def merge_layer_norm(config: ModelConfig, params: Params) -> LayerNorm:
    """The last LayerNorm with its parameters; cheap, for use inside a traced function."""
    return nnx.merge(_graphdef(_layer_norm, config), params)


def param_count(config: ModelConfig) -> int:
    """Number of parameters, the head tied to the embedding: 2,594,247,680 for BioMedLM."""
    d = config.n_embd
    return config.n_layer * (12 * d * d + 13 * d) + (config.vocab_size + config.n_positions) * d + 2 * d


def flops_per_token(config: ModelConfig) -> float:
    """Training FLOPs a token by the usual 6 N + 12 L d T (PaLM, appendix B): 16.57e9 for BioMedLM."""
    return 6 * param_count(config) + 12 * config.n_layer * config.n_embd * config.n_positions
