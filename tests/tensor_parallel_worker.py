"""Program: tensor-parallel forward passes beside one device; prints the largest difference of each case as JSON.

python tensor_parallel_worker.py eight                     over CPU devices of this process
python tensor_parallel_worker.py two ADDRESS INDEX         over one CPU device of each of two processes
"""

import dataclasses
import functools
import json
import os
import sys

if __name__ == "__main__":  # before JAX starts
    os.environ["JAX_PLATFORMS"] = "cpu"
    num_devices = 8 if sys.argv[1] == "eight" else 1
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={num_devices}"

import jax
import numpy as np
import test_execute
import tiny

from nanojax.models import decoder
from nanojax.pipeline import execute, library
from nanojax.pipeline.ir import OpKind
from nanojax.pipeline.tensor_parallel import tensor_parallel

WIDE = dataclasses.replace(
    tiny.LLAMA, num_heads=16, num_kv_heads=8, d_ff=64, qkv_bias=True, qk_norm=True, tied_head=True
)
EXPERTS = dataclasses.replace(WIDE, num_experts=4, num_experts_per_token=2, tied_head=False)
NUM_TOKENS, A, B = test_execute.NUM_TOKENS, test_execute.A, test_execute.B
ATTENTION = "reference"  # the quickest to compile
EARLY = (OpKind.KQV, *test_execute.layer_loop.ATTENTION)

# Number of devices, model, pipeline.  97 tokens of vocabulary are no multiple of any number of devices.
CASES = {
    "gather": (4, WIDE, library.sequential(NUM_TOKENS, collectives="gather")),
    "reduce, D.AR beside the next layer": (
        2, WIDE,
        test_execute.pipeline_of(
            *((OpKind.D_AR, *part, 1, 1) for part in (A, B)),
            *((op, *part) for part in (A, B) for op in (*EARLY, OpKind.O, OpKind.O_AR, OpKind.UG, OpKind.D)),
        ),
    ),
    "both": (8, WIDE, library.llama_70b_figure6(NUM_TOKENS)),
    "both, experts": (2, EXPERTS, library.mixtral_released(NUM_TOKENS)),
}  # fmt: skip
IN_TWO_PROCESSES = (
    2,
    dataclasses.replace(WIDE, num_layers=1),
    library.nano_batched(NUM_TOKENS, (9, 15), collectives=("gather", "reduce")),
)


@functools.cache
def on_one_device(model):
    """Params, and logits and pages of each batch."""
    rng = np.random.default_rng(7)
    shapes = decoder.abstract_params(model)
    params = jax.tree.map(lambda x: rng.normal(float(x.ndim == 1), 0.2, x.shape).astype(np.float32), shapes)
    forward = jax.jit(functools.partial(execute.forward, model, attention=ATTENTION))
    batches = [test_execute.make_batch(*batch, model) for batch in test_execute.BATCHES.values()]
    return params, [jax.tree.map(np.asarray, forward(params, kv, batch)) for batch, kv in batches]


def difference(num_devices, model, pipeline) -> float:
    """Largest difference of logits and of what the pages hold, over batches; infinite where only one has a number."""
    params, expected = on_one_device(model)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:num_devices]), ("tp",))
    split = tensor_parallel(model, mesh, [pipeline], attention=ATTENTION)
    params = jax.tree.map(_put, split.arrange(params), split.params)
    forward = jax.jit(split.forward, donate_argnums=1)
    found = []
    for (rows, num_decode), (wanted_logits, wanted_kv) in zip(test_execute.BATCHES.values(), expected, strict=True):
        batch, kv = test_execute.make_batch(rows, num_decode, model)
        batch = jax.tree.map(lambda x: _put(x, split.replicated), batch)
        logits, kv = forward(params, jax.tree.map(lambda x: _put(x, split.kv), kv), batch)
        found += [_distance(s.data[: len(rows)], wanted_logits[: len(rows)]) for s in logits.addressable_shards]
        for ours, wanted in ((kv.k, wanted_kv.k), (kv.v, wanted_kv.v)):
            found += [_distance(shard.data, wanted[shard.index]) for shard in ours.addressable_shards]
    return max(found)


def _distance(ours, wanted) -> float:
    ours = np.asarray(ours)
    if np.any(np.isnan(ours) != np.isnan(wanted)):
        return np.inf
    return float(np.nanmax(np.abs(ours - wanted), initial=0))


def _put(x, sharding: jax.sharding.Sharding) -> jax.Array:
    """On the devices of this process the parts that are theirs; `device_put` compares processes, and NaN is not NaN."""
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def main() -> None:
    if sys.argv[1] == "eight":
        found = {name: difference(*case) for name, case in CASES.items()}
    else:
        try:
            jax.config.update("jax_cpu_collectives_implementation", "gloo")
        except (AttributeError, ValueError) as error:
            print(json.dumps({"missing": str(error)}))
            return
        jax.distributed.initialize(sys.argv[2], num_processes=2, process_id=int(sys.argv[3]))
        assert jax.process_count() == 2
        found = {"two processes": difference(*IN_TWO_PROCESSES)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
