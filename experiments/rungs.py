"""Which pipeline does the engine run on each rung of its ladder, and what does the cost model say of it?

`--pipeline` where splitting gains, `sequential` where it loses (`nanojax.pipeline.ladder`).  Times are those of `--op_profile`
(a table of `experiments.profile_ops`), else the roofline of the accelerator here.  Where there is neither, as on a CPU without a
profile, nothing is modelled and the pipeline runs on every rung; so it does with `--noswitch`.

Modelled is the batch on which serving settles with prompts of a quarter of `--max_len` and outputs as long, or of
`--expected_output_len`.  Without streams nodes run one after another, and then a split pays only where smaller products are faster.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from absl import flags

from experiments import serving_flags
from nanojax import hardware
from nanojax.config import ModelConfig
from nanojax.pipeline.cost_model import BatchShape, Duration, roofline_durations, steady_shape
from nanojax.pipeline.interference import PAPER_TABLE_3_AND_TEXT
from nanojax.pipeline.ir import Pipeline
from nanojax.pipeline.json_format import from_json
from nanojax.pipeline.ladder import choose_per_rung
from nanojax.pipeline.library import PIPELINES, on_one_stream, sequential
from nanojax.pipeline.profile import ProfileTable
from nanojax.pipeline.simulate import simulate
from pallas_kernels.device import platform

__all__ = ["LayerTimes", "Rung", "choose", "described", "modelled_layer_times", "text", "uses_streams"]

NUM_LAYERS = 8  # simulated; the layers repeat
LENGTH_FRACTION = 4  # of `max_len`, that a prompt and an output are taken to have

LayerTimes = Callable[[Pipeline], tuple[float, float]]
"""Seconds of a layer: of `sequential` on the pipeline's number of tokens, and of the pipeline."""


@dataclasses.dataclass(frozen=True)
class Rung:
    """pipeline: what runs with this budget.    sequential_s, pipeline_s: modelled layers, of `--pipeline`; None if not modelled."""

    pipeline: Pipeline
    sequential_s: float | None
    pipeline_s: float | None


def uses_streams(values: flags.FlagValues) -> bool:
    """Whether nodes run on the GPU streams that they name."""
    return platform() == "gpu" if values.streams is None else values.streams


def choose(values: flags.FlagValues, model: ModelConfig) -> dict[int, Rung]:
    """A rung for each token budget that has a pipeline: all budgets, or the one that `--pipeline`'s file is for.

    Raises ValueError for a file that cannot be read, that is for no budget of the ladder, or that profiles another model.
    """
    if values.pipeline is None:
        return {}
    config = serving_flags.engine_config(values, model.max_len)
    layer_times = _layer_times(values, model, config.max_len)
    modelled: dict[int, tuple[float, float]] = {}

    def gain(pipeline: Pipeline) -> float:
        if layer_times is None:
            return float("inf")
        sequential_s, pipeline_s = modelled[pipeline.num_tokens] = layer_times(pipeline)
        return sequential_s / pipeline_s if values.switch else float("inf")

    make, budgets = _maker(values, model, config.token_budgets)
    plain = functools.partial(sequential, is_moe=model.num_experts > 0)
    chosen = choose_per_rung(make, budgets, gain, make_sequential=plain)
    return {budget: Rung(pipeline, *modelled.get(budget, (None, None))) for budget, pipeline in chosen.items()}


def described(rungs: Mapping[int, Rung]) -> dict[str, Any]:
    """For a record's `config`: by budget the pipeline's name, and the modelled seconds of a layer."""
    return {
        str(budget): {"pipeline": one.pipeline.name, "sequential_s": one.sequential_s, "pipeline_s": one.pipeline_s}
        for budget, one in rungs.items()
    }


def text(rungs: Mapping[int, Rung]) -> str:
    """A line per rung; empty where no pipeline was asked for."""
    lines = []
    for budget, one in rungs.items():
        why = "not modelled: no --op_profile, no published numbers of this device"
        if one.sequential_s is not None and one.pipeline_s is not None:
            why = f"modelled layer {1e6 * one.pipeline_s:,.1f} µs split, {1e6 * one.sequential_s:,.1f} µs sequential"
        lines.append(f"{budget} tokens: {one.pipeline.name} ({why})\n")
    return "".join(lines)


def modelled_layer_times(shape_of: Callable[[int], BatchShape], durations: Callable[[BatchShape], Duration], *,
                         is_moe: bool, overlaps: bool) -> LayerTimes:  # fmt: skip
    """Layer times from the layer simulator, under the paper's interference where nodes overlap."""

    def layer_times(pipeline: Pipeline) -> tuple[float, float]:
        duration = durations(shape_of(pipeline.num_tokens))
        pair = sequential(pipeline.num_tokens, is_moe=is_moe), pipeline if overlaps else on_one_stream(pipeline)
        plain, split = (simulate(one, duration, PAPER_TABLE_3_AND_TEXT, num_layers=NUM_LAYERS) for one in pair)
        return plain.layer_time_s, split.layer_time_s

    return layer_times


def _layer_times(values: flags.FlagValues, model: ModelConfig, max_len: int) -> LayerTimes | None:
    """The cost model that the flags and the device offer; None if there is none."""
    spec = hardware.detect().spec
    if values.op_profile is not None:
        table = ProfileTable.from_json(pathlib.Path(values.op_profile).read_text(encoding="utf-8"))
        if (table.model, table.num_devices) != (model.name, 1):
            raise ValueError(
                f"--op_profile is of {table.model} on {table.num_devices} devices; one of {model.name} on 1 is needed"
            )
        durations = table.durations
    elif spec is not None:
        width = jnp.dtype(values.dtype).itemsize
        durations = functools.partial(roofline_durations, model, spec, 1, bytes_per_value=width)
    else:
        return None
    mean_len = max(max_len // LENGTH_FRACTION, 1)
    output_len = values.expected_output_len or mean_len

    def shape_of(num_tokens: int) -> BatchShape:
        return steady_shape(num_tokens, mean_len, output_len)

    return modelled_layer_times(shape_of, durations, is_moe=model.num_experts > 0, overlaps=uses_streams(values))


def _maker(
    values: flags.FlagValues, model: ModelConfig, budgets: tuple[int, ...]
) -> tuple[Callable[[int], Pipeline], tuple[int, ...]]:
    """`--pipeline` as a function of the budget, and the budgets that it serves."""
    if values.pipeline in PIPELINES:
        make = PIPELINES[values.pipeline]
        return (lambda budget: make(budget, model.num_experts > 0, 1)), budgets
    pipeline = from_json(pathlib.Path(values.pipeline).read_text(encoding="utf-8"))
    if pipeline.num_tokens not in budgets:
        raise ValueError(
            f"pipeline {pipeline.name!r} is for {pipeline.num_tokens} tokens, which is none of token_budgets={budgets}"
        )
    return (lambda _: pipeline), (pipeline.num_tokens,)
