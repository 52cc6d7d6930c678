"""On which stream of a GPU does an operation run?  The annotation that XLA turns into concurrency, and what it can take."""

from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import compute_on

# jax 0.11 gave the newer function the older one's name.
_annotate: Callable[..., Any] = getattr(compute_on, "compute_on2", None) or compute_on.compute_on


def launch(stream: int, operation: Callable[[], Any], *, has_loops: bool = False) -> Any:
    """`operation()` on computation stream `stream + 1`; stream 0 of XLA is where everything else runs.

    XLA overlaps calls with one array as result, and fails on calls inside of them: nested `jit`s are dissolved unless the
    operation `has_loops`, which that would break, and an operation with several results (routing of a mixture of experts)
    stays off the streams.
    """
    if len(jax.tree.leaves(jax.eval_shape(operation))) > 1:
        return operation()

    def call() -> jax.Array:
        with jax.disable_jit(not has_loops):
            return operation()

    return _annotate(call, compute_type=f"gpu_stream:{stream + 1}", out_memory_spaces=jax.memory.Space.Device)()
