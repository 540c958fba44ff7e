"""That the attention benchmarks measure what they say, on tiny shapes: their gate, their processes, their reports."""

import dataclasses
import importlib
import itertools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from biomedlm_jax.kernels import block_sizes, reference
from biomedlm_jax.kernels.flash_attention import BACKENDS

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
timing = importlib.import_module("timing")
attention = importlib.import_module("attention")
tune_attention = importlib.import_module("tune_attention")

SHAPE = timing.Shape(2, 24, 1, 64)


# Run in processes of their own.


def count(n: int) -> Iterator[int]:
    yield from range(n)


def process_id() -> Iterator[int]:
    yield os.getpid()


def yield_and_hang() -> Iterator[int]:
    yield 1
    time.sleep(600)


def crash() -> Iterator[int]:
    os._exit(9)
    yield 0


def fail() -> Iterator[int]:
    raise ValueError("too much\nshared memory")
    yield 0


@pytest.fixture(scope="module")
def worker() -> Iterator["timing.Worker"]:
    worker = timing.Worker()
    yield worker
    worker.close()


def test_one_process_runs_one_work_after_the_other(worker):
    assert list(worker.run(count, 3, limit_s=60)) == [0, 1, 2]
    assert worker.call(process_id, limit_s=60) == worker.call(process_id, limit_s=60) != os.getpid()


def test_a_hang_is_killed_and_costs_its_limit_only(worker):
    before = worker.call(process_id, limit_s=60)
    begin, values = time.monotonic(), []
    with pytest.raises(timing.TimedOut, match="killed after 2 s"):
        for value in worker.run(yield_and_hang, limit_s=2):
            values.append(value)
    assert values == [1]
    assert time.monotonic() - begin < 30
    with pytest.raises(ProcessLookupError):
        os.kill(before, 0)
    assert worker.call(process_id, limit_s=60) != before


def test_crashes_and_errors_are_told_apart(worker):
    with pytest.raises(timing.Died, match="crashed with exit status 9"):
        worker.call(crash, limit_s=60)
    before = worker.call(process_id, limit_s=60)
    with pytest.raises(RuntimeError, match="ValueError: too much shared memory"):
        worker.call(fail, limit_s=60)
    assert worker.call(process_id, limit_s=60) == before


def test_operations_are_those_of_the_causal_half():
    forward = 2 * (2 * 32 * 20 * 1024 * 1024 * 128) / 2  # two products, each a multiplication and an addition
    assert timing.Shape(32, 1024, 20, 128).operations("forward") == forward
    assert timing.Shape(32, 1024, 20, 128).operations("backward") == 2.5 * forward
    assert timing.Shape(32, 1024, 20, 128).operations("packed") == 3.5 * forward


def test_calls_of_a_chain_depend_on_each_other():
    fixed = [np.full((3, 4), 0.1 * i, np.float32) for i in range(3)]
    moving = [np.arange(12, dtype=np.float32).reshape(3, 4) / (20 + i) for i in range(3)]
    loop = timing.Loop(rounds=2, repeats=1)
    chain = timing.Chain(lambda f, m: (m + f, 2 * m), list(map(jnp.array, fixed)), list(map(jnp.array, moving)), loop)
    times = chain.time()  # the program twice: a warm-up, and the one that is timed
    outputs = [(), (), ()]
    for i in [*range(3)] * 4:
        outputs[i] = moving[i] + fixed[i], 2 * moving[i]
        moving[(i + 1) % 3][0] = np.tanh(outputs[i][0][0] + outputs[i][1][0])
    for got, expected in zip(jax.tree.leaves(chain.outputs), jax.tree.leaves(outputs), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert times["calls"] == 6
    assert 0 < times["ms_min"] <= times["ms"] <= times["ms_max"]


def plain(scale, qkv):
    return reference.attention(qkv, scale)


def test_the_gate_lets_a_right_contestant_pass():
    gate = attention.check_jax("ours", attention.Contestant(plain, packed=True), SHAPE, None)
    assert gate["status"] == "ok"
    assert list(gate["errors"]) == ["1/sqrt(head_dim)", "1/sqrt(128)/32"]
    for errors in gate["errors"].values():
        assert set(errors) == {"out", "dq", "dk", "dv"}
        assert all(0 < error < 1e-2 for error in errors.values())


noise = itertools.count(1)


@pytest.mark.parametrize(
    ("attend", "reason"),
    [
        (lambda scale, qkv: plain(scale, qkv) * jnp.bfloat16(1.03), "relative error of out at scale 1/sqrt(head_dim)"),
        (lambda scale, qkv: plain(0.125, qkv), r"relative error of dq at scale 1/sqrt(128)/32"),
        (lambda scale, qkv: plain(scale, qkv).at[1, 3, 0, 5].set(jnp.nan), "relative error of out"),
        (
            lambda scale, qkv: (
                plain(scale, qkv)
                .at[0, 0, 0, 0]
                .add(jax.pure_callback(lambda: np.float32(1e-2 * next(noise)), jnp.float32(0)).astype(qkv.dtype))
            ),
            "10 equal calls gave different bits",
        ),
    ],
    ids=["wrong", "deaf to the scale", "nan", "racing"],
)
def test_the_gate_stops_a_contestant_that_is(attend, reason):
    gate = attention.check_jax("ours", attention.Contestant(attend, packed=True), SHAPE, None)
    assert gate["status"] == "failed"
    assert reason in gate["reason"]


def test_what_fails_the_gate_is_not_timed(monkeypatch):
    wrong = attention.Contestant(lambda scale, qkv: plain(0.125, qkv), packed=True)
    monkeypatch.setattr(attention, "jax_contestant", lambda name, interpret: wrong)
    [row] = attention.run_jax("ours", [SHAPE], attention.SMALL, {})
    assert (row["pass"], row["status"]) == ("gate", "failed")


def test_pytorch_is_checked_and_timed_alike(monkeypatch):
    pytest.importorskip("torch")
    rows = list(attention.run_torch("torch-math", [SHAPE], attention.SMALL, {}))
    assert [row["pass"] for row in rows] == ["gate", *attention.PASSES]
    assert all(0 < error < 1e-2 for errors in rows[0]["errors"].values() for error in errors.values())
    assert all(row["status"] == "ok" and row["ms"] > 0 for row in rows[1:])

    right = attention._torch_attend
    # The float32 reference goes the same way: leave it right.
    monkeypatch.setattr(
        attention,
        "_torch_attend",
        lambda name, scale, q, k, v: right(name, scale, q, k, v * (1.1 if q.itemsize == 2 else 1)),
    )
    [row] = attention.run_torch("torch-math", [SHAPE], attention.SMALL, {})
    assert (row["pass"], row["status"]) == ("gate", "failed")


def test_errors_are_also_bounded_by_those_of_cudnn():
    errors = {"1": {"out": 3e-3}}
    assert attention.failures(errors, None, True) == []
    assert attention.failures(errors, {"1": {"out": 2.1e-3}}, True) == []
    [failure] = attention.failures(errors, {"1": {"out": 1.9e-3}}, True)
    assert "1.5 x cuDNN's 1.90e-03" in failure
    assert attention.failures({"1": {"out": math.nan}}, None, None) != []


def test_ratios_are_to_the_first_run_of_cudnn():
    shape = SHAPE._asdict()

    def row(contestant, ms, run):
        return {"contestant": contestant, "run": run, "shape": shape, "pass": "forward", "ms": ms, "tflops": 1 / ms}

    rows = [row("cudnn", 2.0, 1), row("ours", 1.6, 1), row("cudnn", 2.5, 2)]
    report = {"rows": rows, "matmul": {"tflops": 2.0}}
    attention.compare(report)
    assert [r["ratio_to_cudnn"] for r in rows] == [1.0, 1.25, 0.8]
    assert [r["ratio_to_matmul"] for r in rows] == [0.25, 0.3125, 0.2]
    assert report["drift"] == pytest.approx(0.2)


def test_the_command_times_what_passes_and_records_what_fails(tmp_path, subprocess_env):
    command = [sys.executable, BENCHMARKS / "attention.py", "--small", "--contestants", "xla,cudnn"]
    command += ["--shapes", str(SHAPE), "--out", tmp_path]
    result = subprocess.run(command, env={**subprocess_env, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "attention_cpu.json").read_text())
    assert report["device"] == "cpu"
    assert report["command"].endswith(str(tmp_path))
    assert report["versions"]["jax"] == jax.__version__
    assert report["matmul"]["tflops"] > 0
    ran = [(c["name"], c["run"], c["status"]) for c in report["contestants"]]
    assert ran == [("xla", 1, "finished"), ("cudnn", 1, "finished"), ("xla", 2, "finished")]

    def rows(contestant, run):
        return {row["pass"]: row for row in report["rows"] if (row["contestant"], row["run"]) == (contestant, run)}

    for run in (1, 2):
        assert list(rows("xla", run)) == ["gate", "forward", "backward", "packed"]
        for name in attention.PASSES:
            row = rows("xla", run)[name]
            assert row["shape"] == SHAPE._asdict()
            assert row["tflops"] == pytest.approx(SHAPE.operations(name) / (1e-3 * row["ms"]) / 1e12)
            assert row["ratio_to_cudnn"] is None
    assert list(rows("cudnn", 1)) == ["gate"]
    assert rows("cudnn", 1)["gate"]["status"] == "failed"
    assert "cudnn gate" not in result.stdout
    assert "xla (2)" in result.stdout
    assert (tmp_path / "attention_cpu.png").stat().st_size > 1000


def crash_or_pass(name: str, shapes: list, settings: tuple, baselines: dict) -> Iterator[dict]:
    yield {"shape": SHAPE._asdict(), "pass": "gate", "status": "ok", "errors": sorted(map(str, baselines))}
    if name == "ours":
        os._exit(9)


def test_the_rest_goes_on_after_a_crash_and_knows_the_errors_of_cudnn(monkeypatch, tmp_path):
    monkeypatch.setattr(attention, "run_jax", crash_or_pass)
    arguments = (attention.SMALL, tmp_path, 300, 100)
    report = attention.run(("cudnn", "ours", "xla"), (SHAPE,), *arguments)
    done = ("finished", None)
    outcomes = [(entry["status"], entry.get("reason")) for entry in report["contestants"]]
    assert outcomes == [done, ("failed", "crashed with exit status 9"), done, done]
    assert [row["errors"] for row in report["rows"]] == [[], *[[str(SHAPE)]] * 3]  # cuDNN itself has none to keep to
    assert "ours: failed: crashed" in attention.table(report)


def test_nothing_begins_when_the_budget_is_spent(tmp_path):
    report = attention.run(("xla",), (SHAPE,), attention.SMALL, tmp_path, budget_s=0, limit_s=60)
    assert [entry["status"] for entry in report["contestants"]] == ["skipped", "skipped"]
    assert report["rows"] == []
    assert json.loads((tmp_path / "attention_cpu.json").read_text())["contestants"] == report["contestants"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_block_size_is_tuned_with_its_kernel(backend):
    module = importlib.import_module(f"biomedlm_jax.kernels.{backend}")
    default = module.default_blocks((32, 1024, 60, 128), "bfloat16")
    groups = tune_attention.groups(backend, default)
    assert {tune_attention.pass_of(kernel) for kernel in groups} == {"forward", "backward"}
    tuned = [name for candidates in groups.values() for name in candidates[0]]
    assert sorted(tuned) == sorted(field.name for field in dataclasses.fields(default))
    for candidates in groups.values():
        assert dataclasses.replace(default, **candidates[0]) == default
        assert len({tuple(candidate.values()) for candidate in candidates}) == len(candidates)
        for name in candidates[0]:
            assert len({candidate[name] for candidate in candidates}) > 1, name


def yields(row: dict) -> Iterator[dict]:
    yield row


def test_a_candidate_that_hangs_or_crashes_is_passed_over(worker):
    end = time.monotonic() + 60
    fast = {"status": "ok", "ms": 1.0}
    assert tune_attention.attempt(worker, 60, end, yields, fast) == fast
    assert tune_attention.attempt(worker, 1, end, yield_and_hang)["status"] == "timed out"
    assert tune_attention.attempt(worker, 60, end, crash)["status"] == "died"
    failed = tune_attention.attempt(worker, 60, end, fail)
    assert (failed["status"], failed["reason"]) == ("failed", "ValueError: too much shared memory")
    assert tune_attention.attempt(worker, 60, time.monotonic(), yields, fast)["status"] == "skipped"
    assert tune_attention.attempt(worker, 60, end, yields, fast) == fast


def test_the_default_stays_unless_another_is_faster_by_more_than_noise():
    def rows(*times):
        return [
            {"blocks": i, **({"status": "ok", "ms": ms} if ms else {"status": "died"})} for i, ms in enumerate(times)
        ]

    assert tune_attention.winner(rows(1.0, 0.995, 2.0)) == 0
    assert tune_attention.winner(rows(1.0, 0.9, 0.8)) == 2
    assert tune_attention.winner(rows(None, 1.0)) == 1
    assert tune_attention.winner(rows(None, None)) is None


def pretend(backend, shape, kernel, base, candidate, loop, interpret) -> Iterator[dict]:
    if candidate == {"dq_q": 128, "dq_k": 64, "dq_warps": 8, "dq_stages": 3}:
        os._exit(9)
    # Small blocks are fast, once the forward pass is tuned.
    early = kernel != "forward" and base.forward_k != 32
    yield {"status": "ok", "ms": float(sum(candidate.values())) + 1000 * early, "errors": {}}


def test_winners_are_stored_for_the_kernel_to_find(worker, monkeypatch, tmp_path):
    monkeypatch.setattr(tune_attention, "measure", pretend)
    monkeypatch.setattr(block_sizes, "FILE", block_sizes.FILE)  # restores it
    package_table = block_sizes.FILE.read_text()
    shape, end = timing.Shape(2, 1024, 4, 64), time.monotonic() + 300
    try:
        tune_attention.tune(worker, ["triton"], None, (shape,), timing.SMALL_LOOP, False, tmp_path, 60, end)
        found = block_sizes.lookup("triton", "cpu", (2, 1024, 12, 64), "bfloat16")
    finally:
        block_sizes._table.cache_clear()
    default = importlib.import_module("biomedlm_jax.kernels.triton").default_blocks((2, 1024, 12, 64), "bfloat16")
    assert found != default
    for candidates in tune_attention.groups("triton", default).values():
        best = min(candidates, key=lambda candidate: sum(candidate.values()))
        assert {name: getattr(found, name) for name in best} == best
    report = json.loads((tmp_path / "tune_attention_cpu.json").read_text())
    [winner] = report["winners"]
    assert winner["blocks"] == dataclasses.asdict(found)
    assert {row["status"] for row in report["rows"] if row["kernel"] == "dq"} == {"ok", "died"}
    assert max(row["ms"] for row in report["rows"] if "ms" in row) < 1000
    assert (BENCHMARKS.parent / "biomedlm_jax/kernels/block_sizes.json").read_text() == package_table


@pytest.mark.parametrize("kernel", ["forward", "dkv"])
def test_a_candidate_is_checked_before_it_is_timed(kernel, monkeypatch):
    triton = importlib.import_module("biomedlm_jax.kernels.triton")
    base = triton.default_blocks((2, 24, 3, 64), "bfloat16")

    def measure():
        arguments = ("triton", SHAPE, kernel, base, {f"{kernel}_q": 16, f"{kernel}_k": 16}, timing.SMALL_LOOP, True)
        return list(tune_attention.measure(*arguments))

    [result] = measure()
    assert result["status"] == "ok"
    assert result["ms"] > 0
    assert all(error < 1e-2 for error in result["errors"].values())

    name = tune_attention.pass_of(kernel)
    right = getattr(triton, name)

    def wrong(*args):
        return jax.tree.map(lambda x: x.at[0, 5].multiply(1.2), right(*args))

    monkeypatch.setattr(triton, name, wrong)
    [result] = measure()
    assert result["status"] == "wrong"
    assert "ms" not in result
    assert "relative error" in result["reason"]


def test_kinds_of_one_chip_share_their_block_sizes():
    assert tune_attention.device_name("NVIDIA H100 80GB HBM3") == "NVIDIA H100"
    assert tune_attention.device_name("NVIDIA A100-SXM4-40GB") == "NVIDIA A100"
    assert tune_attention.device_name("TPU v5 lite") == "TPU v5 lite"
