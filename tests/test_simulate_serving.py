"""Does the experiment of the simulator serve one engine, a sweep and a fleet, and does a profile of the engine predict it?"""

import dataclasses

import numpy as np
import pytest
import tiny
from absl import flags

from experiments import (
    fig07_offline_throughput,
    fig09_ablation,
    modelled_steps,
    serving_flags,
    simulate_serving,
    step_profile,
    validate_simulator,
)
from experiments.record import read_record
from nanojax import step_time, virtual_run
from nanojax.config import EngineConfig
from nanojax.simulate import simulate
from nanojax.workload import Trace, burst_arrivals, poisson_arrivals

SMALL = ("--smoke", "--trace=constant:40,6", "--num_requests=12", "--max_tokens=6")


def parsed(experiment, *arguments) -> flags.FlagValues:
    values = flags.FlagValues()
    experiment.define_flags(values)
    values(["experiment", *map(str, arguments)])
    return serving_flags.with_smoke(values)


def test_an_engine_is_simulated(tmp_path):
    record = simulate_serving.run(parsed(simulate_serving, *SMALL, f"--out={tmp_path}"))
    assert read_record(tmp_path / "simulate_serving.json") == record
    assert record["origin"] == "simulated"
    assert record["metrics"]["num_requests"] == 12
    assert record["metrics"]["num_output_tokens"] == 72
    assert (tmp_path / "simulate_serving.png").exists()


def test_a_sweep_is_the_same_one_by_one_and_by_vmap(tmp_path):
    arguments = (*SMALL, "--arrival=poisson", "--sweep=request_rate=2,40;seed=0,1")
    alone, together = (
        simulate_serving.run(parsed(simulate_serving, *arguments, *more, f"--out={tmp_path}"))["series"]["sweep"]
        for more in ((), ("--vmap_steps=500",))
    )
    assert alone == together
    assert alone["request_rate"] == [2, 2, 40, 40]
    assert max(alone["ttft_s_mean"][:2]) < min(alone["ttft_s_mean"][2:]), "a higher rate must mean waiting"


def test_conversations_come_back_from_the_offload_tier(tmp_path):
    arguments = (*SMALL, "--arrival=poisson", "--request_rate=1", "--num_rounds=3", "--think_s=1", f"--out={tmp_path}")
    plain, offloaded = (
        simulate_serving.run(parsed(simulate_serving, *arguments, *more))["metrics"]
        for more in ((), ("--offloads_kv", "--offload_slowdown=1"))
    )
    assert offloaded["prefill_tokens_per_step_mean"] < plain["prefill_tokens_per_step_mean"]


def test_a_fleet_is_simulated(tmp_path):
    arguments = (
        "--arrival=poisson",
        "--request_rate=6",
        "--num_replicas=3",
        "--fleet_duration_s=20",
        f"--out={tmp_path}",
    )
    record = simulate_serving.run(parsed(simulate_serving, *SMALL, *arguments))
    assert record["metrics"]["num_requests_done"] == 12
    assert record["series"]["fleet"]["num_done"][-1] == 12
    assert (tmp_path / "simulate_serving.png").exists()


def test_bad_input_is_one_line(tmp_path):
    for arguments, message in (
        (("--trace=prompts",), "takes lengths"),
        (("--num_replicas=2", "--sweep=seed=0,1"), "do not go together"),
        (("--arrival=recorded",), "no arrival times"),
    ):
        with pytest.raises(SystemExit, match=message):
            simulate_serving.run(parsed(simulate_serving, *SMALL, *arguments, f"--out={tmp_path}"))


def test_step_times_follow_pipeline_and_hardware():
    values = parsed(simulate_serving, "--pipeline=llama_70b_figure6", "--token_budgets=512,2048", "--num_slots=2048")
    config = serving_flags.engine_config(values, 4096)
    lengths = Trace("lengths", burst_arrivals(2), np.array([512, 512]), np.array([512, 512]))
    split = modelled_steps.step_time_of(values, config, lengths)
    # The sum of the interference-free layers is the least, the sequential layers are the most; cf. Figure 7 (198 ms).
    assert 80 * 1.8e-3 < float(split.constant_s[1]) < 80 * 2.813e-3
    assert float(split.per_unit_s[1, step_time.FEATURES.index("decode_context")]) == 0
    assert float(split.per_unit_s[0, step_time.FEATURES.index("decode_context")]) > 0, "the lower rung is sequential"
    values.hardware = "h100"
    assert float(modelled_steps.step_time_of(values, config, lengths).constant_s[1]) < float(split.constant_s[1])
    values.offloads_kv = True
    assert float(modelled_steps.step_time_of(values, config, lengths).slowdown) == pytest.approx(1.03)


def test_few_slots_change_nothing(monkeypatch):
    rng = np.random.default_rng(0)
    arrival_s = poisson_arrivals(60, rate_per_s=2.0, rng=rng)
    trace = Trace("busy", arrival_s, rng.integers(1, 30, 60), rng.integers(1, 20, 60))
    config = EngineConfig(token_budgets=(8,), num_slots=24, page_size=4, num_pages=200, max_len=64)
    whole = simulate(config, tiny.policy(), step_time.linear([0.5]), trace)
    monkeypatch.setattr(virtual_run, "MIN_SLOTS", 3)
    grown = simulate(config, tiny.policy(), step_time.linear([0.5]), trace)
    assert max(step.num_running for step in whole.steps) > 12, "the slots must have grown"
    assert grown.steps == whole.steps
    assert grown.records == whole.records


@pytest.mark.parametrize("budgets", [(8, 32), (4, 16, 64)])
def test_profiling_runs_touch_every_budget(budgets):
    config = dataclasses.replace(tiny.GREEDY, token_budgets=budgets, num_slots=8, num_pages=256, max_len=96)
    engine = tiny.engine(config, check_invariants=False)
    engine.warm_up()
    rng = np.random.default_rng(0)
    traces = step_profile.profile_traces(config, rng)
    table = step_profile.time_steps(engine, tiny.policy(), traces, rng)
    assert set(table.rung) == set(range(len(budgets)))
    step = step_profile.fit([table], len(budgets))
    total_s = step_profile.seconds(step, table).sum()
    assert total_s == pytest.approx(table.seconds.sum(), rel=0.05)
    series = {step_profile.SERIES: step_profile.to_series(step, budgets)}
    again, found = step_profile.from_series({"experiment": "test", "series": series})
    assert found == budgets
    np.testing.assert_allclose(again.per_unit_s, step.per_unit_s)


def test_validation_keeps_measured_and_simulated_apart(tmp_path):
    record = validate_simulator.run(parsed(validate_simulator, "--smoke", f"--out={tmp_path}"))
    clocked = read_record(tmp_path / "validate_simulator-measured.json")
    assert (record["origin"], clocked["origin"]) == ("simulated", "measured")
    for kind in ("offline", "online"):
        assert record["metrics"][f"{kind}_total_tokens_per_s"] > 0 < clocked["metrics"][f"{kind}_total_tokens_per_s"]
    assert record["metrics"]["offline_num_steps"] == clocked["metrics"]["offline_num_steps"]
    assert (tmp_path / "validate_simulator.png").exists()


@pytest.mark.parametrize("figure", [fig07_offline_throughput, fig09_ablation])
def test_figures_measure_the_engine_here(figure, tmp_path):
    figure.run(parsed(figure, "--smoke", "--measured", "--engine=--token_budgets=32", f"--out={tmp_path}"))
    record = read_record(tmp_path / f"{figure.NAME}-measured.json")
    assert record["origin"] == "measured"
    assert len([name for name in record["metrics"] if name.startswith("tokens_per_s_")]) == 12
    assert all(value > 0 for value in record["metrics"].values())
    assert read_record(tmp_path / f"{figure.NAME}.json")["origin"] == "simulated"
    assert (tmp_path / f"{figure.NAME}-measured.png").exists()
