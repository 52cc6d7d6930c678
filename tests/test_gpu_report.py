"""Does the GPU report keep what it has whatever happens, and does it measure what it says?  All without a GPU."""

import json
import pathlib
import re
import subprocess
import sys
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from absl import flags

from experiments.gpu_report import __main__ as report
from experiments.gpu_report import (
    card_curves,
    draw,
    jobs,
    pairs,
    power,
    results_table,
    search_card,
    steady_state,
    supervise,
    timing,
    trace_times,
)
from experiments.gpu_report.cases import PARTS, Part, Setting
from experiments.gpu_report.trace_times import Kernel
from experiments.record import make_record, read_record, write_record
from nanojax.config import PRESETS, EngineConfig
from nanojax.metrics import StepRecord
from nanojax.pipeline.interference import Interference
from nanojax.pipeline.ir import Resource
from nanojax.serve import Engine
from nanojax.workload import Request, SamplingParams
from pallas_kernels.paged_attention import paged_attention


def parsed(*arguments) -> flags.FlagValues:
    values = flags.FlagValues()
    report.define_flags(values)
    values(["gpu_report", *map(str, arguments)])
    return values


def test_a_part_keeps_what_it_has_whatever_its_cases_do(tmp_path):
    part = Part("broken_cases", "Does anything survive?", limit_s=100, package="tests")
    outcome = supervise.run_part(
        part, Setting(tmp_path, True, seed=7), 100, environment={}, config={}, show=lambda text: None
    )
    assert {name: status for name, status, _, _ in outcome.statuses} == {
        "good": "ok", "fails": "failed", "after a failure": "ok", "loses the device": "failed", "hangs": "hung",
        "dies": "died", "needs long": "skipped", "last": "ok",
    }  # fmt: skip
    record = read_record(tmp_path / "broken_cases.json")
    assert record["series"]["rows"] == {
        "case": ["good", "after a failure", "last"], "x": [1, 2, None], "not_finite": [None] * 3, "y": [None, None, 7],
    }  # fmt: skip
    assert record["metrics"] == {
        f"num_cases_{s}": n for s, n in zip(supervise.STATUSES, (3, 2, 1, 1, 0, 1), strict=True)
    }
    assert record["device"]["kind"] == "cpu"
    assert "no such shape" in (tmp_path / "broken_cases.log").read_text()


def test_parts_are_optional_and_what_has_no_time_is_named(tmp_path, capsys):
    skipped = report.run(parsed("--smoke", f"--out={tmp_path}", "--parts=peaks,kernels", "--skip=kernels"))
    assert skipped == []
    assert {path.name for path in tmp_path.glob("*.json")} == {"peaks.json"}
    rows = results_table.rows_of(tmp_path, "peaks")
    assert {row["what"] for row in rows} == {"matmul", "copy", "read", "card"}
    assert all(row["rate_per_s"] > 0 for row in rows if row["what"] != "card")
    assert report.run(parsed("--smoke", f"--out={tmp_path}", "--parts=kernels", "--minutes=0.1", "--seed=1")) in (
        [],
        ["kernels"],
    )
    with pytest.raises(flags.IllegalFlagValueError, match="must be of peaks, kernels"):
        parsed("--parts=nothing")
    assert "skipped: nothing" in capsys.readouterr().out


def test_wheels_are_unpacked_beside_what_is_installed(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no \*.whl"):
        report.unpack(tmp_path, tmp_path / "packages")
    with zipfile.ZipFile(tmp_path / "tool-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tool/__init__.py", "NAME = 'tool'")
    assert (report.unpack(tmp_path, tmp_path / "packages") / "tool" / "__init__.py").read_text() == "NAME = 'tool'"


def test_times_are_those_of_one_operation():
    x = jnp.ones((64, 64))
    program = jax.jit(lambda x: [x + i for i in range(4)])
    found = timing.time_interleaved({"four": timing.Run(lambda: program(x), 4)}, num_repeats=3, repeat_s=1e-4)["four"]
    assert 0 < found.low_s <= found.median_s <= found.high_s < 1
    with pytest.raises(ValueError, match="num_repeats=0"):
        timing.time_interleaved({}, num_repeats=0)


def test_jobs_hold_nan_wherever_no_result_may_look():
    spec = jobs.mixed_specs(True)[0]
    args = jax.jit(lambda: jobs.attention_args(spec, num_layers=1))()
    pages = np.asarray(args[1].astype(jnp.float32))
    num_read = sum(spec.kv_lens) * spec.num_kv_heads * spec.head_dim
    assert np.isfinite(pages).sum() == num_read
    out = paged_attention(*args[:3], 0, *args[3:], implementation="reference").astype(jnp.float32)
    assert bool(jnp.isfinite(out).all())
    assert spec.num_decode == 3
    assert jobs.decode_spec(64, 2048).kv_bytes(jnp.bfloat16) == pytest.approx(64 * 2048 * 4096, rel=0.01)


def test_a_share_of_the_card_is_what_the_matmul_beside_loses():
    matmul_s = {25: 4.0, 50: 2.0, 75: 4 / 3, 100: 1.0}  # in proportion
    attention_s = {25: 2.0, 50: 1.25, 75: 1.0, 100: 1.0}
    curve = card_curves.memory_curve(matmul_s, attention_s, 100)
    assert np.asarray(curve) == pytest.approx(np.array([(0, 0), (0.25, 0.5), (0.5, 0.8), (0.75, 1.0), (1, 1)]))
    found = card_curves.interference(matmul_s, attention_s, 100, "a card")
    again = Interference.from_json(found.to_json())
    assert again == found
    assert again.performance(Resource.MEMORY, 0.5) == pytest.approx(0.8)
    noisy = card_curves.memory_curve(matmul_s, attention_s | {75: 1.5}, 100)
    assert [p for _, p in noisy] == sorted(p for _, p in noisy), "never descending"
    with pytest.raises(ValueError, match="need times"):
        card_curves.memory_curve({}, attention_s, 100)


def test_the_curves_are_those_of_the_fastest_kernel_on_the_largest_job():
    rows = {
        "kind": ["matmul", "matmul", "attention", "attention", "attention"], "job": ["UG", "UG", "a", "b", "b"],
        "implementation": ["m", "xla", "t", "t", "u"], "num_ctas": [8, None, 8, 8, 8], "median_s": [1.0, 0.5, 1.0, 4.0, 3.0],
    }  # fmt: skip
    times = search_card.capped_times({"series": {"rows": rows}})
    assert search_card.pick(times["matmul"]) == {8: 1.0}
    assert search_card.pick(times["attention"]) == {8: 3.0}
    with pytest.raises(ValueError, match="no capped kernel was timed"):
        search_card.pick({})


def test_a_trace_is_added_up_by_operation_and_by_streams():
    text = """
  %gemm.1 = bf16[4]{0} custom-call(%a), metadata={op_name="jit(step)/layer3/KQV[0:384]/dot" source_file="x.py"}
  ROOT fusion.2 = f32[4]{0} fusion(%b), kind=kLoop, metadata={source_line=3 op_name="jit(step)/logits/add"}
  %copy.3 = f32[4]{0} copy(%c)
"""
    scopes = trace_times.scopes_of(text)
    assert scopes == {"gemm.1": "jit(step)/layer3/KQV[0:384]/dot", "fusion.2": "jit(step)/logits/add"}
    kernels = [
        Kernel("k", "one", 0, 4e9, "gemm.1"), Kernel("l", "one", 2e9, 3e9, "fusion.2"),
        Kernel("m", "two", 3e9, 6e9, "gemm.1"), Kernel("n", "two", 8e9, 9e9, "copy.3"),
    ]  # fmt: skip
    busy = trace_times.busy_by_operation(kernels, scopes)
    assert busy == {"KQV": (pytest.approx(7), 2), "logits": (pytest.approx(1), 1), "rest": (pytest.approx(1), 1)}
    assert trace_times.seconds_by_depth(kernels) == pytest.approx([2, 6, 1])
    assert trace_times.busy_fraction(kernels) == pytest.approx(7 / 9)


def test_a_trace_of_this_device_is_read(tmp_path):
    x, f = jnp.ones((64, 64)), jax.jit(lambda x: jnp.tanh(x @ x))
    f(x)
    with jax.profiler.trace(str(tmp_path)):
        jax.block_until_ready(f(x))
    kernels = trace_times.read_trace(tmp_path)
    assert kernels
    assert all(kernel.instruction and kernel.end_ns >= kernel.start_ns for kernel in kernels)
    with pytest.raises(FileNotFoundError, match="xplane"):
        trace_times.read_trace(tmp_path / "nothing")


def test_each_pair_has_its_product_and_waits_for_the_pair_before():
    """A product that nothing needs would be left out of the program, and the pair measured too fast."""
    weights, num_pairs = [jnp.ones((8, 16)) + i for i in range(4)], 4
    run = pairs.pairs_in_a_row(lambda layer: lambda x, w, q: (jnp.dot(x, w), jnp.tanh(q)))
    compiled = jax.jit(run).lower(jnp.ones((4, 8)), weights, jnp.ones((4, 2, 8))).compile()
    assert len(re.findall(r" dot\(|__onednn|custom-call", compiled.as_text() or "")) == num_pairs
    infinite = [weights[0] * jnp.inf, *weights[1:]]
    products, q = run(jnp.ones((4, 8)), infinite, jnp.ones((4, 2, 8)))
    assert not q.any()
    assert not any(y.any() for y in products[1:]), "results that are infinite reach whatever comes after"


def test_stamps_say_whether_two_kernels_ran_at_the_same_time_and_apart():
    from pallas_kernels.placement import read_stamps

    high = (5 << 32) - 50  # the low half wraps in between

    def stamps(sms, start_ns, end_ns):
        halves = [(t & 0xFFFFFFFF, t >> 32) for t in (start_ns, end_ns)]
        row = [0, *(np.uint32(x).astype(np.int32) for half in halves for x in half)]
        table = np.tile(np.array(row, np.int32)[None, :, None], (len(sms), 1, 128))
        table[:, 0] = np.array(sms)[:, None]
        return read_stamps(jnp.asarray(table))

    one, two = stamps([0, 1, 2], high, high + 100), stamps([3, 4], high + 40, high + 140)
    assert one["start_ns"].tolist() == [high] * 3
    row = pairs.co_execution(one, two)
    assert (row["num_multiprocessors"], row["num_shared_multiprocessors"]) == (5, 0)
    assert (row["both_s"], row["span_s"]) == (pytest.approx(60e-9), pytest.approx(140e-9))
    later = pairs.co_execution(one, stamps([2], high + 500, high + 600))
    assert (later["both_s"], later["num_shared_multiprocessors"]) == (0, 1)


def test_power_is_the_mean_of_whole_lines():
    assert power.means("650.5, 1500\n[N/A], 1400\n689.5, 1600\n70") == {"power_w": 670.0, "sm_clock_mhz": 1550.0}
    assert power.means("no devices were found") == {"power_w": None, "sm_clock_mhz": None}


def test_a_steady_state_is_as_full_as_memory_and_budget_allow():
    model = PRESETS["llama-3-8b"]
    same = steady_state.lengths("512/512", max_len=4096)
    assert (same.mean_resident_len, same.tokens_per_decode, same.max_len) == (768, 2.0, 1024)
    wide = steady_state.plan(same, model, max_budget=2048, kv_bytes=1e12, page_size=64)
    assert (wide.num_decode, wide.token_budget, wide.num_slots) == (1024, 2048, 1040)
    narrow = steady_state.plan(same, model, max_budget=2048, kv_bytes=50e9, page_size=64)
    assert narrow.num_decode * 1.1 * (768 + 32) * 131072 <= 50e9
    assert narrow.token_budget % 128 == 0
    data = steady_state.lengths("sharegpt", max_len=2048)
    assert data.max_len <= 2048
    with pytest.raises(ValueError, match="neither IN/OUT nor one of"):
        steady_state.lengths("many", max_len=10)
    with pytest.raises(ValueError, match="no request of 512/512 fits"):
        steady_state.plan(same, model, max_budget=2048, kv_bytes=1e6, page_size=64)


def test_rates_count_steps_of_one_launch_together():
    def step(time_s, tokens):
        return StepRecord(time_s, 8, tokens, 1, 4, 0, 3)

    found = steady_state.metrics([step(0.0, 7), *[step(1.0, 3)] * 2, *[step(3.0, 7)] * 2])
    assert found["total_tokens_per_s"] == pytest.approx((4 + 4 + 8 + 8) / 3)
    assert (found["num_steps"], found["step_median_s"]) == (4, pytest.approx(1.5 * 2 / 4))
    with pytest.raises(ValueError, match="too few for a rate"):
        steady_state.metrics([step(0.0, 1)] * 5)


def test_an_engine_that_starts_in_the_middle_decodes_at_once_and_keeps_its_laws():
    config = EngineConfig(token_budgets=(16,), num_slots=6, page_size=4, num_pages=64, max_len=32)
    engine = Engine(
        config, tiny.LLAMA, tiny.params(tiny.LLAMA), policy=tiny.policy(), attention="reference", check_invariants=True
    )
    found = steady_state.Lengths("8/8", np.full(4, 8), np.full(4, 8))
    steps = steady_state.serve(engine, found, 4, num_warm_steps=0, num_steps=12, max_s=300)
    assert steps[0].num_decode_tokens == 4
    assert all(step.num_decode_tokens + step.num_prefill_tokens > 4 for step in steps[1:])
    assert sum(record.request_id.startswith("resident") for record in engine.records) == 4
    assert all(record.output_len == 8 for record in engine.records if record.request_id.startswith("fresh"))
    with pytest.raises(ValueError, match="unfinished ones do not fit"):
        engine.start_in_the_middle([Request("x", (1, 2), SamplingParams())])


def synthetic(folder, part, rows):
    columns = {name: [row.get(name) for row in rows] for name in dict.fromkeys(n for row in rows for n in row)}
    record = make_record(
        f"gpu_report_{part}", "measured", metrics={"num_cases_ok": 1}, config={"is_smoke": True}, seed=0,
        series={"rows": columns}, device={"name": "a card", "num_cores": 100},
    )  # fmt: skip
    write_record(record, folder / f"{part}.json")


def test_figures_and_the_table_of_aims_come_from_records(tmp_path):
    assert draw.draw(tmp_path) == []
    synthetic(tmp_path, "peaks", [{"what": "copy", "rate_per_s": 4e12}, {"what": "matmul", "rate_per_s": 7e14}])
    synthetic(tmp_path, "kernels", [{"is_ok": True}, {"is_ok": False}])
    speeds = [
        {"kind": "attention", "job": "decode-64x2048", "program": "t", "bytes_per_s": 3.6e12, "flops_per_s": 1e12},
        {"kind": "attention", "job": "prefill-2x2048", "program": "t", "bytes_per_s": 1e12, "flops_per_s": 3.9e14},
        {"kind": "matmul", "job": "UG", "num_tokens": 512, "program": "xla", "median_s": 0.9},
        {"kind": "matmul", "job": "UG", "num_tokens": 512, "program": "mosaic_gpu", "median_s": 1.0},
    ]
    synthetic(tmp_path, "kernel_speed", speeds)
    synthetic(tmp_path, "cta_curves", [{"kind": "matmul"}])
    shares = [
        {"job": "UG | decode", "form": form, "num_matmul_ctas": n, "num_attention_ctas": 100 - n, "time_over_sum": ratio,
         "time_over_max": 1.5 * ratio}
        for form, n, ratio in (("capped", 60, 0.8), ("capped", 80, 0.9), ("fused", 60, 0.95))
    ]  # fmt: skip
    synthetic(tmp_path, "pairs", [*shares, {"program": "placement 60+40", "both_s": 1e-4}])
    served = [
        {"model": "m", "lengths": "512/512", "pipeline": pipeline, "driver": "dispatch_ahead", "total_tokens_per_s": rate,
         "percent_of_optimal": rate / 500, "uses_streams": pipeline == "overlap"}
        for pipeline, rate in (("sequential", 3e4), ("overlap", 3.5e4))
    ]  # fmt: skip
    synthetic(tmp_path, "end_to_end", served)
    curves = card_curves.interference({50: 2.0, 100: 1.0}, {50: 1.2, 100: 1.0}, 100, "a card")
    (tmp_path / "card.interference.json").write_text(curves.to_json())

    found = {name: (value, met) for name, value, _, met in results_table.aims(tmp_path)}
    assert found == {
        "kernels right": (1, "no"), "decode-64x2048, % of copy bandwidth": (pytest.approx(90), "yes"),
        "prefill-2x2048, TFLOP/s": (pytest.approx(390), "no"),
        "matmul UG x 512 tokens, % of cuBLAS": (pytest.approx(90), "yes"), "best pair, T / (T1 + T2)": (0.8, "yes"),
        "end to end, % of optimal": (70, "no"), "best overlap over sequential, 512/512": (pytest.approx(3.5 / 3), "yes"),
    }  # fmt: skip
    text = results_table.table(tmp_path, ["peaks", "mixtral"])
    assert "a card" in text
    assert "not run" in text
    pictures = draw.draw(tmp_path)
    assert [path.name for path in pictures] == ["rp_curves.png", "pair_ratios.png", "end_to_end.png"]
    assert all(path.stat().st_size > 10_000 for path in pictures)


def test_the_parts_together_name_the_order_and_fit_what_a_loan_gives():
    names = [part.name for part in PARTS]
    assert len(set(names)) == len(names)
    assert names.index("op_profile") < names.index("search_card") < names.index("end_to_end")
    assert json.dumps(names)


@pytest.mark.slow
def test_every_part_measures_tiny_shapes(tmp_path):
    names = [part.name for part in PARTS if part.name != "mixtral"]
    command = [sys.executable, "-m", "tests.report_parts_worker", str(tmp_path), *names]
    subprocess.run(command, check=True, cwd=pathlib.Path(__file__).parents[1])
    for name in names:
        assert results_table.rows_of(tmp_path, name), name
    assert "best pair" in results_table.table(tmp_path, names)
    draw.draw(tmp_path)
    assert (tmp_path / "end_to_end.png").exists()
