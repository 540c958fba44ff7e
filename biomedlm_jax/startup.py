"""How long a process takes from its start to the end of its first step, and with what."""

import importlib
import os
import time
from pathlib import Path


def process_start() -> float:
    """When this process began, on the clock of `time.monotonic`; now where the system does not say."""
    try:
        # Field 22, counted behind the name, which may have blanks: clock ticks since the machine was started.
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        age = 0.0
    return time.monotonic() - age


class Startup:
    """Parts of the time to the first step, one after the other without gaps.

    Attributes:
      parts: seconds of each, by name.
    """

    def __init__(self, began: float | None = None):
        """Args: `began`, on the clock of `time.monotonic`; now if not given."""
        self.parts: dict[str, float] = {}
        self._notes: dict[str, str] = {}
        self._last = time.monotonic() if began is None else began

    def end(self, part: str, note: str = "") -> None:
        """Ends a part, which began where the one before ended."""
        now = time.monotonic()
        self.parts[part], self._last = now - self._last, now
        self._notes[part] = f" ({note})" if note else ""

    def end_imports(self, *modules: str) -> None:
        """Imports modules, which else would be where they are first used, and ends the part of that."""
        for module in modules:
            importlib.import_module(f"biomedlm_jax.{module}")
        self.end("imports")

    @property
    def numbers(self) -> dict[str, float]:
        """The total and the parts as metrics."""
        name = "perf/startup_seconds"
        parts = {f"{name}/{part.replace(' ', '_')}": seconds for part, seconds in self.parts.items()}
        return {name: sum(self.parts.values())} | parts

    def __str__(self) -> str:
        parts = ", ".join(f"{part} {seconds:.1f}{self._notes[part]}" for part, seconds in self.parts.items())
        return f"first step after {sum(self.parts.values()):.1f} s: {parts}"
