"""Do the predictions and the report come out, and do the predictions keep what the paper's comparisons say?"""

import json

import pytest
from absl import flags

from experiments import fig07_offline_throughput, fig08_online_latency, fig09_ablation, fig11_models, reproduce


def parsed(experiment, *arguments):
    values = flags.FlagValues()
    experiment.define_flags(values)
    values(["program", *arguments])
    return values


def test_fig07_is_near_and_below_the_optimum(tmp_path):
    metrics = fig07_offline_throughput.run(parsed(fig07_offline_throughput, f"--out={tmp_path}"))["metrics"]
    assert metrics["mean_absolute_error_percent"] <= 8
    rates = {name: rate for name, rate in metrics.items() if name.startswith("tokens_per_s")}
    assert len(rates) == 6
    assert all(817 < rate < 1857 for rate in rates.values())
    assert (tmp_path / "fig07_offline_throughput.png").exists()


def test_fig09_overlap_beats_no_overlap_where_requests_decode(tmp_path):
    metrics = fig09_ablation.run(parsed(fig09_ablation, f"--out={tmp_path}"))["metrics"]
    for lengths in ("512-512", "1024-512", "512-1024"):
        overlap, plain, split = (
            metrics[f"tokens_per_s_per_gpu_{name}_{lengths}"] for name in ("NanoFlow", "Non-overlap", "Nanobatch-only")
        )
        assert overlap > plain >= split * (1 - 1e-9)


def test_fig11_stays_below_each_optimum(tmp_path):
    record = fig11_models.run(parsed(fig11_models, f"--out={tmp_path}"))
    percents = [value for name, value in record["metrics"].items() if name.startswith("percent_of_optimal")]
    assert len(percents) == 5
    assert all(30 < percent < 100 for percent in percents)
    assert record["origin"] == "simulated"


def test_the_report_holds_its_pictures(tmp_path):
    path = reproduce.run(parsed(reproduce, "--smoke", "--only=fig07,table1", f"--out={tmp_path}"))
    page = path.read_text()
    assert page.count("data:image/png;base64,") >= 2
    assert "Accelerator" in page or "accelerator" in page
    assert json.loads((tmp_path / "fig07_offline_throughput.json").read_text())["metrics"]


def test_an_unknown_figure_is_said(tmp_path):
    with pytest.raises(ValueError, match="--only=fig99"):
        reproduce.run(parsed(reproduce, "--only=fig99", f"--out={tmp_path}"))


@pytest.mark.slow
def test_fig08_simulates_the_scheduler(tmp_path):
    record = fig08_online_latency.run(parsed(fig08_online_latency, "--smoke", "--datasets=lmsys", f"--out={tmp_path}"))
    assert record["origin"] == "simulated"
    assert {"published", "simulated", "envelope", "crossings"} <= set(record["series"])
    assert (tmp_path / "fig08_online_latency.png").exists()
