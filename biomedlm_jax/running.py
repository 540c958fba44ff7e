"""What pretraining and fine-tuning share around their loops: the run's folder, its numbers, and how it is stopped."""

import contextlib
import functools
import logging
import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax

from biomedlm_jax import checkpoint, files, metrics
from biomedlm_jax import config as config_lib
from biomedlm_jax.config import Config
from biomedlm_jax.errors import UserError
from biomedlm_jax.finetune_config import FinetuneConfig
from biomedlm_jax.profiling import Profile, check_folder
from biomedlm_jax.startup import Startup
from biomedlm_jax.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

# The part of a run's time that its devices may spend waiting for input before a warning.
_STARVED = 0.05


def hold(config: Config | FinetuneConfig, stack: contextlib.ExitStack) -> None:
    """Makes the folder of a run and keeps it from other processes until the end of `stack`.

    Raises:
      UserError: another process holds it; it is the folder of the model to start from; or it has checkpoints of
        another configuration; names each setting that differs.
    """
    run_dir = Path(config.run.dir)
    if (run_dir / "config.json").is_file() or (run_dir.exists() and run_dir.resolve() == _start_of(config)):
        raise UserError(f"{run_dir} holds a model to start from: choose another run.dir")
    run_dir.mkdir(parents=True, exist_ok=True)
    stack.enter_context(files.lock(run_dir / ".lock", functools.partial(_refuse_busy, run_dir)))
    if config.train.profile_steps:
        check_folder(run_dir)
    if not checkpoint.has_steps(run_dir):
        return
    there = checkpoint.read_config(run_dir)
    if type(there) is not type(config):
        raise UserError(f"{run_dir} holds a run of another command: choose another run.dir")
    differences = config_lib.differences(there, config)
    if differences:
        raise UserError(
            f"{run_dir} holds a run with other settings: {'; '.join(differences)}. Choose another run.dir; "
            "run.init_from starts it with the weights of this one"
        )


def _start_of(config: Config | FinetuneConfig) -> Path | None:
    return Path(config.run.init_from).resolve() if config.run.init_from else None


def _refuse_busy(run_dir: Path) -> None:
    raise UserError(f"{run_dir} is in use by another process: wait for it to end, or choose another run.dir")


def check_identity(saved: dict[str, Any], here: dict[str, Any], run_dir: str) -> None:
    """Raises: UserError: a run was trained on other data than those that are here."""
    differing = [
        f"{name} was {saved.get(name)}, is {value}" for name, value in here.items() if saved.get(name) != value
    ]
    if differing:
        raise UserError(f"the rows are not those that {run_dir} was trained on: {'; '.join(differing)}")


def describe(config: Config | FinetuneConfig, its_tokenizer: Tokenizer) -> None:
    """Writes what others need to read a run's checkpoints: its settings, and its tokenizer."""
    run_dir = Path(config.run.dir)
    config_lib.save_config(config, run_dir / checkpoint.CONFIG_FILE)
    its_tokenizer.save(run_dir / checkpoint.TOKENIZER_FOLDER)


def stopped(number: int, done: int, run_dir: str) -> int:
    """Says that a signal ended a run behind a saved step; the exit status of the process, as shells have it."""
    name = signal.Signals(number).name
    logger.info("stopped by %s: step %d is saved in %s; the same command goes on from there", name, done, run_dir)
    return 128 + number


@contextlib.contextmanager
def stop_signal(job: Any) -> Iterator[None]:
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


class Record:
    """A run's numbers: fetched a step late, so that devices never wait for it, checked, and written by process 0."""

    def __init__(
        self,
        config: Config | FinetuneConfig,
        start_step: int,
        checkpointer: Any,
        job: Any,
        throughput: metrics.Throughput,
        count: Callable[[int], dict[str, float]],
        startup: Startup,
    ):
        """Args: `count`, from completed steps to what was read until then, such as 'tokens'."""
        self.throughput, self._count = throughput, count
        self._config, self.start_step, self._checkpointer = config, start_step, checkpointer
        self._writer = metrics.MetricWriter(config, start_step) if job.index == 0 else None
        self._profile = Profile(config.run.dir, start_step, config.train.profile_steps if job.index == 0 else 0)
        self._pending: tuple[int, dict[str, Any]] | None = None
        self.first_loss = self.last_loss = math.nan
        self.last_evaluation: dict[str, float] = {}
        self._started = time.monotonic()
        self._stalled = 0.0
        self._startup: Startup | None = startup
        self._warned = False

    def batches(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The batches, while the loop's waits for them are measured."""
        iterator, end = iter(batches), object()
        while True:
            begun = time.perf_counter()
            batch = next(iterator, end)
            # The step before is under way: a wait is hidden behind it unless it is complete by now.
            idle = self._pending is None or all(value.is_ready() for value in self._pending[1].values())
            self.throughput.waited(time.perf_counter() - begun, idle)
            if batch is end:
                return
            yield batch

    @contextlib.contextmanager
    def step(self, done: int) -> Iterator[None]:
        """Surrounds the start of the step after which `done` are complete; a profile begins with one."""
        if self._profile.first <= done <= self._profile.last:
            if done == self._profile.first:
                self.check()  # of the steps before, nothing is left to run in it
                self._profile.start()
            with jax.profiler.StepTraceAnnotation("train", step_num=done):
                yield
        else:
            yield

    def trained(self, done: int, values: dict[str, Any]) -> None:
        """Takes the numbers of step `done`, still being computed."""
        self.check()
        self._pending = done, values
        if done == self.start_step + 1:
            # The first step waits for its rows and loads the program: no measure of speed.
            jax.block_until_ready(values)
            self.throughput.restart(done)
            assert self._startup
            self._startup.end("first step")
            logger.info("%s", self._startup)
        if self._profile.is_recording and done == self._profile.last:
            self.check()
            self._profile.stop()
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
        if math.isnan(self.first_loss):
            self.first_loss = loss
        self.last_loss = loss
        if done == 1 or done % self._config.train.log_every == 0 or done == self._config.train.steps:
            if self._startup:
                numbers |= self._startup.numbers
                self._startup = None
            if self._stalled:
                numbers["perf/checkpoint_stall_seconds"] = self._stalled
                self._stalled = 0.0
            self._write(done, numbers | self.throughput.read(done))
            self._warn_of_starvation()

    def _warn_of_starvation(self) -> None:
        if not self._warned and self.throughput.starved > _STARVED:
            self._warned = True
            remedy = "a higher data.reader_threads or a faster disk under the rows may help"
            logger.warning(
                "devices have waited for input in %.0f %% of the time until now%s",
                100 * self.throughput.starved,
                f": {remedy}" if isinstance(self._config, Config) else "",
            )

    @contextlib.contextmanager
    def saving(self, done: int) -> Iterator[None]:
        """Measures how long the loop stands still to save step `done`, first of all until the step is complete."""
        begun = time.perf_counter()
        self.check()
        yield
        self._stalled += time.perf_counter() - begun
        self.throughput.restart(done)

    def evaluated(self, done: int, results: dict[str, float]) -> None:
        """Takes the numbers of an evaluation after step `done`."""
        self.check()
        if results:
            self.last_evaluation = results
            self._write(done, results)
        self.throughput.restart(done)

    def _write(self, done: int, numbers: dict[str, Any]) -> None:
        if self._writer:
            self._writer.write(done, self._count(done) | numbers)

    def close(self) -> None:
        """Writes out everything."""
        self._profile.close()
        if self._writer:
            self._writer.close()

    @property
    def minutes(self) -> float:
        """Since this process began to train."""
        return (time.monotonic() - self._started) / 60
