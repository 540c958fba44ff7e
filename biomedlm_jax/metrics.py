"""Where a run's numbers go: a progress bar, metrics.jsonl, TensorBoard, Weights & Biases."""

import dataclasses
import hashlib
import json
import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar
from tqdm import tqdm

from biomedlm_jax.config import Config
from biomedlm_jax.errors import UserError
from biomedlm_jax.finetune_config import FinetuneConfig
from biomedlm_jax.targets import peak_flops

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"


class Throughput:
    """Seconds a step, what is read a second, model FLOPs utilization, and waits for input, since the last reading.

    Compilation, evaluations and checkpoints do not count: call `restart` after them.
    """

    # Readings of fewer steps than this say nothing about a run.
    _LEAST_STEPS = 20

    def __init__(self, per_step: Mapping[str, float], flops_per_step: float | None = None):
        """Args: `per_step`, what a step reads, such as 'tokens', and `flops_per_step`, if they are to be counted."""
        self._per_step, self._flops_per_step = per_step, flops_per_step
        self._peak = peak_flops(jax.devices()[0].device_kind)
        self._all_steps, self._all_seconds, self._all_idle = 0, 0.0, 0.0
        self.restart(0)

    def restart(self, step: int) -> None:
        """Starts to count at `step` completed steps."""
        self._step, self._time = step, time.perf_counter()
        self._waited = self._idle = 0.0

    def waited(self, seconds: float, idle: bool) -> None:
        """Adds a wait for the next batch; `idle` if the devices had nothing else to do meanwhile."""
        self._waited += seconds
        self._idle += seconds if idle else 0

    @property
    def starved(self) -> float:
        """The part of the time of all readings in which devices waited for input; 0 until there are some steps."""
        return self._all_idle / self._all_seconds if self._all_steps >= self._LEAST_STEPS else 0.0

    def read(self, step: int) -> dict[str, float | None]:
        """The 'perf/' numbers since the last `restart` or `read`; none if no step was completed since."""
        steps = step - self._step
        if steps <= 0:
            return {}
        elapsed, waited = time.perf_counter() - self._time, self._waited
        self._all_steps += steps
        self._all_seconds += elapsed
        self._all_idle += self._idle
        seconds = elapsed / steps
        self.restart(step)
        found: dict[str, float | None] = {
            f"perf/{name}_per_second": amount / seconds for name, amount in self._per_step.items()
        }
        if self._flops_per_step is not None:
            rate = self._flops_per_step / seconds
            found["perf/mfu"] = rate / (self._peak * jax.device_count()) if self._peak else None
        return found | {"perf/step_seconds": seconds, "perf/input_wait_seconds": waited / steps}


class MetricWriter:
    """Writes numbers by step; a resumed run goes on in the same files, without the steps it takes again."""

    def __init__(self, config: Config | FinetuneConfig, start_step: int):
        """Args: `start_step`, completed steps of the checkpoint."""
        self._total = config.train.steps
        run_dir = Path(config.run.dir)
        _drop_after(run_dir / METRICS_FILE, start_step)
        self._file = (run_dir / METRICS_FILE).open("a")
        self._bar = tqdm(
            total=self._total, initial=start_step, desc="training", unit=" steps", disable=None, dynamic_ncols=True
        )
        self._tensorboard = None
        if config.run.tensorboard:
            self._tensorboard = _TensorBoard(run_dir / "tensorboard", start_step)
        self._wandb = None
        if config.run.wandb_project:
            # The same identity again, so that a resumed run goes on there, too.
            identity = hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:16]
            self._wandb = import_wandb().init(
                project=config.run.wandb_project,
                name=run_dir.resolve().name,
                dir=config.run.dir,
                id=identity,
                resume="allow",
                config=dataclasses.asdict(config),
            )

    def advance(self, step: int) -> None:
        """Moves the progress bar."""
        self._bar.update(step - self._bar.n)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Writes one line of numbers; None stands for what is not known."""
        self._file.write(json.dumps({"step": step} | values) + "\n")
        self._file.flush()
        known = {name: value for name, value in values.items() if value is not None}
        if self._tensorboard:
            self._tensorboard.write(step, known)
        if self._wandb:
            self._wandb.log(known, step=step)
        shown = _summary(known)
        self._bar.set_postfix_str(shown)
        if self._bar.disable:
            logger.info("step %d/%d %s", step, self._total, shown)

    def close(self) -> None:
        """Ends the bar and flushes everything."""
        self._bar.close()
        self._file.close()
        if self._tensorboard:
            self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()


class _TensorBoard:
    """An event file, written at once: tensorboardX's own writer blocks for ever behind a full disk."""

    def __init__(self, folder: Path, start_step: int):
        folder.mkdir(exist_ok=True)
        self._events = EventsWriter(str(folder / "events"))
        # Hides what an earlier part of the run wrote of later steps.
        self._add(Event(step=start_step + 1, session_log=SessionLog(status=SessionLog.START)))

    def write(self, step: int, values: dict[str, Any]) -> None:
        for name, value in values.items():
            self._add(Event(step=step, summary=scalar(name, value)))
        self._events.flush()

    def close(self) -> None:
        self._events.close()

    def _add(self, event: Event) -> None:
        event.wall_time = time.time()
        self._events.write_event(event)


def perplexity(loss: float) -> float:
    """exp of a loss in nats a token; infinite past what a float holds."""
    return math.exp(loss) if loss < 700 else math.inf


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; a last line cut off by a crash is left out."""
    path = Path(run_dir) / METRICS_FILE
    if not path.is_file():
        raise UserError(f"{run_dir} has no {METRICS_FILE}: is it the folder of a run?")
    with path.open("rb") as file:
        return [_parse(path, line) for line in file if line.endswith(b"\n")]


def _drop_after(path: Path, step: int) -> None:
    """Cuts off the lines of steps that will be taken again, and one that a crash left incomplete."""
    if not path.is_file():
        return
    kept = 0
    with path.open("r+b") as file:
        for line in file:
            if step == 0 or not line.endswith(b"\n") or _parse(path, line)["step"] > step:
                break
            kept += len(line)
        file.truncate(kept)


def _parse(path: Path, line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError:
        value = None
    if not isinstance(value, dict) or not isinstance(value.get("step"), int):
        raise UserError(
            f"{path} has a line that is no numbers of a step: {line[:60]!r}; remove it, or move the file away"
        )
    return value


def _summary(values: dict[str, Any]) -> str:
    formats = {
        "train/loss": "loss {:.4f}",
        "train/grad_norm": "grad norm {:.2f}",
        "eval/loss": "held-out loss {:.4f}",
        "eval/perplexity": "perplexity {:.2f}",
        "eval/accuracy": "accuracy {:.1%}",
        "perf/examples_per_second": "{:.1f} examples/s",
        "perf/tokens_per_second": "{:,.0f} tokens/s",
        "perf/mfu": "MFU {:.1%}",
    }
    return ", ".join(text.format(values[name]) for name, text in formats.items() if name in values)


def import_wandb() -> Any:
    """Weights & Biases. Raises: UserError: it is not installed."""
    try:
        import wandb
    except ImportError as error:
        raise UserError("run.wandb_project needs Weights & Biases: pip install wandb") from error
    return wandb
