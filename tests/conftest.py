"""All tests run on eight CPU devices, as a small pod would."""

import os
from pathlib import Path

import jax
import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Compiles each program once and in haste, for all tests and the processes that they start."""
    settings = {
        "jax_compilation_cache_dir": str(config.cache.mkdir("jax")),
        "jax_persistent_cache_min_compile_time_secs": 0.3,
        "jax_disable_most_optimizations": True,
    }
    for name, value in settings.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)


jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

# Sample data that developers have beside the checkout; tests that read it are skipped without it.
SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture
def shared_data() -> Path:
    """Folder of real samples in the formats that users have."""
    if not (SHARED / "data").is_dir():
        pytest.skip("the sample data are not beside this checkout")
    return SHARED / "data"


@pytest.fixture(scope="session")
def subprocess_env() -> dict[str, str]:
    """Environment of a command run as a user would: its own settings, one device."""
    ours = ("JAX_COMPILATION_CACHE_", "JAX_PERSISTENT_CACHE_", "JAX_DISABLE_MOST_OPTIMIZATIONS")
    return {
        key: value for key, value in os.environ.items() if key.startswith(ours) or not key.startswith(("JAX_", "XLA_"))
    }
