"""Command: fine-tunes a pretrained model on a downstream task, or goes on where that stopped.

    python -m biomedlm_jax.finetune --config configs/finetune/medqa.yaml

It starts from run.init_from: the folder of a run, or a Hugging Face folder such as the published BioMedLM. The run's
folder is like one of pretraining; the checkpoint that did best on task.eval_files is kept, and is what others load.
"""

import contextlib
import dataclasses
import functools
import logging
import os
from pathlib import Path
from typing import Any

from etils import epy

from biomedlm_jax import config as config_lib
from biomedlm_jax.config import as_paths
from biomedlm_jax.errors import UserError, run_command
from biomedlm_jax.finetune_config import FinetuneConfig, resolve_steps
from biomedlm_jax.startup import Startup, process_start

# `--help` and mistakes in the settings answer before these are loaded.
with epy.lazy_imports():
    import jax

    from biomedlm_jax import (
        adaptation,
        checkpoint,
        devices,
        distributed,
        encoding,
        fp8,
        heads,
        load,
        metrics,
        model,
        program,
        running,
        scoring,
        sharding,
        step,
        tasks,
    )

logger = logging.getLogger("biomedlm_jax.finetune")


def main() -> int:
    """Fine-tunes with the settings of the command line; exits with 128 + the signal that stopped it."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    return finetune(parse_args(), Startup(process_start()))


def parse_args(args: list[str] | None = None) -> FinetuneConfig:
    """The configuration of a command line; settings of the model that it leaves out are those of `run.init_from`.

    Raises:
      UserError: see `config.parse_args`; or `run.init_from` holds no model.
    """
    init_from = config_lib.peek("run.init_from", FinetuneConfig, args)
    if not init_from:
        raise UserError("run.init_from is not set: say what to start from, a run's folder or a Hugging Face folder")
    description = "Fine-tune a model on a downstream task, or go on where that stopped."
    config, _ = config_lib.parse_args_with(
        "finetune", description, lambda parser: None, args, FinetuneConfig, load.model_defaults(init_from)
    )
    return config


def finetune(config: FinetuneConfig, startup: Startup | None = None) -> int:
    """Fine-tunes until the last step, until the dev set says no more, or until SIGINT or SIGTERM.

    Args:
      startup: what measures the time to the first step; by default from here.

    Returns:
      0, or 128 + the number of the signal.

    Raises:
      UserError: the configuration cannot be run here, the task's files cannot be used, the loss is no longer finite, or
        a checkpoint cannot be saved.
    """
    if not config.run.dir:
        raise UserError("run.dir is not set: say where the run shall live, for instance --run.dir runs/medqa")
    if not as_paths(config.task.train_files):
        raise UserError("task.train_files is not set: say where the training examples are")
    if config.run.wandb_project:
        metrics.import_wandb()
    startup = startup or Startup()
    startup.end_imports("encoding", "running")
    with distributed.join(config) as job:
        return _finetune(config, job, startup)


def _finetune(config: FinetuneConfig, job: Any, startup: Startup) -> int:
    """`finetune` once all processes of the run have met."""
    run_dir = Path(config.run.dir)
    job.check_devices()
    devices.keep_compiled_programs(job)
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_divisible(config, mesh)
    fp8.check_devices(config.model, mesh)
    startup.end("devices")

    # ---- The examples, and what depends on them
    tokenizer = load.load_tokenizer(config.run.init_from)
    config = _with_new_words(config, tokenizer)
    train_set = _read(config, tokenizer, "train_files")
    dev_set = _read(config, tokenizer, "eval_files") if as_paths(config.task.eval_files) else None
    if dev_set:
        _warn_of_overlap(train_set, dev_set)
    config = resolve_steps(config, len(train_set))
    startup.end("examples")

    with contextlib.ExitStack() as stack:
        job.first("make the run's folder", functools.partial(running.hold, config, stack))
        job.check_folder(run_dir)
        stack.enter_context(jax.set_mesh(mesh))
        stack.enter_context(running.stop_signal(job))
        checkpointer = stack.enter_context(job.closing(checkpoint.Checkpointer(run_dir, config)))
        job.first("describe the run", functools.partial(running.describe, config, tokenizer))
        return _run(config, mesh, checkpointer, job, train_set, dev_set, startup)


def _run(
    config: FinetuneConfig, mesh: Any, checkpointer: Any, job: Any, train_set: Any, dev_set: Any, startup: Startup
) -> int:
    """`finetune` once its folder is its own and the examples are there."""
    identity = {
        "examples_sha256": train_set.fingerprint,
        "dev_examples_sha256": dev_set.fingerprint if dev_set else None,
    }
    latest = job.first("find the newest checkpoint", checkpointer.latest_step)
    progress = _progress(config, checkpointer, latest, identity)
    if latest is None:
        load.check_weights(config.run.init_from)
    start_step, steps = latest or 0, config.train.steps
    if start_step >= steps or progress.out_of_patience(config):
        logger.info("%s is done: it has its %d steps", config.run.dir, start_step)
        return 0

    # ---- The compiled steps, before any weights: what does not fit into memory is refused now
    rows, size = sharding.batch_sharding(mesh), config.train.global_batch_size
    objective = adaptation.objective(config)
    trained, frozen_shapes = adaptation.abstract_start(config)
    shapes = jax.eval_shape(functools.partial(step.init_state, config), trained)
    state_shardings, frozen_shardings = sharding.tree_shardings(mesh, (shapes, frozen_shapes))
    train_step = program.Program(
        config,
        lambda config: step.jit_train_step(config, state_shardings, rows, objective, frozen_shardings),
        job.first("read the limit of its memory", program.memory_limit),
    )
    read = functools.partial(encoding.train_batches, train_set, config.train.seed, size, stop_step=steps, sharding=rows)
    # For the longest rows, and for those of the first step; for others when they come.
    for batch in (train_set.batch([train_set.longest], size, rows), next(read(start_step))):
        train_step.compile(shapes, batch, *((frozen_shapes,) if frozen_shapes else ()))
    startup.end("compilation", "from the cache" if train_step.from_cache else "")

    # ---- The state to start from
    state, frozen, progress = _starting_state(config, mesh, state_shardings, checkpointer, latest, progress)
    others = (frozen,) if frozen else ()
    startup.end("weights")
    evaluate = _Evaluator(config, mesh, dev_set)
    throughput = metrics.Throughput({"examples": size})

    def count(done: int) -> dict[str, float]:
        return {"epoch": done * size / len(train_set)}

    # ---- The loop
    done, stop = start_step, False
    with job.closing(running.Record(config, start_step, checkpointer, job, throughput, count, startup)) as record:
        for done, batch in enumerate(record.batches(read(start_step)), start=start_step + 1):
            with record.step(done):
                state, values = train_step(state, batch, *others)
            record.trained(done, values)
            last = done == steps
            stop = job.should_stop() and not last
            if last or done % config.train.eval_every == 0:
                record.check()
                results = evaluate(model.combine(frozen, state.params))
                record.evaluated(done, results)
                progress = progress.after(done, results)
            elif not stop:
                continue
            with record.saving(done):
                checkpointer.save(state, {"data": identity, **dataclasses.asdict(progress)})
            if stop or progress.out_of_patience(config):
                break
        checkpointer.wait()
    if stop:
        return running.stopped(job.stop_signal, done, config.run.dir)
    if job.index == 0:
        print(_summary(config, done, record, progress))
    return 0


@dataclasses.dataclass(frozen=True)
class _Progress:
    """What the dev set has said so far; a checkpoint's metadata."""

    best_step: int | None = None
    best: list[float] | None = None
    """Of the best evaluation what is compared, the higher the better: accuracy, then the loss below 0."""
    evaluations_since: int = 0
    base: dict[str, Any] | None = None
    """Of LoRA, what tells the weights that it is trained beside from others; see `load.load_base`."""

    def after(self, done: int, results: dict[str, float]) -> "_Progress":
        """With another evaluation."""
        if not results:
            return self
        value = [results.get("eval/accuracy", 0.0), -results["eval/loss"]]
        if self.best is None or value > self.best:
            return _Progress(done, value, base=self.base)
        return dataclasses.replace(self, evaluations_since=self.evaluations_since + 1)

    def out_of_patience(self, config: FinetuneConfig) -> bool:
        """Whether training ends here."""
        return 0 < config.train.patience <= self.evaluations_since


class _Evaluator:
    """The numbers of the dev set, by parameters; none without one."""

    def __init__(self, config: FinetuneConfig, mesh: Any, dev_set: Any):
        self._dev_set, self._rows = dev_set, sharding.batch_sharding(mesh)
        self._size = config.train.global_batch_size // config.train.gradient_accumulation_steps
        self._has_head = bool(adaptation.scores_per_row(config))
        used = config_lib.as_used(config)
        self._step = (
            heads.jit_scores(used, mesh, adaptation.lora_of(config))
            if self._has_head
            else step.jit_eval_step(used, mesh, adaptation.objective(used))
        )

    def __call__(self, params: Any) -> dict[str, float]:
        """'eval/loss' and 'eval/accuracy' of answers, or 'eval/loss' and 'eval/perplexity' of texts."""
        if not self._dev_set:
            return {}
        batches = encoding.eval_batches(self._dev_set, self._size, self._rows)
        if not self._has_head:
            nll, tokens = step.held_out_loss(self._step, params, batches)
            return {"eval/loss": nll / tokens, "eval/perplexity": metrics.perplexity(nll / tokens)}
        scores = scoring.gather(self._step, params, batches, len(self._dev_set))
        return {
            "eval/loss": scoring.log_loss(scores, self._dev_set.labels),
            "eval/accuracy": scoring.accuracy(scores, self._dev_set.labels),
        }


def _progress(config: FinetuneConfig, checkpointer: Any, latest: int | None, identity: dict[str, Any]) -> _Progress:
    """What the dev set has said until a checkpoint, which must be of the same examples."""
    if latest is None:
        return _Progress()
    metadata = checkpointer.metadata(latest)
    running.check_identity(metadata.pop("data"), identity, config.run.dir)
    return _Progress(**metadata)


def _starting_state(
    config: FinetuneConfig, mesh: Any, state_shardings: Any, checkpointer: Any, latest: int | None, progress: _Progress
) -> tuple[Any, Any, _Progress]:
    """The state from the newest checkpoint or run.init_from, what is frozen beside it, and what tells its weights."""
    init_state = functools.partial(step.init_state, config)
    trained, frozen = adaptation.abstract_start(config)
    base = None
    if latest is None or frozen:
        there = load.mesh_shardings(config.run.init_from, mesh)
        base, known = load.load_base(config.run.dir, config, progress.base, there)
        progress = dataclasses.replace(progress, base=known if frozen else None)
    if latest is None:

        def make(base: Any) -> tuple[Any, Any]:
            trained, frozen = adaptation.start(config, base)
            return init_state(trained), frozen

        logger.info("weights: of %s", config.run.init_from)
        return *jax.jit(make, out_shardings=(state_shardings, sharding.tree_shardings(mesh, frozen)))(base), progress
    if frozen:
        frozen = jax.jit(
            lambda base: adaptation.start(config, base)[1], out_shardings=sharding.tree_shardings(mesh, frozen)
        )(base)
    abstract = jax.jit(init_state, out_shardings=state_shardings).eval_shape(trained)
    logger.info("weights: going on from step %d of %s", latest, config.run.dir)
    return checkpointer.restore(latest, abstract), frozen, progress


def _with_new_words(config: FinetuneConfig, tokenizer: Any) -> FinetuneConfig:
    """The configuration with a vocabulary that has room for the task's special tokens."""
    load.check_architecture(config.run.init_from, config.model, but_words=True)
    there = load.read_config(config.run.init_from).vocab_size
    words = max(there, tokenizer.vocab_size, *(id_ + 1 for id_ in encoding.added_ids(config, tokenizer).values()))
    if config.model.vocab_size not in (there, words):
        raise UserError(
            f"model.vocab_size is {config.model.vocab_size}, and {config.run.init_from} has {there} words, which "
            f"{config.task.name} makes {words}: leave it out"
        )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=words))


def _read(config: FinetuneConfig, tokenizer: Any, name: str) -> Any:
    """The examples of task.train_files or task.eval_files, whose answers must be known, encoded."""
    paths = as_paths(getattr(config.task, name))
    examples = tasks.TASKS[config.task.name].read(paths)
    for example in examples:
        if (example.target if isinstance(example, tasks.Generation) else example.label) is None:
            raise UserError(f"task.{name} {' '.join(paths)}: example {example.id} has no answer to learn from")
    encoded = encoding.encode(config, tokenizer, examples)
    logger.info("task.%s: %s", name, encoded.description(config))
    return encoded


def _warn_of_overlap(train_set: Any, dev_set: Any) -> None:
    seen = {str(rows) for rows in train_set.rows}
    common = sum(str(rows) in seen for rows in dev_set.rows)
    if common:
        logger.warning("%d of the %d dev examples are among the training examples, too", common, len(dev_set))


def _summary(config: FinetuneConfig, done: int, record: Any, progress: _Progress) -> str:
    """What was learnt, where it lies, and what comes next."""
    learnt = f"training loss {record.first_loss:.3f} -> {record.last_loss:.3f}"
    if progress.best:
        accuracy, loss = progress.best[0], -progress.best[1]
        found = f"loss {loss:.3f}" + (f", accuracy {accuracy:.1%}" if adaptation.scores_per_row(config) else "")
        learnt += f", on the dev set at best {found} at step {progress.best_step:,}"
    return (
        f"step {done:,} of {config.train.steps:,}, {record.minutes:.1f} min: {learnt}; model in {config.run.dir}\n"
        f"next: python -m biomedlm_jax.evaluate --checkpoint {config.run.dir} --task {config.task.name} --data FILE"
    )


if __name__ == "__main__":
    run_command(main)
