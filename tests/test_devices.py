"""Where JAX keeps what it compiles."""

import subprocess
import sys

import jax
import pytest

from biomedlm_jax import devices, distributed

SETTINGS = ("jax_compilation_cache_dir", "jax_enable_compilation_cache", "jax_persistent_cache_enable_xla_caches")


@pytest.fixture
def nothing_set(monkeypatch, tmp_path):
    """JAX as a user has it on a GPU, with a home folder of the test's."""
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def where():
    devices.keep_compiled_programs(distributed.Job())
    return jax.config.jax_compilation_cache_dir


def test_programs_are_kept_in_the_home_folder(nothing_set, tmp_path, monkeypatch):
    assert where() == str(tmp_path / "home" / "biomedlm_jax" / "compiled")
    assert list((tmp_path / "home" / "biomedlm_jax").iterdir()) == [tmp_path / "home" / "biomedlm_jax" / "compiled"]
    # The GPU's compiler keeps there, too, which kernels it found to be the fastest.
    assert "xla_gpu_per_fusion_autotune_cache_dir" in jax.config.jax_persistent_cache_enable_xla_caches
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert where() == str(tmp_path / ".cache" / "biomedlm_jax" / "compiled")


def test_what_the_user_says_stays(nothing_set, tmp_path, monkeypatch):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "asked"))
    assert where() == str(tmp_path / "asked")
    jax.config.update("jax_compilation_cache_dir", "gs://bucket/folder")
    assert where() == "gs://bucket/folder"
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_enable_compilation_cache", False)
    assert where() is None
    jax.config.update("jax_enable_compilation_cache", True)
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert where() is None
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize("asked", [False, True])
def test_a_folder_that_cannot_be_written_to_costs_a_warning(nothing_set, asked, tmp_path, caplog):
    (tmp_path / "home").write_text("no folder")
    if asked:
        jax.config.update("jax_compilation_cache_dir", str(tmp_path / "home" / "asked"))
    before = jax.config.jax_compilation_cache_dir
    assert where() == before
    assert f"compiled programs cannot be kept in {tmp_path}/home" in caplog.text
    assert "Not a directory" in caplog.text
    # XLA would refuse to compile where it cannot write.
    assert jax.config.jax_persistent_cache_enable_xla_caches == "none"


def test_a_folder_that_not_all_processes_see_is_not_used(nothing_set, tmp_path, monkeypatch, caplog):
    """Some would find a program that the others compile, and compilers of GPUs wait for each other."""
    monkeypatch.setattr(distributed.Job, "all", lambda self, what, here: False)
    assert where() is None
    assert f"not all processes see {tmp_path}/home/biomedlm_jax/compiled" in caplog.text
    assert not any((tmp_path / "home" / "biomedlm_jax" / "compiled").iterdir())


def test_a_second_process_finds_the_programs_of_the_first(tmp_path, subprocess_env):
    code = (
        "import jax\n"
        "from biomedlm_jax import devices, distributed\n"
        "events = []\n"
        "jax.monitoring.register_event_listener(lambda event, **about: events.append(event))\n"
        "devices.keep_compiled_programs(distributed.Job())\n"
        "jax.jit(lambda x: x @ x + 1).lower(jax.ShapeDtypeStruct((8, 8), 'float32')).compile()\n"
        "print(events.count('/jax/compilation_cache/cache_hits'))\n"
    )
    env = subprocess_env | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "asked"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    for hits in ("0", "1"):
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
        assert result.stdout.strip() == hits
