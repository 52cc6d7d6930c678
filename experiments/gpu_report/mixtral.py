"""How many tokens per second does Mixtral-8x7B serve on one card?  bfloat16, 93 GB of random weights, as `end_to_end`."""

from experiments.gpu_report.cases import Case, Setting
from experiments.gpu_report.end_to_end import Point, model_cases, points

MODEL = "mixtral-8x7b"


def cases(setting: Setting) -> list[Case]:
    """512/512, whole operations one after another, then overlapped."""
    chosen: list[Point] = [point for point in points(setting.is_smoke) if point.driver == "dispatch_ahead"]
    lengths = chosen[0].lengths
    wanted = [point for point in chosen if point.lengths == lengths and point.how in ("sequential", "overlap")]
    return model_cases(setting, MODEL, wanted[:1] if setting.is_smoke else wanted)
