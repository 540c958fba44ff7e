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
import os
from pathlib import Path
from typing import Any

from etils import epy

from biomedlm_jax import config as config_lib
from biomedlm_jax.config import Config
from biomedlm_jax.errors import UserError, run_command
from biomedlm_jax.startup import Startup, process_start

# `--help` and mistakes in the settings answer before these are loaded.
with epy.lazy_imports():
    import jax

    from biomedlm_jax import (
        bandwidth,
        checkpoint,
        data,
        devices,
        distributed,
        fp8,
        load,
        metrics,
        mixture,
        model,
        preparation,
        program,
        rows,
        running,
        sharding,
        step,
        tokenizer,
    )

logger = logging.getLogger("biomedlm_jax.train")


def main() -> int:
    """Trains with the settings of the command line; the exit status is 128 + the signal that stopped the run."""
    # JAX takes three quarters of a GPU's memory unless told otherwise. A tenth is left to CUDA and NCCL.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    config = config_lib.parse_args("train", "Pretrain a GPT-2 on biomedical text, or go on where the run stopped.")
    return train(config, Startup(process_start()))


def train(config: Config, startup: Startup | None = None) -> int:
    """Trains until `train.steps`, or until SIGINT or SIGTERM; either way the last step is saved.

    Args:
      startup: what measures the time to the first step; by default from here.

    Returns:
      0, or 128 + the number of the signal.

    Raises:
      UserError: the configuration cannot be run here, the loss is no longer finite, or a checkpoint cannot be saved.
    """
    if not config.run.dir:
        raise UserError("run.dir is not set: say where the run shall live, for instance --run.dir runs/first")
    if config.run.wandb_project:
        metrics.import_wandb()
    startup = startup or Startup()
    startup.end_imports("data", "running")
    with distributed.join(config) as job:
        return _train(config, job, startup)


def _train(config: Config, job: Any, startup: Startup) -> int:
    """`train` once all processes of the run have met."""
    run_dir = Path(config.run.dir)

    # ---- Devices
    job.check_devices()
    devices.keep_compiled_programs(job)
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_divisible(config, mesh)
    fp8.check_devices(config.model, mesh)
    logger.info(
        "mesh: %s on %d x %s",
        ", ".join(f"{name} {size}" for name, size in mesh.shape.items()),
        mesh.size,
        jax.devices()[0].device_kind,
    )
    if config.run.check_bandwidth:
        bandwidth.log_bandwidth(mesh, job.first)
    startup.end("devices")

    # ---- The run's folder, and the rows it reads: process 0 makes both, and holds the folder until the end
    with contextlib.ExitStack() as stack:
        job.first("prepare the rows", functools.partial(_prepare, config, stack))
        job.check_folder(run_dir)
        for folder in config.prepared_dirs:
            job.check_folder(folder)
        stack.enter_context(jax.set_mesh(mesh))
        stack.enter_context(running.stop_signal(job))
        checkpointer = stack.enter_context(job.closing(checkpoint.Checkpointer(run_dir, config)))
        return _run(config, mesh, checkpointer, job, startup)


def _prepare(config: Config, stack: contextlib.ExitStack) -> None:
    running.hold(config, stack)
    if not config.data.mixture:
        preparation.ensure_prepared(config)
    mixture.check_folders(config)


def _run(config: Config, mesh: Any, checkpointer: Any, job: Any, startup: Startup) -> int:
    """`train` once its folder is its own and the rows are there."""
    run_dir = Path(config.run.dir)
    train_rows, held_out = mixture.open_train(config), mixture.open_held_out(config)
    identity = data.identity(train_rows, config.train.seed, config.train.global_batch_size)
    startup.end("rows")

    # ---- The compiled step, before any weights: what does not fit into memory is refused now
    latest = job.first("find the newest checkpoint", checkpointer.latest_step)
    _check_start(config, checkpointer, latest, identity)
    if latest is not None and latest >= config.train.steps:
        logger.info("%s has all its %d steps already", run_dir, latest)
        return 0
    batch_sharding = sharding.batch_sharding(mesh)
    shapes = jax.eval_shape(functools.partial(step.init_state, config))
    shardings = sharding.tree_shardings(mesh, shapes)
    train_step = program.Program(
        config,
        lambda config: step.jit_train_step(config, shardings, batch_sharding),
        job.first("read the limit of its memory", program.memory_limit),
    )
    train_step.compile(shapes, data.abstract_batch(config))
    startup.end("compilation", "from the cache" if train_step.from_cache else "")

    # ---- The state to start from, and the batches
    state = _starting_state(config, shardings, checkpointer, latest)
    start_step = int(state.step)
    its_tokenizer = next(iter(config.prepared_dirs)) / "tokenizer"
    job.first("describe the run", lambda: running.describe(config, tokenizer.load_tokenizer(its_tokenizer)))
    startup.end("weights")
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
    tokens_per_step = config.train.global_batch_size * config.model.n_positions
    throughput = metrics.Throughput({"tokens": tokens_per_step}, model.flops_per_token(config.model) * tokens_per_step)

    def count(done: int) -> dict[str, float]:
        return {"tokens": done * tokens_per_step}

    with job.closing(running.Record(config, start_step, checkpointer, job, throughput, count, startup)) as record:
        if start_step == 0 and config.train.eval_every:
            record.evaluated(0, evaluator(state.params))
            startup.end("evaluation")
        for done, batch in enumerate(record.batches(batches), start=start_step + 1):
            with record.step(done):
                state, values = train_step(state, batch)
            record.trained(done, values)
            last = done == config.train.steps
            if last or (config.train.eval_every and done % config.train.eval_every == 0):
                record.check()  # before the evaluation, whose time is not the step's
                check_rows()
                record.evaluated(done, evaluator(state.params))
            stop = job.should_stop() and not last
            if last or stop or done % config.train.checkpoint_every == 0:
                with record.saving(done):
                    check_rows()
                    checkpointer.save(state, {"data": identity})
            if stop:
                break
        checkpointer.wait()
    if stop:
        return running.stopped(job.stop_signal, done, config.run.dir)
    if job.index == 0:
        print(_summary(config, record, mixture.entropy(held_out.values())))
    return 0


def _check_start(config: Config, checkpointer: Any, latest: int | None, identity: dict[str, Any]) -> None:
    """Raises: UserError: the weights to start from are missing, of another run, or of another architecture."""
    if latest is not None:
        running.check_identity(checkpointer.metadata(latest)["data"], identity, config.run.dir)
    elif config.run.init_from:
        load.check_architecture(config.run.init_from, config.model)
        load.check_weights(config.run.init_from)


def _starting_state(config: Config, shardings: Any, checkpointer: Any, latest: int | None) -> Any:
    """The state from the first source of weights that there is, laid out by `shardings`."""
    jitted_init = jax.jit(functools.partial(step.init_state, config), out_shardings=shardings)
    init_from = config.run.init_from
    if latest is not None:
        state = checkpointer.restore(latest, jitted_init.eval_shape())
        not_used = "; run.init_from is not used" if init_from else ""
        logger.info("weights: going on from step %d of %s%s", latest, config.run.dir, not_used)
        return state
    if not init_from:
        logger.info("weights: random, from train.seed %d", config.train.seed)
        return jitted_init()
    state = jitted_init(load.start_from(init_from, config.model, shardings.params))
    logger.info("weights: of %s, at step 0", init_from)
    with contextlib.suppress(UserError):  # weights may come without a tokenizer
        theirs, prepared = load.load_tokenizer(init_from).fingerprint, next(iter(config.prepared_dirs))
        if theirs != rows.read_manifest(prepared)["tokenizer_sha256"]:
            logger.warning("weights: %s has another tokenizer than %s: its ids mean other words", init_from, prepared)
    return state


class _Evaluator:
    """The loss on held-out rows, by parameters."""

    def __init__(self, config: Config, held_out: dict[str, Any], batch_sharding: Any, job: Any):
        self._held_out, self._sharding, self._job = held_out, batch_sharding, job
        parts = config.train.gradient_accumulation_steps
        # As many rows at once as in training, and the same rows however many that are.
        self._batch_size, self._limit = config.train.global_batch_size // parts, config.train.eval_batches * parts
        self._document_attention = config.data.document_attention
        self._step = step.jit_eval_step(config_lib.as_used(config), batch_sharding.mesh)

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


def _summary(config: Config, record: Any, entropy: float | None) -> str:
    """What was learnt and where it lies, in one line."""
    steps, tokens = config.train.steps, config.train.global_batch_size * config.model.n_positions
    learnt = f"training loss {record.first_loss:.3f} -> {record.last_loss:.3f}"
    if record.last_evaluation:
        loss, perplexity = record.last_evaluation["eval/loss"], record.last_evaluation["eval/perplexity"]
        learnt += f", held-out loss {loss:.3f} (perplexity {perplexity:.2f})"
        if entropy is not None:
            learnt += f", of which {entropy:.3f} is chance that no model can learn"
    since = f" since step {record.start_step:,}" if record.start_step else ""
    return (
        f"step {steps:,}, {steps * tokens:,} tokens; {record.minutes:.1f} min{since}: {learnt}; "
        f"model in {config.run.dir}"
    )


if __name__ == "__main__":
    run_command(main)
