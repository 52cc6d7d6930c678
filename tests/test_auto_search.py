"""Does the search's program leave a pipeline that the experiments take, from any profile?"""

import pytest
from absl import flags

from experiments import auto_search
from experiments.record import read_record
from nanojax.pipeline.ir import OpKind
from nanojax.pipeline.json_format import from_json
from nanojax.pipeline.profile import OpProfile, ProfileTable
from nanojax.pipeline.validate import validate


def parsed(*arguments) -> flags.FlagValues:
    values = flags.FlagValues()
    auto_search.define_flags(values)
    values(["program", "--smoke", *map(str, arguments)])
    return values


def check(folder, record):
    assert read_record(folder / "auto_search.json") == record
    assert record["origin"] == "simulated"
    pipeline = from_json((folder / "auto_search.pipeline.json").read_text())
    validate(pipeline, num_devices=1)
    assert "memory 1" in (folder / "auto_search.txt").read_text()
    return pipeline


@pytest.mark.usefixtures("unchecked")
def test_a_model_on_one_gpu(tmp_path, capsys):
    values = parsed("--model=llama-3-8b", "--num_devices=1", "--grid=256", f"--out={tmp_path}")
    record = auto_search.run(values)
    pipeline = check(tmp_path, record)
    assert pipeline.num_tokens == auto_search.SMOKE["num_tokens"]
    assert record["metrics"]["sequential_time_ratio"] > 1.1
    assert record["metrics"]["layer_time_bound_s"] <= record["metrics"]["layer_time_s"]
    assert "times the searched pipeline's" in capsys.readouterr().out


@pytest.mark.usefixtures("unchecked")
def test_the_durations_of_a_profile_decide(tmp_path):
    """Decode attention and dense work take equally long and do not disturb each other: overlap nearly halves the layer."""
    per_token = {OpKind.KQV: 1e-6, OpKind.DEC_ATTN: 4e-6, OpKind.O: 1e-6, OpKind.UG: 1e-6, OpKind.D: 1e-6}
    ops = {op: OpProfile((128,), ((128 * s,),)) for op, s in per_token.items()}
    ops[OpKind.PF_ATTN] = OpProfile((128,), ((1e-9,),))
    path = tmp_path / "mine.profile.json"
    path.write_text(ProfileTable("llama-3-8b", "by hand", 1, "simulated", "a test", ops).to_json())
    arguments = ("--model=llama-3-8b", "--num_devices=1", "--grid=256", "--prompt_len=1", "--output_len=511")
    record = auto_search.run(parsed(*arguments, "--interference=none", f"--profile={path}", f"--out={tmp_path}"))
    check(tmp_path, record)
    assert record["config"]["profile"] == "mine.profile.json"
    assert record["metrics"]["layer_time_s"] == pytest.approx(512 * 4e-6, rel=0.02)
    assert record["metrics"]["sequential_time_ratio"] == pytest.approx(2, rel=0.02)


def test_a_batch_that_memory_cannot_hold_is_refused(tmp_path):
    with pytest.raises(ValueError, match="num_tokens=4096: 1 x a100-80 hold the KV cache of at most"):
        auto_search.run(parsed("--model=llama-3-8b", "--num_devices=1", "--num_tokens=4096", f"--out={tmp_path}"))
