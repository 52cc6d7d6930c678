"""How many tokens per second does LLaMA-3-8B serve here, of how many at best?  Random weights, offline, in a steady state.

Points: prompts and outputs of 512/512, 1024/512, 512/1024 and of the paper's datasets; run whole operations one after
another (`sequential`), cut in nano-batches, overlapped on two streams, and by a searched pipeline; three drivers.  The most
telling come first, in case time ends.  The optimum is the paper's Eq. 5 with the peak measured by `peaks`; `busy_fraction` says
for which part of the time the device ran anything.
"""

import dataclasses
import functools
import gc
import pathlib
import shutil
import time
from typing import Any

import jax
from absl import flags

from experiments import serving, serving_flags
from experiments.gpu_report import power, steady_state, trace_times
from experiments.gpu_report.cases import Case, Row, Setting
from experiments.gpu_report.peaks import limits
from nanojax.config import PRESETS, ModelConfig
from nanojax.metrics import optimal_tokens_per_s
from nanojax.pipeline.compiler_options import Graphs
from nanojax.serve import Engine
from nanojax.weights import LoadedModel

MODEL, MAX_BUDGET, PAGE_SIZE, MAX_LEN = "llama-3-8b", 2048, 64, 4096
RESERVED_BYTES = 8e9
"""Of the card's memory, for what a step computes with."""

NUM_TRACED_LAUNCHES = 5
SEARCHED = "searched.pipeline.json"


@dataclasses.dataclass(frozen=True)
class Point:
    """One run.

    pipeline: name of a ready-made one, or a file in the report's folder; None runs whole operations.
    overlap: how its streams divide the multiprocessors; "xla" leaves it to the GPU's scheduler.    graphs: see `Graphs`.
    """

    lengths: str
    how: str
    pipeline: str | None = None
    use_streams: bool = False
    driver: str = "dispatch_ahead"
    overlap: str = "xla"
    graphs: str | None = None

    @property
    def name(self) -> str:
        """For tables."""
        return f"{self.lengths} {self.how}, {self.driver}"


_WAYS = {
    "sequential": {},
    "decode beside dense": {
        "pipeline": "decode_beside_dense",
        "use_streams": True,
        "overlap": "sm_exclusive",
    },
    "overlap": {"pipeline": "llama_8b", "use_streams": True},
    "searched": {"pipeline": SEARCHED, "use_streams": True},
    "decode beside dense, no graphs": {
        "pipeline": "decode_beside_dense",
        "use_streams": True,
        "overlap": "sm_exclusive",
        "graphs": Graphs.NO.value,
    },
    "decode beside dense, cuBLAS": {
        "pipeline": "decode_beside_dense",
        "use_streams": True,
        "overlap": "attention_exclusive",
    },
    "overlap, divided": {"pipeline": "llama_8b", "use_streams": True, "overlap": "sm_exclusive"},
    "nano_batched": {"pipeline": "nano_batched"},
}


def points(is_smoke: bool) -> list[Point]:
    """In the order of what one wants to know first."""

    def point(lengths: str, how: str, **more: Any) -> Point:
        return Point(lengths, how, **(_WAYS[how] | more))

    if is_smoke:
        return [point("12/6", "sequential"), point("12/6", "searched")]
    both = ("sequential", "decode beside dense")
    found = []
    for lengths in fitted_lengths(is_smoke):
        found += [point(lengths, how) for how in both]
        found += [Point(lengths, "fitted", fitted_file(lengths), use_streams=True, overlap="sm_exclusive")]
    found += [point("512/512", how) for how in _WAYS if how not in both]
    found += [point("512/512", how, driver=driver) for how in both for driver in ("host_sync", "device_loop")]
    return found + [point(lengths, how) for lengths in ("512/1024", "sharegpt", "lmsys", "splitwise") for how in both]


def cases(setting: Setting) -> list[Case]:
    """A case for each point."""
    return model_cases(setting, MODEL, points(setting.is_smoke))


def model_cases(setting: Setting, model: str, wanted: list[Point]) -> list[Case]:
    """The same for another model."""
    needs_s = 0.0 if setting.is_smoke else 30.0
    return [
        Case(point.name, lambda point=point: [_measure(point, model, setting)], needs_s, limit_s=150)
        for point in wanted
    ]


def flag_values(point: Point, model: str, found: steady_state.Plan, setting: Setting) -> flags.FlagValues:
    """The flags of a serving experiment that runs this point.  Raises ValueError for a pipeline file that is not there."""
    values = flags.FlagValues()
    serving_flags.define(values)
    page_size = 16 if setting.is_smoke else PAGE_SIZE
    arguments = {
        "model": model, "weights": serving_flags.RANDOM_WEIGHTS, "driver": point.driver, "seed": setting.seed,
        "token_budgets": found.token_budget, "page_size": page_size, "num_pages": found.num_pages,
        "num_slots": found.num_slots, "max_len": found.max_len, "cache_dir": "",
        "overlap": point.overlap,
        # A resident's output is the rest of one, of which the paper's rule would make a mean that suits no fresh request.
        "admission": "oracle",
        "switch": "false",  # what a pipeline does is to be measured, where the cost model says that it loses too
    }  # fmt: skip
    if point.pipeline is not None:
        file = setting.out / point.pipeline
        if file.suffix == ".json" and not file.exists():
            raise ValueError(f"there is no {file.name}: no pipeline was searched for")
        arguments["pipeline"] = file if file.exists() else point.pipeline
    if setting.is_smoke:
        arguments["attention"] = "reference"  # which compiles fast
    if point.use_streams:
        arguments["streams"] = "true"
    if point.graphs is not None:
        arguments["cuda_graphs"] = point.graphs
    values(["gpu_report", *(f"--{name}={value}" for name, value in arguments.items())])
    return values


def plan_of(point: Point, model: str, setting: Setting) -> tuple[steady_state.Lengths, steady_state.Plan, LoadedModel]:
    """What is served, in which capacities, by which weights."""
    loaded = _load(serving_flags.SMOKE_MODEL if setting.is_smoke else model, setting.seed)
    small = setting.is_smoke
    found = steady_state.lengths(point.lengths, max_len=MAX_LEN, seed=setting.seed)
    capacity = steady_state.plan(
        found, loaded.config, max_budget=32 if small else MAX_BUDGET, kv_bytes=kv_bytes(_memory_bytes(), loaded.config),
        page_size=16 if small else PAGE_SIZE, spare_slots=4 if small else 16,
    )  # fmt: skip
    return found, capacity, loaded


def make_engine(
    point: Point, model: str, setting: Setting
) -> tuple[Engine, steady_state.Lengths, steady_state.Plan, Row]:
    """A compiled engine, and what it took."""
    gc.collect()  # another engine's cache
    start_s = time.monotonic()
    found, capacity, loaded = plan_of(point, model, setting)
    load_s = time.monotonic() - start_s
    name = serving_flags.SMOKE_MODEL if setting.is_smoke else model
    engine = serving.engine(flag_values(point, name, capacity, setting), loaded)
    start_s = time.monotonic()
    engine.warm_up()
    return engine, found, capacity, {"load_s": load_s, "compile_s": time.monotonic() - start_s}


def _measure(point: Point, model: str, setting: Setting) -> Row:
    engine, found, capacity, took = make_engine(point, model, setting)
    warm, steps, max_s = (2, 12, 20) if setting.is_smoke else (10, 150, 8)
    with power.sampled() as drawn:
        taken = steady_state.serve(
            engine, found, capacity.num_decode, num_warm_steps=warm, num_steps=steps, max_s=max_s, seed=setting.seed
        )
    rates = steady_state.metrics(taken)
    bounds = limits(setting)
    optimum = optimal_tokens_per_s(bounds.flops_per_s, engine.model.num_active_params)
    return {
        "model": engine.model.name, "lengths": point.lengths, "pipeline": point.how, "driver": point.driver,
        "uses_streams": point.use_streams, **rates, "optimal_tokens_per_s": optimum,
        "percent_of_optimal": 100 * rates["total_tokens_per_s"] / optimum, "peak_source": bounds.source,
        "busy_fraction": _busy_fraction(engine, setting.out / "trace_serving"),
        **drawn, **dataclasses.asdict(capacity), **took,
    }  # fmt: skip


def _busy_fraction(engine: Engine, folder: pathlib.Path) -> float | None:
    """Part of the next few launches' time in which the device ran any kernel; None if the profiler saw none."""
    shutil.rmtree(folder, ignore_errors=True)
    with jax.profiler.trace(str(folder)):
        for _ in range(NUM_TRACED_LAUNCHES):
            engine.poll()
    kernels = trace_times.read_trace(folder)
    shutil.rmtree(folder, ignore_errors=True)
    return trace_times.busy_fraction(kernels) if kernels else None


@functools.lru_cache(maxsize=1)
def _load(model: str, seed: int) -> LoadedModel:
    """Random weights, made once for all points of a process."""
    values = flags.FlagValues()
    serving_flags.define(values)
    values(["gpu_report", f"--model={model}", f"--weights={serving_flags.RANDOM_WEIGHTS}", f"--seed={seed}"])
    return serving.load(values)


def kv_bytes(memory_bytes: float | None, model: ModelConfig) -> float:
    """Memory for the cache: what the weights and a step leave of the device's, or a little where that is not known."""
    return 1e6 if memory_bytes is None else memory_bytes - 2.0 * model.num_params - RESERVED_BYTES


def fitted_lengths(is_smoke: bool) -> tuple[str, ...]:
    """Lengths that have a pipeline of their own (`fitted_file`); for the first of them one is searched for, too."""
    return ("12/6",) if is_smoke else ("512/512", "1024/512")


def fitted_file(lengths: str) -> str:
    """Where `search_card` leaves what suits these lengths."""
    return f"fitted-{lengths.replace('/', '-')}.pipeline.json"


def search_target(setting: Setting, memory_bytes: float | None, lengths: str) -> tuple[tuple[float, float], int]:
    """Mean prompt and output, and tokens of a step, of a steady state: what a pipeline is searched for."""
    found = steady_state.lengths(lengths, max_len=MAX_LEN, seed=setting.seed)
    model = serving.SMOKE_CONFIG if setting.is_smoke else PRESETS[MODEL]
    capacity = steady_state.plan(
        found, model, max_budget=32 if setting.is_smoke else MAX_BUDGET, kv_bytes=kv_bytes(memory_bytes, model),
        page_size=16 if setting.is_smoke else PAGE_SIZE,
    )  # fmt: skip
    return (float(found.input_lens.mean()), float(found.output_lens.mean())), capacity.token_budget


def _memory_bytes() -> float | None:
    return (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
