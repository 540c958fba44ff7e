import json

import jax
import numpy as np
import pytest

from biomedlm_jax import data, mixture, sharding
from biomedlm_jax.config import MeshConfig
from biomedlm_jax.rows import Rows


class Source(list):
    """Row i is filled with the number i, counted from `start`."""

    def __init__(self, count, width=4, start=0):
        super().__init__({"tokens": np.full(width, start + index, np.uint16)} for index in range(count))


def make_rows(count, tokens=None, width=4):
    return Rows(Source(count, width), width, count * width if tokens is None else tokens, "hash", 0)


def read(start, stop, *, count=50, batch=8, seed=3, mesh=None):
    mesh = mesh or sharding.make_mesh(MeshConfig())
    batches = data.train_batches(make_rows(count), seed, batch, start, stop, sharding.batch_sharding(mesh), threads=3)
    return [np.asarray(batch.tokens)[:, 0].tolist() for batch in batches]


def test_the_batch_is_a_function_of_seed_and_step():
    straight = read(0, 40)
    assert read(17, 23) == straight[17:23]
    assert read(0, 40) == straight
    assert read(0, 5, seed=4) != straight[:5]
    # However many devices there are.
    for devices in (1, 2, 4):
        mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:devices])
        assert read(17, 23, mesh=mesh) == straight[17:23]


@pytest.mark.parametrize(("count", "batch"), [(50, 8), (97, 8), (7, 3), (5, 16), (1, 4)])
def test_every_row_once_an_epoch_and_in_another_order(count, batch):
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    steps = -(-6 * count // batch)
    rows = [row for values in read(0, steps, count=count, batch=batch, mesh=mesh) for row in values]
    epochs = [rows[start : start + count] for start in range(0, 6 * count, count)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    if count > 5:
        assert len({tuple(epoch) for epoch in epochs}) == 6
        assert epochs[0] != list(range(count))


def test_far_steps_are_reached_at_once():
    # 300e9 tokens of 1,024 are 293 million draws; nothing before them is read.
    class Counting(Source):
        reads = 0

        def __getitem__(self, index):
            Counting.reads += 1
            return super().__getitem__(index)

    rows = Rows(Counting(1000), 4, 4000, "hash", 0)
    mesh = sharding.make_mesh(MeshConfig())
    batches = data.train_batches(rows, 0, 1024, 280_000, 280_001, sharding.batch_sharding(mesh), threads=1)
    assert next(batches).tokens.shape == (1024, 4)
    assert Counting.reads == 1024


class OneProcess:
    """How a batch lies on the devices of one of several processes."""

    def __init__(self, sharding, devices):
        self._sharding, self._devices = sharding, devices

    def addressable_devices_indices_map(self, shape):
        everything = self._sharding.devices_indices_map(shape)
        return {device: everything[device] for device in self._devices}


def make_two(counts=(41, 23), weights=(0.7, 0.3)):
    """A mixture whose second set has rows of numbers from 10,000 on."""
    first, second = make_rows(counts[0]), Rows(Source(counts[1], start=10_000), 4, counts[1] * 4, "other", 0)
    return mixture.make_mixture([(first, weights[0]), (second, weights[1])])


@pytest.mark.parametrize(
    "rows", [mixture.Mixture((make_rows(9001),), (1.0,)), make_two((5003, 8009))], ids=["one set", "a mixture"]
)
def test_the_same_batch_for_any_number_of_processes(rows):
    """Processes imitated by what each one's devices hold: 1, 2, 4 and 8 of them, at 1,000 random steps.

    Of few rows Grain's permutation is slow: it goes through a cycle of 65,536 numbers until one is small enough.
    """
    mesh = sharding.make_mesh(MeshConfig())
    batch_sharding, devices = sharding.batch_sharding(mesh), list(mesh.devices.flat)
    assert len(devices) == 8
    steps = np.random.default_rng(0).integers(0, 300_000, 1000).tolist()

    def read_all(processes):
        here = len(devices) // processes
        parts = [OneProcess(batch_sharding, devices[i * here : (i + 1) * here]) for i in range(processes)]
        local = [data._local_rows(part, (16, 4)) for part in parts]
        assert [len(part) for part in local] == [16 // processes] * processes
        readers = [data.step_reader(rows, 3, 16, part) for part in local]
        return [np.concatenate([reader(step) for reader in readers]) for step in steps]

    one = read_all(1)
    assert one[0].shape == (16, 4) and len({batch.tobytes() for batch in one}) > 990
    for processes in (2, 4, 8):
        np.testing.assert_array_equal(read_all(processes), one)
    # What `train_batches` gives is that, and what it is by the description: draws step * 16 and on.
    draws = rows.draws(3)
    for step, expected in list(zip(steps, one, strict=True))[::100]:
        batch = next(data.train_batches(rows, 3, 16, step, step + 1, batch_sharding, 1))
        np.testing.assert_array_equal(batch.tokens, expected)
        places = [draws[step * 16 + index] for index in range(16)]
        assert expected[:, 0].tolist() == [rows.sets[number].source[row]["tokens"][0] for number, row in places]


def test_held_out_rows_come_once_and_padding_is_masked():
    rows = make_rows(11, tokens=11 * 4 - 3)  # the last row holds one token and three of padding
    mesh = sharding.make_mesh(MeshConfig())
    batches = list(data.eval_batches(rows, 8, sharding.batch_sharding(mesh)))
    assert len(batches) == data.eval_batch_count(rows, 8) == 2
    tokens = np.concatenate([batch.tokens for batch in batches])
    mask = np.concatenate([batch.mask for batch in batches])
    assert tokens[:11, 0].tolist() == list(range(11))
    assert mask.sum() == rows.tokens
    assert mask[10].tolist() == [True, False, False, False] and not mask[11:].any()
    assert len(list(data.eval_batches(rows, 8, sharding.batch_sharding(mesh), limit=1))) == 1


@pytest.mark.parametrize("name", ["rows_sha256", "rows", "n_positions", "seed", "global_batch_size"])
def test_identity_holds_what_batches_depend_on(name):
    base = data.identity(make_rows(10), 0, 8)
    others = {
        "rows_sha256": data.identity(Rows(Source(10), 4, 40, "other", 0), 0, 8),
        "rows": data.identity(make_rows(11), 0, 8),
        "n_positions": data.identity(make_rows(10, width=5), 0, 8),
        "seed": data.identity(make_rows(10), 1, 8),
        "global_batch_size": data.identity(make_rows(10), 0, 16),
    }
    assert base[name] != others[name][name]


def test_weights_and_all_sets_are_in_the_identity():
    base = data.identity(make_two(), 0, 8)
    assert base == json.loads(json.dumps(base))
    assert base != data.identity(make_two(weights=(0.6, 0.4)), 0, 8)
    assert base != data.identity(make_two(counts=(41, 22)), 0, 8)
    assert base != data.identity(make_rows(41), 0, 8)
    assert base == data.identity(make_two(weights=(7, 3)), 0, 8)


def test_a_document_begins_at_the_end_of_the_one_before():
    tokens = np.array([[5, 6, 0, 7, 8, 0, 0, 9], [0, 1, 2, 3, 4, 5, 6, 0]])
    assert data.segment_ids(tokens, 0).tolist() == [[0, 0, 1, 1, 1, 2, 3, 3], [1, 1, 1, 1, 1, 1, 1, 2]]
    mesh = sharding.make_mesh(MeshConfig())
    options = (sharding.batch_sharding(mesh), 1)
    rows = Rows([{"tokens": row.astype(np.uint16)} for row in np.tile(tokens, (4, 1))], 8, 64, "hash", 0)
    for batch in (
        next(data.train_batches(rows, 0, 8, 0, 1, *options, document_attention=True)),
        next(data.eval_batches(rows, 8, options[0], document_attention=True)),
    ):
        expected = [[list(row[: i + 1]).count(0) for i in range(8)] for row in batch.tokens.tolist()]
        assert batch.segment_ids.tolist() == expected
    # Without it there is nothing that a program could depend on.
    for batch in (next(data.train_batches(rows, 0, 8, 0, 1, *options)), next(data.eval_batches(rows, 8, options[0]))):
        assert batch.segment_ids is None and len(jax.tree.leaves(batch)) == 2
