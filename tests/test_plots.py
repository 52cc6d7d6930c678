"""Do figures come out of records, and of records alone?"""

import pathlib

import matplotlib.image
import pytest

from experiments import plots
from experiments.record import make_record, write_record
from experiments.sweep import parse_sweep, sweep_series
from nanojax.metrics import StepRecord, step_series


def make(origin="measured", config=None, metrics=None, **series) -> dict:
    return make_record("toy", origin, metrics=metrics or {}, config=config or {}, seed=0, series=series)


def timeline_record() -> dict:
    steps = [StepRecord(0.1 * i, 64, 4 * i, 64 - 4 * i, i, 16 - i, 30 * i) for i in range(1, 16)]
    return make(
        config={"num_pages": 500}, metrics={"total_tokens_per_s": 640.0}, timeline=step_series(steps, num_bins=20)
    )


def latency_record(origin: str = "measured") -> dict:
    name = "normalized_latency_s_per_token"
    return make(
        origin,
        latency={
            "request_rate_per_s": [1, 2, 4],
            f"{name}_mean": [0.05, 0.06, None],
            f"{name}_p99": [0.06, 0.09, None],
        },
    )


def sweep_record(text: str) -> dict:
    points = parse_sweep(text)
    metrics = [{"ttft_s_p99": 0.1 + i, "tpot_s_mean": None if i == 1 else 0.5} for i in range(len(points))]
    return make(config={"swept": list(points[0])}, sweep=sweep_series(points, metrics))


def assert_is_a_picture(path: pathlib.Path):
    pixels = matplotlib.image.imread(path)
    assert pixels.shape[1] == plots.WIDTH_INCHES * plots.DPI
    assert pixels.min() < 0.5 < pixels.max()


def test_a_timeline_is_drawn(tmp_path):
    assert_is_a_picture(plots.plot_timeline(timeline_record(), tmp_path / "new" / "timeline.png"))


def test_latency_curves_are_drawn_and_measured_is_told_from_simulated(tmp_path):
    records = [latency_record("measured"), latency_record("simulated")]
    assert_is_a_picture(plots.plot_latency(records, tmp_path / "latency.png"))
    assert_is_a_picture(plots.plot_latency(records[:1], tmp_path / "plain.png", labels=["nano"], slo_s_per_token=None))


@pytest.mark.parametrize("text", ["page_size=8,16,32", "driver=sync,ahead;page_size=8,16"])
@pytest.mark.parametrize("metric", ["ttft_s_p99", "tpot_s_mean"])
def test_a_sweep_is_drawn(tmp_path, text, metric):
    assert_is_a_picture(plots.plot_sweep(sweep_record(text), metric, tmp_path / "sweep.png"))


def test_the_source_line_states_origin_device_and_commit():
    record = {**timeline_record(), "device": {"name": "TestChip"}, "commit": "0123456789abcdef-dirty"}
    assert plots._source(record) == "toy: measured, TestChip, commit 012345678 (changed)"


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        ("ttft_s_p99", "TTFT p99 (s)"),
        ("total_tokens_per_s", "total throughput (tokens / s)"),
        ("normalized_latency_s_per_token_mean", "normalized latency mean (s / token)"),
        ("budget_fill_fraction", "budget fill (fraction)"),
        ("percent_of_optimal", "percent of optimal"),
        ("num_preemptions", "num preemptions"),
    ],
)
def test_metric_names_become_labels_with_units(metric, words):
    assert plots._words(metric) == words


def test_what_cannot_be_drawn_is_named(tmp_path):
    path = tmp_path / "x.png"
    with pytest.raises(ValueError, match="'toy' has no series 'timeline': latency"):
        plots.plot_timeline(latency_record(), path)
    with pytest.raises(ValueError, match="at least 1 record, got 0"):
        plots.plot_latency([], path)
    with pytest.raises(ValueError, match="no column 'speed': page_size, ttft_s_p99, tpot_s_mean"):
        plots.plot_sweep(sweep_record("page_size=8,16"), "speed", path)
    with pytest.raises(ValueError, match=r"config\['swept'\]=\['a', 'b', 'c'\] must name one or two"):
        plots.plot_sweep(sweep_record("a=1;b=1;c=1"), "ttft_s_p99", path)
    with pytest.raises(ValueError, match="7 lines in one figure"):
        plots.plot_sweep(sweep_record("a=1,2,3,4,5,6,7;b=1,2"), "ttft_s_p99", path)
    assert not path.exists()


def test_every_series_of_a_record_file_is_drawn(tmp_path):
    record = timeline_record()
    record["series"] |= latency_record()["series"] | sweep_record("page_size=8,16")["series"]
    record["config"]["swept"] = ["page_size"]
    write_record(record, tmp_path / "toy.json")
    drawn = plots.draw(tmp_path / "toy.json", tmp_path / "figures", "ttft_s_p99")
    assert [path.name for path in drawn] == ["toy_timeline.png", "toy_latency.png", "toy_sweep.png"]
    assert sorted(drawn) == sorted((tmp_path / "figures").iterdir())
