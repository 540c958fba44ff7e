import re
import types

import jax
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec as P

from biomedlm_jax import hlo, sharding
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


ONE, SHARDED, BOTH, REPLICATED = (
    MeshConfig(replica=replica, fsdp=fsdp) for replica, fsdp in ((1, 1), (1, 8), (2, 4), (8, 1))
)


@pytest.mark.parametrize(("accumulation", "meshes"), [(1, (ONE, SHARDED, BOTH, REPLICATED)), (2, (ONE, BOTH))])
def test_meshes_give_the_same_losses(accumulation, meshes):
    config = tiny.replace(train={"gradient_accumulation_steps": accumulation})
    losses = []
    for mesh in meshes:
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


# Large enough that the padding of what travels packed does not count.
WIDE = tiny.replace(model={"vocab_size": 1021, "n_embd": 128, "n_layer": 4, "n_positions": 64})


def exchanged(config, mesh):
    """What a device sends in a step, by kind and by whom it exchanges with, in bytes of float32 around rings."""
    trainer = tiny.Trainer(config, mesh)
    with jax.set_mesh(trainer.mesh):
        batch = jax.device_put(tiny.random_batch(config, 0), sharding.batch_sharding(trainer.mesh))
        text = trainer.jitted_step.lower(trainer.state, batch).compile().as_text()
    found = {}
    for collective in hlo.collectives(hlo.parse(text)):
        key = collective.kind, collective.groups[0]
        found[key] = found.get(key, 0) + collective.wire_bytes * collective.executions
    return found


@pytest.mark.parametrize(
    ("parts", "reshard_after_forward", "remat"),
    [(1, True, "none"), (1, True, "full"), (1, False, "full"), (2, True, "none"), (2, False, "full")],
)
def test_the_step_exchanges_each_weight_and_each_gradient_and_nothing_else(parts, reshard_after_forward, remat):
    config = tiny.replace(WIDE, model={"remat": remat}, train={"gradient_accumulation_steps": parts})
    mesh = MeshConfig(fsdp=8, reshard_after_forward=reshard_after_forward)
    total, kernels = param_bytes(config)
    all_devices = tuple(range(8))
    found = exchanged(config, mesh)
    # The kernels once more for the backward pass, unless they are kept; a scan keeps the compiler from merging the two.
    gathered = (total - kernels + parts * kernels * (1 + reshard_after_forward)) * 7 / 8
    assert found.pop(("all-gather", all_devices)) == pytest.approx(gathered, rel=0.05)
    assert found.pop(("reduce-scatter", all_devices)) == pytest.approx(
        (total - kernels + parts * kernels) * 7 / 8, rel=0.05
    )
    # The loss, the number of tokens, and the norm.
    assert found == {("all-reduce", all_devices): 3 * 4 * 2 * 7 / 8}


def test_replicas_reduce_shards_only():
    total, kernels = param_bytes(WIDE)
    found = exchanged(WIDE, MeshConfig(replica=2, fsdp=4))
    assert found.pop(("all-gather", (0, 1, 2, 3))) == pytest.approx((total + kernels) * 3 / 4, rel=0.05)
    assert found.pop(("reduce-scatter", (0, 1, 2, 3))) == pytest.approx(total * 3 / 4, rel=0.05)
    assert found.pop(("all-reduce", (0, 4))) == pytest.approx(total / 4)
    assert found == {("all-reduce", tuple(range(8))): 3 * 4 * 2 * 7 / 8}


@pytest.mark.parametrize("reduce_dtype", ["bfloat16", "float32"])
def test_gradients_of_kernels_are_reduced_in_the_type_asked_for(reduce_dtype):
    config = tiny.replace(WIDE, model={"compute_dtype": "bfloat16"})
    trainer = tiny.Trainer(config, MeshConfig(fsdp=8, reduce_dtype=reduce_dtype))
    with jax.set_mesh(trainer.mesh):
        jaxpr = trainer.jitted_step.trace(trainer.state, tiny.random_batch(config, 0)).jaxpr
    short = {"bfloat16": "bf16", "float32": "f32"}[reduce_dtype]
    reduced = re.findall(r":(\w+)\[([\d,]+)\] = reduce_scatter", str(jaxpr))
    # Four kernels, and what travels packed.
    kernels = [(short, dims) for dims in ("16,128", "16,384", "16,512", "64,128")]
    assert len(reduced) == 5 and set(kernels) < set(reduced)


def param_bytes(config):
    """Of all parameters in float32, and of the kernels among them."""
    params = jax.eval_shape(lambda: init_params(config.model, 0))
    sizes = [(jax.tree_util.keystr(path), x.size * 4) for path, x in jax.tree_util.tree_leaves_with_path(params)]
    return sum(size for _, size in sizes), sum(size for path, size in sizes if "kernel" in path)


def test_packed_and_gathered_parameters_are_the_parameters():
    params = init_params(WIDE.model, 0)
    mesh = sharding.make_mesh(MeshConfig())
    exchange = sharding.Exchange(rings=(8,))

    def gather(params):
        whole = sharding.gather_all_but_kernels(exchange, params)
        return whole | {"h": jax.vmap(lambda layer: sharding.gather_kernels(exchange, layer))(whole["h"])}

    with jax.set_mesh(mesh):
        gathered = jax.jit(
            jax.shard_map(gather, in_specs=(sharding.tree_specs(params),), out_specs=P(), check_vma=False)
        )(params)
    jax.tree.map(np.testing.assert_array_equal, gathered, params)


class FakeChip:
    """A device of a TPU as far as meshes look at it."""

    platform, device_kind = "tpu", "TPU"

    def __init__(self, coords, slice_index=0, core_on_chip=0):
        self.coords, self.slice_index, self.core_on_chip = tuple(int(c) for c in coords), slice_index, core_on_chip


@pytest.mark.parametrize(
    ("torus", "cores", "slices", "replica", "rings"),
    [
        ((2, 2, 2), 1, 1, 1, (2, 2, 2)),
        ((4, 4, 8), 1, 1, 1, (8, 4, 4)),
        ((4, 4, 8), 1, 1, 2, (4, 4, 4)),
        ((4, 4, 1), 1, 1, 1, (4, 4)),
        ((16, 16, 1), 1, 1, 4, (4, 16)),
        ((2, 4, 1), 1, 2, 2, (4, 2)),
        ((2, 2, 1), 2, 1, 1, (2, 2, 2)),
    ],
)
def test_meshes_of_tpus_lie_along_the_torus(torus, cores, slices, replica, rings):
    places = np.stack(np.meshgrid(*map(np.arange, torus), indexing="ij"), axis=-1).reshape(-1, 3)
    chips = [FakeChip(c, slice_, core) for slice_ in range(slices) for c in places for core in range(cores)]
    shuffled = [chips[i] for i in np.random.default_rng(0).permutation(len(chips))]
    mesh = sharding.make_mesh(MeshConfig(replica=replica), shuffled)
    assert sharding.find_rings(mesh) == rings
    assert slices == 1 or all(len({chip.slice_index for chip in copy}) == 1 for copy in mesh.devices)


@pytest.mark.parametrize(
    ("torus", "order", "rings"),
    [
        ((4, 4, 8), (0, 1, 2), (4, 4, 8)),
        ((4, 4, 8), (2, 0, 1), (8, 4, 4)),
        ((16, 16, 1), (1, 0, 2), (16, 16)),
        ((2, 1, 4), (0, 1, 2), (2, 4)),
        ((4, 1, 1), (0, 1, 2), (4,)),
    ],
)
def test_rings_run_along_the_axes_of_the_torus(torus, order, rings):
    coords = np.stack(np.meshgrid(*map(np.arange, torus), indexing="ij"), axis=-1).transpose(*order, 3).reshape(-1, 3)
    chips = np.array([FakeChip(tuple(c)) for c in coords])
    mesh = types.SimpleNamespace(devices=chips[None])
    assert sharding.find_rings(mesh) == rings
    # Every group differs in one coordinate, and each pair of devices meets through the rings once.
    exchange = sharding.Exchange(rings=rings)
    for ring in range(len(rings)):
        for group in exchange._groups(ring) or [range(len(coords))]:
            assert sum(len(set(axis)) > 1 for axis in coords[list(group)].T) == 1


def test_devices_in_no_order_of_the_torus_form_one_ring():
    coords = np.random.default_rng(0).permutation([(x, y, 0) for x in range(4) for y in range(4)])
    mesh = types.SimpleNamespace(devices=np.array([FakeChip(tuple(c)) for c in coords])[None])
    assert sharding.find_rings(mesh) == (16,)


def test_an_exchange_ring_by_ring_is_the_exchange_among_all():
    mesh = sharding.make_mesh(MeshConfig())
    x = jax.random.normal(jax.random.key(0), (8, 16, 6))

    def exchanged_with(rings):
        exchange = sharding.Exchange(rings=rings)

        def on_a_device(x):
            return exchange.all_gather(x[0], axis=1), exchange.reduce_scatter(x[0])

        specs = (P(), P("fsdp"))
        with jax.set_mesh(mesh):
            return jax.jit(jax.shard_map(on_a_device, in_specs=P("fsdp"), out_specs=specs, check_vma=False))(x)

    whole, reduced = exchanged_with((8,))
    np.testing.assert_array_equal(whole, np.concatenate(x, axis=1))
    np.testing.assert_allclose(reduced, x.sum(0), atol=1e-5)
    for rings in ((2, 4), (4, 2), (2, 2, 2)):
        by_ring = exchanged_with(rings)
        np.testing.assert_array_equal(by_ring[0], whole)
        np.testing.assert_allclose(by_ring[1], reduced, atol=1e-5)


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
