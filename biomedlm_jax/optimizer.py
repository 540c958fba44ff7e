"""Decoupled AdamW and its schedule, as optax transformations."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike, Float

from biomedlm_jax.config import OptimizerConfig
from biomedlm_jax.finetune_config import FinetuneOptimizerConfig


def cosine_with_warmup(
    peak_learning_rate: float, warmup_steps: int, total_steps: int, final_fraction: float
) -> optax.Schedule:
    """Linear warm-up from 0, then half a cosine to `final_fraction` of the peak at `total_steps`.

    Composer's CosineAnnealingWithWarmupScheduler: the first step has rate 0 unless there is no warm-up.

    Returns:
      A function from completed steps to the learning rate.

    Raises:
      ValueError: `warmup_steps` is not in [0, total_steps).
    """
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(f"warmup_steps must be in [0, total_steps): {warmup_steps} of {total_steps}")

    def schedule(step: ArrayLike) -> Array:
        # optax's own schedules round to float32 even where float64 is on.
        step = jnp.asarray(step).astype(float)
        progress = jnp.clip((step - warmup_steps) / (total_steps - warmup_steps), 0, 1)
        cosine = final_fraction + (1 - final_fraction) * (1 + jnp.cos(jnp.pi * progress)) / 2
        return peak_learning_rate * jnp.where(step < warmup_steps, step / max(warmup_steps, 1), cosine)

    return schedule


def linear_with_warmup(peak_learning_rate: float, warmup_steps: int, total_steps: int) -> optax.Schedule:
    """Linear warm-up from 0, then linear decay to 0 at `total_steps`; transformers' get_linear_schedule_with_warmup.

    Returns:
      A function from completed steps to the learning rate.
    """
    return optax.join_schedules(
        [
            optax.linear_schedule(0, peak_learning_rate, warmup_steps),
            optax.linear_schedule(peak_learning_rate, 0, total_steps - warmup_steps),
        ],
        [warmup_steps],
    )


def decoupled_adamw(
    schedule: optax.ScalarOrSchedule,
    peak_learning_rate: float,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    *,
    weight_decay: float,
) -> optax.GradientTransformation:
    """Composer's DecoupledAdamW, which BioMedLM was trained with.

    Each step removes the fraction `weight_decay * schedule(t) / peak_learning_rate` of every parameter, biases,
    LayerNorm and embeddings too, and adds Adam's update: optax's AdamW with the decay divided by the peak rate.

    Args:
      schedule: learning rate by completed steps.
      peak_learning_rate: the rate at which `weight_decay` holds; Composer's `initial_lr`.
      weight_decay: fraction of a parameter removed per step at the peak rate.

    Source: composer/optim/decoupled_weight_decay.py.
    """
    return optax.adamw(schedule, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay / peak_learning_rate)


def make_schedule(config: OptimizerConfig | FinetuneOptimizerConfig, total_steps: int) -> optax.Schedule:
    """The learning rate of a run by completed steps."""
    if isinstance(config, FinetuneOptimizerConfig):
        return linear_with_warmup(config.learning_rate, math.ceil(config.warmup_fraction * total_steps), total_steps)
    return cosine_with_warmup(config.learning_rate, config.warmup_steps, total_steps, config.final_fraction)


def clip_by_known_norm(max_norm: float) -> optax.GradientTransformationExtraArgs:
    """`optax.clip_by_global_norm` for a norm that is known: `update` takes it as `grad_norm`.

    A step that shards its gradients has the norm from the same exchange as the loss.
    """

    def update(updates: Any, state: Any, params: Any = None, *, grad_norm: Float[Array, ""], **_: Any) -> Any:
        scale = jnp.minimum(1, max_norm / grad_norm)
        return jax.tree.map(lambda x: x * scale, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def make_optimizer(
    config: OptimizerConfig | FinetuneOptimizerConfig, total_steps: int
) -> optax.GradientTransformationExtraArgs:
    """Clipping by global norm, then AdamW under the run's schedule; `update` takes `grad_norm`.

    Of pretraining Decoupled AdamW, of fine-tuning torch's and optax's.
    """
    schedule, betas = make_schedule(config, total_steps), (config.beta1, config.beta2)
    if isinstance(config, FinetuneOptimizerConfig):
        adamw = optax.adamw(schedule, *betas, eps=config.eps, weight_decay=config.weight_decay)
    else:
        adamw = decoupled_adamw(schedule, config.learning_rate, *betas, config.eps, weight_decay=config.weight_decay)
    if not config.clip_norm:
        return optax.with_extra_args_support(adamw)
    return optax.chain(clip_by_known_norm(config.clip_norm), adamw)
