"""What do all tests share?  Where the optional shared data lies, and a quiet, small JAX."""

import importlib.metadata
import os
import pathlib

CHECKOUT = pathlib.Path(__file__).parents[1]

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The tests compile far more than they compute: spare LLVM's optimisations, and as long as XLA has other emitters of fused loops,
# those that take twice as long.
CHEAP_CODE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11):
    CHEAP_CODE += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{CHEAP_CODE} {os.environ.get('XLA_FLAGS', '')}"
# Many tests build the same engine; each program is compiled once, also across workers and runs.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CHECKOUT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

import jax  # noqa: E402  (it reads the environment when it is imported)
import pytest  # noqa: E402
from jaxtyping import config  # noqa: E402


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """Folder with traces, a tiny real model and golden outputs, beside the checkout; tests that need it skip without it."""
    path = CHECKOUT.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip("needs ../shared/data, which is not part of this repository")
    return path


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """What is traced takes the ways that it takes where there is no CPU to watch a condition."""
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *operands, default, **_: default(*operands))


@pytest.fixture
def unchecked():
    """Type checks of each call would take most of the time here: thousands of simulations."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)
