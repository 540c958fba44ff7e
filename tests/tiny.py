"""Small configurations and batches that tests share."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from biomedlm_jax import sharding, step
from biomedlm_jax.config import Config, MeshConfig, ModelConfig, OptimizerConfig, TrainConfig

CONFIG = Config(
    model=ModelConfig(vocab_size=61, n_positions=16, n_embd=32, n_layer=2, n_head=4, compute_dtype="float32"),
    optimizer=OptimizerConfig(learning_rate=1e-2, weight_decay=1e-3, warmup_steps=2),
    train=TrainConfig(steps=50, global_batch_size=16),
)


def replace(config: Config = CONFIG, **groups: dict[str, Any]) -> Config:
    """A configuration with some settings changed: replace(train={'steps': 3})."""
    return dataclasses.replace(
        config, **{group: dataclasses.replace(getattr(config, group), **changes) for group, changes in groups.items()}
    )


def run_config(prepared: Any, run_dir: Any, **groups: dict[str, Any]) -> Config:
    """A run on synthetic text that `train` takes: `prepared` is where its rows lie."""
    config = replace(
        model={"vocab_size": 600, "n_positions": 64, "n_embd": 64},
        data={"dir": str(prepared), "synthetic_documents": 200, "synthetic_eval_documents": 10},
        train={"log_every": 1},
        run={"dir": str(run_dir), "tensorboard": False},
    )
    return replace(config, **groups)


def random_batch(config: Config, index: int) -> step.Batch:
    """Random rows, some of them padded."""
    shape = (config.train.global_batch_size, config.model.n_positions)
    keys = jax.random.split(jax.random.key(1000 + index))
    lengths = jax.random.randint(keys[1], (shape[0], 1), 2, shape[1] + 1)
    return step.Batch(jax.random.randint(keys[0], shape, 0, config.model.vocab_size), jnp.arange(shape[1]) < lengths)


class Trainer:
    """The compiled training step on a mesh, and its state."""

    def __init__(self, config: Config, mesh: MeshConfig):
        config = dataclasses.replace(config, mesh=mesh)
        devices = jax.devices()[: mesh.replica * mesh.fsdp]
        self.mesh = sharding.make_mesh(mesh, devices)
        init = functools.partial(step.init_state, config)
        self.shardings = sharding.tree_shardings(self.mesh, jax.eval_shape(init))
        self.state = jax.jit(init, out_shardings=self.shardings)()
        self.jitted_step = step.jit_train_step(config, self.shardings, sharding.batch_sharding(self.mesh))

    def __call__(self, batch: step.Batch) -> dict[str, float]:
        with jax.set_mesh(self.mesh):
            self.state, metrics = self.jitted_step(
                self.state, jax.device_put(batch, sharding.batch_sharding(self.mesh))
            )
        return {name: float(value) for name, value in metrics.items()}
