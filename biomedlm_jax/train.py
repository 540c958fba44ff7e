"""Command: pretrains a model, or goes on where a run stopped.

    python -m biomedlm_jax.train --config configs/quickstart.yaml

Which weights a run starts from, the first that there is:
  1. the newest checkpoint in run.dir: the run goes on with its optimizer state and its place in the data
  2. run.init_from, another run or a Hugging Face folder: weights only, step 0
  3. train.seed: random weights, step 0
"""

import contextlib
import functools
import math
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from etils import epy

from biomedlm_jax import config as config_lib
from biomedlm_jax.config import Config
from biomedlm_jax.errors import UserError, run_command

# `--help` and mistakes in the settings answer before these are loaded.
with epy.lazy_imports():
    import logging

    import jax
    from jax.experimental import multihost_utils

    from biomedlm_jax import checkpoint, data, load, metrics, rows, sharding, step, tokenizer


def main() -> int:
    """Trains with the settings of the command line; the exit status is 128 + the signal that stopped the run."""
    return train(config_lib.parse_args("train", "Pretrain a GPT-2 on biomedical text, or go on where the run stopped."))


def train(config: Config) -> int:
    """Trains until `train.steps`, or until SIGINT or SIGTERM; either way the last step is saved.

    Returns:
      0, or 128 + the number of the signal.

    Raises:
      UserError: the configuration cannot be run here, or the loss is no longer finite.
    """
    logger = logging.getLogger("biomedlm_jax.train")
    if not config.run.dir:
        raise UserError("run.dir is not set: say where the run shall live, for instance --run.dir runs/first")
    run_dir = Path(config.run.dir)

    # ---- Devices, and how the state lies on them
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_divisible(config, mesh)
    batch_sharding = sharding.batch_sharding(mesh)
    init_state = functools.partial(step.init_state, config)
    abstract_state = jax.eval_shape(init_state)
    state_shardings = sharding.tree_shardings(mesh, abstract_state)
    logger.info("mesh: %s on %d x %s", ", ".join(f"{name} {size}" for name, size in mesh.shape.items()),
                jax.device_count(), jax.devices()[0].device_kind)

    # ---- The run's folder, and the rows it reads
    _check_run_folder(config, run_dir)
    rows.ensure_prepared(config)
    train_rows, eval_rows = (rows.open_rows(config.prepared_dir, split) for split in ("train", "eval"))
    assert train_rows is not None
    identity = data.identity(train_rows, config.train.seed, config.train.global_batch_size)

    # ---- The state to start from
    checkpointer = checkpoint.Checkpointer(run_dir, config.train)
    start_step = checkpointer.latest_step() or 0
    if checkpointer.latest_step() is not None:
        abstract_state = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract_state, state_shardings)
        state = checkpointer.restore(start_step, abstract_state)
        _check_identity(checkpointer.metadata(start_step)["data"], identity, run_dir)
        logger.info("weights: going on from step %d of %s%s", start_step, run_dir,
                    "; run.init_from is not used" if config.run.init_from else "")
    else:
        state = jax.jit(init_state, out_shardings=state_shardings)()
        if config.run.init_from:
            params = load.start_from(config.run.init_from, config.model, state_shardings.params)
            state = step.TrainState(state.step, params, state.opt_state)
        logger.info("weights: %s", f"of {config.run.init_from}, at step 0" if config.run.init_from
                    else f"random, from train.seed {config.train.seed}")
    if start_step >= config.train.steps:
        logger.info("%s has all its %d steps already", run_dir, start_step)
        return 0

    if jax.process_index() == 0:
        config_lib.save_config(config, run_dir / checkpoint.CONFIG_FILE)
        tokenizer.load_tokenizer(config.prepared_dir / "tokenizer").save(run_dir / checkpoint.TOKENIZER_FOLDER)

    # ---- The compiled steps
    train_step = jax.jit(functools.partial(step.train_step, config), donate_argnums=0,
                         in_shardings=(state_shardings, batch_sharding), out_shardings=(state_shardings, None))
    eval_step = jax.jit(functools.partial(step.eval_step, config))
    batches = data.train_batches(train_rows, config.train.seed, config.train.global_batch_size, start_step,
                                 config.train.steps, batch_sharding, config.data.reader_threads)
    writer = metrics.MetricWriter(config, start_step, write=jax.process_index() == 0)
    throughput = metrics.Throughput(config)
    losses: list[float] = []
    results: dict[str, float] = {}
    started = time.monotonic()
    tokens_per_step = config.train.global_batch_size * config.model.n_positions

    def log(done: int, values: dict[str, Any]) -> None:
        """Fetches and writes the numbers of step `done`; called a step late, so that devices never wait for it."""
        numbers = {name: float(value) for name, value in values.items()}
        losses.append(numbers["train/loss"])
        if not all(map(math.isfinite, numbers.values())):
            raise UserError(f"at step {done} the loss is {numbers['train/loss']} and the gradient's norm "
                            f"{numbers['train/grad_norm']}; the last checkpoint is step {checkpointer.latest_step()} of "
                            f"{run_dir}. A lower optimizer.learning_rate or a longer optimizer.warmup_steps may help")
        writer.write(done, {"tokens": done * tokens_per_step} | numbers | throughput.read(done))

    def evaluate(done: int) -> None:
        if eval_rows is None:
            return
        nll, count = 0.0, 0.0
        batch_size = config.train.global_batch_size // config.train.gradient_accumulation_steps
        for batch in data.eval_batches(eval_rows, batch_size, batch_sharding, config.train.eval_batches):
            batch_nll, batch_count = eval_step(state.params, batch)
            nll, count = nll + float(batch_nll), count + float(batch_count)
        results.update({"eval/loss": nll / count, "eval/perplexity": math.exp(nll / count)})
        writer.write(done, {"tokens": done * tokens_per_step} | results)

    # ---- The loop
    pending: tuple[int, dict[str, Any]] | None = None
    with _stop_signal() as received, contextlib.closing(writer), contextlib.closing(checkpointer):
        if start_step == 0 and config.train.eval_every:
            evaluate(0)
        for done, batch in enumerate(batches, start=start_step + 1):
            state, values = train_step(state, batch)
            if pending:
                log(*pending)
                pending = None
            if done == start_step + 1:
                # The first step compiles, which is no measure of speed.
                jax.block_until_ready(state)
                throughput.restart(done)
            writer.advance(done)
            last = done == config.train.steps
            stop = _agree(bool(received), done)
            at_checkpoint = done % config.train.checkpoint_every == 0 or last or stop
            at_eval = last or bool(config.train.eval_every) and done % config.train.eval_every == 0
            if done % config.train.log_every == 0 or done == start_step + 1 or last or stop:
                pending = done, values
            if pending and (at_checkpoint or at_eval):
                log(*pending)
                pending = None
            if at_eval and not stop:
                evaluate(done)
            if at_checkpoint:
                checkpointer.save(state, {"data": identity, "tokens": done * tokens_per_step})
            if at_checkpoint or at_eval:
                throughput.restart(done)
            if stop:
                break
        checkpointer.wait()
    if stop:
        name = signal.Signals(received[0]).name if received else "another process"
        logger.info("stopped by %s: step %d is saved in %s; the same command goes on from there", name, done, run_dir)
        return 128 + (received[0] if received else signal.SIGTERM)
    learnt = f"training loss {losses[0]:.3f} -> {losses[-1]:.3f}"
    if results:
        learnt += f", held-out loss {results['eval/loss']:.3f} (perplexity {results['eval/perplexity']:.2f})"
    if eval_rows and eval_rows.entropy:
        learnt += f", of which {eval_rows.entropy:.3f} is chance that no model can learn"
    print(f"{config.train.steps} steps, {config.train.steps * tokens_per_step:,} tokens in "
          f"{(time.monotonic() - started) / 60:.1f} min: {learnt}; model in {run_dir}")
    return 0


def _check_run_folder(config: Config, run_dir: Path) -> None:
    """Refuses a folder with checkpoints of another configuration, naming each setting that differs."""
    if not checkpoint.has_steps(run_dir):
        return
    differences = config_lib.differences(config_lib.load_config(run_dir / checkpoint.CONFIG_FILE), config)
    if differences:
        raise UserError(f"{run_dir} holds a run with other settings: {'; '.join(differences)}. Choose another run.dir; "
                        "run.init_from starts it with the weights of this one")


def _check_identity(saved: dict[str, Any], here: dict[str, Any], run_dir: Path) -> None:
    differing = [f"{name} was {saved.get(name)}, is {value}" for name, value in here.items() if saved.get(name) != value]
    if differing:
        raise UserError(f"the rows are not those that {run_dir} was trained on: {'; '.join(differing)}")


@contextlib.contextmanager
def _stop_signal() -> Iterator[list[int]]:
    """Collects the first SIGINT or SIGTERM instead of dying of it; the second one acts as ever."""
    received: list[int] = []
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def receive(number: int, frame: Any) -> None:
        received.append(number)
        restore()
        logging.getLogger("biomedlm_jax.train").info(
            "%s: saving after this step; once more to end at once", signal.Signals(number).name)

    for number in previous:
        signal.signal(number, receive)
    try:
        yield received
    finally:
        restore()


def _agree(stop: bool, done: int) -> bool:
    """Whether to stop after this step: what one process was told, all must do at the same step."""
    if jax.process_count() == 1:
        return stop
    return bool(multihost_utils.reached_preemption_sync_point(done))


if __name__ == "__main__":
    run_command(main)
