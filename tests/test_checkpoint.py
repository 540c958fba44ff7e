import dataclasses

import jax
import numpy as np
import pytest
import tiny

from biomedlm_jax import checkpoint
from biomedlm_jax import config as config_lib
from biomedlm_jax.config import MeshConfig
from biomedlm_jax.errors import UserError
from biomedlm_jax.model import init_params


def make_run(tmp_path, **train):
    config = tiny.replace(train=train)
    config_lib.save_config(config, tmp_path / "config.yaml")
    return config, checkpoint.Checkpointer(tmp_path, config)


def at_step(state, step):
    return dataclasses.replace(state, step=state.step * 0 + step)


def abstract(trainer):
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), trainer.state, trainer.shardings
    )


def assert_equal(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


def test_restores_bit_by_bit_on_any_mesh(tmp_path):
    config, checkpointer = make_run(tmp_path)
    saved = tiny.Trainer(config, MeshConfig(fsdp=8))
    for index in range(2):
        saved(tiny.random_batch(config, index))
    checkpointer.save(saved.state, {"data": {"seed": 0}})
    checkpointer.wait()
    assert checkpointer.latest_step() == 2
    assert checkpointer.metadata(2) == {"data": {"seed": 0}}
    for mesh in (MeshConfig(fsdp=8), MeshConfig(replica=2, fsdp=2), MeshConfig(fsdp=1)):
        other = tiny.Trainer(config, mesh)
        restored = checkpointer.restore(2, abstract(other))
        assert_equal(restored, saved.state)
        assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding == s, restored, other.shardings))
    checkpointer.close()
    assert_equal(checkpoint.load_params(tmp_path), saved.state.params)


def test_keeps_the_last_and_every_so_many(tmp_path):
    config, checkpointer = make_run(tmp_path, keep_last=2, keep_every=4)
    state = tiny.Trainer(config, MeshConfig(fsdp=1)).state
    for step in range(1, 11):
        checkpointer.save(at_step(state, step), {})
    checkpointer.wait()
    checkpointer.close()
    assert sorted(int(path.name) for path in checkpoint.checkpoint_folder(tmp_path).iterdir()) == [4, 8, 9, 10]
    assert checkpoint.find_step(tmp_path) == 10 and checkpoint.find_step(tmp_path, 4) == 4
    with pytest.raises(UserError, match="no checkpoint of step 5; there are 4, 8, 9, 10"):
        checkpoint.find_step(tmp_path, 5)


def test_an_unfinished_checkpoint_does_not_count(tmp_path):
    config, checkpointer = make_run(tmp_path)
    state = tiny.Trainer(config, MeshConfig(fsdp=1)).state
    checkpointer.save(at_step(state, 1), {})
    checkpointer.wait()
    checkpointer.close()
    # What a crash leaves: Orbax gives a checkpoint its name when it is complete.
    (checkpoint.checkpoint_folder(tmp_path) / "2.orbax-checkpoint-tmp" / "params").mkdir(parents=True)
    assert checkpoint.find_step(tmp_path) == 1
    again = checkpoint.Checkpointer(tmp_path, config)
    assert again.latest_step() == 1
    assert sorted(path.name for path in checkpoint.checkpoint_folder(tmp_path).iterdir()) == ["1"]
    again.save(at_step(state, 2), {})
    again.wait()
    assert again.latest_step() == 2
    again.close()


def test_a_failed_background_save_is_raised(tmp_path, monkeypatch):
    config, checkpointer = make_run(tmp_path)
    state = tiny.Trainer(config, MeshConfig(fsdp=1)).state
    checkpointer.save(at_step(state, 1), {})
    checkpointer.wait()

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpointer._manager, "wait_until_finished", fail)
    with pytest.raises(
        UserError,
        match=r"saving to .*/checkpoints failed \(no space left on device\); the last complete checkpoint is step 1",
    ):
        checkpointer.wait()


def test_weights_alone_are_not_a_run_to_go_on_with(tmp_path):
    config, checkpointer = make_run(tmp_path)
    trainer = tiny.Trainer(config, MeshConfig(fsdp=1))
    checkpointer.close()
    checkpoint.save_params(tmp_path, 0, trainer.state.params)
    assert_equal(checkpoint.load_params(tmp_path), trainer.state.params)
    again = checkpoint.Checkpointer(tmp_path, config)
    with pytest.raises(UserError, match="weights without an optimizer state: start from it with run.init_from"):
        again.restore(0, abstract(trainer))


def test_other_shapes_and_damage_name_the_checkpoint(tmp_path):
    config, checkpointer = make_run(tmp_path)
    checkpoint.save_params(tmp_path, 3, tiny.Trainer(config, MeshConfig(fsdp=1)).state.params)
    checkpointer.close()
    folder = checkpoint.checkpoint_folder(tmp_path) / "3" / "params"
    with pytest.raises(UserError, match=f"cannot read the checkpoint {folder}.*shape"):
        larger = tiny.replace(model={"n_embd": 64}).model
        checkpoint.restore_params(tmp_path, 3, jax.eval_shape(lambda: init_params(larger, 0)))
    largest = max(folder.rglob("d/*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    with pytest.raises(UserError, match=f"cannot read the checkpoint {folder}"):
        checkpoint.load_params(tmp_path)


def test_no_run_and_no_checkpoint_are_named(tmp_path):
    with pytest.raises(UserError, match="is not the folder of a run"):
        checkpoint.find_step(tmp_path)
    config_lib.save_config(tiny.CONFIG, tmp_path / "config.yaml")
    with pytest.raises(UserError, match="has no checkpoint yet"):
        checkpoint.find_step(tmp_path)


@pytest.mark.parametrize("content", [None, "", "[]"])
def test_damaged_metadata_is_named(tmp_path, content):
    config, checkpointer = make_run(tmp_path)
    checkpointer.save(tiny.Trainer(config, MeshConfig(fsdp=1)).state, {"data": {}})
    checkpointer.wait()
    file = checkpoint.checkpoint_folder(tmp_path) / "0" / "metadata" / "metadata"
    file.unlink() if content is None else file.write_text(content)
    with pytest.raises(UserError, match="cannot read the checkpoint .*/0 .*move this one away"):
        checkpointer.metadata(0)
    checkpointer.close()
