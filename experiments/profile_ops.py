"""How long does each operation of a model take on the device here, by tokens and context?

Table: a profile that the cost model reads (`nanojax.pipeline.profile.ProfileTable`): NanoFlow (arXiv 2408.12757v2), section
4.1.1, the interference-free profile over batch sizes.
Claim: none; it is the input of search and simulation on this device.
Command: python -m experiments.profile_ops [--model=llama-3-8b --num_tokens=128,256,512,1024,2048 --context_lens=512,1024]
Hardware: any, one device; the defaults (SmolLM2-135M's shape, random weights) are meant for a CPU.    Minutes: 2.
Expected: dense operations get cheaper per token up to a few hundred tokens; decode attention grows with rows x context.

Each operation runs over all layers of the model, or `--num_layers` of them, which compile faster, and its time is divided
by their number (`experiments/op_programs.py`).
Repeats are interleaved over all programs, medians count.

    out/profile_ops.profile.json  the profile table
    out/profile_ops.json          record: series `profile`, medians with spread, the roofline beside them
    out/profile_ops.png           microseconds per token and layer
"""

import dataclasses
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from tqdm import tqdm

from experiments import comparison, figures, serving, serving_flags
from experiments.op_programs import Point, attention_points, dense_points
from experiments.record import make_record, write_record
from nanojax import hardware
from nanojax.config import ModelConfig
from nanojax.hardware import HardwareSpec
from nanojax.models import decoder
from nanojax.pipeline.cost_model import BatchShape, roofline_durations
from nanojax.pipeline.ir import NanoBatch, OpKind
from nanojax.pipeline.profile import OpProfile, ProfileTable
from nanojax.weights import LoadedModel

NAME = "profile_ops"
SMOKE = {"num_tokens": "8,16", "context_lens": "12,20", "repeats": 2}


def define_flags(values: flags.FlagValues) -> None:
    serving_flags.define(values)
    values.set_default("weights", serving_flags.RANDOM_WEIGHTS)
    flags.DEFINE_string("out", "out", "Folder for profile, record and figure.", flag_values=values)
    flags.DEFINE_string("num_tokens", "16,64,128,256,512", "Tokens of an operation, ascending.", flag_values=values)
    flags.DEFINE_string("context_lens", "128,512", "Mean contexts of attention, ascending.", flag_values=values)
    flags.DEFINE_integer("num_layers", 0, "Layers of the programs; 0 for all.", lower_bound=0, flag_values=values)
    flags.DEFINE_integer("repeats", 10, "Timings of each program; medians count.", 1, flag_values=values)


def run(values: flags.FlagValues) -> dict[str, Any]:
    """Times, prints, writes profile, record and figure; gives the record."""
    for name, value in SMOKE.items() if values.smoke else ():
        values.set_default(name, value)
    with serving_flags.one_line_errors():
        sizes, contexts = _counts(values.num_tokens), _counts(values.context_lens)
        loaded = _first_layers(serving.load(values), values.num_layers)
    print(f"{loaded.config.name}: compiling ...", flush=True)
    points = [*dense_points(values, loaded, sizes), *attention_points(values, loaded.config, sizes, contexts)]
    seconds = _time(points, values.repeats)
    device = hardware.detect()
    profile = _profile(values, loaded.config, device.name, points, [float(np.median(times)) for times in seconds])
    table = _table(values, loaded.config, points, seconds, device.spec or _measured_spec(values, device.name))
    flags_shown = {
        name: values[name].value for name in ("attention", "page_size", "num_tokens", "context_lens", "num_layers")
    }
    record = make_record(
        NAME, "measured", metrics={"num_programs": len(points), "num_repeats": values.repeats}, seed=values.seed,
        config={"model": loaded.config.name, "dtype": values.dtype, **flags_shown}, series={"profile": table},
    )  # fmt: skip
    folder = pathlib.Path(values.out)
    write_record(record, folder / f"{NAME}.json")
    (folder / f"{NAME}.profile.json").write_text(profile.to_json() + "\n", encoding="utf-8")
    picture = figures.line_chart(
        f"Time of each operation: {loaded.config.name}, {values.dtype}", figures.sources_of(record), _lines(table),
        folder / f"{NAME}.png", x_label="tokens", y_label="µs per token, one layer", is_log=(True, True),
    )  # fmt: skip
    print(comparison.text_table(table))
    print(f"profile {folder / NAME}.profile.json, record {folder / NAME}.json, figure {picture}")
    return record


def _first_layers(loaded: LoadedModel, num_layers: int) -> LoadedModel:
    """The model with its first `num_layers` layers only; all of them for 0.  Raises ValueError where it has fewer."""
    if num_layers == 0:
        return loaded
    config, params = decoder.first_layers(loaded.config, loaded.params, num_layers)
    return dataclasses.replace(loaded, config=config, params=params)


def _time(points: Sequence[Point], num_repeats: int) -> list[list[float]]:
    """Seconds per operation, `num_repeats` times each, in turn; the first run of each compiles and does not count."""
    seconds: list[list[float]] = [[] for _ in points]
    with tqdm(total=(num_repeats + 1) * len(points), unit=" programs", file=sys.stderr, dynamic_ncols=True) as bar:
        for repeat in range(-1, num_repeats):
            for point, times in zip(points, seconds, strict=True):
                start_s = time.perf_counter()
                jax.block_until_ready(point.call())
                if repeat >= 0:
                    times.append((time.perf_counter() - start_s) / point.num_runs)
                bar.update()
    return seconds


def _profile(
    values: flags.FlagValues, model: ModelConfig, device: str, points: Sequence[Point], medians_s: Sequence[float]
) -> ProfileTable:
    """The points as tables.  Grouped up and gate projections are less the router, which was timed in them."""
    found = {(p.op, p.num_tokens, p.context_len): s for p, s in zip(points, medians_s, strict=True)}
    for t in {p.num_tokens for p in points if p.op is OpKind.ROUTER}:
        rest_s = found[OpKind.UG, t, None] - found[OpKind.ROUTER, t, None]
        found[OpKind.UG, t, None] = max(rest_s, 0.1 * found[OpKind.UG, t, None])
    ops, extras = {}, {}
    for op in dict.fromkeys(p.op for p in points):
        sizes = sorted({t for kind, t, _ in found if kind == op})
        contexts = sorted({c for kind, _, c in found if kind == op and c is not None})
        rows = tuple(tuple(found[op, t, context] for t in sizes) for context in contexts or [None])
        (ops if isinstance(op, OpKind) else extras)[op] = OpProfile(tuple(sizes), rows, tuple(contexts))
    source = f"experiments.{NAME}, {values.dtype}, medians of {values.repeats}"
    return ProfileTable(model.name, device, 1, "measured", source, ops, extras)


def _table(
    values: flags.FlagValues, model: ModelConfig, points: Sequence[Point], seconds: Sequence[Sequence[float]],
    spec: HardwareSpec,
) -> dict[str, list]:  # fmt: skip
    """The record's columns; `roofline_s` is what the device's peak and bandwidth allow (operations of a layer only)."""
    width = jnp.dtype(values.dtype).itemsize
    bounds = []
    for p in points:
        bound = None
        if isinstance(p.op, OpKind):
            decode = p.op is OpKind.DEC_ATTN
            context = p.context_len or 1
            shape = BatchShape(p.num_tokens * decode, p.num_tokens * (not decode), context, context)
            duration = roofline_durations(model, spec, 1, shape, bytes_per_value=width)
            bound = duration(p.op, NanoBatch(0, p.num_tokens))
        bounds.append(bound)
    return {
        "operation": [p.op.value if isinstance(p.op, OpKind) else p.op for p in points],
        "num_tokens": [p.num_tokens for p in points],
        "context_len": [p.context_len for p in points],
        "median_s": [float(np.median(times)) for times in seconds],
        "low_s": [min(times) for times in seconds],
        "high_s": [max(times) for times in seconds],
        "roofline_s": bounds,
    }


def _lines(table: dict[str, list]) -> list[figures.Line]:
    """A line per operation and context: microseconds per token."""
    keys = dict.fromkeys(zip(table["operation"], table["context_len"], strict=True))
    lines = []
    for name, context in keys:
        chosen = [i for i, n in enumerate(table["operation"]) if (n, table["context_len"][i]) == (name, context)]
        x = [table["num_tokens"][i] for i in chosen]
        y = [1e6 * table["median_s"][i] / table["num_tokens"][i] for i in chosen]
        label = name if context is None else f"{name}, context {context}"
        panel = "attention" if context is not None else "others (logits, sampling: per step)"
        lines.append(figures.Line(label, "measured", x, y, panel))
    return lines


def _measured_spec(values: flags.FlagValues, name: str) -> HardwareSpec:
    """This device by its measured peak and copy bandwidth; it has no network."""
    small = {"sizes": (128,), "num_repeats": 3} if values.smoke else {}
    peak = hardware.measure_peak_flops(values.dtype, **small).median
    bandwidth = hardware.measure_copy_bandwidth(num_bytes=1 << (20 if values.smoke else 28), num_repeats=3).median
    return HardwareSpec(name, 0, 0.0, bandwidth, bandwidth, peak, None, "measured")


def _counts(text: str) -> list[int]:
    """`"16,64"` -> [16, 64].  Raises ValueError unless whole numbers ascend."""
    counts = [int(number) for number in serving_flags.numbers(text)]
    if counts != sorted(set(counts)) or counts != serving_flags.numbers(text):
        raise ValueError(f"{text!r} must be ascending whole numbers")
    return counts


if __name__ == "__main__":
    serving_flags.launch(define_flags, run)
