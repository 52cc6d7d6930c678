"""What does scheduling cost?  Admit, plan, pages, pack and commit as one compiled program, over the number of slots.

    python -m experiments.scheduling_cost [--num_slots=64,512] [--token_budget=256]

Claim        a step's scheduling takes at most 300 us at 512 slots: continuous batching needs no second thread for it.
Method       a steady state is laid out (nearly all slots decode, some prefill); a launch schedules 16 steps in a row inside
             one program, as the engine's step does, without a model; median of --repeats launches, divided by 16.
Hardware     any.        Minutes      less than 1.        Expected     100 to 300 us on 2 CPU cores.
"""

import dataclasses
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments import breakdown, figure_flags
from experiments.record import make_record, write_record
from nanojax import engine as core
from nanojax import scheduler
from nanojax.admission import make_forecast
from nanojax.array_types import Array
from nanojax.config import EngineConfig, ModelConfig
from nanojax.scheduler import Policy

NAME = "scheduling_cost"
NUM_STEPS = 16
"""Steps per launch."""
MODEL = ModelConfig(
    "bookkeeping only", num_layers=1, d_model=8, num_heads=1, num_kv_heads=1, head_dim=8, d_ff=8, vocab_size=8, max_len=1024
)  # fmt: skip


def define_flags(values: flags.FlagValues) -> None:
    figure_flags.define(values)
    flags.DEFINE_list("num_slots", ["64", "512"], "Numbers of slots.", flag_values=values)
    flags.DEFINE_integer("token_budget", 1024, "Tokens per step.", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("repeats", 50, "Timed launches.", lower_bound=1, flag_values=values)


def run(values: flags.FlagValues) -> dict:
    """Times each number of slots; prints the table, writes and returns the record."""
    metrics = {}
    for num_slots in map(int, values.num_slots):
        seconds = np.sort(measure(num_slots, values.token_budget, 3 if values.smoke else values.repeats))
        median_s = float(np.median(seconds))
        metrics[f"scheduling_s_{num_slots}"] = median_s
        low, high = seconds[len(seconds) // 10], seconds[-1 - len(seconds) // 10]
        print(f"{num_slots:>5} slots: {1e6 * median_s:6.0f} us   (p10 {1e6 * low:.0f}, p90 {1e6 * high:.0f})")
    config = {"token_budget": values.token_budget, "repeats": values.repeats}
    record = make_record(NAME, "measured", metrics=metrics, config=config, seed=values.seed)
    path = pathlib.Path(values.out) / f"{NAME}.json"
    write_record(record, path)
    print(f"record {path}")
    return record


def measure(num_slots: int, token_budget: int, repeats: int) -> list[float]:
    """Seconds per step, by launch; 7/8 of the slots decode with 300 tokens in the cache, the others start long prompts."""
    num_decode = min(num_slots - num_slots // 8, token_budget)
    num_prompts = min(num_slots // 8, token_budget - num_decode)
    config = EngineConfig(
        token_budgets=(token_budget,), num_slots=num_slots, num_pages=64 * num_slots, max_len=MODEL.max_len
    )
    room = NUM_STEPS * (token_budget - num_decode) // max(num_prompts, 1)
    chunks = (min(room, MODEL.max_len - NUM_STEPS),) * num_prompts
    policy = Policy(make_forecast("peak_memory"), scheduler.first_come)
    typical = breakdown.Typical(token_budget, 1, num_decode, chunks, 300)
    state = breakdown.lay_out(config, typical, core.init(config, MODEL, jnp.float32), 0.0)

    def step(_, carry: tuple[core.EngineState, Array]) -> tuple[core.EngineState, Array]:
        state, used = carry
        packed, booked, pool = breakdown.schedule(config, policy, token_budget, state)
        used += sum(
            jnp.sum(leaf, dtype=jnp.int32) for leaf in jax.tree.leaves(packed)
        )  # what nobody uses is not computed
        return dataclasses.replace(state, scheduler=booked, pool=pool), used

    @jax.jit
    def launch(state: core.EngineState) -> Array:
        return jax.lax.fori_loop(0, NUM_STEPS, step, (state, jnp.int32(0)))[1]

    jax.block_until_ready(launch(state))
    seconds = []
    for _ in range(repeats):
        start_s = time.perf_counter()
        jax.block_until_ready(launch(state))
        seconds.append((time.perf_counter() - start_s) / NUM_STEPS)
    return seconds


if __name__ == "__main__":
    figure_flags.launch(define_flags, run)
