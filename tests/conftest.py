"""All tests run on eight CPU devices, as a small pod would."""

import os
from pathlib import Path

import jax
import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Compiles each program once, for all tests and the processes that they start."""
    folder = config.cache.mkdir("jax")
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"


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
    cache = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
    return {name: value for name, value in os.environ.items() if name in cache or not name.startswith(("JAX_", "XLA_"))}
