"""Do the closed-form tables and figures run, keep origins apart and leave valid records, and does profiling make a profile?"""

import dataclasses

import matplotlib.image
import numpy as np
import pytest
from absl import flags

from experiments import (
    comparison,
    fig02_network_ratio,
    fig03_memory_ratio,
    figures,
    op_programs,
    profile_ops,
    published,
    serving_flags,
    table1_accelerators,
    table2_cost_model,
    table3_fig05_interference,
    table4_datasets,
)
from experiments.record import read_record
from nanojax.config import PRESETS
from nanojax.pipeline.cost_model import BatchShape
from nanojax.pipeline.interference import RELEASED_TABLES
from nanojax.pipeline.ir import NanoBatch, OpKind
from nanojax.pipeline.profile import ProfileTable
from tests.tiny import MODELS

CLOSED_FORM = (
    table1_accelerators, fig02_network_ratio, fig03_memory_ratio, table2_cost_model, table3_fig05_interference, table4_datasets,
)  # fmt: skip


def parsed(experiment, *arguments) -> flags.FlagValues:
    values = flags.FlagValues()
    experiment.define_flags(values)
    values(["experiment", *map(str, arguments)])
    return values


@pytest.mark.parametrize("experiment", CLOSED_FORM, ids=lambda module: module.NAME)
def test_each_writes_a_record_with_an_origin_per_series_and_a_picture(experiment, tmp_path, capsys):
    record = experiment.run(parsed(experiment, "--smoke", f"--out={tmp_path}"))
    assert read_record(tmp_path / f"{experiment.NAME}.json") == record
    origins = {name.partition("_")[0] for name in record["series"]} - {"dense", "optimum"}
    assert origins == {"published", "simulated"}
    assert record["config"]["published_source"].startswith("arXiv 2408.12757v2")
    assert matplotlib.image.imread(tmp_path / f"{experiment.NAME}.png").min() < 0.5
    assert experiment.NAME in capsys.readouterr().out


def test_the_records_hold_the_errors(tmp_path):
    def metrics(experiment):
        return experiment.run(parsed(experiment, f"--out={tmp_path}"))["metrics"]

    assert metrics(fig02_network_ratio)["largest_difference_ratio"] <= 0.0005
    memory = metrics(fig03_memory_ratio)
    assert memory["largest_difference_dense_ratio"] < 0.005 < memory["largest_difference_mixtral_ratio"] < 0.006
    assert metrics(table3_fig05_interference)["largest_difference_fraction"] < 1e-12
    table2 = metrics(table2_cost_model)
    assert table2["total_est_compute_s"] == pytest.approx(0.11418, abs=1e-5)
    assert table2["total_real_s_published"] == pytest.approx(0.22505)
    assert table2["optimal_llama_2_70b_tokens_per_s"] == pytest.approx(1857.14, abs=0.01)


def test_measured_curves_and_trace_files_are_shown_beside(tmp_path):
    (tmp_path / "curves.json").write_text(dataclasses.replace(RELEASED_TABLES, source="here").to_json())
    values = parsed(table3_fig05_interference, f"--out={tmp_path}", f"--curves={tmp_path}/curves.json")
    assert table3_fig05_interference.run(values)["series"]["measured"]["memory"][4] == 0.6
    for name in ("splitwise", "lmsys", "sharegpt"):
        (tmp_path / f"{name}.csv").write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n0,10,4\n1,20,6\n")
    values = parsed(table4_datasets, "--smoke", f"--out={tmp_path}", f"--traces={tmp_path}")
    counted = table4_datasets.run(values)["series"]["published_counted"]
    assert (counted["input_mean_tokens"], counted["output_std_tokens"]) == ([15.0] * 3, [1.0] * 3)
    with pytest.raises(FileNotFoundError, match=r"no splitwise.csv or AzureLLMInferenceTrace_conv.csv in"):
        table4_datasets.run(parsed(table4_datasets, f"--out={tmp_path}", f"--traces={tmp_path}/nowhere"))


@pytest.mark.parametrize("model", ["llama", "mixtral"])
def test_profiling_gives_a_table_that_the_cost_model_reads(tmp_path, monkeypatch, model):
    monkeypatch.setitem(PRESETS, "stories260k", MODELS[model])
    sizes = (
        "--num_tokens=4,8",
        "--context_lens=3,6",
        "--repeats=2",
        "--dtype=float32",
        "--page_size=4",
        "--attention=xla",
    )
    values = serving_flags.with_smoke(
        parsed(profile_ops, "--smoke", "--model=stories260k", f"--out={tmp_path}", *sizes)
    )
    record = profile_ops.run(values)
    assert read_record(tmp_path / "profile_ops.json") == record
    profile = ProfileTable.from_json((tmp_path / "profile_ops.profile.json").read_text())
    assert (profile.model, profile.num_devices, profile.origin) == (MODELS[model].name, 1, "measured")
    assert set(profile.ops) == {
        OpKind.KQV, OpKind.DEC_ATTN, OpKind.PF_ATTN, OpKind.O, OpKind.UG, OpKind.D,
        *([OpKind.ROUTER] if MODELS[model].num_experts else []),
    }  # fmt: skip
    assert set(profile.extras) == {"logits", "sampling"}
    assert profile.ops[OpKind.DEC_ATTN].context_lens == (3, 6)
    duration = profile.durations(BatchShape(5, 3, 4, 4))
    assert all(duration(kind, NanoBatch(0, 8)) > 0 for kind in profile.ops)
    assert len(record["series"]["profile"]["median_s"]) == 2 * len(profile.ops) + 4 + 2 * 2
    assert (tmp_path / "profile_ops.png").exists()


def test_profiling_refuses_sizes_that_do_not_ascend(tmp_path):
    with pytest.raises(SystemExit, match="'8,4' must be ascending whole numbers"):
        profile_ops.run(parsed(profile_ops, "--model=smoke", "--num_tokens=8,4", f"--out={tmp_path}"))


@pytest.mark.parametrize(("num_tokens", "context"), [(3, 20), (16, 4), (14, 4), (8, 4), (100, 1), (1, 7)])
def test_profiled_prefill_tokens_see_the_context_that_was_asked_for(num_tokens, context):
    q_lens, kv_lens = op_programs._prefill_rows(num_tokens, context)
    seen = [kv - q + 1 + i for q, kv in zip(q_lens, kv_lens, strict=True) for i in range(q)]
    assert len(seen) == num_tokens
    assert min(seen) >= 1
    assert abs(np.mean(seen) - context) <= 0.5


def test_every_published_item_is_whole():
    for name, item in published._items().items():
        found = {"grid": published.grid, "table": published.table, "scalars": published.scalars}[item["kind"]](name)
        assert found.source
        assert found.certainty in ("paper", "repo", "derived", "read_from_image")
        match found:
            case published.Grid():
                assert {len(row) for row in found.values} == {len(found.columns)}
                assert len(found.values) == len(found.rows)
            case published.Table():
                assert len({len(column) for column in found.columns.values()}) == 1
                assert len(found.rows()) > 0


def test_what_is_not_published_is_named_with_what_is():
    with pytest.raises(ValueError, match="nothing published is a grid named 'table1': fig02, fig03, fig07"):
        published.grid("table1")
    with pytest.raises(ValueError, match=r"no \('gpt', 'h100'\) here: rows llama-3-8b"):
        published.grid("fig02").at("gpt", "h100")
    assert published.grid("fig09").at("NanoFlow", "512-512") == 1323


def test_errors_against_published_numbers():
    assert comparison.error_percent(110, 100) == 10
    assert comparison.error_percent(None, 100) is None
    assert comparison.error_percent(1, 0) is None
    texts = [
        comparison.error_text(*pair) for pair in ((103.21, 100), (80, 100), (100.01, 100), (99.99, 100), (1, None))
    ]
    assert texts == ["+3.2%", "-20%", "0.0%", "0.0%", ""]
    assert comparison.mean_absolute_error_percent([90, 120, 5], [100, 100, None]) == 15
    assert comparison.mean_absolute_error_percent([None], [3]) is None


def test_a_text_table_is_aligned():
    table = comparison.text_table({"name": ["a", "long"], "x": [1, None], "y": [0.12345, 123456.7]})
    assert table == "name  x        y\na     1   0.1235\nlong  -  123,457"


def test_origins_have_colours_of_their_own_and_series_of_one_origin_differ():
    assert len(set(figures.ORIGIN_COLORS.values())) == 4
    bars = [figures.Bars(str(i), origin, [1.0]) for i, origin in enumerate(["published"] * 4 + ["simulated"] * 2)]
    assert len(set(figures._bar_styles(bars))) == 6


def test_what_cannot_be_drawn_is_named(tmp_path):
    path = tmp_path / "x.png"
    with pytest.raises(ValueError, match="'a' has 1 values for 2 groups"):
        figures.grouped_bars("t", [], ["g", "h"], [figures.Bars("a", "published", [1.0])], path, y_label="y")
    with pytest.raises(ValueError, match="'a' counts against 'b', which is none of a"):
        figures.grouped_bars("t", [], ["g"], [figures.Bars("a", "simulated", [1.0], "b")], path, y_label="y")
    with pytest.raises(ValueError, match=r"1 rows and 2 columns, but values of shape \(1, 1\) and \(1, 1\)"):
        figures.heatmap("t", [], ["r"], ["c", "d"], [[1.0]], [[1.0]], path)
    with pytest.raises(ValueError, match="at least 1 line, got 0"):
        figures.line_chart("t", [], [], path, x_label="x", y_label="y")
    assert not path.exists()


def test_bars_with_gaps_and_reference_lines_are_drawn(tmp_path):
    bars = [
        figures.Bars("theirs", "published", [100.0, 200.0]),
        figures.Bars("ours", "simulated", [110.0, None], against="theirs"),
        figures.Bars("here", "measured", [None, 190.0], against="theirs"),
    ]
    path = figures.grouped_bars(
        "A title", ["source"], ["g", "h"], bars, tmp_path / "bars.png", y_label="y", reference_lines={"optimum": 250.0}
    )
    assert matplotlib.image.imread(path).min() < 0.5
