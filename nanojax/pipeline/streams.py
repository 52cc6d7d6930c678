"""On which stream of a GPU does an operation run?  The annotation that XLA turns into concurrency, and what it can take."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import compute_on

# jax 0.11 gave the newer function the older one's name.
_annotate: Callable[..., Any] = getattr(compute_on, "compute_on2", None) or compute_on.compute_on


def launch(stream: int, operation: Callable, *inputs: Any, has_loops: bool = False) -> Any:
    """`operation(*inputs)` on computation stream `stream + 1`; stream 0 of XLA is where everything else runs.

    XLA overlaps calls with one array as result, and fails on calls inside of them: several results of one dtype travel as
    one array, and nested `jit`s are dissolved unless the operation `has_loops`, which that would break.  Results of several
    dtypes (routing of a mixture of experts) keep the operation off the streams.
    """
    leaves, structure = jax.tree.flatten(jax.eval_shape(operation, *inputs))
    if len({leaf.dtype for leaf in leaves}) > 1:
        return operation(*inputs)

    def packed(*inputs: Any) -> jax.Array:
        with jax.disable_jit(not has_loops):
            results = jax.tree.leaves(operation(*inputs))
            return results[0] if len(results) == 1 else jnp.concatenate([result.reshape(-1) for result in results])

    result = _annotate(packed, compute_type=f"gpu_stream:{stream + 1}", out_memory_spaces=jax.memory.Space.Device)(
        *inputs
    )
    if len(leaves) == 1:
        return jax.tree.unflatten(structure, [result])
    ends = [sum(leaf.size for leaf in leaves[: i + 1]) for i in range(len(leaves))]
    parts = [result[end - leaf.size : end].reshape(leaf.shape) for leaf, end in zip(leaves, ends, strict=True)]
    return jax.tree.unflatten(structure, parts)
