"""What does a timeline look like?  As text, as a trace for Perfetto or Chrome, and as bars for a plot."""

import dataclasses
from typing import Any

from nanojax.pipeline.ir import Resource
from nanojax.pipeline.simulate import Span, Timeline

LABEL_WIDTH = 12
GAP, END = ".", "|"
WINDOW_ROUNDING = 1e-9
"""What lasts for a smaller fraction of a window is rounding of its ends."""


@dataclasses.dataclass(frozen=True)
class Bar:
    """A span as it is drawn.  `layer` counts from that of the window's first node 0: -1 is the one before."""

    lane: int
    label: str
    start_s: float
    stop_s: float
    resource: Resource
    share: float
    layer: int


@dataclasses.dataclass(frozen=True)
class Chart:
    """Lanes, top to bottom, and the bars in them; bars of one lane do not overlap.  Times are from the window's start."""

    lanes: tuple[str, ...]
    bars: tuple[Bar, ...]
    length_s: float


def chart(timeline: Timeline, window_s: tuple[float, float] | None = None) -> Chart:
    """What runs in `window_s`, one steady layer unless given; a lane for each stream of each resource.

    Bars are cut at the window's ends; spans without duration are left out.
    Raises ValueError for a window that ends before it starts.
    """
    start_s, stop_s = timeline.window_s if window_s is None else window_s
    if not start_s < stop_s:
        raise ValueError(f"window {start_s}..{stop_s} s must end after it starts")
    nodes = timeline.pipeline.nodes
    order = list(Resource)
    lanes = sorted({(order.index(node.op.resource), node.stream) for node in nodes})
    names = tuple(f"{order[resource].value} {stream}" for resource, stream in lanes)
    least_s = WINDOW_ROUNDING * (stop_s - start_s)
    shown = [span for span in timeline.spans if min(span.stop_s, stop_s) - max(span.start_s, start_s) > least_s]
    first_layer = min((span.layer for span in shown if span.node == 0), default=0)
    bars = tuple(
        Bar(
            lane=lanes.index((order.index(span.resource), nodes[span.node].stream)),
            label=timeline.pipeline.label(span.node),
            start_s=max(span.start_s, start_s) - start_s,
            stop_s=min(span.stop_s, stop_s) - start_s,
            resource=span.resource,
            share=nodes[span.node].share,
            layer=span.layer - first_layer,
        )
        for span in shown
    )
    return Chart(names, bars, stop_s - start_s)


def text_gantt(timeline: Timeline, *, width: int = 100, window_s: tuple[float, float] | None = None) -> str:
    """The chart in `width` columns: a line per lane, bars as `KQV1====|`, with `.` where nothing runs.

    A bar that is too short for its label has as much of it as fits.  Raises ValueError for fewer than 40 columns.
    """
    if width < 40:
        raise ValueError(f"width={width} must be at least 40 columns")
    drawn = chart(timeline, window_s)
    columns = width - LABEL_WIDTH
    rows = []
    for lane, name in enumerate(drawn.lanes):
        row = [GAP] * columns
        for bar in drawn.bars:
            if bar.lane == lane:
                first, stop = (round(columns * t / drawn.length_s) for t in (bar.start_s, bar.stop_s))
                row[first:stop] = _bar_text(bar.label, stop - first)
        rows.append(name.ljust(LABEL_WIDTH) + "".join(row))
    length = f"{drawn.length_s * 1e3:.3f} ms"
    return "\n".join([*rows, " " * LABEL_WIDTH + "0" + length.rjust(columns - 1)])


def trace_events(timeline: Timeline) -> dict[str, Any]:
    """All spans in the Trace Event Format, for ui.perfetto.dev or chrome://tracing; write it with `json.dump`.

    One track per stream and resource; times in microseconds, as the format has them.
    """
    pipeline = timeline.pipeline
    tracks = sorted({(span.resource.value, pipeline.nodes[span.node].stream) for span in timeline.spans})
    events: list[dict[str, Any]] = [
        {"ph": "M", "name": "process_name", "pid": 0, "tid": 0, "args": {"name": f"{pipeline.name} (simulated)"}}
    ]
    for tid, (resource, stream) in enumerate(tracks):
        events.append(
            {"ph": "M", "name": "thread_name", "pid": 0, "tid": tid, "args": {"name": f"{resource} {stream}"}}
        )
    for span in timeline.spans:
        track = (span.resource.value, pipeline.nodes[span.node].stream)
        events.append(_span_event(timeline, span, tracks.index(track)))
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _span_event(timeline: Timeline, span: Span, tid: int) -> dict[str, Any]:
    node = timeline.pipeline.nodes[span.node]
    tokens = timeline.pipeline.tokens_of(node)
    return {
        "ph": "X",
        "name": timeline.pipeline.label(span.node),
        "cat": span.resource.value,
        "pid": 0,
        "tid": tid,
        "ts": span.start_s * 1e6,
        "dur": (span.stop_s - span.start_s) * 1e6,
        "args": {
            "layer": span.layer,
            "tokens": f"{tokens.start}..{tokens.stop}",
            "share": node.share,
            "alone_us": timeline.alone_s[span.node] * 1e6,
            "waited_for_room_us": (span.start_s - span.ready_s) * 1e6,
        },
    }


def _bar_text(label: str, width: int) -> list[str]:
    """`width` characters: the label, then `=`, closed by `|` so that neighbours can be told apart."""
    if width <= 0:
        return []
    return list(label[: width - 1].ljust(width - 1, "=") + END)
