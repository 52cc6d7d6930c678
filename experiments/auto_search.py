"""Which pipeline does auto-search find for a model, a machine and mean lengths?

Figure: the search of NanoFlow (arXiv 2408.12757v2), section 4.1; its answer for LLaMA-2-70B is Figure 6.
Claim: a practical plan in about 10 minutes; a proven one takes the authors' solver hours or days.
Command: python -m experiments.auto_search --model=llama-2-70b --num_devices=8 --prompt_len=512 --output_len=1024
    [--hardware=h100 --profile=roofline | --profile=FILE.json --num_devices=1]
Hardware: none.    Minutes: 2 at most (`--time_limit_s`).
Expected: 2.307 ms per layer for the above, 18 % less than no overlap, 5 % less than Figure 6's pipeline, 5 % above the bound.

Stage I is solved to a proven optimum for each structure that is tried; stage II (shares) keeps its bound open.  The answer is
the same each time unless the time limit cuts the search, which is then said.

    out/auto_search.pipeline.json   the pipeline: every experiment's `--pipeline=` accepts it
    out/auto_search.json            record: layer times, bounds, gain
    out/auto_search.txt             one steady layer as text
"""

import pathlib
import sys
import time
from typing import Any

from absl import flags
from tqdm import tqdm

from experiments import comparison, figure_flags, layer_timings
from experiments.record import make_record, write_record
from nanojax.config import PRESETS
from nanojax.hardware import PAPER_TABLE_1, REAL_HARDWARE, hardware_spec
from nanojax.pipeline.closed_forms import max_dense_batch
from nanojax.pipeline.cost_model import Duration, roofline_durations, steady_shape
from nanojax.pipeline.json_format import to_json
from nanojax.pipeline.profile import ProfileTable
from nanojax.pipeline.published_profile import released_profile, table2_profile
from nanojax.pipeline.render import text_gantt
from nanojax.pipeline.search.problem import Problem
from nanojax.pipeline.search.search import Found, known_pipelines, search

NAME = "auto_search"
TEXT_COLUMNS = 150
SMOKE = {"num_tokens": 512, "time_limit_s": 10.0}


def define_flags(values: flags.FlagValues) -> None:
    figure_flags.define(values)
    devices = ", ".join(PAPER_TABLE_1 | REAL_HARDWARE)
    flags.DEFINE_enum("model", "llama-2-70b", list(PRESETS), "Whose layers.", flag_values=values)
    flags.DEFINE_string("hardware", "a100-80", f"One of {devices}.", flag_values=values)
    for name, default, text in (
        ("num_devices", 8, "Tensor-parallel devices, of one pipeline stage."),
        ("num_stages", 1, "Pipeline-parallel stages; each holds its part of the layers."),
        ("prompt_len", 512, "Mean prompt, tokens."),
        ("num_tokens", 2048, "Dense batch: tokens per step."),
        ("grid", 128, "Nano-batches are cut at multiples of this many tokens."),
    ):
        flags.DEFINE_integer(name, default, text, lower_bound=1, flag_values=values)
    flags.DEFINE_integer("output_len", 1024, "Mean output, tokens; 0: prefill only.", 0, flag_values=values)
    sources = ", ".join(f"{name} ({text})" for name, text in layer_timings.PROFILES.items())
    flags.DEFINE_string("profile", "table2", f"{sources}, or a file of experiments.profile_ops.", flag_values=values)
    flags.DEFINE_enum(
        "interference",
        "paper_and_text",
        list(layer_timings.INTERFERENCE),
        "What a share R is worth.",
        flag_values=values,
    )
    flags.DEFINE_float("time_limit_s", 120.0, "The best pipeline so far is taken then.", 0.0, flag_values=values)


def run(values: flags.FlagValues) -> dict[str, Any]:
    """Searches, prints, writes pipeline, record and text; gives the record."""
    for name, value in SMOKE.items() if values.smoke else ():
        values.set_default(name, value)
    problem = Problem(
        values.num_tokens, _durations(values), layer_timings.INTERFERENCE[values.interference], values.num_devices,
        PRESETS[values.model].num_experts > 0, values.grid,
    )  # fmt: skip
    start_s = time.perf_counter()
    found = _search_with_progress(problem, values.time_limit_s)
    took_s = time.perf_counter() - start_s
    known_s = {pipeline.name: problem.timeline(pipeline).layer_time_s for pipeline in known_pipelines(problem)}
    layer_s = found.timeline.layer_time_s
    metrics = {
        "layer_time_s": layer_s,
        "layer_time_bound_s": found.bound_s,
        "stage1_layer_time_s": found.order_s,
        "stage1_bound_s": found.order_bound_s,
        "sequential_time_ratio": known_s["sequential"] / layer_s,
        "num_structures": found.num_structures,
        "num_nodes": len(found.timeline.pipeline.nodes),
        "search_s": took_s,
    }
    names = (
        "model",
        "hardware",
        "num_devices",
        "num_stages",
        "num_tokens",
        "prompt_len",
        "output_len",
        "grid",
        "interference",
    )
    config = {name: values[name].value for name in (*names, "time_limit_s")}
    record = make_record(
        NAME, "simulated", metrics=metrics, config=config | {"profile": pathlib.Path(values.profile).name, "is_complete": found.is_complete},
        seed=values.seed, series={"ready_made": {"pipeline": list(known_s), "layer_time_s": list(known_s.values())}},
    )  # fmt: skip
    folder = pathlib.Path(values.out)
    write_record(record, folder / f"{NAME}.json")
    text = text_gantt(found.timeline, width=TEXT_COLUMNS)
    (folder / f"{NAME}.txt").write_text(text + "\n", encoding="utf-8")
    (folder / f"{NAME}.pipeline.json").write_text(to_json(found.timeline.pipeline), encoding="utf-8")
    _show(found, known_s, text)
    print(
        f"pipeline {folder / NAME}.pipeline.json, record {folder / NAME}.json, text {folder / NAME}.txt ({took_s:.0f} s)"
    )
    return record


def _durations(values: flags.FlagValues) -> Duration:
    """Times of operations, alone.  Raises ValueError for a model that does not fit, or a batch that its memory cannot serve."""
    model, hardware = PRESETS[values.model], hardware_spec(values.hardware)
    shape = steady_shape(values.num_tokens, values.prompt_len, values.output_len)
    if values.profile not in layer_timings.PROFILES:
        return ProfileTable.from_json(pathlib.Path(values.profile).read_text(encoding="utf-8")).durations(shape)
    num_devices = values.num_devices * values.num_stages
    largest = max_dense_batch(model, hardware, num_devices, values.prompt_len, max(values.output_len, 1))
    if values.num_tokens > largest:
        raise ValueError(
            f"num_tokens={values.num_tokens}: {num_devices} x {hardware.name} hold the KV cache of at most {largest:.0f} "
            f"tokens per step of {model.name} with prompts of {values.prompt_len} and outputs of {values.output_len} tokens"
        )
    if values.profile == "roofline":
        return roofline_durations(model, hardware, values.num_devices, shape)
    if values.profile == "released":
        known = (values.model, values.num_devices, values.hardware) == ("llama-2-70b", 8, "a100-80")
        if not known:
            raise ValueError("profile=released is of llama-2-70b on 8 x a100-80 only")
        return released_profile().durations(shape)
    return table2_profile(model, hardware, values.num_devices).durations(shape)


def _search_with_progress(problem: Problem, time_limit_s: float) -> Found:
    stop_s = time.monotonic() + time_limit_s
    with tqdm(total=None, unit=" programs", file=sys.stderr, dynamic_ncols=True) as bar:

        def report(stage: str, best_s: float, bound_s: float) -> None:
            bar.set_postfix_str(
                f"{stage}: {best_s * 1e3:.3f} ms per layer, bound {bound_s * 1e3:.3f} ms, open {_open(best_s, bound_s)}"
            )
            bar.update()

        return search(problem, lambda: stop_s - time.monotonic(), report)


def _show(found: Found, known_s: dict[str, float], text: str) -> None:
    pipeline, layer_s = found.timeline.pipeline, found.timeline.layer_time_s
    table = {
        "node": [pipeline.label(i) for i in range(len(pipeline.nodes))],
        "tokens": [f"{pipeline.tokens_of(n).start}..{pipeline.tokens_of(n).stop}" for n in pipeline.nodes],
        "stream": [node.stream for node in pipeline.nodes],
        "share": [node.share for node in pipeline.nodes],
        "layer": [f"-{node.lag}" if node.lag else "0" for node in pipeline.nodes],
    }
    print(comparison.text_table(table))
    print(text)
    print(f"stage I, no interference: {found.order_s * 1e3:.3f} ms per layer, bound {found.order_bound_s * 1e3:.3f} ms")
    print(
        f"stage II: {layer_s * 1e3:.3f} ms per layer, bound {found.bound_s * 1e3:.3f} ms ({_open(layer_s, found.bound_s)} open), "
        f"{found.num_structures} structures tried" + ("" if found.is_complete else "; cut by the time limit")
    )
    for name, seconds in known_s.items():
        print(f"  {name}: {seconds * 1e3:.3f} ms, {seconds / layer_s:.3f} times the searched pipeline's")


def _open(best_s: float, bound_s: float) -> str:
    return f"{100 * (1 - bound_s / best_s):.1f} %"


if __name__ == "__main__":
    figure_flags.launch(define_flags, run)
