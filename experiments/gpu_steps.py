"""Which whole steps are compiled for GPUs that are not there?  One iteration of continuous batching, at full size, as shapes.

Of greedy requests, as the measurements serve them.
"""

import collections
import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from experiments.compiled_code import CompiledCode, Target, compile_for
from nanojax import engine, scheduler
from nanojax.admission import make_forecast
from nanojax.config import GREEDY, EngineConfig, ModelConfig
from nanojax.models import decoder
from nanojax.pipeline import execute
from nanojax.pipeline.compiler_options import Graphs
from nanojax.pipeline.ir import OpKind, Pipeline
from nanojax.pipeline.layer_loop import attention_calls, phases
from nanojax.pipeline.tensor_parallel import tensor_parallel

POLICY = scheduler.Policy(forecast=make_forecast("peak_memory"), priority=scheduler.first_come)


@dataclasses.dataclass(frozen=True)
class Step:
    """A compiled step.  `pages_shape`: of the keys, and of the values, on one device."""

    model: ModelConfig
    pipeline: Pipeline
    num_devices: int
    pages_shape: tuple[int, ...]
    code: CompiledCode

    @property
    def kv_bytes(self) -> int:
        """Keys and values on one device, bfloat16."""
        return 2 * 2 * math.prod(self.pages_shape)

    @property
    def num_kv_copies(self) -> int:
        """Copies of the keys or the values of all layers, or of one."""
        layer = self.pages_shape[1:]
        return sum(self.code.copies_of(shape) for shape in (self.pages_shape, layer, (1, *layer)))

    @functools.cached_property
    def pairs(self) -> tuple[int, int]:
        """Pairs of operations that the pipeline launches side by side, and those of them that are under way together."""
        overlap, calls = self.code.overlap, attention_calls(self.pipeline)
        where = {(start.layer, start.label, start.tokens): i for i, start in enumerate(overlap.starts)}

        def region(iteration: int, index: int) -> int | None:
            node, ops = self.pipeline.nodes[index], calls.get(index, (self.pipeline.nodes[index].op,))
            tokens = self.pipeline.tokens_of(node)
            label = "+".join(op.value for op in ops)
            return where.get((iteration - node.lag, label, f"{tokens.start}:{tokens.stop}"))

        num_planned = num_there = 0
        for phase in phases(self.pipeline, self.model.num_layers):
            found = [
                (self.pipeline.nodes[i].stream, region(iteration, i)) for iteration, i in phase if calls.get(i) != ()
            ]
            for (stream, one), (other_stream, two) in itertools.combinations(found, 2):
                if stream != other_stream:
                    num_planned += 1
                    num_there += one is not None and two in overlap.beside[one]
        return num_planned, num_there

    @property
    def num_merged_matmuls(self) -> int:
        """Products of nano-operations that are in the code neither as the library's nor as persistent ones of their own."""
        wanted = matmuls(self.model, self.pipeline, self.num_devices)
        found = collections.Counter(self.code.matmuls)
        for (rows, *columns), count in self.code.mosaic_results.items():  # of gate and up the kernel gives one product
            is_gated = columns == [self.model.d_ff // self.num_devices]
            found[rows, *([2 * columns[0]] if is_gated else columns)] += count
        return sum(max(count - found[shape], 0) for shape, count in wanted.items())


def compile_step(
    gpu: Target,
    model: ModelConfig,
    pipeline: Pipeline,
    *,
    kv_bytes: float,
    num_devices: int = 1,
    num_slots: int = 1024,
    attention: str | None = None,
    overlap: str = "xla",
) -> Step:
    """`engine.step` on batches of the pipeline's size, weights and pages bfloat16, on the streams that the pipeline names.

    kv_bytes: of the pages, on all devices together, or a page more.    attention, overlap: as in `execute.forward`.
    CUDA graphs are those in which streams can run side by side; on several GPUs they hold collectives, too.
    """
    page_size = 16
    config = EngineConfig(
        token_budgets=(pipeline.num_tokens,), num_slots=num_slots, page_size=page_size, max_len=2048,
        num_pages=math.ceil(kv_bytes / (2 * model.kv_values_per_token * page_size)),
        sampling=GREEDY,
    )  # fmt: skip
    mesh = gpu.mesh(num_devices)
    params: Any = decoder.abstract_params(model, jnp.bfloat16)
    state = jax.eval_shape(lambda: engine.init(config, model, jnp.bfloat16))
    if num_devices == 1:
        forward = functools.partial(
            execute.forward, model, pipeline=pipeline, attention=attention, use_streams=True, overlap=overlap
        )
    else:
        split = tensor_parallel(model, mesh, [pipeline], attention=attention, use_streams=True)
        forward = split.forward
        params = jax.tree.map(_placed, jax.eval_shape(split.arrange, params), split.params)
        kv = jax.tree.map(lambda leaf: _placed(leaf, split.kv), state.kv)
        state = dataclasses.replace(jax.tree.map(lambda leaf: _placed(leaf, split.replicated), state), kv=kv)
    code = compile_for(
        gpu, functools.partial(engine.step, config, POLICY, forward, pipeline.num_tokens), (params, state),
        mesh=mesh, donate=[1], graphs=Graphs.CONCURRENT,
    )  # fmt: skip
    shape = state.kv.k.shape
    return Step(model, pipeline, num_devices, (*shape[:2], shape[2] // num_devices, *shape[3:]), code)


def _placed(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def matmuls(model: ModelConfig, pipeline: Pipeline, num_devices: int = 1) -> Mapping[tuple[int, int], int]:
    """How many products of each [rows, columns] the nano-operations of a dense model ask for, on one device."""
    qkv_dim = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    gathered = {pipeline.tokens_of(node) for node in pipeline.nodes if node.op is OpKind.O_AG}
    found: collections.Counter[tuple[int, int]] = collections.Counter()
    for node in pipeline.nodes:
        tokens = pipeline.tokens_of(node)
        is_gathered = any(own.intersects(tokens) for own in gathered)
        columns = {
            OpKind.KQV: qkv_dim // num_devices,
            OpKind.O: model.d_model // (num_devices if is_gathered else 1),
            OpKind.UG: 2 * model.d_ff // num_devices,
            OpKind.D: model.d_model,
        }
        if node.op in columns:
            found[tokens.num_tokens, columns[node.op]] += model.num_layers
    return found
