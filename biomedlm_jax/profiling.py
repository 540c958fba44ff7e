"""A profile of a few steps of a run, for XProf (TensorBoard) and Perfetto."""

import logging
from pathlib import Path

import jax

logger = logging.getLogger(__name__)

FOLDER = "profile"

# The first step of a process loads the program and the second one warms up.
_SKIPPED = 2


class Profile:
    """Records some steps of a process, from its third on.

    Attributes:
      first: the first step to record.
      last: the last one.
      is_recording: whether it does just now.
    """

    def __init__(self, run_dir: str, start_step: int, steps: int):
        """Args: `start_step`, completed before this process; `steps`, how many to record; 0 records none."""
        self.first = start_step + _SKIPPED + 1
        self.last = start_step + _SKIPPED + steps
        self._folder = Path(run_dir) / FOLDER
        self.is_recording = False

    def start(self) -> None:
        """Begins to record."""
        jax.profiler.start_trace(self._folder, create_perfetto_trace=True)
        self.is_recording = True

    def stop(self) -> None:
        """Writes what was recorded, if anything was."""
        if not self.is_recording:
            return
        self.is_recording = False
        jax.profiler.stop_trace()
        logger.info(
            "profile from step %d on: xprof --logdir %s shows it (pip install xprof), and https://ui.perfetto.dev its "
            "perfetto_trace.json.gz",
            self.first,
            self._folder,
        )
