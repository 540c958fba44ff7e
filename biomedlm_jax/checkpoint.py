"""Checkpoints of a run with Orbax: save in the background, keep by a rule, restore on any mesh.

    RUN/checkpoints/<step>/params       parameters, as `model.init_params` nests them
    RUN/checkpoints/<step>/optimizer    the optimizer's state
    RUN/checkpoints/<step>/metadata     JSON: what else the step needs to go on, such as which rows were read

Parameters and optimizer are apart so that evaluation and export read only what they need. A checkpoint without
`optimizer` holds weights to start from, not a run to go on with. Of a fine-tuning run there are two at most, the newest
and the best, which the newest one's metadata names; those of LoRA hold what was trained only.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from biomedlm_jax import config as config_lib
from biomedlm_jax.config import Config
from biomedlm_jax.errors import UserError, reason
from biomedlm_jax.finetune_config import FinetuneConfig
from biomedlm_jax.model import Params, init_params
from biomedlm_jax.step import TrainState

CONFIG_FILE = "config.yaml"
TOKENIZER_FOLDER = "tokenizer"

# Arrays are stored in pieces of at most this many bytes, so that one layer of a stack, or the shard of another
# mesh, is read without reading all of it.
_CHUNK_BYTES = 64 * 2**20


def checkpoint_folder(run_dir: str | Path) -> Path:
    """Where a run's checkpoints lie."""
    return Path(os.path.abspath(run_dir)) / "checkpoints"


def read_config(run_dir: str | Path) -> Config | FinetuneConfig:
    """The configuration of a run, of pretraining or of fine-tuning.

    Raises:
      UserError: see `config.load_config`.
    """
    path = Path(run_dir) / CONFIG_FILE
    return config_lib.load_config(path, FinetuneConfig if config_lib.file_has_group("task", path) else Config)


class _LatestAndBest:
    """Keeps the newest checkpoint, and the one that is called the best."""

    best: int | None = None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        return [found.step in (checkpoints[-1].step, self.best) for found in checkpoints]


class Checkpointer:
    """Saves and restores the train state of one run."""

    def __init__(self, run_dir: str | Path, config: Config | FinetuneConfig):
        folder = checkpoint_folder(run_dir)
        if jax.process_index() == 0:
            for unfinished in folder.glob("*.orbax-checkpoint-tmp*"):
                # Of a crash or a full disk: Orbax gives a checkpoint its name when it is complete.
                shutil.rmtree(unfinished, ignore_errors=True)
        self._kept = _LatestAndBest()
        if isinstance(config, FinetuneConfig):
            options = ocp.CheckpointManagerOptions(preservation_policy=self._kept)
        else:
            train = config.train
            options = ocp.CheckpointManagerOptions(max_to_keep=train.keep_last, keep_period=train.keep_every or None)
        self._manager = ocp.CheckpointManager(folder, options=options)

    def latest_step(self) -> int | None:
        """The newest complete checkpoint; None if there is none."""
        return self._manager.latest_step()

    def save(self, state: TrainState, metadata: dict[str, Any]) -> None:
        """Starts to save the state of its step, and returns once the state may be changed.

        Args:
          metadata: as JSON; of fine-tuning with the step that is the best, as 'best_step'.

        Raises:
          UserError: this save, or an earlier one in the background, failed; what was complete before stays.
        """
        # Orbax has exchanges of its own to make its processes wait for each other: none may meet those of a step.
        jax.block_until_ready(state)
        self._kept.best = metadata.get("best_step")
        with self._failures_named():
            self._manager.check_for_errors()
            self._manager.save(
                int(state.step),
                args=ocp.args.Composite(
                    params=_save_args(state.params),
                    optimizer=_save_args(state.opt_state),
                    metadata=ocp.args.JsonSave(metadata),
                ),
            )

    def metadata(self, step: int) -> dict[str, Any]:
        """What `save` was given beside the state.

        Raises:
          UserError: it cannot be read.
        """
        with _explained(Path(self._manager.directory) / str(step)):
            restored = self._manager.restore(step, args=ocp.args.Composite(metadata=ocp.args.JsonRestore())).metadata
            if not isinstance(restored, dict):
                raise ValueError("its metadata is no JSON object")
            return restored

    def restore(self, step: int, abstract_state: TrainState) -> TrainState:
        """The state of a step, laid out as `abstract_state` (shapes, types and shardings) says.

        The mesh may be another than the one it was saved on.

        Raises:
          UserError: the checkpoint holds weights only, or arrays of other shapes.
        """
        folder = Path(self._manager.directory) / str(step)
        if not (folder / "optimizer").exists():
            raise UserError(
                f"{folder} holds weights without an optimizer state: start from it with run.init_from "
                "and another run.dir"
            )
        with _explained(folder):
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardRestore(abstract_state.params),
                    optimizer=ocp.args.StandardRestore(abstract_state.opt_state),
                ),
            )
        step_array = jax.make_array_from_callback((), abstract_state.step.sharding, lambda _: np.int32(step))
        return TrainState(step_array, restored.params, restored.optimizer)

    def wait(self) -> None:
        """Waits for saves under way.

        Raises:
          UserError: a save failed.
        """
        with self._failures_named():
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    @contextlib.contextmanager
    def _failures_named(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            raise UserError(
                f"saving to {self._manager.directory} failed ({reason(error)}); the last complete checkpoint is "
                f"step {self._manager.latest_step()}: make room, and the same command goes on from it"
            ) from error

    def close(self) -> None:
        """Waits for saves under way and frees what the manager holds.

        Raises:
          UserError: a save failed.
        """
        with self._failures_named():
            self._manager.close()


def save_params(run_dir: str | Path, step: int, params: Params) -> None:
    """Writes a checkpoint that holds weights only, as an import does."""
    with ocp.CheckpointManager(checkpoint_folder(run_dir)) as manager:
        manager.save(step, args=ocp.args.Composite(params=_save_args(params)))


def has_steps(run_dir: str | Path) -> bool:
    """Whether a run's folder holds a complete checkpoint."""
    folder = checkpoint_folder(run_dir)
    return folder.is_dir() and bool(ocp.utils.checkpoint_steps(folder))


def find_step(run_dir: str | Path, step: int | None = None) -> int:
    """`step`, or the newest checkpoint of a run, of fine-tuning the best one.

    Raises:
      UserError: there is no such run, checkpoint, or step; lists the steps that there are.
    """
    folder = checkpoint_folder(run_dir)
    if not (Path(run_dir) / CONFIG_FILE).is_file():
        raise UserError(f"{run_dir} is not the folder of a run: it has no {CONFIG_FILE}")
    steps = sorted(ocp.utils.checkpoint_steps(folder)) if folder.is_dir() else []
    if not steps:
        raise UserError(f"{run_dir} has no checkpoint yet")
    if step is not None:
        if step not in steps:
            raise UserError(f"{run_dir} has no checkpoint of step {step}; there are {', '.join(map(str, steps))}")
        return step
    if isinstance(read_config(run_dir), FinetuneConfig):
        best = read_metadata(run_dir, steps[-1]).get("best_step")
        return next((found for found in steps if found == best), steps[-1])
    return steps[-1]


def read_metadata(run_dir: str | Path, step: int) -> dict[str, Any]:
    """What `Checkpointer.save` was given beside the state of a step; nothing of weights without a state.

    Raises:
      UserError: it cannot be read.
    """
    folder = checkpoint_folder(run_dir) / str(step) / "metadata"
    if not folder.is_dir():
        return {}
    with _explained(folder.parent), ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
        return checkpointer.restore(folder)


def load_params(run_dir: str | Path, step: int | None = None, shardings: Params | None = None) -> Params:
    """The parameters of a run's checkpoint, by default the newest, on one device unless `shardings` says otherwise.

    Raises:
      UserError: see `find_step`.
    """
    step = find_step(run_dir, step)
    model = read_config(run_dir).model
    abstract = jax.eval_shape(lambda: init_params(model, 0))
    return restore_params(run_dir, step, abstract, shardings)


def restore_params(run_dir: str | Path, step: int, abstract: Params, shardings: Params | None = None) -> Params:
    """The parameters of a checkpoint, laid out by `shardings` or on one device.

    Args:
      abstract: their shapes and types.
    """
    folder = checkpoint_folder(run_dir) / str(step) / "params"
    if shardings is None:
        shardings = jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), abstract)
    abstract = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), abstract, shardings
    )
    with _explained(folder), ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder, abstract)


def _save_args(tree: Any) -> ocp.args.StandardSave:
    # Only stacks of kernels have three axes; Orbax would cut the largest axes, and each piece would hold all layers.
    return ocp.args.StandardSave(
        tree,
        save_args=jax.tree.map(
            lambda x: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES, shard_axes=(0,) if x.ndim == 3 else ()), tree
        ),
    )


@contextlib.contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Names the checkpoint when Orbax cannot read it: other shapes than the configuration's, or damaged files."""
    try:
        yield
    except Exception as error:
        raise UserError(
            f"cannot read the checkpoint {folder} ({reason(error)}); if an older step is whole, move this one away"
        ) from error
