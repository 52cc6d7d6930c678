"""Which of XLA's options does a step need on a GPU?  Data, by what the options are for; the same on jax 0.10 and 0.11."""

from collections.abc import Mapping

# XLA 0.11 joins products of two nano-batches with one weight into one product; never joining them is what nano-batches are.
_KEEP_NANO_BATCHES = {"xla_gpu_dot_merger_threshold_mb": 0}
# On by default in jax 0.11, where it fails on updates of a library product's result.
_SLICES = {"xla_gpu_enable_dynamic_slice_fusion": False}
# What becomes part of a CUDA graph: XLA's default, and loops, whose trip counts the graph then finds without the host.
_ONE_GRAPH = {
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE",
    "xla_gpu_graph_min_graph_size": 1,
}
_COLLECTIVES = {"xla_gpu_enable_command_buffer": f"{_ONE_GRAPH['xla_gpu_enable_command_buffer']},COLLECTIVES"}


def gpu_options(*, one_graph: bool = True, num_devices: int = 1) -> Mapping[str, bool | int | str]:
    """`compiler_options` for `jax.jit` of a step on NVIDIA GPUs.

    one_graph: the whole step is one CUDA graph, loops and conditions of the scheduler included; else XLA's default, which
      leaves loops to the host.  Not for serving: on an H200 with jax 0.11.2 a step with WHILE loses pages, with both it
      admitted nobody; with CONDITIONAL alone it was right (`experiments/LOG.md`).
    """
    graph = {**_ONE_GRAPH, **(_COLLECTIVES if num_devices > 1 else {})} if one_graph else {}
    return {**_KEEP_NANO_BATCHES, **_SLICES, **graph}
