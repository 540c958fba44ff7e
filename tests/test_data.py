import jax
import numpy as np
import pytest

from biomedlm_jax import data, sharding
from biomedlm_jax.config import MeshConfig
from biomedlm_jax.rows import Rows


class Source(list):
    """Row i is filled with the number i."""

    def __init__(self, count, width=4):
        super().__init__({"tokens": np.full(width, index, np.uint16)} for index in range(count))


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


def test_every_row_once_an_epoch_and_in_another_order():
    rows = [row for batch in read(0, 25) for row in batch]  # 4 epochs of 50 rows
    epochs = [rows[start : start + 50] for start in range(0, 200, 50)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert epochs[0] != list(range(50))


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


def test_each_process_reads_its_own_rows(monkeypatch):
    """Eight processes of one device each, imitated by what each one's devices hold, read the batch between them."""
    mesh = sharding.make_mesh(MeshConfig())
    batch_sharding = sharding.batch_sharding(mesh)
    everything = batch_sharding.devices_indices_map((16, 4))
    seen = []
    for device in mesh.devices.flat:

        class OneProcess:
            @staticmethod
            def addressable_devices_indices_map(shape, device=device):
                return {device: everything[device]}

        local = data._local_rows(OneProcess, (16, 4))
        assert len(local) == 2
        seen += local.tolist()
    assert seen == list(range(16))


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
