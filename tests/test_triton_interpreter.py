"""Do paged attention's Triton kernels keep the contract?  Run in Triton's interpreter, on a CPU."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import triton_interpreter_worker as worker

from pallas_kernels.paged_attention import api

pytestmark = [
    pytest.mark.gpu_compile,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton: make test-gpu-compile"),
]
ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> dict:
    """What the kernels make of each case."""
    path = tmp_path_factory.mktemp("triton") / "outputs.npz"
    env = {**os.environ, "TRITON_INTERPRET": "1", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, worker.__file__, str(path)], check=True, env=env)
    return dict(np.load(path))


def reference(args: dict) -> np.ndarray:
    call = jax.jit(lambda args: api.paged_attention(layer=worker.LAYER, implementation="reference", **args))
    return np.asarray(call(args), np.float32)


@pytest.mark.parametrize("name", worker.CASES)
def test_kernels_keep_the_contract(outputs, name):
    case = worker.CASES[name]
    args = case.args()
    as_float32 = {x: v.astype(jnp.float32) if jnp.issubdtype(v.dtype, jnp.floating) else v for x, v in args.items()}
    truth = reference(as_float32)
    # Against float32, at most twice the error of the plain implementation in the same dtype.
    limit = 4e-6 if case.dtype == "float32" else 2 * np.abs(reference(args) - truth).max()
    np.testing.assert_allclose(outputs[name][case.wanted], truth[case.wanted], rtol=0, atol=limit)
    if case.only != "decode":
        assert not outputs[name][sum(case.spec.q_lens) :].any(), "padding tokens are 0"
