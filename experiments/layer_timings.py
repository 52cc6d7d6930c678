"""How long do a layer's operations take in the figures of pipelines?  A model on devices, a batch, and where times come from."""

import dataclasses
from collections.abc import Callable, Mapping

from absl import flags

from nanojax.config import PRESETS, ModelConfig
from nanojax.hardware import PAPER_TABLE_1, HardwareSpec
from nanojax.pipeline.cost_model import BatchShape, Duration, Roofline, op_cost, roofline_durations, steady_shape
from nanojax.pipeline.interference import (
    NO_INTERFERENCE,
    PAPER_TABLE_3,
    PAPER_TABLE_3_AND_TEXT,
    RELEASED_TABLES,
    Interference,
)
from nanojax.pipeline.ir import NanoBatch, OpKind, Pipeline, Resource
from nanojax.pipeline.published_profile import released_profile, table2_profile
from nanojax.pipeline.simulate import Shares, Timeline, simulate

__all__ = [
    "INTERFERENCE", "MODEL_FLAGS", "PROFILES", "Setting", "define_flags", "define_model_flags", "durations_of", "setting", "setting_of",
]  # fmt: skip

INTERFERENCE: dict[str, Interference] = {
    "paper": PAPER_TABLE_3,
    "paper_and_text": PAPER_TABLE_3_AND_TEXT,
    "released": RELEASED_TABLES,
    "none": NO_INTERFERENCE,
}
MODEL_FLAGS = ("profile", "interference", "shares", "spares_idle")
"""What `define_model_flags` defines: a record's config has them."""
PROFILES = {
    "table2": "efficiencies of the paper's Table 2, 8 A100-80GB",
    "released": "timings in the authors' repository, LLaMA-2-70B on 8 A100-80GB",
    "roofline": "roofline of the published peaks",
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """A model at work on `num_devices` of `hardware`, each step on a batch of `shape`.

    duration: seconds of a nano-operation alone, one layer.
    """

    model: ModelConfig
    hardware: HardwareSpec
    num_devices: int
    shape: BatchShape
    duration: Duration

    def occupancy(self, kind: OpKind, nano_batch: NanoBatch) -> float:
        """Part of the device that a nano-operation keeps busy alone: what it took as a part of the whole batch / its own time."""
        num_tokens, alone_s = self.shape.num_tokens_of(kind, nano_batch), self.duration(kind, nano_batch)
        if not num_tokens or not alone_s:
            return 1.0
        whole = NanoBatch(0, max(self.shape.num_tokens, nano_batch.stop))
        at_best_s = self.duration(kind, whole) * num_tokens / self.shape.num_tokens_of(kind, whole)
        return min(1.0, at_best_s / alone_s)

    def timeline(self, pipeline: Pipeline, values: flags.FlagValues, *, num_layers: int) -> Timeline:
        """`pipeline` at work, under what the flags of `define_model_flags` say."""
        return simulate(
            pipeline, self.duration, INTERFERENCE[values.interference], num_layers=num_layers,
            shares=Shares(values.shares), occupancy=self.occupancy if values.spares_idle else None,
        )  # fmt: skip

    def peak_time(self, kind: OpKind, nano_batch: NanoBatch) -> Mapping[Resource, float]:
        """Seconds for which each resource were busy at its published peak."""
        cost = op_cost(self.model, kind, nano_batch, self.shape, num_devices=self.num_devices)
        compute_s, memory_s, network_s = Roofline(self.hardware, self.num_devices).bounds_s(cost)
        return {Resource.COMPUTE: compute_s, Resource.MEMORY: memory_s, Resource.NETWORK: network_s}


def setting(
    model_name: str, num_devices: int, num_tokens: int, *, profile: str, input_len: float, output_len: float
) -> Setting:
    """`model_name` on A100s with a batch of `num_tokens`, prompts and outputs of these mean lengths (tokens)."""
    model, hardware = PRESETS[model_name], PAPER_TABLE_1["a100-80"]
    shape = steady_shape(num_tokens, input_len, output_len)
    duration = durations_of(model_name, num_devices, profile)(shape)
    return Setting(model, hardware, num_devices, shape, duration)


def durations_of(model_name: str, num_devices: int, profile: str) -> Callable[[BatchShape], Duration]:
    """Seconds of `model_name`'s operations on `num_devices` A100s, for batches of any shape.

    The released timings know only one model; others then get Table 2's efficiencies.
    """
    model, hardware = PRESETS[model_name], PAPER_TABLE_1["a100-80"]
    if profile == "roofline":
        return lambda shape: roofline_durations(model, hardware, num_devices, shape)
    if profile == "released" and (model_name, num_devices) == ("llama-2-70b", 8):
        return released_profile().durations
    return table2_profile(model, hardware, num_devices).durations


def setting_of(model_name: str, num_devices: int, num_tokens: int, values: flags.FlagValues) -> Setting:
    """The same, as the flags of `define_flags` say."""
    lengths = {"input_len": values.input_len, "output_len": values.output_len}
    return setting(model_name, num_devices, num_tokens, profile=values.profile, **lengths)


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags that `setting_of` reads, and those of the simulation."""
    flags.DEFINE_integer("input_len", 512, "Mean prompt, tokens.", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("output_len", 1024, "Mean output, tokens.", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("num_layers", 16, "Layers that are simulated.", lower_bound=1, flag_values=values)
    define_model_flags(values)


def define_model_flags(values: flags.FlagValues) -> None:
    """Defines what durations and shares are worth."""
    flags.DEFINE_enum("profile", "table2", list(PROFILES), "Where durations come from.", flag_values=values)
    flags.DEFINE_enum(
        "interference", "paper_and_text", list(INTERFERENCE), "What a share R is worth.", flag_values=values
    )
    flags.DEFINE_enum(
        "shares", Shares.FIXED.value, [one.value for one in Shares],
        "fixed: a node runs at P(R) also when it is alone (the paper's stage II); fair: the device is divided among those "
        "that run.", flag_values=values,
    )  # fmt: skip
    flags.DEFINE_bool(
        "spares_idle", False, "What an operation leaves idle of the device, others take without slowing it down (`simulate`'s "
        "occupancy); else it counts twice, as in the paper's D_best / P(R).", flag_values=values,
    )  # fmt: skip
