"""The command as users run it: in processes of its own, stopped in every way, and resumed."""

import dataclasses
import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import unittest.mock

import jax
import numpy as np
import pytest
import tiny

from biomedlm_jax import checkpoint, files, metrics, model, preparation, program, rows, running
from biomedlm_jax import config as config_lib
from biomedlm_jax import step as step_lib
from biomedlm_jax import train as train_lib
from biomedlm_jax.config import Config
from biomedlm_jax.errors import UserError
from biomedlm_jax.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Rows that all runs of this file read."""
    folder = tmp_path_factory.mktemp("data") / "prepared"
    preparation.ensure_prepared(make_config(folder, "unused"))
    return folder


def make_config(prepared, run_dir, **groups) -> Config:
    config = tiny.run_config(prepared, run_dir, train={"steps": 30, "eval_every": 10, "checkpoint_every": 5})
    return tiny.replace(config, **groups)


# Runs `train` and sends itself a signal when a step has been started; the numbers before it are written.
SIGNALLED = """
import os, sys
from biomedlm_jax import errors, metrics, train

at, number = int(sys.argv[1]), int(sys.argv[2])
advance = metrics.MetricWriter.advance

def advance_and_signal(self, step):
    advance(self, step)
    if step == at:
        os.kill(os.getpid(), number)

metrics.MetricWriter.advance = advance_and_signal
sys.argv = ["train", *sys.argv[3:]]
errors.run_command(train.main)
"""


def run_train(config: Config, env: dict[str, str], devices: int = 1, at: int = 0, number: int = 0):
    """Runs `train` in a process: its exit status, standard output and standard error."""
    path = f"{config.run.dir}-config.yaml"
    os.makedirs(os.path.dirname(path), exist_ok=True)
    config_lib.save_config(config, path)
    result = subprocess.run(
        [sys.executable, "-c", SIGNALLED, str(at), str(number), "--config", path],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=env | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)},
    )
    return result.returncode, result.stdout, result.stderr


def read_metrics(run_dir):
    try:
        return metrics.read_metrics(run_dir)
    except UserError:
        return []


def losses(run_dir):
    return {line["step"]: line["train/loss"] for line in read_metrics(run_dir) if "train/loss" in line}


@pytest.fixture(scope="module")
def straight(prepared, tmp_path_factory):
    """30 steps without a stop, on one device and on eight."""
    folder = tmp_path_factory.mktemp("straight")
    for devices in (1, 8):
        config = make_config(prepared, folder / str(devices), train={"keep_last": 10})
        status, out, err = run_train(config, dict(os.environ), devices)
        assert status == 0, err
        assert "step 30, 30,720 tokens" in out and f"model in {config.run.dir}" in out
    return {devices: str(folder / str(devices)) for devices in (1, 8)}


PARTS = ("imports", "devices", "rows", "weights", "compilation", "evaluation", "first_step")


def test_the_contract_of_the_run_folder(straight, prepared):
    lines = metrics.read_metrics(straight[1])
    trained = [line for line in lines if "train/loss" in line]
    assert [line["step"] for line in trained] == list(range(1, 31))
    for line in trained:
        assert line["tokens"] == line["step"] * 16 * 64
        assert {"train/grad_norm", "train/learning_rate"} <= line.keys()
    assert {"perf/tokens_per_second", "perf/mfu", "perf/step_seconds"} <= trained[-1].keys()
    assert trained[-1]["perf/tokens_per_second"] * trained[-1]["perf/step_seconds"] == pytest.approx(16 * 64)
    assert all(line["perf/input_wait_seconds"] >= 0 for line in trained if "perf/step_seconds" in line)
    startup = {name for name in trained[0] if name.startswith("perf/startup_seconds/")}
    assert startup == {f"perf/startup_seconds/{part}" for part in PARTS}
    assert trained[0]["perf/startup_seconds"] == pytest.approx(sum(trained[0][name] for name in startup))
    assert not any("perf/startup_seconds" in line for line in trained[1:])
    # After the checkpoints, of which the last one is after the last line.
    assert [line["step"] for line in trained if "perf/checkpoint_stall_seconds" in line] == [6, 11, 16, 21, 26]
    evaluated = {line["step"]: line for line in lines if "eval/loss" in line}
    assert set(evaluated) == {0, 10, 20, 30}
    assert evaluated[30]["eval/perplexity"] == pytest.approx(np.exp(evaluated[30]["eval/loss"]))
    assert evaluated[30]["eval/loss"] < evaluated[0]["eval/loss"] - 1
    config = config_lib.load_config(f"{straight[1]}/config.yaml")
    assert config == make_config(prepared, straight[1], train={"keep_last": 10})
    assert (checkpoint.checkpoint_folder(straight[1]) / "30").is_dir()
    assert os.path.exists(f"{straight[1]}/tokenizer/tokenizer.model")


@pytest.mark.parametrize("log_every", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_killed_twice_and_resumed_is_equal_to_the_last_bit(straight, prepared, tmp_path, subprocess_env, log_every):
    config = make_config(prepared, tmp_path / "run", train={"log_every": log_every})
    for step in (8, 18):
        status, _, err = run_train(config, subprocess_env, at=step, number=signal.SIGKILL)
        assert status == -signal.SIGKILL, err
        assert max(losses(config.run.dir)) == (step - 1) // log_every * log_every
    status, _, err = run_train(config, subprocess_env)
    assert status == 0 and "going on from step" in err
    expected = {step: loss for step, loss in losses(straight[1]).items() if step in (1, 30) or step % log_every == 0}
    assert losses(config.run.dir) == expected
    steps = [line["step"] for line in metrics.read_metrics(config.run.dir)]
    assert steps == sorted([0, *expected, 10, 20, 30])


@pytest.mark.parametrize(
    ("number", "step"), [pytest.param(signal.SIGINT, 7, marks=pytest.mark.slow), (signal.SIGTERM, 10)]
)
def test_a_signal_saves_the_step_and_the_command_goes_on(straight, prepared, tmp_path, subprocess_env, number, step):
    """Between checkpoints, and when an evaluation is due, which is then left out."""
    config = make_config(prepared, tmp_path / "run", train={"checkpoint_every": 1000})
    status, _, err = run_train(config, subprocess_env, at=step, number=number)
    assert status == 128 + number, err
    assert checkpoint.find_step(config.run.dir) == step
    assert f"stopped by {number.name}: step {step} is saved in {config.run.dir}; the same command goes on" in err
    assert max(losses(config.run.dir)) == step
    assert not any(line["step"] == step and "eval/loss" in line for line in metrics.read_metrics(config.run.dir))
    status, _, err = run_train(config, subprocess_env)
    assert status == 0 and f"going on from step {step}" in err
    assert losses(config.run.dir) == losses(straight[1])


def test_a_signal_at_the_last_step_comes_too_late(prepared, tmp_path, subprocess_env):
    config = make_config(prepared, tmp_path / "run")
    status, out, err = run_train(config, subprocess_env, at=30, number=signal.SIGTERM)
    assert status == 0 and f"model in {config.run.dir}" in out, err
    assert checkpoint.find_step(config.run.dir) == 30


def test_resumed_on_fewer_devices_reads_the_same_rows(straight, prepared, tmp_path, subprocess_env):
    run_dir = tmp_path / "run"
    shutil.copytree(straight[8], run_dir)
    for step in (20, 25, 30):
        shutil.rmtree(run_dir / "checkpoints" / str(step))
    status, _, err = run_train(make_config(prepared, run_dir), subprocess_env, devices=2)
    assert status == 0 and "going on from step 15" in err and "2 x cpu" in err
    # The rows of a step are drawn anew each epoch, so other rows would show at once.
    resumed, expected = losses(run_dir), losses(straight[8])
    assert resumed.keys() == expected.keys()
    np.testing.assert_allclose(list(resumed.values()), list(expected.values()), rtol=0, atol=1e-5)


def test_a_full_disk_loses_nothing_that_was_saved(prepared, tmp_path, subprocess_env):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], capture_output=True, check=False
    ).returncode:
        pytest.skip("this process may not mount a small disk")
    try:
        status, _, err = run_train(make_config(prepared, disk / "run", train={"keep_last": 100}), subprocess_env)
        assert status == 2 and "Traceback" not in err, err
        # Whichever write came first: a checkpoint's, whose message names the last one that is whole, or another.
        assert "no space left on device" in err.lower() and "make room" in err
        params = checkpoint.load_params(disk / "run")
        assert params["wte"]["embedding"].shape == (600, 64)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_mistakes_are_one_line_and_lose_nothing(straight, prepared, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(straight[1], run_dir)
    before = sorted((path, path.stat().st_mtime_ns) for path in run_dir.rglob("*"))
    for groups, message in [
        (
            {"model": {"n_layer": 3}, "train": {"seed": 9}},
            "holds a run with other settings: model.n_layer was 2, is 3; train.seed was 0",
        ),
        ({"train": {"steps": 60}}, "train.steps was 30, is 60"),
        ({"optimizer": {"learning_rate": 1.0}}, "optimizer.learning_rate was 0.01, is 1.0"),
        ({"mesh": {"replica": 3}}, "3 x 2 is not 8"),
        ({"train": {"global_batch_size": 12}}, "multiple of the 8 devices"),
        ({"data": {"synthetic_documents": 10}}, "data.synthetic_documents 200, and this configuration has 10"),
    ]:
        with pytest.raises(UserError, match=message):
            train_lib.train(make_config(prepared, run_dir, **groups))
    other = tmp_path / "other"
    with pytest.raises(UserError, match="the rows are not those that .* was trained on: rows_sha256 was"):
        train_lib.train(make_config(other, run_dir, data={"dir": str(other), "synthetic_documents": 201}))
    with pytest.raises(UserError, match="run.dir is not set"):
        train_lib.train(make_config(prepared, ""))
    assert sorted((path, path.stat().st_mtime_ns) for path in run_dir.rglob("*")) == before


def test_rows_that_change_under_a_run_end_it_before_it_is_saved(prepared, tmp_path, monkeypatch):
    folder = tmp_path / "prepared"
    shutil.copytree(prepared, folder)
    config = make_config(folder, tmp_path / "run", train={"steps": 6, "checkpoint_every": 2, "eval_every": 0})
    file = next((folder / "rows").glob("*train*array_record*"))
    before, advance = file.read_bytes(), metrics.MetricWriter.advance

    def change(self, step):
        advance(self, step)
        if step == 3:
            file.write_bytes(before)  # the same bytes, but who knows what was read meanwhile

    with monkeypatch.context() as patched:
        patched.setattr(metrics.MetricWriter, "advance", change)
        with pytest.raises(UserError, match=f"{file} was written since this run began to read the rows of {folder}"):
            train_lib.train(config)
    assert checkpoint.find_step(config.run.dir) == 2
    assert train_lib.train(config) == 0
    assert checkpoint.find_step(config.run.dir) == 6


def test_a_tokenizer_of_other_rows_is_refused(prepared, tmp_path):
    folder = tmp_path / "prepared"
    shutil.copytree(prepared, folder)
    train_tokenizer(["other words than those of the rows " * 50], 600, folder / "tokenizer")
    sha256 = rows.read_manifest(folder)["tokenizer_sha256"]
    with pytest.raises(
        UserError, match=f"{folder / 'tokenizer'} .*is not the one that the rows of {folder} .*{sha256}"
    ):
        train_lib.train(make_config(folder, tmp_path / "run"))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_run_has_one_process(prepared, tmp_path):
    config = make_config(prepared, tmp_path / "run")
    (tmp_path / "run").mkdir()
    with (
        files.lock(tmp_path / "run" / ".lock", lambda: None),
        pytest.raises(UserError, match=f"{config.run.dir} is in use by another process"),
    ):
        train_lib.train(config)
    assert os.listdir(tmp_path / "run") == [".lock"]


def test_numbers_of_a_step_are_read_before_its_evaluation(prepared, tmp_path, monkeypatch):
    """Otherwise the evaluation would count in the step's throughput."""
    config = make_config(prepared, tmp_path / "run", train={"steps": 4, "eval_every": 2})
    held_out_loss, seen = step_lib.held_out_loss, []

    def spy(*args, **kwargs):
        seen.append(max(losses(config.run.dir), default=0))
        return held_out_loss(*args, **kwargs)

    monkeypatch.setattr(step_lib, "held_out_loss", spy)
    assert train_lib.train(config) == 0
    assert seen == [0, 2, 4]


class Watched:
    """A number of a step on the device, which notes when it is fetched."""

    def __init__(self, value, note):
        self.value, self.note = value, note

    def is_ready(self):
        return self.value.is_ready()

    def block_until_ready(self):
        return self.value.block_until_ready()

    def __float__(self):
        self.note()
        return float(self.value)

    def __int__(self):
        self.note()
        return int(self.value)


def test_the_loop_fetches_nothing_of_a_step_before_the_next_one_is_under_way(prepared, tmp_path, monkeypatch):
    config = make_config(prepared, tmp_path / "run", train={"steps": 6, "eval_every": 4, "checkpoint_every": 6})
    call, events = program.Program.__call__, []

    def spy(self, state, batch):
        if events:
            state = dataclasses.replace(state, step=state.step.value)
        state, values = call(self, state, batch)
        step = sum(what == "started" for what, _ in events) + 1
        events.append(("started", step))

        def note():
            if events[-1] != ("fetched", step):
                events.append(("fetched", step))

        watched = {name: Watched(value, note) for name, value in values.items()}
        return dataclasses.replace(state, step=Watched(state.step, note)), watched

    monkeypatch.setattr(program.Program, "__call__", spy)
    assert train_lib.train(config) == 0
    # The evaluation after step 4 and the end wait for theirs.
    order = "started 1, started 2, fetched 1, started 3, fetched 2, started 4, fetched 3, fetched 4, "
    order += "started 5, started 6, fetched 5, fetched 6"
    assert ", ".join(f"{what} {step}" for what, step in events) == order


def test_a_second_run_takes_its_step_from_the_cache(prepared, tmp_path, subprocess_env):
    env = subprocess_env | {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    for name in ("first", "second"):
        config = make_config(
            prepared, tmp_path / name, train={"steps": 2, "eval_every": 0}, optimizer={"warmup_steps": 1}
        )
        status, _, err = run_train(config, env)
        assert status == 0, err
        (line,) = re.findall("first step after .*", err)
        assert ("(from the cache)" in line) == (name == "second")


@pytest.mark.parametrize(("profiled", "steps"), [(2, [3, 4]), (9, [3, 4, 5])])
def test_a_profile_has_the_steps_asked_for(prepared, tmp_path, caplog, profiled, steps):
    """As many as there are: the run ends after five."""
    config = make_config(prepared, tmp_path / "run", train={"steps": 5, "eval_every": 0, "profile_steps": profiled})
    with caplog.at_level("INFO", logger="biomedlm_jax"):
        assert train_lib.train(config) == 0
    assert f"profile from step 3 on: xprof --logdir {tmp_path}/run/profile shows it" in caplog.text
    (folder,) = (tmp_path / "run" / "profile" / "plugins" / "profile").iterdir()
    assert [path.stat().st_size > 0 for path in folder.glob("*.xplane.pb")] == [True]
    with gzip.open(folder / "perfetto_trace.json.gz") as file:
        events = json.load(file)["traceEvents"]
    assert sorted(int(event["args"]["step_num"]) for event in events if event.get("name") == "train") == steps
    # What the device did, too, and not only what this process asked of it.
    assert any("dot" in event.get("name", "") for event in events)
    assert set(losses(config.run.dir)) == {1, 2, 3, 4, 5}


def test_a_profile_begins_behind_all_steps_before_it(prepared, tmp_path, monkeypatch):
    """Of which one may still be computed."""
    events = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda *args, **kwargs: events.append("profile"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: events.append("end"))
    check = running.Record.check
    monkeypatch.setattr(
        running.Record, "check", lambda self: events.extend(["check"] * bool(self._pending)) or check(self)
    )
    config = make_config(prepared, tmp_path / "run", train={"steps": 5, "eval_every": 0, "profile_steps": 2})
    assert train_lib.train(config) == 0
    assert events[:5] == ["check", "check", "profile", "check", "check"] and events[5] == "end"


def test_a_profile_that_cannot_be_written_ends_no_run(prepared, tmp_path, monkeypatch, caplog):
    config = make_config(prepared, tmp_path / "run", train={"steps": 4, "eval_every": 0, "profile_steps": 2})
    stop = jax.profiler.stop_trace

    def full():
        stop()
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no space left on device")

    monkeypatch.setattr(jax.profiler, "stop_trace", full)
    assert train_lib.train(config) == 0
    assert "the profile cannot be written" in caplog.text and "no space left" in caplog.text
    # Where there is no place for it, that is said at once.
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "profile").write_text("")
    with pytest.raises(UserError, match="train.profile_steps cannot write to .*/other/profile: File exists"):
        train_lib.train(tiny.replace(config, run={"dir": str(tmp_path / "other")}))


def test_a_run_too_short_for_a_profile_says_so(prepared, tmp_path, caplog):
    config = make_config(
        prepared,
        tmp_path / "run",
        train={"steps": 2, "eval_every": 0, "profile_steps": 2},
        optimizer={"warmup_steps": 1},
    )
    assert train_lib.train(config) == 0
    assert "train.profile_steps has recorded nothing: it begins with step 3" in caplog.text


def test_a_finished_run_says_so(straight, prepared, caplog):
    before = metrics.read_metrics(straight[8])
    with caplog.at_level("INFO", logger="biomedlm_jax"):
        assert train_lib.train(make_config(prepared, straight[8], train={"keep_last": 10})) == 0
    assert "has all its 30 steps already" in caplog.text
    assert metrics.read_metrics(straight[8]) == before


def test_a_loss_that_is_not_finite_ends_the_run_before_it_is_saved(prepared, tmp_path):
    config = make_config(prepared, tmp_path / "run", optimizer={"learning_rate": 1e30}, train={"checkpoint_every": 1})
    with pytest.raises(UserError, match=r"at step \d+ the loss is nan.*the last checkpoint is step \d+.*learning_rate"):
        train_lib.train(config)
    assert all(np.isfinite(x).all() for x in _leaves(checkpoint.load_params(config.run.dir)))


def test_starts_from_the_weights_of_another_run(straight, prepared, tmp_path, caplog):
    config = make_config(
        prepared,
        tmp_path / "run",
        run={"init_from": straight[1]},
        optimizer={"warmup_steps": 1},
        train={"steps": 3, "eval_every": 1, "checkpoint_every": 1},
    )
    with caplog.at_level("INFO", logger="biomedlm_jax"):
        assert train_lib.train(config) == 0
        assert f"weights: of {straight[1]}, at step 0" in caplog.text
        start = next(line for line in metrics.read_metrics(config.run.dir) if line["step"] == 0)
        end = [line for line in metrics.read_metrics(straight[1]) if "eval/loss" in line][-1]
        assert start["eval/loss"] == pytest.approx(end["eval/loss"], abs=1e-5)
        # A checkpoint in run.dir wins.
        shutil.rmtree(tmp_path / "run" / "checkpoints" / "3")
        caplog.clear()
        assert train_lib.train(config) == 0
        assert f"going on from step 2 of {config.run.dir}; run.init_from is not used" in caplog.text


def test_weights_of_another_architecture_are_refused(straight, prepared, tmp_path):
    config = make_config(prepared, tmp_path / "run", run={"init_from": straight[1]}, model={"n_layer": 1})
    with pytest.raises(UserError, match=f"run.init_from {straight[1]}: model.n_layer is 2 there and 1 here"):
        train_lib.train(config)


def test_numbers_resume_where_the_checkpoint_is(tmp_path):
    config = tiny.replace(run={"dir": str(tmp_path), "tensorboard": True})
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        "".join(json.dumps({"step": step, "train/loss": 1.0}) + "\n" for step in range(1, 8)) + '{"step": 8, "tr'
    )
    writer = metrics.MetricWriter(config, start_step=5)
    writer.write(6, {"train/loss": 2.0, "perf/mfu": None})
    writer.close()
    assert [(line["step"], line["train/loss"]) for line in metrics.read_metrics(tmp_path)] == [
        (1, 1.0),
        (2, 1.0),
        (3, 1.0),
        (4, 1.0),
        (5, 1.0),
        (6, 2.0),
    ]
    assert list((tmp_path / "tensorboard").iterdir())


def test_weights_and_biases_gets_the_numbers(tmp_path, monkeypatch):
    config = tiny.replace(run={"dir": str(tmp_path), "wandb_project": "biomedlm", "tensorboard": False})
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="run.wandb_project needs Weights & Biases: pip install wandb"):
        metrics.MetricWriter(config, start_step=0)
    wandb = unittest.mock.MagicMock()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    writer = metrics.MetricWriter(config, start_step=0)
    writer.write(3, {"train/loss": 2.0, "perf/mfu": None})
    writer.close()
    again = metrics.MetricWriter(config, start_step=3)
    again.close()
    first, second = (call.kwargs for call in wandb.init.call_args_list)
    assert first["project"] == "biomedlm" and first["name"] == tmp_path.name
    assert first["resume"] == "allow" and first["id"] == second["id"]
    wandb.init().log.assert_called_once_with({"train/loss": 2.0}, step=3)
    assert wandb.init().finish.call_count == 2


@pytest.mark.parametrize(
    ("kind", "flops"),
    [
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA H200", 989e12),
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("cpu", None),
    ],
)
def test_peaks_are_those_of_the_data_sheets(kind, flops):
    assert metrics.peak_flops(kind) == flops


def test_mfu_of_the_card():
    """4,340 tokens/s on an A100 are 23.1 % of its peak."""
    assert 4340 * model.flops_per_token(Config().model) / metrics.peak_flops("NVIDIA A100") == pytest.approx(
        0.231, abs=5e-4
    )


def _leaves(tree):
    import jax

    return jax.tree.leaves(tree)
