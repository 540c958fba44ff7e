"""Tasks that several processes, on one machine or on many, do between them, each once.

A task's result is a file that names what it was made from, and the right to make it is a lock file. So there is no
scheduler: every process goes through the same list, makes what nobody has made, and waits for the rest. Processes may
come and go; a lock ends with its holder, and whoever waits for it does the work.
"""

import concurrent.futures
import contextlib
import dataclasses
import json
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from tqdm import tqdm

from biomedlm_jax.errors import UserError
from biomedlm_jax.files import replace_file, try_lock

logger = logging.getLogger(__name__)

# Starting a process takes as long as preparing some megabytes of text.
_BYTES_PER_PROCESS = 8 << 20
_SECONDS_BETWEEN_LINES = 60

Advance = Callable[[int], None]


@dataclasses.dataclass(frozen=True)
class Task:
    """Something to make once.

    Attributes:
      folder: where its files lie: what `make` writes, NAME.json with what it returns, NAME.lock.
      key: hash of all that the result depends on; a result of another key is made again.
      size: bytes that it reads, for the progress bar.
      make: called with a function to tell of bytes read; what it writes is complete whenever it is there. Picklable.
    """

    folder: Path
    name: str
    key: str
    size: int
    make: Callable[[Advance], dict[str, Any]]

    def result(self) -> dict[str, Any] | None:
        """What `make` returned; None if it did not yet, or from something else."""
        try:
            result = json.loads((self.folder / f"{self.name}.json").read_bytes())
        except (FileNotFoundError, ValueError):
            return None
        return result["result"] if result["key"] == self.key else None

    def attempt(self, wait: bool, advance: Advance) -> bool:
        """Makes the result unless it is there; false if another process is at it, and `wait` is false."""
        if self.result() is not None:
            return True
        with try_lock(self.folder / f"{self.name}.lock", wait) as held:
            if held and self.result() is None:
                content = {"key": self.key, "result": self.make(advance)}
                replace_file(self.folder / f"{self.name}.json", json.dumps(content).encode())
        return held


def run(description: str, tasks: Sequence[Task], processes: int) -> list[dict[str, Any]]:
    """The results of all tasks, after making those that are missing.

    Args:
      description: for the progress bar.
      processes: how many to use here; 0 is one a core, as far as there is enough to do.

    Raises:
      UserError: of a task, after all others are done.
    """
    missing = [task for task in tasks if task.result() is None]
    if missing:
        size = sum(task.size for task in missing)
        processes = min(processes or min(_cores(), 1 + size // _BYTES_PER_PROCESS), len(missing))
        if len(missing) < len(tasks):
            logger.info("%s: going on, %d of %d are done", description, len(tasks) - len(missing), len(tasks))
        total = sum(task.size for task in tasks)
        with _Progress(description, total, total - size) as progress:
            runner = _run_here if processes == 1 else _run_in_processes
            errors, busy = runner(missing, False, processes, progress)
            if busy:
                logger.info("%s: waiting for %d that another process is at", description, len(busy))
                errors += runner(busy, True, min(processes, len(busy)), progress)[0]
        if errors:
            others = f" (and so with {len(errors) - 1} more: {errors[1]}, ...)" if len(errors) > 1 else ""
            raise UserError(f"{errors[0]}{others}")
    results = [result for task in tasks if (result := task.result()) is not None]
    if len(results) < len(tasks):
        raise UserError(
            f"{description}: another process made the same from other input meanwhile: start the same command again"
        )
    return results


def _cores() -> int:
    # Those that this process may use: fewer than the machine's under Slurm and in containers.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _run_here(
    tasks: Sequence[Task], wait: bool, processes: int, progress: "_Progress"
) -> tuple[list[UserError], list[Task]]:
    """The mistakes met, and the tasks that others are at."""
    errors, busy = [], []
    for task in tasks:
        try:
            if not task.attempt(wait, progress.advance):
                busy.append(task)
        except UserError as error:
            errors.append(error)
    return errors, busy


def _run_in_processes(
    tasks: Sequence[Task], wait: bool, processes: int, progress: "_Progress"
) -> tuple[list[UserError], list[Task]]:
    """`_run_here` in processes of its own."""
    errors, busy = [], []
    others = set(multiprocessing.active_children())
    # JAX may run threads in this process, which a fork would not survive.
    context = multiprocessing.get_context("spawn")
    # Bytes read for each task: as only one process writes each number, no lock, which one that is killed might hold.
    bytes_read = context.RawArray("q", len(tasks))
    executor = concurrent.futures.ProcessPoolExecutor(processes, context, _start_worker, (bytes_read,))
    seen = 0
    try:
        # Ctrl-C reaches the whole group, and this process ends the others: they are started deaf to it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            pending = {executor.submit(_attempt_in_worker, *pair, wait): pair[1] for pair in enumerate(tasks)}
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        while pending:
            done, _ = concurrent.futures.wait(pending, timeout=0.2, return_when=concurrent.futures.FIRST_COMPLETED)
            total = sum(bytes_read)
            progress.advance(total - seen)
            seen = total
            for future in done:
                task = pending.pop(future)
                try:
                    if not future.result():
                        busy.append(task)
                except UserError as error:
                    errors.append(error)
        executor.shutdown()
    except BrokenProcessPool as error:
        raise UserError(
            "a process that prepared rows was killed, perhaps for want of memory: the same command goes on from here; "
            "fewer data.processes take less"
        ) from error
    finally:
        for process in set(multiprocessing.active_children()) - others:
            process.kill()
        executor.shutdown(wait=False, cancel_futures=True)
    return errors, busy


def _start_worker(bytes_read: Any) -> None:
    global _bytes_read
    _bytes_read = bytes_read
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _attempt_in_worker(index: int, task: Task, wait: bool) -> bool:
    def advance(size: int) -> None:
        _bytes_read[index] += size

    return task.attempt(wait, advance)


_bytes_read: Any = None


class _Progress:
    """A bar with rate and time left; in a log, a line a minute."""

    def __init__(self, description: str, total: int, done: int):
        self._description, self._total, self._begin = description, total, done
        self._done, self._started = done, time.monotonic()
        self._next_line = self._started + _SECONDS_BETWEEN_LINES
        self._bar = tqdm(
            desc=description, total=total, initial=done, unit="B", unit_scale=True, disable=None, mininterval=0.5
        )

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def advance(self, size: int) -> None:
        """Tells of bytes that were read."""
        self._done += size
        self._bar.update(size)
        now = time.monotonic()
        if self._bar.disable and now > self._next_line:
            self._next_line = now + _SECONDS_BETWEEN_LINES
            seconds = now - self._started
            meter = tqdm.format_meter(
                self._done, self._total, seconds, unit="B", unit_scale=True, initial=self._begin, ncols=0
            )
            logger.info("%s: %s", self._description, meter)


@contextlib.contextmanager
def reading(report: Any, advance: Advance) -> Iterator[Callable[[], None]]:
    """Gives a function that tells `advance` what was read since it was called last; the rest is told at the end."""
    told = 0

    def tell() -> None:
        nonlocal told
        advance(report.raw_bytes - told)
        told = report.raw_bytes

    yield tell
    tell()
