"""The train state, and the training and evaluation steps: pure functions of pytrees."""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, Key

from biomedlm_jax import compiler_options, sharding
from biomedlm_jax import model as model_lib
from biomedlm_jax import optimizer as optimizer_lib
from biomedlm_jax.config import Config, ModelConfig
from biomedlm_jax.finetune_config import FinetuneConfig, LoraConfig
from biomedlm_jax.loss import next_token_loss, target_count
from biomedlm_jax.model import Params
from biomedlm_jax.sharding import Exchange


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows of token ids.

    Attributes:
      mask: false for padding, and for other tokens that are not to be predicted.
      segment_ids: runs of equal ids for documents that do not attend to each other; None is a program without them.
    """

    tokens: Int[Array, "batch seq"]
    mask: Bool[Array, "batch seq"]
    segment_ids: Int[Array, "batch seq"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that training changes: completed steps, float32 parameters, and the optimizer's moments."""

    step: Int[Array, ""]
    params: Params
    opt_state: Any


# One block's parameters made whole, of which a device holds shards.
Gather = Callable[[Params], Params]


@dataclasses.dataclass(frozen=True)
class Objective:
    """What a step lowers: the mean, over the terms that a batch has on all devices, of a loss.

    Attributes:
      summed_loss: from parameters, a batch, a key of dropout for each of its rows or None, and `Gather` or None, the
        sum in nats.
      count: of a batch's terms.
    """

    summed_loss: Callable[[Params, Any, Key[Array, "batch"] | None, Gather | None], Float[Array, ""]]
    count: Callable[[Any], Float[Array, ""]]


def language_model(config: ModelConfig, loss_chunk: int = 0, lora: LoraConfig | None = None) -> Objective:
    """The prediction of the tokens that a `Batch` masks in, each from those before it."""

    def summed_loss(params: Params, batch: Batch, keys: Key[Array, "batch"] | None, gather: Gather | None) -> Array:
        model = model_lib.merge(config, params, lora)
        hidden = model.hidden_states(batch.tokens, segment_ids=batch.segment_ids, dropout_keys=keys, gather=gather)
        return next_token_loss(hidden, params["wte"]["embedding"], batch.tokens, batch.mask, loss_chunk)

    return Objective(summed_loss, lambda batch: target_count(batch.mask))


def pretraining(config: Config | FinetuneConfig) -> Objective:
    """The objective of a pretraining run: the prediction of words by all weights."""
    return language_model(config.model, config.train.loss_chunk)


def init_state(config: Config | FinetuneConfig, params: Params | None = None) -> TrainState:
    """The state at step 0 with these parameters, or else random ones from `train.seed`; jit it with `out_shardings`."""
    if params is None:
        params = model_lib.init_params(config.model, config.train.seed)
    opt_state = optimizer_lib.make_optimizer(config.optimizer, config.train.steps).init(params)
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state)


def train_step(
    config: Config | FinetuneConfig,
    objective: Objective,
    exchange: Exchange,
    state: TrainState,
    batch: Any,
    frozen: Params | None = None,
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """One optimizer step on a global batch, under the mesh set by `jax.set_mesh`.

    The loss is the mean over the batch's terms (predicted tokens), whatever their spread over devices and over the
    parts of an accumulated batch, and so is its gradient.

    Args:
      batch: as the objective takes it, rows along the first axis of each array.
      frozen: parameters that are not trained, where `state` does not hold all.

    Returns:
      The next state, and 'train/loss' in nats a term, 'train/grad_norm' before clipping, 'train/learning_rate'.
    """
    loss, grads, grad_norm = _loss_and_grads(config, objective, exchange, state, batch, frozen or {})
    optimizer = optimizer_lib.make_optimizer(config.optimizer, config.train.steps)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params, grad_norm=grad_norm)
    schedule = optimizer_lib.make_schedule(config.optimizer, config.train.steps)
    metrics = {
        "train/loss": loss,
        "train/grad_norm": grad_norm,
        "train/learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
    }
    return TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state), metrics


def jit_train_step(
    config: Config | FinetuneConfig,
    state_shardings: TrainState,
    batch_sharding: NamedSharding,
    objective: Objective | None = None,
    frozen_shardings: Params | None = None,
) -> Any:
    """`train_step` compiled for a mesh; the state that it takes is given away for the one it returns.

    Args:
      objective: by default that of pretraining.
      frozen_shardings: of the parameters that it takes behind state and batch, if it does.
    """
    mesh = batch_sharding.mesh
    assert isinstance(mesh, Mesh)
    return jax.jit(
        functools.partial(train_step, config, objective or pretraining(config), _exchange(config, mesh)),
        donate_argnums=0,
        in_shardings=(state_shardings, batch_sharding) + ((frozen_shardings,) if frozen_shardings else ()),
        out_shardings=(state_shardings, None),
        compiler_options=compiler_options.for_mesh(mesh),
    )


def eval_step(config: Config, params: Params, batch: Batch) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The summed loss in nats over a batch's predicted tokens, and their number; on one device."""
    objective = pretraining(config)
    return objective.summed_loss(params, batch, None, None), objective.count(batch)


def jit_eval_step(config: Config | FinetuneConfig, mesh: Mesh, objective: Objective | None = None) -> Any:
    """`eval_step` compiled for parameters and batches that lie on a mesh as in training.

    The forward pass is that of training: where embeddings are sharded, they are rounded to the compute type.

    Args:
      objective: by default that of pretraining.
    """
    goal = objective or pretraining(config)

    def of_rows(params: Params, batch: Any, gather: Gather) -> tuple[Float[Array, ""], Float[Array, ""]]:
        nll, terms = jax.lax.psum(
            jnp.stack([goal.summed_loss(params, batch, None, gather), goal.count(batch)]), sharding.AXES
        )
        return nll, terms

    return _jit_forward(config, mesh, of_rows)


def jit_rows(
    config: Config | FinetuneConfig, mesh: Mesh, function: Callable[[Params, Any, Gather], Float[Array, "batch *rest"]]
) -> Any:
    """A function of each row of a batch, compiled for parameters and batches that lie on a mesh as in training.

    Args:
      function: takes parameters and a batch as an `Objective` does.

    Returns:
      From parameters and a batch to what the function makes of all its rows, whole on every device.
    """

    def of_rows(params: Params, batch: Any, gather: Gather) -> Float[Array, "batch *rest"]:
        return jax.lax.all_gather(function(params, batch, gather), sharding.AXES, axis=0, tiled=True)

    return _jit_forward(config, mesh, of_rows)


def _jit_forward(config: Config | FinetuneConfig, mesh: Mesh, of_rows: Callable[[Params, Any, Gather], Any]) -> Any:
    """Compiles what a device does with its rows of a batch, and exchanges, to what is equal on all of them."""
    exchange = _exchange(config, mesh)

    def on_a_device(params: Params, batch: Any) -> Any:
        whole = sharding.gather_all_but_kernels(exchange, params)
        return of_rows(whole, batch, functools.partial(sharding.gather_kernels, exchange))

    def on_the_mesh(params: Params, batch: Any) -> Any:
        in_specs = (sharding.tree_specs(params), sharding.BATCH_SPEC)
        return jax.shard_map(on_a_device, mesh=mesh, in_specs=in_specs, out_specs=P(), check_vma=False)(params, batch)

    return jax.jit(on_the_mesh, compiler_options=compiler_options.for_mesh(mesh))


def held_out_loss(
    jitted_eval_step: Any, params: Params, batches: Iterable[Any], stop: Callable[[], bool] = lambda: False
) -> tuple[float, float]:
    """The summed loss in nats over the predicted tokens of all batches, and their number.

    Args:
      jitted_eval_step: of `jit_eval_step`.
      stop: asked before each batch whether to give up; what is returned then is of the batches until there.
    """
    nll = tokens = 0.0
    for batch in batches:
        if stop():
            break
        batch_nll, batch_tokens = jitted_eval_step(params, batch)
        nll, tokens = nll + float(batch_nll), tokens + float(batch_tokens)
    return nll, tokens


def _exchange(config: Config | FinetuneConfig, mesh: Mesh) -> Exchange:
    return Exchange(
        rings=sharding.find_rings(mesh),
        replica=mesh.shape["replica"],
        dtype=jnp.dtype(config.model.compute_dtype),
        reduce_dtype=jnp.promote_types(config.model.compute_dtype, config.mesh.reduce_dtype),
        keep=not config.mesh.reshard_after_forward,
    )


def _loss_and_grads(
    config: Config | FinetuneConfig,
    objective: Objective,
    exchange: Exchange,
    state: TrainState,
    batch: Any,
    frozen: Params,
) -> tuple[Float[Array, ""], Params, Float[Array, ""]]:
    """The mean loss of a batch, its gradient, and the gradient's norm."""
    specs = sharding.tree_specs(state.params)
    row_ids = jnp.arange(jax.tree.leaves(batch)[0].shape[0])
    totals, grads = jax.shard_map(
        functools.partial(_sums_on_a_device, config, objective, exchange),
        in_specs=(specs, sharding.tree_specs(frozen), P(), sharding.BATCH_SPEC, sharding.BATCH_SPEC),
        out_specs=(P(), specs),
        check_vma=False,
    )(state.params, frozen, state.step, batch, row_ids)
    nll, count, squares = totals
    count = jnp.maximum(count, 1)  # a batch that predicts nothing has no gradient
    return nll / count, jax.tree.map(lambda x: x / count, grads), jnp.sqrt(squares) / count


def _sums_on_a_device(
    config: Config | FinetuneConfig,
    objective: Objective,
    exchange: Exchange,
    params: Params,
    frozen: Params,
    step: Int[Array, ""],
    batch: Any,
    row_ids: Int[Array, "rows"],
) -> tuple[Float[Array, "3"], Params]:
    """What one device does of `_loss_and_grads`, with its shards of the parameters and its rows of the batch.

    Returns:
      Over all devices: the summed loss, the number of its terms, and the sum of squares of the gradient of the summed
      loss; and this device's shards of that gradient.
    """
    parts = config.train.gradient_accumulation_steps

    # Once for all parts, and so are the gradients of what it makes whole: those of kernels are shards on both sides.
    frozen = sharding.gather_all_but_kernels(exchange, frozen)
    whole, scatter = jax.vjp(functools.partial(sharding.gather_all_but_kernels, exchange), params)

    def part_loss(whole: Params, part: Any, row_ids: Int[Array, "rows"]) -> Float[Array, ""]:
        keys = None
        if config.model.dropout:
            # By the row's place in the batch, so that masks depend neither on the mesh nor on accumulation.
            step_key = jax.random.fold_in(jax.random.key(config.train.seed), step)
            keys = jax.vmap(jax.random.fold_in, (None, 0))(step_key, row_ids)
        gather = functools.partial(sharding.gather_kernels, exchange)
        return objective.summed_loss(model_lib.combine(frozen, whole), part, keys, gather)

    loss_and_grads = jax.value_and_grad(part_loss)
    if parts == 1:
        nll, grads = loss_and_grads(whole, batch, row_ids)
    else:

        def accumulate(total: Any, inputs: tuple[Any, Array]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, loss_and_grads(whole, *inputs)), None

        # Every parts-th row: which part a row is in changes nothing, and the compiler moves none.
        split = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), (batch, row_ids))
        zeros = (jnp.float32(0), jax.tree.map(jnp.zeros_like, whole))
        (nll, grads), _ = jax.lax.scan(accumulate, zeros, split)
    (grads,) = scatter(grads)
    if exchange.replica > 1:
        grads = jax.lax.psum(grads, "replica")
    # What is one number travels together, at the end. Replicas hold the same shards of the gradient.
    squares = optax.tree.norm(grads, squared=True) / exchange.replica
    totals = jax.lax.psum(jnp.stack([nll, objective.count(batch), squares]), sharding.AXES)
    return totals, grads
