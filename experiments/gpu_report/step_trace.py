"""Where does the time of a serving step go, and what runs beside what?  One step's kernels, from a profiler's trace.

The step is that of `end_to_end`: as many decode rows and prefill tokens as a steady state of 512/512 has.  It is launched
kernel by kernel, without CUDA graphs, or the profiler could not tell what a kernel belongs to; so a few milliseconds more
pass between kernels.
"""

import dataclasses
import functools
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import breakdown, serving
from experiments.gpu_report import end_to_end
from experiments.gpu_report.cases import Case, Row, Setting
from experiments.gpu_report.end_to_end import Point
from experiments.gpu_report.programs import options_here
from experiments.gpu_report.trace_times import busy_by_operation, read_trace, scopes_of, seconds_by_depth
from nanojax import engine as core
from nanojax.pipeline import execute
from nanojax.pipeline.compiler_options import Graphs

NUM_STEPS = 3


def cases(setting: Setting) -> list[Case]:
    """In order, and decode attention beside dense operations."""
    wanted = [point for point in end_to_end.points(setting.is_smoke) if point.driver == "dispatch_ahead"]
    first = wanted[0].lengths
    chosen = [
        point for point in wanted if point.lengths == first and point.how in ("sequential", "decode beside dense")
    ]
    if setting.is_smoke:
        chosen = chosen[:1]
    needs_s = 0.0 if setting.is_smoke else 25.0
    return [
        Case(f"trace {point.how}", lambda point=point: _trace(point, setting), needs_s, limit_s=150) for point in chosen
    ]


def forward_of(point: Point, values: Any, loaded: Any, budget: int) -> Any:
    """The forward pass that an engine of these flags runs at its budget."""
    pipelines = serving.pipelines(values, loaded)
    more = {"use_streams": True, "overlap": point.overlap} if point.use_streams and pipelines else {}
    return functools.partial(
        execute.forward, loaded.config, attention=values.attention, pipeline=pipelines.get(budget), **more
    )


def _trace(point: Point, setting: Setting) -> list[Row]:
    found, capacity, loaded = end_to_end.plan_of(point, end_to_end.MODEL, setting)
    name = "smoke" if setting.is_smoke else end_to_end.MODEL
    values = end_to_end.flag_values(point, name, capacity, setting)
    config, policy = serving.engine_config(values, loaded), serving.policy(values)
    budget = capacity.token_budget
    num_prefill = budget - capacity.num_decode
    chunk = int(found.input_lens.mean())
    typical = breakdown.Typical(
        budget, 1, capacity.num_decode,
        tuple(len(part) for part in np.array_split(np.arange(num_prefill), max(1, round(num_prefill / chunk)))),
        min(int(found.mean_resident_len), capacity.max_len - 2),
    )  # fmt: skip
    step = jax.jit(
        functools.partial(core.step, config, policy, forward_of(point, values, loaded, budget), budget),
        donate_argnums=1,
    )
    state = breakdown.lay_out(config, typical, core.init(config, loaded.config, serving.kv_dtype(values)), 0.0)
    kv, small = state.kv, dataclasses.replace(state, kv=jax.tree.map(lambda x: x[:0], state.kv))

    def fresh() -> Any:  # a step consumes its state, of which some arrays are one buffer
        return jax.block_until_ready(jax.tree.map(jnp.copy, small))

    compiled = step.lower(loaded.params, dataclasses.replace(fresh(), kv=kv)).compile(
        compiler_options=options_here(Graphs.NO)
    )
    states = [fresh() for _ in range(NUM_STEPS + 1)]
    kv = compiled(loaded.params, dataclasses.replace(states.pop(), kv=kv))[0].kv
    folder = setting.out / "trace_step"
    shutil.rmtree(folder, ignore_errors=True)
    with jax.profiler.trace(str(folder)):
        for one in states:
            new, report = compiled(loaded.params, dataclasses.replace(one, kv=kv))
            kv = new.kv
            jax.block_until_ready(report)
    kernels = read_trace(folder)
    rows = _rows(kernels, compiled.as_text() or "")
    shutil.rmtree(folder, ignore_errors=True)  # hundreds of megabytes
    return [{"pipeline": point.how, "token_budget": budget, "num_decode": capacity.num_decode, **row} for row in rows]


def _rows(kernels: list, program_text: str) -> list[Row]:
    """Seconds per step by operation, and by how many streams were busy."""
    busy = busy_by_operation(kernels, scopes_of(program_text))
    total_s = sum(seconds for seconds, _ in busy.values())
    rows: list[Row] = [
        {
            "what": "operation", "name": name, "seconds_per_step": seconds / NUM_STEPS,
            "num_kernels_per_step": count / NUM_STEPS, "fraction": seconds / total_s,
        }
        for name, (seconds, count) in sorted(busy.items(), key=lambda item: -item[1][0])
    ]  # fmt: skip
    depths = seconds_by_depth(kernels)
    return rows + [
        {
            "what": "streams busy", "name": str(depth), "seconds_per_step": seconds / NUM_STEPS,
            "fraction": seconds / sum(depths),
        }
        for depth, seconds in enumerate(depths)
        if seconds
    ]  # fmt: skip
