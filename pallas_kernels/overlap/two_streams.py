"""How do two kernels of one CUDA graph become branches of it?  Calls on two streams, under XLA's narrow rules.

Both calls are annotated, each has one array as its result, no jit is nested in them, and a barrier joins the two: else XLA
runs them one after the other, or refuses (openxla/xla#17982).
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import compute_on
from jaxtyping import Array

from pallas_kernels.matmul import mosaic_gpu as matmul
from pallas_kernels.overlap import decode

# jax 0.11 gave the newer function the older one's name.
_annotate: Callable[..., Any] = getattr(compute_on, "compute_on2", None) or compute_on.compute_on


def run(
    operands: tuple[Array, ...], call: decode.Decode, *, num_ctas: int, out_dtype: Any, config: Any, interpret: Any
) -> tuple[Array, Array]:
    """The product on one stream, decode attention on another."""

    def multiply(*operands: Array) -> Array:
        return matmul.matmul(*operands, num_ctas=num_ctas, out_dtype=out_dtype, config=config, interpret=interpret)

    def attend(*operands: Any) -> Array:
        inputs, schedule = operands[: len(call.inputs)], type(call.schedule)(*operands[len(call.inputs) :])
        return decode.attend(call, inputs, schedule, interpret)

    if interpret is not None:  # no streams there
        return multiply(*operands), attend(*call.inputs, *call.schedule)
    product = _on_stream(1, multiply)(*operands)
    attended = _on_stream(2, attend)(*call.inputs, *call.schedule)
    return jax.lax.optimization_barrier((product, attended))


def _on_stream(stream: int, operation: Callable) -> Callable:
    return _annotate(operation, compute_type=f"gpu_stream:{stream}", out_memory_spaces=jax.memory.Space.Device)
