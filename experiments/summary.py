"""How does a run read on a terminal?  Progress while it runs, sample texts, and a table of its metrics at the end."""

import contextlib
import os
import pathlib
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tqdm import tqdm

from nanojax.live_request import Event

WIDTH = 100


@contextlib.contextmanager
def progress(num_requests: int, questions: Mapping[str, str]) -> Iterator[Callable[[Event], None]]:
    """A bar over requests with tokens beside it; gives the function that takes the engine's events.

    The first answer of each category in `questions` (request id without its number -> text) is printed as it finishes.
    """
    num_tokens, shown = 0, set()
    start_s = time.perf_counter()
    with tqdm(total=num_requests, unit=" requests", file=sys.stderr, dynamic_ncols=True, smoothing=0) as bar:

        def on_event(event: Event) -> None:
            nonlocal num_tokens
            num_tokens += len(event.token_ids)
            if event.output is None:
                return
            rate = num_tokens / (time.perf_counter() - start_s)
            bar.set_postfix_str(f"{num_tokens} new tokens, {rate:.0f} / s", refresh=False)
            bar.update()
            category = event.request_id.rpartition("-")[0]
            if event.request_id in questions and category not in shown:
                shown.add(category)
                bar.write(sample(event.request_id, questions[event.request_id], event.output.text or ""))

        yield on_event


def sample(request_id: str, question: str, answer: str) -> str:
    """A question, shortened to one line, and its answer."""
    asked = textwrap.shorten(question, WIDTH - len(request_id) - 2, placeholder=" ...")
    lines = [part for line in answer.strip().splitlines() for part in textwrap.wrap(line, WIDTH - 4) or [""]]
    return f"{request_id}: {asked}\n" + textwrap.indent("\n".join(lines), "    ") + "\n"


def table(metrics: Mapping[str, Any], device_name: str) -> str:
    """The metrics that matter most, with their units; those that the run does not have are left out."""
    m = metrics
    lines = [
        f"measured on {device_name}",
        f"requests        {m['num_requests']} ({m['num_input_tokens']:,} tokens in, {m['num_output_tokens']:,} out) "
        f"in {m['duration_s']:.2f} s",
        f"throughput      {m['total_tokens_per_s']:,.0f} tokens/s  (in {m['input_tokens_per_s']:,.0f}, "
        f"out {m['output_tokens_per_s']:,.0f})",
    ]
    if "percent_of_optimal" in m:
        lines.append(
            f"optimal         {m['optimal_tokens_per_s']:,.0f} tokens/s (measured peak of {m['peak_flops'] / 1e9:,.0f} "
            f"GFLOP/s / 2 x active parameters); reached {m['percent_of_optimal']:.1f} %"
        )
    lines += ["latency                       p50       p90       p99"]
    for label, name, scale, unit in (
        ("time to first token", "ttft_s", 1, "s"),
        ("time per output token", "tpot_s", 1e3, "ms"),
        ("normalized latency", "normalized_latency_s_per_token", 1e3, "ms"),
    ):
        columns = [m[f"{name}_{rank}"] for rank in ("p50", "p90", "p99")]
        numbers = "".join("         -" if x is None else f"{x * scale:10.{2 if scale == 1 else 1}f}" for x in columns)
        lines.append(f"  {label:<22}{numbers} {unit}")
    if "num_steps" in m:
        lines += [
            f"steps           {m['num_steps']}, {m['tokens_per_step_mean']:.1f} tokens each on average "
            f"({100 * m['budget_fill_fraction']:.0f} % of the token budgets)",
            f"KV pages        {100 * m['page_occupancy_fraction_mean']:.0f} % in use on average, "
            f"{100 * m['page_occupancy_fraction_max']:.0f} % at most; {m['num_preemptions']} preemptions",
        ]
    return "\n".join(lines)


def process_age_s() -> float | None:
    """Seconds since this process was started, None where the system does not tell (it does on Linux)."""
    try:
        started_ticks = int(pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        up_s = float(pathlib.Path("/proc/uptime").read_text().split()[0])
        return up_s - started_ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return None
