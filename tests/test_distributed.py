"""Real processes, as a pod has them: the same losses, one failure ends all, and all stop at one step."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny

from biomedlm_jax import checkpoint, distributed, metrics, mixture, preparation, rows
from biomedlm_jax import config as config_lib
from biomedlm_jax import train as train_lib
from biomedlm_jax.config import Config
from biomedlm_jax.errors import UserError

ROOT = Path(__file__).parents[1]

# Runs `train`; when one process takes the batch of one step, something happens to it. Each notes the rows it reads.
CHILD = """
import collections, dataclasses, os, signal, sys
from biomedlm_jax import data, errors, rows, train

process, at, what, reads = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
sys.argv = ["train", *sys.argv[5:]]
mine = process == int(os.environ.get("JAX_PROCESS_ID", 0))

def happen():
    if what == "raise":
        raise ValueError("something broke")
    os.kill(os.getpid(), getattr(signal, what))

class Noted(collections.abc.Sequence):
    def __init__(self, source):
        self.source, self.file = source, open(reads, "a", buffering=1)
    def __len__(self):
        return len(self.source)
    def __getitem__(self, index):
        self.file.write(f"{index}\\n")
        return self.source[index]

def noted_rows(folder, split, open_rows=rows.open_rows):
    opened = open_rows(folder, split)
    return dataclasses.replace(opened, source=Noted(opened.source)) if split == "train" else opened

def batches(*args, train_batches=data.train_batches):
    for number, batch in enumerate(train_batches(*args), start=args[3] + 1):
        if mine and number == at:
            happen()
        yield batch

rows.open_rows, data.train_batches = noted_rows, batches
errors.run_command(train.main)
"""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "prepared"
    preparation.ensure_prepared(make_config(folder, "unused"))
    return folder


def make_config(prepared, run_dir, **groups) -> Config:
    config = tiny.run_config(
        prepared,
        run_dir,
        train={"steps": 12, "eval_every": 6, "checkpoint_every": 3, "keep_last": 10},
        run={"connect_timeout": 60, "heartbeat_timeout": 8},
    )
    return tiny.replace(config, **groups)


class Processes:
    """`train` in several processes on this machine; what each says goes to a file."""

    def __init__(self, configs, env, devices=(2, 2), happening=(-1, 0, "nothing"), folder=None):
        self.folder = Path(folder or f"{configs[0].run.dir}-files")
        self.folder.mkdir(parents=True, exist_ok=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.started = []
        for index, config in enumerate(configs):
            path = self.folder / f"{index}.yaml"
            config_lib.save_config(config, path)
            place = {
                "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                "JAX_NUM_PROCESSES": str(len(configs)),
                "JAX_PROCESS_ID": str(index),
            }
            with (self.folder / f"{index}.log").open("w") as log:
                command = [sys.executable, "-c", CHILD, *map(str, happening), str(self.folder / f"{index}.reads")]
                self.started.append(
                    subprocess.Popen(
                        [*command, "--config", str(path)],
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        env=env
                        | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices[index]), "PYTHONPATH": str(ROOT)}
                        | (place if len(configs) > 1 else {}),
                    )
                )

    def wait(self, timeout=240, but=()) -> list[int | None]:
        """The statuses of all, once all have ended but those in `but`, which hang and are killed then."""
        until = time.monotonic() + timeout
        try:
            for index, process in enumerate(self.started):
                if index not in but:
                    process.wait(max(0.1, until - time.monotonic()))
            return [process.poll() for process in self.started]
        finally:
            for process in self.started:
                process.kill()
                process.wait()

    def said(self, index: int) -> str:
        return (self.folder / f"{index}.log").read_text()

    def errors(self, index: int) -> list[str]:
        return [line for line in self.said(index).splitlines() if line.startswith("error: ")]

    def reads(self, index: int) -> list[int]:
        return [int(line) for line in (self.folder / f"{index}.reads").read_text().split()]


def run_all(prepared, run_dir, env, count=2, devices=2, happening=(-1, 0, "nothing"), **groups) -> Processes:
    """Runs to the end without a failure."""
    started = Processes([make_config(prepared, run_dir, **groups)] * count, env, [devices] * count, happening)
    assert started.wait() == [0] * count, "\n".join(map(started.said, range(count)))
    return started


def losses(run_dir):
    lines = metrics.read_metrics(run_dir)
    assert len({line["step"] for line in lines if "train/loss" in line}) == sum("train/loss" in line for line in lines)
    return [(line["step"], name, line[name]) for line in lines for name in ("train/loss", "eval/loss") if name in line]


def assert_close(found, expected):
    assert [entry[:2] for entry in found] == [entry[:2] for entry in expected] and expected
    np.testing.assert_allclose([entry[2] for entry in found], [entry[2] for entry in expected], rtol=0, atol=1e-5)


# ---- In the normal suite


def test_two_processes_train_as_one_and_share_the_rows(prepared, tmp_path, subprocess_env):
    train = {"steps": 4, "eval_every": 2, "checkpoint_every": 4}
    several = run_all(prepared, tmp_path / "2x4", subprocess_env, devices=4, train=train)
    assert train_lib.train(make_config(prepared, tmp_path / "1x8", train=train)) == 0
    assert_close(losses(tmp_path / "2x4"), losses(tmp_path / "1x8"))
    assert len(losses(tmp_path / "2x4")) == 4 + 3
    # Each reads its half of each batch, and nothing else.
    draws = mixture.Mixture((rows.open_rows(prepared, "train"),), (1.0,)).draws(0)
    drawn = np.array([draws[index][1] for index in range(4 * 16)]).reshape(4, 2, 8)
    for index in range(2):
        assert sorted(several.reads(index)) == sorted(drawn[:, index].flat)
    # Process 0 speaks for all.
    assert "devices: 2 processes on 1 host" in several.said(0) and "4 x cpu each" in several.said(0)
    assert "mesh: replica 1, fsdp 8 on 8 x cpu" in several.said(0)
    assert "step 4, 4,096 tokens" in several.said(0)
    spoken = re.compile(r"^(devices|mesh|rows|weights|attention|error|step \d)", re.MULTILINE)
    assert len(spoken.findall(several.said(0))) > 10 and not spoken.search(several.said(1))


def test_the_others_end_when_one_is_killed(prepared, tmp_path, subprocess_env):
    config = make_config(prepared, tmp_path / "run", run={"heartbeat_timeout": 5})
    started = Processes([config] * 2, subprocess_env, [1, 1], happening=(1, 2, "SIGKILL"))
    assert started.wait() == [1, -signal.SIGKILL]
    host = re.escape(socket.gethostname())
    (error,) = started.errors(0)
    assert re.fullmatch(
        rf"error: process 1 \({host}\) gave no sign of life for 5 s: .*start all processes again.*", error
    )
    assert "Traceback" not in started.said(0)


PLACES = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
STEP = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "gpu[003-004]",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}


def test_the_place_of_a_process(monkeypatch):
    def place(variables):
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            return distributed.find_place()

    assert place({}) is None
    explicit = place(PLACES)
    assert (explicit.address, explicit.count, explicit.index) == ("10.0.0.1:1234", 4, 3)
    assert place(PLACES | STEP) == explicit
    assert place(PLACES | {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}) is None
    slurm = place(STEP)
    assert (slurm.count, slurm.index) == (2, 1) and re.fullmatch(r"gpu003:\d+", slurm.address)
    assert place(STEP | {"JAX_COORDINATOR_PORT": "5000"}).address == "gpu003:5000"
    # A step of one task, and a batch script, which is no step, are single processes.
    assert place(STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}) is None
    assert place({name: value for name, value in STEP.items() if "STEP" not in name}) is None


def test_the_place_of_a_process_on_a_tpu_slice(monkeypatch):
    from jax._src import clusters, hardware_utils

    monkeypatch.setattr(hardware_utils, "num_available_tpu_chips_and_device_id", lambda: (4, None))
    monkeypatch.setattr(clusters.GkeTpuCluster, "is_env_present", classmethod(lambda cls: True))
    monkeypatch.setattr(clusters.GkeTpuCluster, "wait_for_coordinator", classmethod(lambda cls, *args: None))
    for name, value in {"TPU_WORKER_HOSTNAMES": "a,b,c", "TPU_WORKER_ID": "2", "MEGASCALE_NUM_SLICES": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MEGASCALE_SLICE_ID", "0")
    monkeypatch.setenv("MEGASCALE_COORDINATOR_ADDRESS", "a:9000")
    assert distributed.find_place() is None  # the tests run on the CPU
    monkeypatch.setattr(type(distributed.jax.config), "jax_platforms", "tpu,cpu")
    place = distributed.find_place()
    assert place == distributed.Place("a:8482", 3, 2, "the TPU slice's metadata")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"JAX_PROCESS_ID": ""}, "JAX_PROCESS_ID is not set: several processes need all of JAX_COORDINATOR_ADDRESS, "),
        (
            {"JAX_COORDINATOR_ADDRESS": "", "JAX_NUM_PROCESSES": ""},
            "JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES are not set",
        ),
        ({"JAX_COORDINATOR_ADDRESS": "10.0.0.1"}, "JAX_COORDINATOR_ADDRESS must be HOST:PORT, not '10.0.0.1'"),
        ({"JAX_COORDINATOR_ADDRESS": "10.0.0.1:99999"}, "must be HOST:PORT"),
        ({"JAX_NUM_PROCESSES": "many"}, "JAX_NUM_PROCESSES must be a whole number, not 'many'"),
        ({"JAX_PROCESS_ID": "4"}, "process 4 is not one of 4, numbered from 0"),
        ({"JAX_PROCESS_ID": "-1"}, "process -1 is not one of 4"),
        ({"JAX_NUM_PROCESSES": "0", "JAX_PROCESS_ID": "0"}, "process 0 is not one of 0"),
    ],
)
def test_bad_variables_are_one_error(tmp_path, monkeypatch, changes, message):
    for name, value in (PLACES | changes).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=re.escape(message)):
        train_lib.train(make_config(tmp_path / "data", tmp_path / "run"))


@pytest.mark.parametrize("address", ["127.0.0.1", "no-such-host.invalid"])
def test_a_coordinator_out_of_reach(tmp_path, monkeypatch, address):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))  # and nobody listens
        for name, value in (PLACES | {"JAX_COORDINATOR_ADDRESS": f"{address}:{probe.getsockname()[1]}"}).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match=rf"process 3 cannot reach process 0 at {address}:\d+ .*within .* \(2 s"):
            train_lib.train(make_config(tmp_path / "data", tmp_path / "run", run={"connect_timeout": 2}))


# ---- Slow


@pytest.fixture(scope="module")
def straight(prepared, tmp_path_factory):
    """Two processes of two devices that nobody disturbs."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    env = {name: value for name, value in os.environ.items() if not name.startswith("XLA_")}
    run_all(prepared, folder, env)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("count", "devices", "replica"), [(2, 4, 2), (4, 2, 1)])
def test_the_same_losses_as_one_process(prepared, tmp_path, subprocess_env, count, devices, replica):
    groups = {"mesh": {"replica": replica}, "run": {"check_bandwidth": True}}
    several = run_all(prepared, tmp_path / "several", subprocess_env, count, devices, **groups)
    run_all(prepared, tmp_path / "one", subprocess_env, 1, count * devices, **groups)
    assert_close(losses(tmp_path / "several"), losses(tmp_path / "one"))
    assert re.search(r"bandwidth: all-gather over \d+ devices \(fsdp\), GB/s a device: \d", several.said(0))
    assert re.search(r"bandwidth: reduce-scatter over \d+ devices \(fsdp\), GB/s a device: \d", several.said(0))
    assert ("bandwidth: all-reduce" in several.said(0)) == (replica > 1)


@pytest.mark.slow
def test_saved_by_two_processes_and_resumed_by_four_and_by_one(straight, prepared, tmp_path, subprocess_env):
    for count, devices in [(4, 1), (1, 4)]:
        run_dir = tmp_path / f"by-{count}"
        shutil.copytree(straight, run_dir)
        for step in (9, 12):
            shutil.rmtree(run_dir / "checkpoints" / str(step))
        resumed = run_all(prepared, run_dir, subprocess_env, count, devices)
        assert "going on from step 6" in resumed.said(0)
        assert_close(losses(run_dir), losses(straight))


@pytest.mark.slow
@pytest.mark.parametrize("process", [0, 1])
def test_killed_and_started_again_is_equal_to_the_last_bit(straight, prepared, tmp_path, subprocess_env, process):
    config = make_config(prepared, tmp_path / "run")
    started = Processes([config] * 2, subprocess_env, happening=(process, 8, "SIGKILL"))
    statuses = started.wait()
    assert statuses[process] == -signal.SIGKILL and statuses[1 - process] == 1
    assert started.errors(1 - process)[-1].startswith(f"error: process {process} (")
    # The checkpoint of step 6 may have been under way.
    step = checkpoint.find_step(config.run.dir)
    assert step in (3, 6)
    again = run_all(prepared, config.run.dir, subprocess_env)
    assert f"going on from step {step}" in again.said(0)
    assert losses(config.run.dir) == losses(straight)


@pytest.mark.slow
def test_the_others_end_when_the_first_hangs(prepared, tmp_path, subprocess_env):
    config = make_config(prepared, tmp_path / "run")
    started = Processes([config] * 4, subprocess_env, [1] * 4, happening=(0, 4, "SIGSTOP"))
    statuses = started.wait(but={0})
    for other in (1, 2, 3):
        assert statuses[other] == 1
        assert "error: process 0 (" in started.errors(other)[0]
        assert "gave no sign of life for 8 s" in started.errors(other)[0]


@pytest.mark.slow
@pytest.mark.parametrize("process", [0, 1])
def test_the_others_end_when_one_has_a_defect(prepared, tmp_path, subprocess_env, process):
    # The long timeout shows that they are told.
    config = make_config(prepared, tmp_path / "run", run={"heartbeat_timeout": 10_000})
    started = Processes([config] * 2, subprocess_env, happening=(process, 4, "raise"))
    assert started.wait() == [1, 1]
    assert "Traceback" in started.said(process) and "Traceback" not in started.said(1 - process)
    assert started.errors(process) == ["error: ValueError: something broke"]
    (error,) = started.errors(1 - process)
    assert error.startswith(f"error: process {process} (") and error.endswith("failed: ValueError: something broke")


@pytest.mark.slow
@pytest.mark.parametrize(("process", "number"), [(0, signal.SIGTERM), (1, signal.SIGTERM), (1, signal.SIGINT)])
def test_a_signal_to_one_stops_all_at_one_step(prepared, tmp_path, subprocess_env, process, number):
    """Process 0 between evaluations, process 1 when nearly all the time goes into them."""
    groups = {"train": {"steps": 1000, "eval_every": 1000 if process == 0 else 1, "checkpoint_every": 1000}}
    config = make_config(prepared, tmp_path / "run", **groups)
    started = Processes([config] * 2, subprocess_env, happening=(process, 3, number.name))
    assert started.wait() == [128 + number] * 2, started.said(0)
    step = checkpoint.find_step(config.run.dir)
    assert 3 <= step < 1000 and f"stopped by {number.name}: step {step} is saved" in started.said(0)
    trained = [entry for entry in losses(config.run.dir) if entry[1] == "train/loss"]
    assert [entry[0] for entry in trained] == list(range(1, step + 1))


@pytest.mark.slow
def test_processes_must_have_the_same_settings_and_devices(prepared, tmp_path, subprocess_env):
    config = make_config(prepared, tmp_path / "run")
    other = tiny.replace(config, model={"n_layer": 3}, train={"steps": 13})
    started = Processes([config, config, other], subprocess_env, [1, 1, 1])
    assert started.wait() == [2, 2, 2]
    for index in range(3):
        (error,) = started.errors(index)
        assert re.search(r"same settings: model.n_layer is 3 in process 2 .* and 2 in process 0 .*; train.steps", error)
        assert "Traceback" not in started.said(index)
    started = Processes([config] * 2, subprocess_env, [1, 2])
    assert started.wait() == [2, 2]
    for index in range(2):
        assert re.search(
            r"equally many devices, and process 0 \(.*\) has 1, process 1 \(.*\) has 2", started.errors(index)[0]
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_what_process_0_cannot_prepare_ends_all(tmp_path, subprocess_env):
    source = {"source": "pile", "train_files": str(tmp_path / "nothing" / "*.zst")}
    config = make_config(tmp_path / "prepared", tmp_path / "run", data=source)
    started = Processes([config] * 2, subprocess_env, [1, 1])
    assert started.wait() == [2, 2]
    (own,), (told,) = started.errors(0), started.errors(1)
    assert "nothing" in own and told.startswith("error: process 0 (") and told.endswith(own.removeprefix("error: "))


@pytest.mark.slow
def test_a_process_that_never_comes(prepared, tmp_path, subprocess_env):
    config = make_config(prepared, tmp_path / "run", run={"connect_timeout": 5})
    started = Processes([config] * 2, subprocess_env, [1, 1])
    started.started[1].kill()
    assert started.wait()[0] == 2
    assert re.fullmatch(
        r"error: not all 2 processes met at 127.0.0.1:\d+ within run.connect_timeout \(5 s\): .*", started.errors(0)[0]
    )


@pytest.mark.slow
def test_the_launcher_shows_and_ends_what_it_starts(prepared, tmp_path, subprocess_env):
    config = make_config(prepared, tmp_path / "run", train={"steps": 3})
    config_lib.save_config(config, tmp_path / "config.yaml")
    command = [sys.executable, str(ROOT / "launch" / "local" / "run.py"), "--processes", "2", "--devices", "2", "--"]

    def launch(*arguments):
        return subprocess.run(
            [*command, "--config", str(tmp_path / "config.yaml"), *arguments],
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
            env=subprocess_env | {"PYTHONPATH": str(ROOT)},
        )

    done = launch()
    assert done.returncode == 0, done.stdout
    assert "[0] devices: 2 processes on 1 host" in done.stdout and "[0] step 3, 3,072 tokens" in done.stdout
    refused = launch("--train.steps", "5")
    assert refused.returncode == 2
    assert "[0] error: " in refused.stdout and "[1] error: process 0 (" in refused.stdout
    manifest = json.loads((prepared / "manifest.json").read_text())
    assert manifest["splits"]["train"]["rows"] > 0
