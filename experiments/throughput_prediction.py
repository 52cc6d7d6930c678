"""How many tokens per second does a pipeline promise?  Dense batch over the time of its layers, from published timings only.

    tokens/s per device = dense batch / (layers x steady layer time) / devices

Layer times come from the layer simulator with Table 2's efficiencies and the paper's interference table: nothing of what
is predicted (Figures 7, 9, 11) is used.  Left out, so that a prediction is an upper bound: embedding, logits, sampling,
norms, scheduling, and batches that are not full.
"""

import dataclasses

from absl import flags

from experiments import layer_timings
from nanojax.config import PRESETS
from nanojax.pipeline import library
from nanojax.pipeline.ir import Pipeline

__all__ = ["Prediction", "named", "predict"]

NUM_LAYERS = 8  # simulated; the layers repeat


@dataclasses.dataclass(frozen=True)
class Prediction:
    """`tokens_per_s_per_device`, and the steady time of one layer behind it."""

    tokens_per_s_per_device: float
    layer_time_s: float


def predict(
    model_name: str, num_devices: int, pipeline: Pipeline, input_len: float, output_len: float, values: flags.FlagValues,
) -> Prediction:  # fmt: skip
    """`pipeline` on A100s, prompts and outputs of these mean lengths (tokens), as the flags of `layer_timings` say."""
    lengths = {"input_len": input_len, "output_len": output_len}
    work = layer_timings.setting(model_name, num_devices, pipeline.num_tokens, profile=values.profile, **lengths)
    timeline = work.timeline(pipeline, values, num_layers=NUM_LAYERS)
    step_s = PRESETS[model_name].num_layers * timeline.layer_time_s
    return Prediction(pipeline.num_tokens / step_s / num_devices, timeline.layer_time_s)


def named(name: str, model_name: str, num_tokens: int, num_devices: int) -> Pipeline:
    """A ready-made pipeline cut for a model."""
    return library.PIPELINES[name](num_tokens, PRESETS[model_name].num_experts > 0, num_devices)
