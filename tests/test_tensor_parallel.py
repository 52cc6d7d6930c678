"""Law: devices that share every layer compute what one device computes.  The runs are in `tensor_parallel_worker.py`."""

import dataclasses
import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import pytest
import tensor_parallel_worker as worker
import tiny

from nanojax.models import decoder
from nanojax.pipeline import library
from nanojax.pipeline.tensor_parallel import tensor_parallel

PROGRAM = pathlib.Path(worker.__file__)
TIMEOUT_S = 240


def start(*arguments) -> subprocess.Popen:
    paths = os.pathsep.join([str(PROGRAM.parents[1]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(PROGRAM), *map(str, arguments)]
    return subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": paths}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def result(process: subprocess.Popen) -> dict[str, float]:
    out, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, err[-3000:]
    return json.loads(out.splitlines()[-1])


@pytest.fixture(scope="module")
def differences():
    """Of each case on CPU devices of one process; they must be many before JAX starts, hence a process of its own."""
    return result(start("eight"))


@pytest.mark.parametrize("name", worker.CASES)
def test_devices_of_one_process_equal_one_device(name, differences):
    assert differences[name] < 1e-5


def test_two_processes_equal_one_device():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    processes = [start("two", address, index) for index in range(2)]
    try:
        found = [result(process) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    if any("missing" in one for one in found):
        pytest.skip(f"no gloo collectives here: {found}")
    assert all(one["two processes"] < 1e-5 for one in found), found


def mesh(num_devices: int, name: str = "tp"):
    return jax.sharding.AbstractMesh((num_devices,), (name,))


@pytest.mark.parametrize(
    ("message", "model", "options"),
    [
        ("num_kv_heads=2 is no multiple of the 4 devices of 'tp'", tiny.LLAMA, {}),
        ("d_ff=50 is no multiple of the 4", dataclasses.replace(worker.WIDE, d_ff=50), {}),
        ("d_model=34 is no multiple of the 4", dataclasses.replace(worker.WIDE, d_model=34), {"collectives": "gather"}),
        ("has no collectives, but is to run on 4 devices", worker.WIDE, {"collectives": None}),
        ("has a router, but tiny-llama has no experts", worker.WIDE, {"is_moe": True}),
    ],
)
def test_what_cannot_be_split_is_refused(message, model, options):
    with pytest.raises(ValueError, match=message):
        tensor_parallel(model, mesh(4), [library.sequential(8, **{"collectives": "reduce", **options})])


def test_a_mesh_without_the_axis_and_a_batch_without_a_pipeline_are_refused():
    with pytest.raises(ValueError, match="mesh axes \\('x',\\) have no 'tp'"):
        tensor_parallel(worker.WIDE, mesh(2, "x"), [])
    split = tensor_parallel(worker.WIDE, mesh(2), [library.sequential(8, collectives="reduce")])
    batch, kv = worker.test_execute.make_batch((), 0, worker.WIDE)
    with pytest.raises(ValueError, match=r"no pipeline is for 24 tokens, only for \[8\]"):
        split.forward({}, kv, batch)


@pytest.mark.parametrize(("collectives", "num_copies"), [("gather", 1), ("reduce", 1), (("gather", "reduce"), 2)])
@pytest.mark.parametrize("tied_head", [True, False])
def test_what_is_held_twice(collectives, num_copies, tied_head):
    model = dataclasses.replace(worker.WIDE, tied_head=tied_head)
    split = tensor_parallel(model, mesh(4), [library.nano_batched(8, (3, 5), collectives=collectives)])
    params = decoder.abstract_params(model)
    arranged = jax.eval_shape(split.arrange, params)
    sizes = [sum(x.size for x in jax.tree.leaves(tree)) for tree in (arranged, params)]
    head = (100 if tied_head else 3) * model.d_model  # 97 tokens become 100
    o_size = sum(layer["out"]["kernel"].size for layer in params["layers"].values())
    assert sizes[0] - sizes[1] == head + (num_copies - 1) * o_size
    assert jax.tree.structure(split.params) == jax.tree.structure(arranged)
    jax.tree.map(lambda x, sharding: sharding.shard_shape(x.shape), arranged, split.params)  # all splits are even
