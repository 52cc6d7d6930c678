"""What does scheduling cost?  Admit, plan, pages, pack and commit as one compiled program, over the number of slots.

    python -m experiments.scheduling_cost [--num_slots=64,512] [--token_budget=256]

Claim        a step's scheduling takes at most 300 us at 512 slots: continuous batching needs no second thread for it.
Method       a steady state is laid out (nearly all slots decode, some prefill); median of --repeats calls, each blocked.
Hardware     any.        Minutes      less than 1.        Expected     100 to 300 us on 2 CPU cores.
"""

import functools
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
from nanojax.config import EngineConfig, ModelConfig
from nanojax.scheduler import Policy

NAME = "scheduling_cost"
MODEL = ModelConfig(
    "bookkeeping only", num_layers=1, d_model=8, num_heads=1, num_kv_heads=1, head_dim=8, d_ff=8, vocab_size=8, max_len=1024
)  # fmt: skip


def define_flags(values: flags.FlagValues) -> None:
    figure_flags.define(values)
    flags.DEFINE_list("num_slots", ["64", "512"], "Numbers of slots.", flag_values=values)
    flags.DEFINE_integer("token_budget", 1024, "Tokens per step.", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("repeats", 200, "Timed calls.", lower_bound=1, flag_values=values)


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
    """Seconds of each call; 7/8 of the slots decode with 300 tokens in the cache, the others start a prompt."""
    num_decode = min(num_slots - num_slots // 8, token_budget)
    room = max(token_budget - num_decode, 0)
    chunks = tuple(
        len(part) for part in np.array_split(np.arange(room), min(num_slots // 8, max(room, 1))) if len(part)
    )
    config = EngineConfig(token_budgets=(token_budget,), num_slots=num_slots, num_pages=64 * num_slots, max_len=1024)
    policy = Policy(make_forecast("peak_memory"), scheduler.first_come)
    typical = breakdown.Typical(token_budget, 1, num_decode, chunks, 300)
    state = breakdown.lay_out(config, typical, core.init(config, MODEL, jnp.float32), 0.0)
    plan = jax.jit(functools.partial(breakdown.schedule, config, policy, token_budget))
    jax.block_until_ready(plan(state))
    seconds = []
    for _ in range(repeats):
        start_s = time.perf_counter()
        jax.block_until_ready(plan(state))
        seconds.append(time.perf_counter() - start_s)
    return seconds


if __name__ == "__main__":
    figure_flags.launch(define_flags, run)
