"""What do all tests share?  Where the optional shared data lies, and a quiet, small JAX."""

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import pytest


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """Folder with traces, a tiny real model and golden outputs, beside the checkout; tests that need it skip without it."""
    path = pathlib.Path(__file__).parents[2] / "shared" / "data"
    if not path.is_dir():
        pytest.skip("needs ../shared/data, which is not part of this repository")
    return path
