"""What does the real engine reach on the device here, by lengths and pipeline?  The `measured` mode of Figures 7 and 9.

A model that fits the device stands in for the paper's, so tokens/s do not compare; shares of each one's optimum (Eq. 5),
and ratios of pipelines, do.  Constant lengths: the paper's over `--length_divisor`; all requests there at once.
"""

import dataclasses
import shlex
from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import flags
from tqdm import tqdm

from experiments import serving, serving_flags
from nanojax import hardware, workload
from nanojax.metrics import optimal_tokens_per_s, summarize

__all__ = ["Measured", "define_flags", "measure"]

DEFAULTS = {
    "num_requests": 16,
    "length_divisor": 16,
    "token_budgets": "16,64",
    "num_slots": 16,
    "num_pages": 256,
    "max_len": 640,
    "switch": False,  # each pipeline is to be measured, where it loses too
}
SMOKE = {"model": serving_flags.SMOKE_MODEL, "num_requests": 4, "cache_dir": ""}


@dataclasses.dataclass(frozen=True)
class Measured:
    """tokens_per_s: pipeline -> lengths -> input and output tokens per second, median over repeats.

    optimal_tokens_per_s: paper Eq. 5 with the peak measured here.    config: for a record.
    """

    tokens_per_s: dict[str, dict[str, float]]
    optimal_tokens_per_s: float
    config: dict[str, Any]


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of the mode."""
    flags.DEFINE_bool("measured", False, "Also run the real engine on the device here.", flag_values=values)
    flags.DEFINE_string(
        "engine", "", "Flags of that engine, as of experiments.offline_throughput: '--model=llama-3-8b --token_budgets=2048'.",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_integer("repeats", 1, "Runs of each bar, in turn; medians count.", 1, flag_values=values)


def measure(
    values: flags.FlagValues, lengths: Mapping[str, tuple[float, float]], pipelines: Mapping[str, str | None]
) -> Measured:
    """Serves requests of each kind of `lengths` (prompt, output; tokens) on each of `pipelines` (label -> `--pipeline`).

    Raises ValueError for flags or lengths that do not suit the engine.
    """
    own = _engine_flags(values)
    loaded = serving.load(own)
    limit = serving.engine_config(own, loaded).max_len
    engines = {}
    for label, pipeline in pipelines.items():
        own.pipeline = pipeline
        engines[label] = serving.engine(own, loaded)
        engines[label].warm_up()
    own.pipeline = None
    rng = np.random.default_rng(values.seed)
    found: dict[str, dict[str, list[float]]] = {label: {name: [] for name in lengths} for label in engines}
    with tqdm(total=values.repeats * len(lengths) * len(engines), unit=" runs") as bar:
        for _ in range(values.repeats):
            for name, pair in lengths.items():
                input_len, output_len = (max(1, round(mean / own.length_divisor)) for mean in pair)
                if input_len + output_len > limit:
                    raise ValueError(
                        f"{name}: {input_len} + {output_len} tokens exceed max_len={limit}; raise --length_divisor"
                    )
                trace = workload.constant_trace(own.num_requests, input_len=input_len, output_len=output_len)
                requests = workload.synthetic_requests(trace, loaded.config.vocab_size, rng)
                for label, engine in engines.items():
                    engine.reset_metrics()
                    engine.generate(requests)
                    rate: Any = summarize(engine.records)["total_tokens_per_s"]
                    found[label][name].append(rate)
                    bar.update()
    small = {"sizes": (128,), "num_repeats": 3} if values.smoke else {}
    peak = hardware.measure_peak_flops(own.dtype, **small)
    medians = {label: {name: float(np.median(rates)) for name, rates in by.items()} for label, by in found.items()}
    optimum = optimal_tokens_per_s(peak.median, loaded.config.num_active_params)
    config = serving.describe(own, loaded) | {"pipelines": dict(pipelines), "repeats": values.repeats}
    return Measured(medians, optimum, config)


def _engine_flags(values: flags.FlagValues) -> flags.FlagValues:
    """The engine's own flags.  Raises `flags.Error` for one that does not exist."""
    own = flags.FlagValues()
    serving_flags.define(own)
    serving_flags.define_work(own)
    for name, value in (DEFAULTS | (SMOKE if values.smoke else {})).items():
        own.set_default(name, value)
    own.set_default("seed", values.seed)
    if rest := own(["engine", *shlex.split(values.engine)])[1:]:
        raise ValueError(f"--engine: {' '.join(rest)!r} is no flag")
    return own
