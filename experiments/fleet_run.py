"""How does a fleet of simulated engines do?  Flags, the run, its metrics and its figure, for `experiments.simulate_serving`."""

import concurrent.futures
import os
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import flags
from tqdm import tqdm

from experiments import figures
from nanojax.config import EngineConfig
from nanojax.fleet import FleetConfig, Routing, simulate_fleet
from nanojax.scheduler import Policy
from nanojax.simulate import Host
from nanojax.step_time import StepTime
from nanojax.workload import Rounds, Trace

__all__ = ["define_flags", "draw", "run"]

NUM_POINTS = 120


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of fleet and router."""
    flags.DEFINE_integer(
        "num_replicas", None, "Engines; if not given there is one, and no router.", 1, flag_values=values
    )
    flags.DEFINE_enum(
        "routing", Routing.ROUND_ROBIN.value, [r.value for r in Routing], "Who is next.", flag_values=values
    )
    flags.DEFINE_float("window_s", 1.0, "How old the router's knowledge of loads can be.", 1e-6, flag_values=values)
    flags.DEFINE_float(
        "fleet_duration_s", 60.0, "What is not finished then stays unfinished.", 1e-6, flag_values=values
    )
    flags.DEFINE_integer("chunk_size", 32, "Replicas in one call of the compiled program.", 1, flag_values=values)


def run(
    values: flags.FlagValues, config: EngineConfig, policy: Policy, host: Host, step: StepTime, work: Trace | Rounds
) -> tuple[dict[str, Any], dict[str, dict[str, list]]]:
    """Metrics and series.  Raises ValueError for requests that no engine can serve."""
    fleet = FleetConfig(
        values.num_replicas, Routing(values.routing), window_s=values.window_s, chunk_size=values.chunk_size
    )
    duration_s, start_s, cpu_start_s = values.fleet_duration_s, time.perf_counter(), time.process_time()
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool, tqdm(total=duration_s, unit=" s") as bar:

        def on_window(end_s: float, num_done: int) -> None:
            bar.update(end_s - bar.n)
            bar.set_postfix_str(f"{num_done} requests done")

        result = simulate_fleet(
            config, policy, step, work, fleet, duration_s=duration_s, host=host, run_all=pool.map, on_window=on_window
        )
    wall_s, cpu_s = time.perf_counter() - start_s, time.process_time() - cpu_start_s
    is_done, is_routed = np.isfinite(result.finish_s), result.replica >= 0
    is_started = np.isfinite(result.first_token_s)
    ttft_s = result.first_token_s[is_started] - result.arrival_s[is_started]
    latency = (result.finish_s[is_done] - result.arrival_s[is_done]) / work.output_lens[is_done]
    by_replica = np.bincount(result.replica[is_routed], minlength=values.num_replicas)
    metrics: dict[str, Any] = {
        "wall_s": wall_s, "cpu_s": cpu_s, "simulated_s": duration_s, "num_replicas": values.num_replicas,
        "num_steps": int(result.num_steps.sum()), "simulated_steps_per_s": float(result.num_steps.sum() / wall_s),
        "num_requests": int(is_routed.sum()), "num_requests_done": int(is_done.sum()),
        "output_tokens_of_done_requests_per_s": float(work.output_lens[is_done].sum() / duration_s),
        "num_reused_tokens": int(result.reused_len.sum()),
        "num_requests_per_replica_min": int(by_replica.min()), "num_requests_per_replica_max": int(by_replica.max()),
    }  # fmt: skip
    for name, column in (("ttft_s", ttft_s), ("normalized_latency_s_per_token", latency)):
        for percent in (50, 99):
            metrics[f"{name}_p{percent}"] = float(np.percentile(column, percent)) if len(column) else None
    time_s = np.linspace(0, duration_s, NUM_POINTS)

    def count(times_s: np.ndarray) -> np.ndarray:
        return np.searchsorted(np.sort(times_s[is_routed]), time_s, side="right")

    arrived, started, done = (count(t) for t in (result.arrival_s, result.first_token_s, result.finish_s))
    series = {
        "fleet": {
            "time_s": time_s.tolist(),
            "num_waiting": (arrived - started).tolist(),
            "num_decoding": (started - done).tolist(),
            "num_done": done.tolist(),
        }
    }
    return metrics, series


def draw(record: Mapping[str, Any], path: pathlib.Path) -> pathlib.Path:
    """Requests in the fleet over time."""
    table, config, metrics = record["series"]["fleet"], record["config"], record["metrics"]
    lines = [
        figures.Line(label, record["origin"], table["time_s"], table[name], marked=False)
        for name, label in (
            ("num_waiting", "before the first token"),
            ("num_decoding", "decoding"),
            ("num_done", "done"),
        )
    ]
    notes = [
        f"{config['model']} on {config['num_devices']} x {config['hardware']} each; routing {config['routing']}, loads up to "
        f"{config['window_s']:g} s old.",
        f"{metrics['num_requests']:,} requests, {metrics['num_steps']:,} steps, simulated in {metrics['wall_s']:.0f} s.",
    ]
    return figures.line_chart(
        f"A fleet of {config['num_replicas']:,} engines", figures.sources_of(record), lines, path,
        x_label="simulated time (s)", y_label="requests", notes=notes,
    )  # fmt: skip
