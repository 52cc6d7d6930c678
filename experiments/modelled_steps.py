"""How long would a step take on hardware that is not here?  Flags -> step times of a model's pipelines, for the simulator.

From a profile of this device (`--step_profile`, a record of `experiments.validate_simulator`), or from a cost model: the
top budget runs `--pipeline` through the layer simulator at the mix that serving settles on, budgets it is not made for run
`sequential`.  A split pipeline takes as long however full its batch is; `sequential` pays for the contexts that are there.
"""

import pathlib

from absl import flags

from experiments import layer_timings, serving_flags, step_profile
from experiments.record import read_record
from nanojax import hardware, step_time
from nanojax.config import PRESETS, EngineConfig, ModelConfig
from nanojax.pipeline.cost_model import BatchShape, Duration, roofline_durations, steady_shape
from nanojax.pipeline.ir import OpKind, Pipeline
from nanojax.pipeline.json_format import from_json
from nanojax.pipeline.library import PIPELINES
from nanojax.pipeline.published_profile import table2_profile
from nanojax.pipeline.simulate import Shares, simulate
from nanojax.step_time import StepCoefficients
from nanojax.workload import Rounds, Trace

__all__ = ["define_flags", "step_time_of"]

NUM_LAYERS = 8  # simulated; the layers repeat
BYTES_PER_VALUE = 2


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags that `step_time_of` reads besides those of `serving_flags`."""
    known = [*hardware.PAPER_TABLE_1, *hardware.REAL_HARDWARE]
    flags.DEFINE_enum("hardware", "a100-80", known, "Accelerator, as published.", flag_values=values)
    flags.DEFINE_integer("num_devices", 8, "Tensor-parallel devices of one engine.", 1, flag_values=values)
    flags.DEFINE_enum(
        "profile", "table2", ["table2", "roofline"], "Efficiencies of the operations.", flag_values=values
    )
    flags.DEFINE_enum(
        "interference", "paper_and_text", list(layer_timings.INTERFERENCE), "What a share is worth.", flag_values=values
    )
    flags.DEFINE_enum("shares", Shares.FIXED.value, [one.value for one in Shares], "As in fig07.", flag_values=values)
    flags.DEFINE_string(
        "step_profile", None, "A record with step times of this device, in place of a cost model.", flag_values=values
    )
    flags.DEFINE_float("overhead_s", 0.0, "Host time of a step that nothing hides.", 0.0, flag_values=values)
    flags.DEFINE_float(
        "offload_slowdown", 1.03, "Step time with KV offload over without (paper: 3 % more).", 1.0, flag_values=values
    )
    flags.DEFINE_float(
        "offload_bytes_per_s",
        20e9,
        "Host to device, each device; brings offloaded tokens back.",
        1.0,
        flag_values=values,
    )


def step_time_of(values: flags.FlagValues, config: EngineConfig, lengths: Trace | Rounds) -> StepCoefficients:
    """Step times for the budgets of `config`, serving requests like `lengths`.

    Raises ValueError for a pipeline that is for none of the budgets, or a step profile of other budgets.
    """
    if values.step_profile is not None:
        step, budgets = step_profile.from_series(read_record(values.step_profile))
        if budgets != config.token_budgets:
            raise ValueError(f"--step_profile is for token_budgets={budgets}, not {config.token_budgets}")
        return step
    model, spec = PRESETS[values.model], hardware.hardware_spec(values.hardware)
    input_len, output_len = float(lengths.input_lens.mean()), float(lengths.output_lens.mean())
    shapes = [steady_shape(budget, input_len, output_len) for budget in config.token_budgets]

    def durations(shape: BatchShape) -> Duration:
        if values.profile == "table2":
            return table2_profile(model, spec, values.num_devices).durations(shape)
        return roofline_durations(model, spec, values.num_devices, shape)

    is_split = [_pipeline(values, budget, model) for budget in config.token_budgets]
    if values.pipeline is not None and not any(is_split):
        raise ValueError(f"--pipeline={values.pipeline} is for none of token_budgets={config.token_budgets}")
    token_bytes = BYTES_PER_VALUE * model.kv_values_per_token / values.num_devices
    extras = {
        "overhead_s": values.overhead_s,
        "head_s_per_row": 2.0 * model.d_model * model.vocab_size / values.num_devices / spec.peak_flops,
        "restore_s_per_token": token_bytes / values.offload_bytes_per_s if values.offloads_kv else 0.0,
        "slowdown": values.offload_slowdown if values.offloads_kv else 1.0,
    }
    rungs = []
    for shape, pipeline in zip(shapes, is_split, strict=True):
        if pipeline is None:
            kinds = _kinds(model, shape.num_tokens, values.num_devices)
            rungs.append(step_time.from_durations(durations, [_with_both(shape)], kinds, model.num_layers, **extras))
        else:
            interference = layer_timings.INTERFERENCE[values.interference]
            timeline = simulate(
                pipeline, durations(shape), interference, num_layers=NUM_LAYERS, shares=Shares(values.shares)
            )
            rungs.append(step_time.from_layer_times([timeline.layer_time_s], model.num_layers, **extras))
    return step_time.ladder(rungs)


def _pipeline(values: flags.FlagValues, budget: int, model: ModelConfig) -> Pipeline | None:
    """The pipeline of a budget; None for `sequential`.  Ready-made ones are for the top budget."""
    if values.pipeline in (None, "sequential"):
        return None
    if values.pipeline not in PIPELINES:
        pipeline = from_json(pathlib.Path(values.pipeline).read_text())
        return pipeline if pipeline.num_tokens == budget else None
    top = serving_flags.engine_config(values, values.max_len).token_budgets[-1]
    return PIPELINES[values.pipeline](budget, model.num_experts > 0, values.num_devices) if budget == top else None


def _kinds(model: ModelConfig, num_tokens: int, num_devices: int) -> list[OpKind]:
    """A layer's operations one after another, collectives only between several devices."""
    pipeline = PIPELINES["sequential"](num_tokens, model.num_experts > 0, num_devices)
    return [node.op for node in pipeline.nodes]


def _with_both(shape: BatchShape) -> BatchShape:
    """A shape with at least one decode and one prefill token, so that both attentions get a line."""
    num_decode = min(max(shape.num_decode_tokens, 1), shape.num_tokens - 1)
    contexts = max(shape.mean_context_len, 2.0), max(shape.mean_prefill_context_len, 2.0)
    return BatchShape(num_decode, shape.num_tokens - num_decode, *contexts)
