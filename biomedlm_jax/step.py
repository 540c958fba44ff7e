"""The train state, and the training and evaluation steps: pure functions of pytrees."""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Float, Int

from biomedlm_jax import model as model_lib
from biomedlm_jax import optimizer as optimizer_lib
from biomedlm_jax.config import Config
from biomedlm_jax.loss import next_token_loss, target_count
from biomedlm_jax.model import Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows of token ids; `mask` is false for padding."""

    tokens: Int[Array, "batch seq"]
    mask: Bool[Array, "batch seq"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that training changes: completed steps, float32 parameters, and the optimizer's moments."""

    step: Int[Array, ""]
    params: Params
    opt_state: Any


def init_state(config: Config, params: Params | None = None) -> TrainState:
    """The state at step 0 with these parameters, or else random ones from `train.seed`; jit it with `out_shardings`."""
    if params is None:
        params = model_lib.init_params(config.model, config.train.seed)
    opt_state = optimizer_lib.make_optimizer(config.optimizer, config.train.steps).init(params)
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state)


def train_step(config: Config, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """One optimizer step on a global batch.

    The loss is the mean over the batch's predicted tokens, whatever their spread over the parts of an
    accumulated batch, and so is its gradient.

    Returns:
      The next state, and 'train/loss' in nats a token, 'train/grad_norm' before clipping, 'train/learning_rate'.
    """
    loss, grads = _loss_and_grads(config, state, batch)
    optimizer = optimizer_lib.make_optimizer(config.optimizer, config.train.steps)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    schedule = optimizer_lib.make_schedule(config.optimizer, config.train.steps)
    metrics = {
        "train/loss": loss,
        "train/grad_norm": optax.tree.norm(grads),
        "train/learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
    }
    return TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state), metrics


def jit_train_step(config: Config, state_shardings: TrainState, batch_sharding: NamedSharding) -> Any:
    """`train_step` compiled for a mesh; the state that it takes is given away for the one it returns."""
    return jax.jit(
        functools.partial(train_step, config),
        donate_argnums=0,
        in_shardings=(state_shardings, batch_sharding),
        out_shardings=(state_shardings, None),
    )


def eval_step(config: Config, params: Params, batch: Batch) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The summed loss in nats over a batch's predicted tokens, and their number."""
    return _summed_loss(config, params, batch, None), target_count(batch.mask)


def held_out_loss(
    jitted_eval_step: Any, params: Params, batches: Iterable[Batch], stop: Callable[[], bool] = lambda: False
) -> tuple[float, float]:
    """The summed loss in nats over the predicted tokens of all batches, and their number.

    Args:
      jitted_eval_step: `eval_step` of a configuration.
      stop: asked before each batch whether to give up; what is returned then is of the batches until there.
    """
    nll = tokens = 0.0
    for batch in batches:
        if stop():
            break
        batch_nll, batch_tokens = jitted_eval_step(params, batch)
        nll, tokens = nll + float(batch_nll), tokens + float(batch_tokens)
    return nll, tokens


def _summed_loss(config: Config, params: Params, batch: Batch, dropout_key: Array | None) -> Float[Array, ""]:
    model = model_lib.merge(config.model, params)
    hidden = model.hidden_states(batch.tokens, dropout_key=dropout_key)
    return next_token_loss(hidden, params["wte"]["embedding"], batch.tokens, batch.mask, config.train.loss_chunk)


def _loss_and_grads(config: Config, state: TrainState, batch: Batch) -> tuple[Float[Array, ""], Params]:
    parts = config.train.gradient_accumulation_steps
    tokens = target_count(batch.mask)
    step_key = jax.random.fold_in(jax.random.key(config.train.seed), state.step) if config.model.dropout else None

    def part_loss(params: Params, part: Batch, index: Int[Array, ""]) -> Float[Array, ""]:
        key = None if step_key is None else jax.random.fold_in(step_key, index)
        # Divided by the tokens of the whole batch, so that parts are summed, however many tokens each has.
        return _summed_loss(config, params, part, key) / tokens

    loss_and_grads = jax.value_and_grad(part_loss)
    if parts == 1:
        return loss_and_grads(state.params, batch, 0)

    def accumulate(total: Any, inputs: tuple[Batch, Array]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, loss_and_grads(state.params, *inputs)), None

    # Every parts-th row, so that each part is spread over all devices and no row moves.
    split = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)
    zeros = (jnp.float32(0), jax.tree.map(jnp.zeros_like, state.params))
    total, _ = jax.lax.scan(accumulate, zeros, (split, jnp.arange(parts)))
    return total
