"""Which of XLA's options does a step need on a GPU?  Data, by what the options are for; the same on jax 0.10 and 0.11."""

import enum
from collections.abc import Mapping

from nanojax.pipeline.ir import Pipeline

# XLA 0.11 joins products of two nano-batches with one weight into one product; never joining them is what nano-batches are.
_KEEP_NANO_BATCHES = {"xla_gpu_dot_merger_threshold_mb": 0}
# On by default in jax 0.11, where it fails on updates of a library product's result.
_SLICES = {"xla_gpu_enable_dynamic_slice_fusion": False}
# A collective starts as soon as it can and ends as late, several at a time.  By default XLA starts them late on Hopper, by its
# estimate of what they take, and on other GPUs waits for each at once.
_COLLECTIVES_BESIDE = {
    "xla_gpu_enable_latency_hiding_scheduler": True,
    "xla_gpu_enable_analytical_sol_latency_estimator": False,
    "xla_gpu_experimental_parallel_collective_overlap_limit": 2,
}
# What becomes part of a CUDA graph by XLA's default.
_CAPTURED = "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,CONDITIONAL"


class Graphs(enum.Enum):
    """What the host launches: `SOME` graphs, XLA's default; `CONCURRENT` ones; `ONE` CUDA graph for everything; `NO` graphs but each kernel.

    A step of greedy requests is one graph by XLA's default: it has neither loops nor conditions, which that leaves to the host.
    ONE has them in the graph (loops find their trip counts there, without the host), and is not for serving: on an H200 with
    jax 0.11.2 a step with WHILE lost pages, with CONDITIONAL, too, it admitted nobody; with CONDITIONAL alone it was right
    (`experiments/LOG.md`).
    SOME and ONE are chains, in which kernels of several streams run one after another (an H200, jax 0.11.2).  CONCURRENT has edges only
    where one kernel needs another's buffer: it is for steps on several streams, which take 1.5 % longer with NO.
    NO is for a profiler, which tells only of kernels launched one by one what they belong to.
    """

    ONE = "one"
    SOME = "some"
    CONCURRENT = "concurrent"
    NO = "no"


def best_graphs(pipeline: Pipeline | None, *, use_streams: bool) -> Graphs:
    """What the host launches, unless somebody says otherwise, for a step that is cut so; None is in order."""
    return Graphs.CONCURRENT if use_streams and pipeline is not None and pipeline.num_streams > 1 else Graphs.SOME


def gpu_options(graphs: Graphs, *, num_devices: int = 1) -> Mapping[str, bool | int | str]:
    """`compiler_options` for `jax.jit` of a step on NVIDIA GPUs."""
    options: dict[str, bool | int | str] = {**_KEEP_NANO_BATCHES, **_SLICES}
    collectives = ""
    if num_devices > 1:
        options |= _COLLECTIVES_BESIDE
        collectives = ",COLLECTIVES"
    if graphs is Graphs.ONE:
        options["xla_gpu_enable_command_buffer"] = f"{_CAPTURED},WHILE{collectives}"
        options["xla_gpu_graph_min_graph_size"] = 1
    elif graphs is Graphs.CONCURRENT:
        options["xla_gpu_command_buffer_scheduling_mode"] = "CONCURRENT"
        if num_devices > 1:
            options["xla_gpu_enable_command_buffer"] = _CAPTURED + collectives
    elif graphs is Graphs.NO:
        options["xla_gpu_enable_command_buffer"] = ""
    return options
