"""That the contestants of benchmarks/train_step.py do the same: equal losses, step for step."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "train_step.py"


@pytest.mark.slow
def test_all_contestants_have_the_same_losses(tmp_path):
    """What it prints is to be read: how fast each was is not for a test to judge."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    done = subprocess.run([sys.executable, BENCHMARK, "--small", "--out", tmp_path], capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    [file] = tmp_path.glob("*.json")
    rows = {row["contestant"]: row for row in json.loads(file.read_text())["rows"]}
    assert rows.keys() == {"ours", "torch", "torch-eager", "huggingface"}
    assert {row["status"] for row in rows.values()} == {"ok"}
    losses = np.array([row["losses"] for row in rows.values()])
    assert losses.shape == (4, 21)
    apart = np.ptp(losses, axis=0)
    print(f"losses are apart by {apart[0]:.1e} at step 0, and by at most {apart.max():.1e} in 20 steps")
    assert apart[0] < 1e-4
    assert apart.max() < 1e-3
    assert (losses[:, -1] < losses[:, 0] - 0.3).all()
    assert file.with_suffix(".png").exists()
