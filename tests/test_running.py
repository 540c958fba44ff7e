"""What a run's loop measures of itself, by a clock that the tests turn."""

import pytest
import tiny

from biomedlm_jax import distributed, metrics, running, startup

STEP = 1.0
STALL = "perf/checkpoint_stall_seconds"


class Clock:
    """Stands in for the module `time` where the loop asks it."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now

    time = monotonic = perf_counter


class Device:
    """Computes one step after the other, each in `STEP` seconds, while the clock goes on."""

    def __init__(self, clock):
        self.clock, self.free_at, self.events = clock, 0.0, []

    def run(self, step):
        self.events.append(f"started {step}")
        self.free_at = max(self.free_at, self.clock.now) + STEP
        return {name: Value(self, step, self.free_at) for name in ("train/loss", "train/grad_norm")}


class Value:
    """A number that the device is computing."""

    def __init__(self, device, step, ready_at):
        self.device, self.step, self.ready_at = device, step, ready_at

    def is_ready(self):
        return self.device.clock.now >= self.ready_at

    def block_until_ready(self):
        self.device.clock.now = max(self.device.clock.now, self.ready_at)
        return self

    def __float__(self):
        self.block_until_ready()
        if f"fetched {self.step}" not in self.device.events:
            self.device.events.append(f"fetched {self.step}")
        return 1.0


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    for module in (metrics, running):
        monkeypatch.setattr(module, "time", clock)
    return clock


def run(tmp_path, clock, input_seconds, steps=30, save_at=(), save_seconds=0.0, begun=None):
    """The lines of a run whose batches take so long to come; its events."""
    config = tiny.replace(train={"steps": steps, "log_every": 1}, run={"dir": str(tmp_path), "tensorboard": False})
    device, throughput = Device(clock), metrics.Throughput({"tokens": 1})

    def read():
        for step in range(1, steps + 1):
            clock.now += input_seconds
            yield step

    record = running.Record(config, 0, None, distributed.Job(), throughput, lambda done: {}, begun or startup.Startup())
    for done, batch in enumerate(record.batches(read()), start=1):
        record.trained(done, device.run(batch))
        if done in save_at:
            with record.saving(done):
                clock.now += save_seconds
    record.check()
    record.close()
    return metrics.read_metrics(tmp_path), device.events


def test_the_next_step_is_under_way_before_the_numbers_of_a_step_are_fetched(tmp_path, clock):
    _, events = run(tmp_path, clock, input_seconds=0.1, steps=5)
    assert events[0] == "started 1"
    assert events[1:] == [
        *(f"{what} {step}" for n in range(1, 5) for what, step in (("started", n + 1), ("fetched", n))),
        "fetched 5",
    ]


@pytest.mark.parametrize(("seconds", "expected"), [(0.5, STEP), (3.0, 3.0)])
def test_waits_for_input_are_measured_and_warned_of_if_devices_wait_too(tmp_path, clock, caplog, seconds, expected):
    lines, _ = run(tmp_path, clock, input_seconds=seconds)
    for line in lines[2:-1]:
        assert line["perf/input_wait_seconds"] == pytest.approx(seconds)
        assert line["perf/step_seconds"] == pytest.approx(expected)
    warnings = [record.message for record in caplog.records if "waited for input" in record.message]
    assert len(warnings) == (seconds > STEP)
    assert all("data.reader_threads" in message for message in warnings)


def test_a_checkpoint_counts_as_a_stall_and_not_as_a_step(tmp_path, clock):
    lines, _ = run(tmp_path, clock, input_seconds=0.1, save_at=(4, 8), save_seconds=7.0)
    # Until the step that was just started is complete, and until it is saved.
    stalls = {line["step"]: line[STALL] for line in lines if STALL in line}
    assert stalls == {5: pytest.approx(7 + STEP), 9: pytest.approx(7 + STEP)}
    assert all(line["perf/step_seconds"] < 2 * STEP for line in lines if "perf/step_seconds" in line)


def test_the_time_to_the_first_step_is_said_and_kept(tmp_path, clock, caplog, monkeypatch):
    monkeypatch.setattr(startup, "time", clock)
    caplog.set_level("INFO", logger="biomedlm_jax")
    begun = startup.Startup(clock.now)
    for part, seconds, note in (("imports", 2.0, ""), ("compilation", 30.0, "from the cache")):
        clock.now += seconds
        begun.end(part, note)
    lines, _ = run(tmp_path, clock, input_seconds=0.5, steps=3, begun=begun)
    assert "first step after 33.5 s: imports 2.0, compilation 30.0 (from the cache), first step 1.5" in caplog.messages
    parts = {name: value for name, value in lines[0].items() if name.startswith("perf/startup")}
    assert parts == {
        "perf/startup_seconds": 33.5,
        "perf/startup_seconds/imports": 2,
        "perf/startup_seconds/compilation": 30,
        "perf/startup_seconds/first_step": 1.5,
    }
    assert not any("perf/startup_seconds" in line for line in lines[1:])
