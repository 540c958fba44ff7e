"""What fine-tuning makes of a pretrained model: new words, a head, and either all weights or LoRA's to be trained."""

import functools

import jax
import jax.numpy as jnp
from flax import traverse_util

from biomedlm_jax import heads, step
from biomedlm_jax import model as model_lib
from biomedlm_jax.finetune_config import CLASSIFICATION, MULTIPLE_CHOICE, FinetuneConfig, LoraConfig
from biomedlm_jax.model import Params, combine
from biomedlm_jax.step import Objective
from biomedlm_jax.tasks import TASKS


def lora_of(config: FinetuneConfig) -> LoraConfig | None:
    """The settings of LoRA, if it is used."""
    return config.lora if config.lora.rank else None


def scores_per_row(config: FinetuneConfig) -> int:
    """How wide the task's head is: one score of a choice, or one a label; 0 where there is no head."""
    if config.task.name in MULTIPLE_CHOICE:
        return 1
    return len(TASKS[config.task.name].labels) if config.task.name in CLASSIFICATION else 0


def objective(config: FinetuneConfig) -> Objective:
    """What the task's training lowers: of answers by a head, or of texts."""
    lora = lora_of(config)
    if scores_per_row(config):
        return heads.objective(config.model, lora)
    return step.language_model(config.model, config.train.loss_chunk, lora)


def with_new_parts(config: FinetuneConfig, params: Params) -> Params:
    """The parameters of a pretrained model with embeddings of the task's words, a head, and LoRA's matrices.

    New embeddings and the head are drawn from N(0, initializer_range) by `train.seed`, as transformers does.
    """
    wte = params["wte"]["embedding"]
    shape = (config.model.vocab_size - len(wte), config.model.n_embd)
    new_words = config.model.initializer_range * jax.random.normal(jax.random.key(config.train.seed), shape)
    parts = [params, {"wte": {"embedding": jnp.concatenate([wte, new_words])}}]
    if width := scores_per_row(config):
        parts.append(heads.init_head(config.model, width, config.train.seed))
    if lora := lora_of(config):
        flat = traverse_util.flatten_dict(model_lib.init_params(config.model, config.train.seed, lora))
        parts.append(traverse_util.unflatten_dict({path: x for path, x in flat.items() if "lora" in path}))
    return combine(*parts)


def split(config: FinetuneConfig, params: Params) -> tuple[Params, Params]:
    """What is trained, and what is frozen; of LoRA the latter with matrices in the compute type."""
    if not lora_of(config):
        return params, {}
    dtype, trained, frozen = jnp.dtype(config.model.compute_dtype), {}, {}
    for path, x in traverse_util.flatten_dict(params).items():
        if "lora" in path or "score" in path:
            trained[path] = x
        else:
            frozen[path] = x.astype(dtype) if path[-1] in ("kernel", "embedding") else x
    return traverse_util.unflatten_dict(trained), traverse_util.unflatten_dict(frozen)


def start(config: FinetuneConfig, params: Params | None = None) -> tuple[Params, Params]:
    """What is trained and what is frozen, from a pretrained model's parameters or random ones; to be compiled."""
    if params is None:
        params = model_lib.init_params(config.model, config.train.seed)
    return split(config, with_new_parts(config, params))


def checksum(params: Params) -> int:
    """Tells a model's checkpoints apart: the sum of the bits of its LayerNorms, which each step moves."""
    norms = [x for path, x in traverse_util.flatten_dict(params).items() if path[-2].startswith("ln_")]
    bits = [jax.lax.bitcast_convert_type(x, jnp.uint32).sum(dtype=jnp.uint32) for x in norms]
    return int(sum(bits[1:], bits[0]))


def finish(config: FinetuneConfig, trained: Params, base: Params) -> Params:
    """Parameters of a whole model: what LoRA trained, merged into the model that it started from; to be compiled."""
    flat = traverse_util.flatten_dict(combine(with_new_parts(config, base), trained))
    whole = {path: x for path, x in flat.items() if "lora" not in path}
    for path in flat:
        if path[-1] == "lora_a":
            beside = path[:-2]
            product = jnp.einsum("lir,lro->lio", flat[path], flat[*beside, "lora", "lora_b"])
            whole[*beside, "kernel"] = flat[*beside, "kernel"] + config.lora.scale * product
    return traverse_util.unflatten_dict(whole)


def abstract_start(config: FinetuneConfig) -> tuple[Params, Params]:
    """Shapes and types of what is trained and what is frozen."""
    return jax.eval_shape(functools.partial(start, config))
