"""Does each rung of the ladder run what the cost model says, with the same tokens?"""

import functools

import jax.numpy as jnp
import pytest
from absl import flags

from experiments import generate, offline_throughput, rungs, serving, serving_flags
from nanojax import hardware
from nanojax.config import PRESETS
from nanojax.pipeline.cost_model import roofline_durations, steady_shape
from nanojax.pipeline.ir import OpKind
from nanojax.pipeline.library import PIPELINES
from nanojax.pipeline.profile import OpProfile, ProfileTable

KINDS = (OpKind.KQV, OpKind.DEC_ATTN, OpKind.PF_ATTN, OpKind.O, OpKind.UG, OpKind.D)
# The step of 64 tokens falls off a cliff that two of 32 do not reach; below, time hardly depends on tokens.
CLIFF = OpProfile((8, 32, 64), ((1e-3, 1.1e-3, 10e-3),))


def parsed(experiment, *arguments) -> flags.FlagValues:
    values = flags.FlagValues()
    experiment.define_flags(values)
    values(["experiment", "--smoke", *map(str, arguments)])
    return serving_flags.with_smoke(values)


@pytest.fixture
def profile(tmp_path):
    path = tmp_path / "smoke.profile.json"
    table = ProfileTable("smoke", "by hand", 1, "simulated", "a test", dict.fromkeys(KINDS, CLIFF))
    path.write_text(table.to_json())
    return path


def test_a_rung_that_loses_is_sequential_and_one_that_gains_is_split(profile):
    values = parsed(offline_throughput, "--pipeline=nano_batched", f"--op_profile={profile}")
    loaded = serving.load(values)
    chosen = rungs.choose(values, loaded.config)
    assert {budget: one.pipeline.name for budget, one in chosen.items()} == {16: "sequential", 64: "nano_batched"}
    times = {budget: (one.sequential_s or 0.0, one.pipeline_s or 0.0) for budget, one in chosen.items()}
    assert 0 < times[16][0] < times[16][1]
    assert 0 < times[64][1] < times[64][0]
    assert times[64][0] == pytest.approx(4 * 10e-3, rel=0.5)  # attention has its own, fewer tokens
    assert serving.describe(values, loaded)["pipeline_by_budget"]["16"]["pipeline"] == "sequential"
    lines = rungs.text(chosen).splitlines()
    assert lines[0].startswith("16 tokens: sequential (modelled layer ")
    assert lines[1].startswith("64 tokens: nano_batched (modelled layer ")


def test_the_tokens_are_those_of_the_plain_engine(profile):
    def tokens(*arguments):
        values = parsed(offline_throughput, *arguments, "--num_requests=5", "--dtype=float32")
        loaded = serving.load(values)
        engine = serving.engine(values, loaded)
        return [answer.token_ids for answer in engine.generate(serving.work(values, loaded, 5).requests)]

    assert tokens("--pipeline=nano_batched", f"--op_profile={profile}") == tokens()


def test_without_the_switch_or_a_cost_model_the_pipeline_runs_everywhere(profile):
    for arguments in ((f"--op_profile={profile}", "--noswitch"), ()):
        values = parsed(generate, "--pipeline=nano_batched", *arguments)
        chosen = rungs.choose(values, serving.load(values).config)
        assert {one.pipeline.name for one in chosen.values()} == {"nano_batched"}
        assert ("not modelled" in rungs.text(chosen)) == (not arguments)


def test_a_profile_of_another_model_is_refused(tmp_path):
    path = tmp_path / "other.profile.json"
    path.write_text(ProfileTable("other", "by hand", 1, "simulated", "a test", dict.fromkeys(KINDS, CLIFF)).to_json())
    values = parsed(generate, "--pipeline=nano_batched", f"--op_profile={path}")
    with pytest.raises(ValueError, match="op_profile is of other on 1 devices; one of smoke on 1 is needed"):
        rungs.choose(values, serving.load(values).config)


def test_by_the_roofline_of_a_gpu_small_batches_lose_and_streams_let_large_ones_gain():
    model, spec = PRESETS["llama-3-8b"], hardware.hardware_spec("a100-80-sxm")
    durations = functools.partial(roofline_durations, model, spec, 1, bytes_per_value=jnp.dtype("bfloat16").itemsize)

    def gain(num_tokens, *, overlaps):
        layer_times = rungs.modelled_layer_times(
            lambda n: steady_shape(n, 512, 2048), durations, is_moe=False, overlaps=overlaps
        )
        sequential_s, pipeline_s = layer_times(PIPELINES["llama_8b"](num_tokens, False, 1))
        return sequential_s / pipeline_s

    assert gain(64, overlaps=True) < 1 < gain(2048, overlaps=True)
    assert gain(2048, overlaps=False) == pytest.approx(1)  # compute-bound: a split costs nothing and brings nothing
