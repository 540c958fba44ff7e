import re

import jax
import numpy as np
import pytest
import tiny

from biomedlm_jax import sharding
from biomedlm_jax.config import MeshConfig, ModelConfig
from biomedlm_jax.errors import UserError
from biomedlm_jax.model import init_params


def test_each_device_holds_an_eighth_of_parameters_and_moments():
    trainer = tiny.Trainer(tiny.CONFIG, MeshConfig(fsdp=8))
    trainer(tiny.random_batch(tiny.CONFIG, 0))
    adam = next(
        x for x in jax.tree.leaves(trainer.state.opt_state, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(x, "mu")
    )
    for tree in (trainer.state.params, adam.mu, adam.nu):
        leaves = jax.tree.leaves(tree)
        assert len(leaves) == len(jax.tree.leaves(trainer.state.params))
        for array in leaves:
            assert [shard.data.size * 8 for shard in array.addressable_shards] == [array.size] * 8
    total = sum(x.nbytes for x in jax.tree.leaves(trainer.state))
    held = dict.fromkeys(jax.devices(), 0)
    for array in jax.tree.leaves(trainer.state):
        for shard in array.addressable_shards:
            held[shard.device] += shard.data.nbytes
    # What is not sharded is a few counters.
    assert max(held.values()) <= total / 8 + 64


def test_replicas_hold_copies_of_the_shards():
    trainer = tiny.Trainer(tiny.CONFIG, MeshConfig(replica=2, fsdp=4))
    kernel = trainer.state.params["h"]["mlp"]["c_fc"]["kernel"]
    shards = [np.asarray(shard.data) for shard in kernel.addressable_shards]
    assert all(shard.size * 4 == kernel.size for shard in shards)
    np.testing.assert_array_equal(shards[0], shards[4])


@pytest.mark.parametrize("changes", [{}, {"train": {"gradient_accumulation_steps": 2}}])
def test_meshes_give_the_same_losses(changes):
    config = tiny.replace(**changes)
    losses = []
    for mesh in (MeshConfig(fsdp=1), MeshConfig(fsdp=8), MeshConfig(replica=2, fsdp=4), MeshConfig(replica=8, fsdp=1)):
        trainer = tiny.Trainer(config, mesh)
        losses.append([trainer(tiny.random_batch(config, index))["train/loss"] for index in range(6)])
    for other in losses[1:]:
        np.testing.assert_allclose(other, losses[0], rtol=0, atol=1e-5)


def test_the_published_model_divides_by_every_pod_of_the_docs():
    params = jax.eval_shape(lambda: init_params(ModelConfig(), 0))
    for fsdp in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        mesh = jax.sharding.AbstractMesh((1, fsdp), ("replica", "fsdp"))
        for leaf, spec in zip(
            jax.tree.leaves(params), jax.tree.leaves(sharding.tree_shardings(mesh, params)), strict=True
        ):
            assert np.prod(spec.shard_shape(leaf.shape)) * fsdp == leaf.size


@pytest.mark.parametrize("parts", [1, 2])
def test_the_step_exchanges_parameters_and_never_activations(parts):
    """On eight devices: what is gathered has the shape of a parameter, or of one layer of it."""
    config = tiny.replace(model={"n_positions": 24}, train={"gradient_accumulation_steps": parts})
    trainer = tiny.Trainer(config, MeshConfig(fsdp=8))
    with jax.set_mesh(trainer.mesh):
        batch = jax.device_put(tiny.random_batch(config, 0), sharding.batch_sharding(trainer.mesh))
        text = trainer.jitted_step.lower(trainer.state, batch).compile().as_text()
    gathered = {tuple(map(int, dims.split(","))) for dims in re.findall(r"f32\[([\d,]+)\]\S* all-gather\(", text)}
    shapes = {x.shape for x in jax.tree.leaves(trainer.state.params)}
    shapes |= {shape[1:] for shape in shapes} | {(1, *shape[1:]) for shape in shapes}
    assert gathered and gathered <= shapes
    # Activations would move through these; only the embedding's lookup may, whose table is split by width.
    moves = [line for line in text.splitlines() if re.search(r" (all-to-all|collective-permute)\(", line)]
    assert all("jit(_take)" in line for line in moves), moves


def test_a_leaf_outside_of_the_table_is_an_error():
    mesh = sharding.make_mesh(MeshConfig(), jax.devices())
    with pytest.raises(KeyError, match="no sharding is known for h/new/weights"):
        sharding.tree_shardings(mesh, {"h": {"new": {"weights": np.zeros((2, 2))}}})


def test_sizes_that_do_not_divide_are_named():
    with pytest.raises(UserError, match="3 x 2 is not 8"):
        sharding.make_mesh(MeshConfig(replica=3, fsdp=2))
    with pytest.raises(UserError, match="3 x 2 is not 8"):
        sharding.make_mesh(MeshConfig(replica=3))
    mesh = sharding.make_mesh(MeshConfig())
    with pytest.raises(UserError, match=r"model.n_embd \(36\) must be a multiple of mesh.fsdp \(8\)"):
        sharding.check_divisible(tiny.replace(model={"n_embd": 36}), mesh)
    with pytest.raises(UserError, match=r"\(16 / 4\) must be a multiple of the 8 devices"):
        sharding.check_divisible(tiny.replace(train={"gradient_accumulation_steps": 4}), mesh)
