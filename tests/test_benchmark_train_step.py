"""That the contestants of benchmarks/train_step.py do the same, and that its report says what was measured."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from biomedlm_jax.errors import UserError

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "train_step.py"
sys.path.insert(0, str(BENCHMARK.parent))
train_step = importlib.import_module("train_step")


def timed(contestant: str, micro_batch: int, *group_seconds: float) -> dict:
    return {
        "contestant": contestant,
        "micro_batch": micro_batch,
        "status": "ok",
        "seconds": sorted(group_seconds)[1],
        "group_seconds": group_seconds,
        "compile_s": 1.0,
        "peak_bytes": None,
        "losses": [3.0, 2.0, 1.0],
    }


def made_up_report(*rows: dict) -> dict:
    """Of a device of 1e6 operations a second, whose product of matrices reached half; 100 operations a token."""
    report = {
        "device": "Device",
        "protocol": {"flops_per_token": 100},
        "peak_flops": 1e6,
        "matmul": [{"tflops": 4e-7}, {"reason": "died"}, {"tflops": 5e-7}],
        "rows": list(rows),
    }
    train_step.derive(report, n_positions=1000)
    return report


FAILED = {"contestant": "torch", "micro_batch": 8, "status": "failed", "reason": "no memory"}
SKIPPED = {"contestant": "ours", "micro_batch": 8, "status": "skipped", "reason": "no time"}
# The first run of ours is the fastest of all; FP8 is faster still, and no part of the comparison.
ROWS = (
    timed("ours", 4, 0.99, 1.0, 1.03),
    timed("torch", 4, 1.25, 1.25, 1.25),
    timed("huggingface", 2, 1.0, 1.0, 1.0),
    timed("ours-fp8", 4, 0.5, 0.5, 0.9),
    FAILED,
    SKIPPED,
    timed("ours", 4, 1.0526, 1 / 0.95, 1.0527),
)


def test_what_follows_from_the_seconds_of_a_step():
    report = made_up_report(*ROWS)
    ours, torch, huggingface, fp8, failed, skipped, again = report["rows"]
    rates = [row["tokens_per_second"] for row in (ours, torch, huggingface, fp8, again)]
    np.testing.assert_allclose(rates, [4000, 3200, 2000, 8000, 3800])
    np.testing.assert_allclose([ours["mfu"], torch["mfu"]], [0.4, 0.32])
    np.testing.assert_allclose([ours["ratio_to_matmul"], torch["ratio_to_matmul"]], [0.8, 0.64])
    np.testing.assert_allclose([ours["spread"], torch["spread"], fp8["spread"]], [0.02, 0, 0.4])
    assert (ours["loss_first"], ours["loss_last"]) == (3.0, 1.0)
    assert (failed, skipped) == (FAILED, SKIPPED)
    np.testing.assert_allclose(report["drift"], 0.05)
    np.testing.assert_allclose(report["ratio_to_pytorch"], 3900 / 3200)  # the mean of the two runs of ours


def test_the_table_shows_spread_drift_failures_and_the_ratio():
    lines = train_step.table(made_up_report(*ROWS)).splitlines()
    assert len(lines) == 1 + len(ROWS) + 2
    assert "1000.0 ms (+- 2.0%)     4,000 tokens/s  40.0% MFU  80.0% of the product" in lines[1]
    assert lines[5].endswith("failed: no memory")
    assert lines[6].endswith("skipped: no time")
    assert lines[-2] == "drift between the first and the last run of a case: at most 5.0%"
    assert lines[-1] == "the best of ours is 1.22x the best of PyTorch"


@pytest.mark.parametrize(
    "rows",
    [
        (timed("ours", 4, 1, 1, 1), timed("torch", 4, 1, 1, 1), timed("ours", 4, 1.2, 1.2, 1.2)),
        (timed("ours", 4, 1, 1, 1), timed("torch", 4, 1, 1, 1.3)),
    ],
    ids=["drift", "spread"],
)
def test_a_ratio_from_a_busy_machine_is_not_to_be_trusted(rows):
    ratio, warning = train_step.table(made_up_report(*rows)).splitlines()[-2:]
    assert ratio.startswith("the best of ours is ")
    assert "busy" in warning
    assert "do not trust the ratio" in warning


def test_without_two_sides_or_two_runs_there_is_no_ratio_and_no_drift():
    report = made_up_report(timed("ours-fp8", 4, 1, 1, 1), timed("torch", 4, 1, 1, 1), SKIPPED)
    assert report["ratio_to_pytorch"] is None
    assert report["drift"] is None
    assert len(train_step.table(report).splitlines()) == 4


def test_the_chart_has_a_bar_for_each_row_that_is_ok(tmp_path, monkeypatch):
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kwargs: (figures.append(self), save(self, *args)))
    train_step.draw(made_up_report(*ROWS), tmp_path / "chart.png")
    assert (tmp_path / "chart.png").stat().st_size
    [axes] = figures[0].axes
    np.testing.assert_allclose([bar.get_width() for bar in axes.patches], [4000, 3200, 2000, 8000, 3800])
    assert [round(bar.get_y() + bar.get_height() / 2, 6) for bar in axes.patches] == [0, 1, 2, 3, 4]
    assert [label.get_text() for label in axes.get_yticklabels()][::4] == ["ours, 4 sequences"] * 2


def test_groups_are_taken_one_after_the_other():
    taken = []

    def take(count: int) -> float:
        taken.append(count)
        return [5.0, 10.0, 30.0][len(taken) - 1]

    assert train_step.time_groups(take, 15) == {"seconds": 2.0, "group_seconds": [1.0, 2.0, 6.0]}
    assert taken == [5, 5, 5]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--warm-up 0", "--warm-up must be at least 1, not 0"),
        ("--steps 0", "--steps must be a multiple of 3, not 0"),
        ("--steps -3", "--steps must be a multiple of 3, not -3"),
        ("--steps 16", "--steps must be a multiple of 3, not 16"),
        ("--cases ours:0", "a case is contestant:micro-batch, not ours:0"),
        ("--cases theirs:4", "a case is contestant:micro-batch, not theirs:4"),
        ("--loss-chunk 100", "train.loss_chunk must divide model.n_positions: 256 / 100"),
        ("--loss-chunk -1", "train.loss_chunk must not be negative"),
        ("--out {file}", "{file} is no folder that can be written to"),
        ("--out {file}/in", "{file} is no folder that can be written to"),
    ],
)
def test_mistakes_are_refused_before_anything_runs(arguments, says, tmp_path, monkeypatch, capsys):
    file = tmp_path / "file"
    file.touch()
    arguments = arguments.format(file=file).split()
    monkeypatch.setattr(sys, "argv", ["train_step.py", "--small", "--out", str(tmp_path), *arguments])
    monkeypatch.setattr(train_step, "run", lambda *_: pytest.fail("it ran"))
    with pytest.raises((SystemExit, UserError)) as refused:
        train_step.main()
    printed = capsys.readouterr().err
    assert says.format(file=file) in (printed if refused.type is SystemExit else str(refused.value))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_mistake_is_one_line_on_standard_error(tmp_path):
    command = [sys.executable, BENCHMARK, "--small", "--out", tmp_path, "--loss-chunk", "100"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: train.loss_chunk must divide")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("last", "status"),
    [(SKIPPED, 0), (FAILED, 1), ({**FAILED, "status": "timed out"}, 1)],
    ids=["skipped", "failed", "timed out"],
)
def test_the_exit_status_is_1_if_a_case_failed(last, status, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_step.py", "--small", "--out", str(tmp_path)])
    monkeypatch.setattr(train_step, "run", lambda *_: made_up_report(timed("ours", 4, 1, 1, 1), last))
    assert train_step.main() == status
    assert (tmp_path / "train_step_device.png").exists()


@pytest.mark.parametrize(("limit_s", "status"), [(50, "timed out"), (180, "skipped")])
def test_a_case_that_the_budget_cuts_short_is_skipped_not_failed(limit_s, status, tmp_path, monkeypatch):
    def in_new_process(function, *_, limit_s):
        if function is not train_step.timing.device_kind:
            raise train_step.TimedOut(f"killed after {limit_s:.0f} s")
        return iter(["Device"])

    monkeypatch.setattr(train_step.attention, "_in_new_process", in_new_process)
    monkeypatch.setattr(train_step.timing, "query_gpu", lambda *_: {})
    settings = train_step.Settings(6, 15, "none", 0, 0, "", small=True, fp8=False)
    [row] = train_step.run([("ours", 4)], settings, tmp_path, budget_s=100, limit_s=limit_s)["rows"]
    assert row["status"] == status
    assert row["reason"].startswith("killed after ")


@pytest.mark.slow
def test_all_contestants_have_the_same_losses(tmp_path):
    """What it prints is to be read: how fast each was is not for a test to judge."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    # Without what makes JAX compile in haste for tests.
    env = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    command = [sys.executable, BENCHMARK, "--small", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    [file] = tmp_path.glob("*.json")
    report = json.loads(file.read_text())
    rows = report["rows"]
    assert [row["contestant"] for row in rows] == ["ours", "torch", "torch-eager", "huggingface", "ours"]
    assert {row["status"] for row in rows} == {"ok"}
    losses = np.array([row["losses"] for row in rows])
    assert losses.shape == (5, 21)
    np.testing.assert_array_equal(losses[0], losses[-1])
    apart = np.ptp(losses, axis=0)
    print(f"losses are apart by {apart[0]:.1e} at step 0, and by at most {apart.max():.1e} in 20 steps")
    assert apart[0] < 1e-4
    assert apart.max() < 1e-3
    assert (losses[:, -1] < losses[:, 0] - 0.3).all()
    assert all(len(row["group_seconds"]) == 3 for row in rows)
    assert report["drift"] is not None
    assert report["ratio_to_pytorch"]
    assert file.with_suffix(".png").exists()
