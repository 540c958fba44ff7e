"""Command: pretrains a model, or goes on where a run stopped.

    python -m biomedlm_jax.train --config configs/quickstart.yaml

Which weights a run starts from, the first that there is:
  1. the newest checkpoint in run.dir: the run goes on with its optimizer state and its place in the data
  2. run.init_from, another run or a Hugging Face folder: weights only, step 0
  3. train.seed: random weights, step 0
"""

import contextlib
import functools
import logging
import math
import os
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
    import jax

    from biomedlm_jax import (
        bandwidth,
        checkpoint,
        data,
        distributed,
        files,
        load,
        metrics,
        mixture,
        preparation,
        rows,
        sharding,
        step,
        tokenizer,
    )

logger = logging.getLogger("biomedlm_jax.train")


def main() -> int:
    """Trains with the settings of the command line; the exit status is 128 + the signal that stopped the run."""
    # JAX takes three quarters of a GPU's memory unless told otherwise. A tenth is left to CUDA and NCCL.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    return train(config_lib.parse_args("train", "Pretrain a GPT-2 on biomedical text, or go on where the run stopped."))


def train(config: Config) -> int:
    """Trains until `train.steps`, or until SIGINT or SIGTERM; either way the last step is saved.

    Returns:
      0, or 128 + the number of the signal.

    Raises:
      UserError: the configuration cannot be run here, the loss is no longer finite, or a checkpoint cannot be saved.
    """
    if not config.run.dir:
        raise UserError("run.dir is not set: say where the run shall live, for instance --run.dir runs/first")
    if config.run.wandb_project:
        metrics.import_wandb()
    with distributed.join(config) as job:
        return _train(config, job)


def _train(config: Config, job: Any) -> int:
    """`train` once all processes of the run have met."""
    run_dir = Path(config.run.dir)

    # ---- Devices
    job.check_devices()
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_divisible(config, mesh)
    logger.info(
        "mesh: %s on %d x %s",
        ", ".join(f"{name} {size}" for name, size in mesh.shape.items()),
        mesh.size,
        jax.devices()[0].device_kind,
    )
    if config.run.check_bandwidth:
        bandwidth.log_bandwidth(mesh, job.first)

    # ---- The run's folder, and the rows it reads: process 0 makes both, and holds the folder until the end
    with contextlib.ExitStack() as stack:
        job.first("prepare the rows", functools.partial(_prepare, config, stack))
        job.check_folder(run_dir)
        for folder in config.prepared_dirs:
            job.check_folder(folder)
        stack.enter_context(jax.set_mesh(mesh))
        stack.enter_context(_stop_signal(job))
        checkpointer = stack.enter_context(job.closing(checkpoint.Checkpointer(run_dir, config.train)))
        return _run(config, mesh, checkpointer, job)


def _prepare(config: Config, stack: contextlib.ExitStack) -> None:
    run_dir = Path(config.run.dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    stack.enter_context(files.lock(run_dir / ".lock", functools.partial(_refuse_busy, run_dir)))
    _check_run_folder(config, run_dir)
    if not config.data.mixture:
        preparation.ensure_prepared(config)
    mixture.check_folders(config)


def _run(config: Config, mesh: Any, checkpointer: Any, job: Any) -> int:
    """`train` once its folder is its own and the rows are there."""
    run_dir = Path(config.run.dir)
    train_rows, held_out = mixture.open_train(config), mixture.open_held_out(config)
    identity = data.identity(train_rows, config.train.seed, config.train.global_batch_size)

    # ---- The state to start from
    latest = job.first("find the newest checkpoint", checkpointer.latest_step)
    state, state_shardings = _starting_state(config, mesh, checkpointer, latest, identity)
    start_step = int(state.step)
    if start_step >= config.train.steps:
        logger.info("%s has all its %d steps already", run_dir, start_step)
        return 0
    job.first("describe the run", functools.partial(_describe_run, config))

    # ---- The compiled steps, and the batches they take
    batch_sharding = sharding.batch_sharding(mesh)
    train_step = step.jit_train_step(config, state_shardings, batch_sharding)
    evaluator = _Evaluator(config, held_out, batch_sharding, job)
    batches = data.train_batches(
        train_rows,
        config.train.seed,
        config.train.global_batch_size,
        start_step,
        config.train.steps,
        batch_sharding,
        config.data.reader_threads,
        config.data.document_attention,
    )
    train_rows.log(config.train.steps * config.train.global_batch_size)

    def check_rows() -> None:
        # One process asks for all: a thousand files on each of a hundred hosts are much to ask a file system for.
        if job.index == 0:
            for opened in (*train_rows.sets, *held_out.values()):
                opened.check_unchanged()

    # ---- The loop
    done, stop = start_step, False
    with job.closing(_Record(config, start_step, checkpointer, job)) as record:
        if start_step == 0 and config.train.eval_every:
            record.evaluated(0, evaluator(state.params))
        for done, batch in enumerate(batches, start=start_step + 1):
            state, values = train_step(state, batch)
            record.trained(done, values)
            last = done == config.train.steps
            if last or (config.train.eval_every and done % config.train.eval_every == 0):
                record.check()  # before the evaluation, whose time is not the step's
                check_rows()
                record.evaluated(done, evaluator(state.params))
            stop = job.should_stop() and not last
            if last or stop or done % config.train.checkpoint_every == 0:
                record.check()
                check_rows()
                checkpointer.save(state, {"data": identity})
                record.throughput.restart(done)
            if stop:
                break
        checkpointer.wait()
    if stop:
        name = signal.Signals(job.stop_signal).name
        logger.info("stopped by %s: step %d is saved in %s; the same command goes on from there", name, done, run_dir)
        return 128 + job.stop_signal
    if job.index == 0:
        print(record.summary(mixture.entropy(held_out.values())))
    return 0


def _describe_run(config: Config) -> None:
    run_dir = Path(config.run.dir)
    config_lib.save_config(config, run_dir / checkpoint.CONFIG_FILE)
    tokenizer.load_tokenizer(next(iter(config.prepared_dirs)) / "tokenizer").save(run_dir / checkpoint.TOKENIZER_FOLDER)


def _refuse_busy(run_dir: Path) -> None:
    raise UserError(f"{run_dir} is in use by another process: wait for it to end, or choose another run.dir")


def _starting_state(
    config: Config, mesh: Any, checkpointer: Any, latest: int | None, identity: dict[str, Any]
) -> tuple[Any, Any]:
    """The state from the first source of weights that there is, on the mesh, and its shardings."""
    init_state = functools.partial(step.init_state, config)
    shardings = sharding.tree_shardings(mesh, jax.eval_shape(init_state))
    jitted_init = jax.jit(init_state, out_shardings=shardings)
    run_dir, init_from = config.run.dir, config.run.init_from
    if latest is not None:
        state = checkpointer.restore(latest, jitted_init.eval_shape())
        _check_identity(checkpointer.metadata(latest)["data"], identity, run_dir)
        not_used = "; run.init_from is not used" if init_from else ""
        logger.info("weights: going on from step %d of %s%s", latest, run_dir, not_used)
        return state, shardings
    if not init_from:
        logger.info("weights: random, from train.seed %d", config.train.seed)
        return jitted_init(), shardings
    state = jitted_init(load.start_from(init_from, config.model, shardings.params))
    logger.info("weights: of %s, at step 0", init_from)
    with contextlib.suppress(UserError):  # weights may come without a tokenizer
        theirs, prepared = load.load_tokenizer(init_from).fingerprint, next(iter(config.prepared_dirs))
        if theirs != rows.read_manifest(prepared)["tokenizer_sha256"]:
            logger.warning("weights: %s has another tokenizer than %s: its ids mean other words", init_from, prepared)
    return state, shardings


class _Evaluator:
    """The loss on held-out rows, by parameters."""

    def __init__(self, config: Config, held_out: dict[str, Any], batch_sharding: Any, job: Any):
        self._held_out, self._sharding, self._job = held_out, batch_sharding, job
        parts = config.train.gradient_accumulation_steps
        # As many rows at once as in training, and the same rows however many that are.
        self._batch_size, self._limit = config.train.global_batch_size // parts, config.train.eval_batches * parts
        self._document_attention = config.data.document_attention
        self._step = step.jit_eval_step(config, batch_sharding.mesh)

    def __call__(self, params: Any) -> dict[str, float]:
        """'eval/loss' in nats a token of all sets, 'eval/perplexity', and of several sets 'eval/loss/NAME' of each.

        Nothing without held-out rows, or if it was stopped.
        """
        found = {}
        for name, of_set in self._held_out.items():
            batches = data.eval_batches(of_set, self._batch_size, self._sharding, self._limit, self._document_attention)
            found[name] = step.held_out_loss(self._step, params, batches, stop=self._job.should_stop)
            if self._job.stop_signal:
                return {}
        if not found:
            return {}
        nll, tokens = map(sum, zip(*found.values(), strict=True))
        results = {"eval/loss": nll / tokens, "eval/perplexity": metrics.perplexity(nll / tokens)}
        if len(found) > 1:
            results |= {f"eval/loss/{name}": nll / tokens for name, (nll, tokens) in found.items()}
        return results


class _Record:
    """A run's numbers: fetched a step late, so that devices never wait for it, checked, and written by process 0."""

    def __init__(self, config: Config, start_step: int, checkpointer: Any, job: Any):
        self.throughput = metrics.Throughput(config)
        self._config, self._start_step, self._checkpointer = config, start_step, checkpointer
        self._tokens_per_step = config.train.global_batch_size * config.model.n_positions
        self._writer = metrics.MetricWriter(config, start_step) if job.index == 0 else None
        self._pending: tuple[int, dict[str, Any]] | None = None
        self._first_loss = self._last_loss = math.nan
        self._evaluated: dict[str, float] = {}
        self._started = time.monotonic()

    def trained(self, done: int, values: dict[str, Any]) -> None:
        """Takes the numbers of step `done`, still being computed."""
        self.check()
        self._pending = done, values
        if done == self._start_step + 1:
            # The first step compiles, which is no measure of speed.
            jax.block_until_ready(values)
            self.throughput.restart(done)
        if self._writer:
            self._writer.advance(done)

    def check(self) -> None:
        """Fetches the numbers taken last, and writes them if it is their turn.

        Raises:
          UserError: one is not finite.
        """
        if self._pending is None:
            return
        done, values = self._pending
        self._pending = None
        numbers = {name: float(value) for name, value in values.items()}
        loss, grad_norm = numbers["train/loss"], numbers["train/grad_norm"]
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            latest = self._checkpointer.latest_step()
            saved = "nothing was saved yet" if latest is None else f"the last checkpoint is step {latest}"
            raise UserError(
                f"at step {done} the loss is {loss} and the gradient's norm {grad_norm}; {saved} of "
                f"{self._config.run.dir}. A lower optimizer.learning_rate or a longer optimizer.warmup_steps may help"
            )
        if math.isnan(self._first_loss):
            self._first_loss = loss
        self._last_loss = loss
        if done == 1 or done % self._config.train.log_every == 0 or done == self._config.train.steps:
            self._write(done, numbers | self.throughput.read(done))

    def evaluated(self, done: int, results: dict[str, float]) -> None:
        """Takes the numbers of an evaluation after step `done`."""
        self.check()
        if results:
            self._evaluated = results
            self._write(done, results)
        self.throughput.restart(done)

    def _write(self, done: int, numbers: dict[str, Any]) -> None:
        if self._writer:
            self._writer.write(done, {"tokens": done * self._tokens_per_step} | numbers)

    def close(self) -> None:
        """Writes out everything."""
        if self._writer:
            self._writer.close()

    def summary(self, entropy: float | None) -> str:
        """What was learnt and where it lies, in one line."""
        steps, minutes = self._config.train.steps, (time.monotonic() - self._started) / 60
        learnt = f"training loss {self._first_loss:.3f} -> {self._last_loss:.3f}"
        if self._evaluated:
            loss, perplexity = self._evaluated["eval/loss"], self._evaluated["eval/perplexity"]
            learnt += f", held-out loss {loss:.3f} (perplexity {perplexity:.2f})"
            if entropy is not None:
                learnt += f", of which {entropy:.3f} is chance that no model can learn"
        since = f" since step {self._start_step:,}" if self._start_step else ""
        return (
            f"step {steps:,}, {steps * self._tokens_per_step:,} tokens; {minutes:.1f} min{since}: {learnt}; "
            f"model in {self._config.run.dir}"
        )


def _check_run_folder(config: Config, run_dir: Path) -> None:
    """Refuses a folder with checkpoints of another configuration, naming each setting that differs."""
    if not checkpoint.has_steps(run_dir):
        return
    differences = config_lib.differences(config_lib.load_config(run_dir / checkpoint.CONFIG_FILE), config)
    if differences:
        raise UserError(
            f"{run_dir} holds a run with other settings: {'; '.join(differences)}. Choose another run.dir; "
            "run.init_from starts it with the weights of this one"
        )


def _check_identity(saved: dict[str, Any], here: dict[str, Any], run_dir: str) -> None:
    differing = [
        f"{name} was {saved.get(name)}, is {value}" for name, value in here.items() if saved.get(name) != value
    ]
    if differing:
        raise UserError(f"the rows are not those that {run_dir} was trained on: {'; '.join(differing)}")


@contextlib.contextmanager
def _stop_signal(job: Any) -> Iterator[None]:
    """Takes the first SIGINT or SIGTERM as a request to stop instead of dying of it; the second one acts as ever."""
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def receive(number: int, frame: Any) -> None:
        job.request_stop(number)
        restore()
        logger.info("%s: saving after this step; once more to end at once", signal.Signals(number).name)

    for number in previous:
        signal.signal(number, receive)
    try:
        yield
    finally:
        restore()


if __name__ == "__main__":
    run_command(main)
