"""Do text, trace and bars show the timeline that was simulated, and do the figures of pipelines come out of them?"""

import itertools
import json
import re

import matplotlib.image
import pytest
from absl import flags

from experiments import fig06_pipelines, fig10_utilization
from experiments.record import read_record
from nanojax.pipeline import library
from nanojax.pipeline.interference import NO_INTERFERENCE, PAPER_TABLE_3_AND_TEXT
from nanojax.pipeline.ir import OpKind, Resource
from nanojax.pipeline.json_format import to_json
from nanojax.pipeline.render import chart, text_gantt, trace_events
from nanojax.pipeline.simulate import simulate

SECONDS = {OpKind.KQV: 1.0, OpKind.DEC_ATTN: 2.0, OpKind.PF_ATTN: 0.0, OpKind.O: 1.0, OpKind.UG: 2.0, OpKind.D: 1.0}


def small(num_layers=6):
    """Half a layer of software pipelining; a layer takes 10 s, bound by compute."""
    pipeline = library.llama_8b_single_gpu(8, 4)
    return simulate(pipeline, lambda op, _: SECONDS[op], NO_INTERFERENCE, num_layers=num_layers)


def released(num_layers=6):
    pipeline = library.llama_70b_released(64)
    return simulate(
        pipeline, lambda op, tokens: 1e-6 * tokens.num_tokens, PAPER_TABLE_3_AND_TEXT, num_layers=num_layers
    )


def test_text_is_drawn_to_scale():
    """A layer is 10 s, 10 columns each; O, UG and D of the layer before run in its first half; no prefill in this batch."""
    assert text_gantt(small(), width=112).splitlines() == [
        "compute 0   KQV1=====|O2=======|UG2================|D2=======|KQV2=====|O1=======|UG1================|D1=======|",
        "compute 1   " + "." * 100,
        "memory 1    ..........DecAttn1===========|DecAttn2===========|..........DecAttn3===========|DecAttn4===========|",
        " " * 12 + "0" + "10000.000 ms".rjust(99),
    ]


@pytest.mark.parametrize("timeline", [small(), released()], ids=["one device", "eight"])
def test_bars_of_a_lane_do_not_overlap_and_none_is_lost(timeline):
    drawn = chart(timeline)
    assert drawn.length_s == pytest.approx(timeline.layer_time_s)
    for lane in range(len(drawn.lanes)):
        bars = sorted((bar.start_s, bar.stop_s) for bar in drawn.bars if bar.lane == lane)
        assert all(a[1] <= b[0] + 1e-9 * drawn.length_s for a, b in itertools.pairwise(bars))
    start_s, stop_s = timeline.window_s
    for resource in Resource:
        shown = sum(bar.stop_s - bar.start_s for bar in drawn.bars if bar.resource is resource)
        busy = sum(
            max(0.0, min(span.stop_s, stop_s) - max(span.start_s, start_s))
            for span in timeline.spans
            if span.resource is resource
        )
        assert shown == pytest.approx(busy)
    assert {bar.layer for bar in drawn.bars} <= {-1, 0, 1}
    assert next(bar for bar in drawn.bars if bar.label == "KQV1").layer == 0


@pytest.mark.parametrize("width", [40, 80, 133])
def test_text_has_the_width_that_was_asked_for(width):
    lines = text_gantt(released(), width=width).splitlines()
    assert [len(line) for line in lines] == [width] * len(lines)
    assert [line.split()[0] for line in lines[:-1]] == ["compute", "memory", "network"]
    assert lines[-1].endswith("ms")


def test_a_trace_holds_every_span_on_a_track_of_its_own_stream():
    timeline = released(num_layers=3)
    trace = json.loads(json.dumps(trace_events(timeline)))
    spans = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert len(spans) == len(timeline.spans) == 3 * len(timeline.pipeline.nodes)
    tracks = {event["tid"]: event["args"]["name"] for event in trace["traceEvents"] if event["name"] == "thread_name"}
    for event, span in zip(spans, timeline.spans, strict=True):
        node = timeline.pipeline.nodes[span.node]
        assert tracks[event["tid"]] == f"{span.resource.value} {node.stream}"
        assert event["ts"] == pytest.approx(span.start_s * 1e6)
        assert event["ts"] + event["dur"] == pytest.approx(span.stop_s * 1e6)
        assert event["args"]["layer"] == span.layer
        assert event["args"]["share"] == node.share
    for tid in tracks:  # complete events of one track must not overlap, or the viewer nests them
        own = sorted((event["ts"], event["ts"] + event["dur"]) for event in spans if event["tid"] == tid)
        assert all(a[1] <= b[0] + 1e-6 for a, b in itertools.pairwise(own))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: text_gantt(small(), width=39), "width=39 must be at least 40 columns"),
        (lambda: chart(small(), (2.0, 2.0)), "window 2.0..2.0 s must end after it starts"),
    ],
)
def test_impossible_pictures_are_refused(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def parsed(experiment, *arguments):
    values = flags.FlagValues()
    experiment.define_flags(values)
    values(["experiment", "--num_layers=6", *map(str, arguments)])
    return values


def assert_is_a_picture(path):
    pixels = matplotlib.image.imread(path)
    assert pixels.shape[1] > 1000
    assert pixels.min() < 0.5 < pixels.max()


def test_fig06_draws_every_pipeline_and_keeps_its_numbers(tmp_path, capsys, monkeypatch):
    """All are simulated; a picture is drawn of two, one of them from a file, to save time."""
    cases = fig06_pipelines.ready_made()
    assert {case.pipeline.name for case in cases} >= set(library.PIPELINES)
    monkeypatch.setattr(fig06_pipelines, "ready_made", lambda: [cases[3]])
    record = fig06_pipelines.run(parsed(fig06_pipelines, f"--out={tmp_path}"))
    assert read_record(tmp_path / "fig06_pipelines.json") == record
    table = record["series"]["layer_times"]
    assert table["no_interference_s"][0] < table["layer_time_s"][0] < table["sequential_s"][0]
    assert record["series"]["authors_search"]["published"][0] == 2.347
    assert_is_a_picture(tmp_path / "fig06_llama_70b_figure6.png")
    assert json.loads((tmp_path / "fig06_llama_70b_figure6.trace.json").read_text())["traceEvents"]
    assert (tmp_path / "fig06_llama_70b_figure6.txt").read_text().strip() in capsys.readouterr().out

    path = tmp_path / "mine.json"
    path.write_text(to_json(library.sequential(32, is_moe=True)))
    one = (f"--pipeline={path}", "--model=mixtral-8x7b", "--num_devices=1", "--interference=none", "--shares=fair")
    record = fig06_pipelines.run(parsed(fig06_pipelines, f"--out={tmp_path}", *one))
    assert record["series"]["layer_times"]["layer_time_s"] == record["series"]["layer_times"]["sequential_s"]
    assert_is_a_picture(tmp_path / "fig06_sequential.png")


def test_fig10_means_are_work_over_time(tmp_path):
    record = fig10_utilization.run(parsed(fig10_utilization, f"--out={tmp_path}"))
    assert read_record(tmp_path / "fig10_utilization.json") == record
    assert_is_a_picture(tmp_path / "fig10_utilization.png")
    metrics, flops = record["metrics"], 2 * 2048 * 8192 * (10240 + 8192 + 57344 + 28672)
    for name in ("sequential", "llama_70b_figure6"):
        dense = flops / (8 * 312e12) / metrics[f"layer_time_s_{name}"]
        attention = metrics[f"compute_fraction_{name}"] - dense
        assert 0 < attention < 0.03
        for column in ("compute", "memory", "network"):
            assert max(record["series"][f"utilization_{name}"][column]) <= 1 + 1e-9
    assert metrics["published_compute_fraction"] == 0.685
