"""Where does the time of a run go?  The parts of a step, each compiled and timed alone at the shapes that the run had.

For each rung of the ladder a typical step is laid out: as many decode rows, prefill tokens and pages as the run's steps
on that rung had on average, prompts of the mean length, contexts of one length.  Parts are timed in turn (median of
`NUM_REPEATS`) and weighted with the rung's number of steps:

    dense       embedding, norms, projections, rotation, feed-forward, logits: all layers, attention's place left out
    attention   `paged_attention` of all layers over the pages in use
    kv_write    storing keys and values of all layers
    sampling    the next token of each row
    scheduling  admit, plan, pages, pack, commit
    step_rest   the whole step, timed in the same way, less the parts: what the parts alone do not show
    host        the run's wall time less its steps: launching, reading reports, text, waiting for one another

Shares are of the run's wall time and add up to 1.  They are estimates: a typical step stands for many, and a part alone
is not fused with its neighbours; `step_rest` and `host` can come out below 0 by that error.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments import serving
from nanojax import batch as batches
from nanojax import engine as core
from nanojax import kv_cache, sampling, scheduler
from nanojax.batch import RaggedBatch
from nanojax.config import EngineConfig, ModelConfig, SamplingParts
from nanojax.engine import EngineState
from nanojax.metrics import StepRecord
from nanojax.models import decoder
from nanojax.models.layers import Extent
from nanojax.pipeline import execute
from nanojax.scheduler import Policy
from nanojax.weights import LoadedModel
from pallas_kernels.paged_attention import paged_attention

PARTS = ("dense", "attention", "kv_write", "sampling", "scheduling", "step_rest", "host")
NUM_REPEATS = 10


@dataclasses.dataclass(frozen=True)
class Typical:
    """The mean step of a rung: rows that decode, prefill tokens by row, tokens in the cache of a decode row."""

    token_budget: int
    num_steps: int
    num_decode: int
    chunk_lens: tuple[int, ...]
    context_len: int


def measure(
    values: flags.FlagValues, loaded: LoadedModel, steps: Sequence[StepRecord], *, mean_input_len: float
) -> dict[str, float]:
    """`time_fraction_<part>` for each of `PARTS`, and the median times behind them (`part_s_<part>_<rung>`).

    `steps` are those of the run, their times counted from its start.
    """
    config, policy = serving.engine_config(values, loaded), serving.policy(values)
    pipelines = serving.pipelines(values, loaded)
    state = core.init(config, loaded.config, serving.kv_dtype(values))
    duration_s = steps[-1].time_s
    totals_s, found = dict.fromkeys(PARTS, 0.0), {}
    for rung in sorted({record.token_budget for record in steps}):
        typical = typical_step([record for record in steps if record.token_budget == rung], config, mean_input_len)
        state = lay_out(config, typical, state, values.temperature)
        forward = functools.partial(
            execute.forward, loaded.config, attention=values.attention, pipeline=pipelines.get(rung)
        )
        step = jax.jit(functools.partial(core.step, config, policy, forward, rung), donate_argnums=1)
        medians_s, state = _time_parts(values, config, policy, loaded, step, state, typical)
        medians_s["step_rest"] = 2 * medians_s["step"] - sum(medians_s.values())
        for part, median_s in medians_s.items():
            found[f"part_s_{part}_{rung}"] = median_s
            if part in totals_s:
                totals_s[part] += median_s * typical.num_steps
    totals_s["host"] = duration_s - sum(totals_s.values())
    return {f"time_fraction_{part}": total_s / duration_s for part, total_s in totals_s.items()} | found


def table(metrics: Mapping[str, int | float | None]) -> str:
    """The shares, one line each."""
    lines = ["where the time went (measured: each part alone, at the run's mean shapes; see experiments/breakdown.py)"]
    for part in PARTS:
        lines.append(f"  {part:<12}{100 * (metrics[f'time_fraction_{part}'] or 0):6.1f} %")
    return "\n".join(lines)


def typical_step(steps: Sequence[StepRecord], config: EngineConfig, mean_input_len: float) -> Typical:
    """The mean of `steps`, all on one rung.  A request's last page is half full on average."""
    decode, prefill, running, pages = (
        float(np.mean([getattr(step, name) for step in steps]))
        for name in ("num_decode_tokens", "num_prefill_tokens", "num_running", "pages_in_use")
    )
    num_decode = min(round(decode), config.num_slots - 1)
    num_prefill = round(prefill)
    num_chunks = min(max(1, round(num_prefill / mean_input_len)), config.num_slots - num_decode)
    chunks = tuple(len(part) for part in np.array_split(np.arange(num_prefill), num_chunks)) if num_prefill > 1 else ()
    context = round((pages / max(running, 1) - 0.5) * config.page_size)
    return Typical(steps[0].token_budget, len(steps), num_decode, chunks, min(max(context, 1), config.max_len - 2))


def lay_out(config: EngineConfig, typical: Typical, state: EngineState, temperature: float) -> EngineState:
    """An engine state whose next step is the typical one.  Keeps only the KV arrays of `state`."""
    known = [typical.context_len + 1] * typical.num_decode + list(typical.chunk_lens)
    computed = [typical.context_len] * typical.num_decode + [0] * len(typical.chunk_lens)
    column = functools.partial(_padded, config.num_slots)
    occupied = jnp.arange(config.num_slots) < len(known)
    requests = dataclasses.replace(
        scheduler.init(config.num_slots), request_id=column(range(len(known))), resident=occupied, active=occupied,
        num_tokens=column(known), num_computed=column(computed), prompt_len=column(known),
        max_tokens=jnp.full((config.num_slots,), config.max_len, jnp.int32),
        expected_tokens=column([n + 1 for n in known]), arrival=jnp.arange(config.num_slots, dtype=jnp.int32),
    )  # fmt: skip
    pages = kv_cache.pages_for(requests.num_computed, config.page_size)
    return EngineState(
        scheduler=requests,
        pool=jax.jit(kv_cache.grow, static_argnums=2)(kv_cache.init_pool(config), pages, config.num_pages),
        kv=state.kv,
        sampling=dataclasses.replace(
            sampling.init(config.num_slots, config.max_stop_tokens),
            temperature=jnp.full((config.num_slots,), temperature, jnp.float32),
        ),
        tokens=jnp.zeros((config.num_slots, config.max_len), jnp.int32),
    )


def schedule(
    config: EngineConfig, policy: Policy, token_budget: int, state: EngineState
) -> tuple[RaggedBatch, scheduler.SchedulerState, kv_cache.PagePool]:
    """What a step does besides computing: its batch, and the bookkeeping as if no request ended."""
    admitted, plan, pool, packed = core.schedule(config, policy, token_budget, state)
    is_sampled = scheduler.samples(admitted, plan)
    return packed, scheduler.commit(admitted, plan, is_sampled, jnp.zeros_like(is_sampled)), pool


def _time_parts(
    values: flags.FlagValues, config: EngineConfig, policy: Policy, loaded: LoadedModel, step, state: EngineState,
    typical: Typical,
) -> tuple[dict[str, float], EngineState]:  # fmt: skip
    """Median seconds of the whole step and its parts, in turn; consumes `state` and gives one with its KV arrays."""
    model, budget = loaded.config, typical.token_budget
    kv = state.kv
    small = dataclasses.replace(state, kv=jax.tree.map(lambda x: x[:0], kv))
    plan = jax.jit(functools.partial(schedule, config, policy, budget))
    packed, *_ = jax.block_until_ready(plan(small))
    key = jax.random.key(values.seed)
    queries = jax.random.normal(key, (budget, model.num_heads, model.head_dim))
    keys = jax.random.normal(key, (budget, model.num_kv_heads, model.head_dim))
    logits = jax.random.normal(key, (packed.row_slots.shape[0], model.vocab_size))

    dense = jax.jit(functools.partial(_dense, model, kv.value_dtype))
    attend = jax.jit(functools.partial(_attend, model, values.attention))
    write = jax.jit(functools.partial(_write, model), donate_argnums=0)
    sample = jax.jit(functools.partial(_sample, config.sampling))

    def run_write(_: EngineState) -> jax.Array:
        nonlocal kv
        kv = write(kv, keys, packed)
        return kv.k

    def run_step(own: EngineState) -> jax.Array:
        nonlocal kv
        new, report = step(loaded.params, dataclasses.replace(own, kv=kv))
        kv = new.kv
        return report.token

    runs: dict[str, Callable[[EngineState], Any]] = {
        "step": run_step,
        "dense": lambda _: dense(loaded.params, packed),
        "attention": lambda _: attend(kv, queries.astype(kv.value_dtype), packed),
        "kv_write": run_write,
        "sampling": lambda own: sample(logits, own.sampling, packed.row_slots, own.scheduler.num_tokens),
        "scheduling": plan,
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(-1, NUM_REPEATS):  # the first one compiles
        for name, part in runs.items():
            own = jax.block_until_ready(jax.tree.map(jnp.copy, small))  # the step consumes it
            start_s = time.perf_counter()
            jax.block_until_ready(part(own))
            if repeat >= 0:
                seconds[name].append(time.perf_counter() - start_s)
    return {name: float(np.median(times)) for name, times in seconds.items()}, dataclasses.replace(state, kv=kv)


def _dense(model: ModelConfig, kv_dtype: jnp.dtype, params, packed: RaggedBatch):
    """All that is computed per token without its context.  Queries stand where attention's result would."""
    bound = decoder.bind(model, params)
    rope = jax.lax.optimization_barrier(decoder.rope_angles(model, packed.positions))
    x, extent, stored = bound.embed_tokens(packed.tokens), Extent(packed.cu_q_lens[-1]), []
    for layer in bound.layers:
        q, k, v = layer.project_qkv(x, rope, extent, kv_dtype)
        stored.append((k, v))  # given back, so that they are computed
        x = layer.project_out(x, q, extent)
        x = layer.down(x, layer.up_gate(x, extent=extent), extent)
    return bound.logits(x[batches.last_tokens(packed)], batches.num_rows(packed)), stored


def _attend(model: ModelConfig, implementation: str | None, kv, x, packed):
    """Each layer's result is the next one's query, so that they run in order and none is left out."""
    for index in range(model.num_layers):
        x = paged_attention(
            x, kv.k, kv.v, index, packed.kv_lens, packed.page_indices, packed.cu_q_lens, packed.num_decode,
            implementation=implementation,
        ).astype(kv.value_dtype)  # fmt: skip
    return x


def _write(model: ModelConfig, kv: kv_cache.KVPages, keys, packed: RaggedBatch) -> kv_cache.KVPages:
    offset = packed.positions % kv.k.shape[3]
    for index in range(model.num_layers):
        kv = kv_cache.write(kv, index, keys, keys, packed.pages, offset)
    return kv


def _sample(parts: SamplingParts, logits, how: sampling.SamplingState, slots, num_tokens):
    return sampling.sample(logits, how, slots, num_tokens[slots], parts)


def _padded(size: int, numbers: Sequence[int]) -> jax.Array:
    return jnp.array([*numbers, *[0] * (size - len(numbers))], jnp.int32)
