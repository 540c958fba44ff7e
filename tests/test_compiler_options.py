"""Which options a step is compiled with; tests/test_compile.py has those of GPUs and TPUs."""

import jax
import pytest
import tiny

from biomedlm_jax import compiler_options, sharding
from biomedlm_jax.compiler_options import Option
from biomedlm_jax.config import MeshConfig

KNOWN = Option((("xla_no_such_name", True), ("xla_cpu_enable_fast_math", False)), "cpu", "has a new name elsewhere")
UNKNOWN = Option((("xla_no_such_option", 1),), "cpu", "does nothing")
ALWAYS = Option((("xla_cpu_enable_fast_min_max", False),), "cpu", "is of one device, too", exchanges=False)
ELSEWHERE = Option((("xla_gpu_enable_latency_hiding_scheduler", True),), "NVIDIA", "is of other devices")


@pytest.fixture
def options(monkeypatch):
    monkeypatch.setattr(compiler_options, "OPTIONS", (KNOWN, UNKNOWN, ALWAYS, ELSEWHERE))
    compiler_options._for_mesh.cache_clear()
    yield
    compiler_options._for_mesh.cache_clear()


def test_the_step_takes_what_its_compiler_knows(options, monkeypatch, caplog):
    mesh = sharding.make_mesh(MeshConfig())
    known, always = {"xla_cpu_enable_fast_math": False}, {"xla_cpu_enable_fast_min_max": False}
    assert compiler_options.for_mesh(mesh) == known | always
    compiler_options._for_mesh.cache_clear()
    with jax.set_mesh(mesh):  # as `train` asks
        assert compiler_options.for_mesh(mesh) == known | always
    assert "no option xla_no_such_option; left out: it does nothing" in caplog.text
    assert "xla_no_such_name" not in caplog.text and "latency" not in caplog.text
    assert compiler_options.for_mesh(sharding.make_mesh(MeshConfig(), jax.devices()[:1])) == always
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
    assert compiler_options.for_mesh(mesh) == always


def test_a_step_made_under_its_mesh_runs_with_options(options):
    """As `train` makes it, on devices for which there are options."""
    mesh = sharding.make_mesh(MeshConfig(fsdp=8))
    with jax.set_mesh(mesh):
        trainer = tiny.Trainer(tiny.CONFIG, MeshConfig(fsdp=8))
    assert trainer(tiny.random_batch(tiny.CONFIG, 0))["train/loss"] > 0
