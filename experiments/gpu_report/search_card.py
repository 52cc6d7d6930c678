"""Which pipeline suits this card?  R -> P curves from `cta_curves`, a search with them and with the times of `op_profile`.

    card.interference.json     curves that simulation and search read (`nanojax.pipeline.interference`)
    searched.pipeline.json     the pipeline found, which `end_to_end` runs
    fitted-512-512.pipeline.json and its like     `decode_beside_dense` with the cut and the shares that suit these lengths

Needs no GPU and does not touch it.
"""

import collections
import itertools
import json
import time
from typing import Any

from experiments.gpu_report import card_curves, end_to_end
from experiments.gpu_report.cases import Case, Row, Setting
from nanojax.pipeline.cost_model import steady_shape
from nanojax.pipeline.interference import PAPER_TABLE_3, Interference
from nanojax.pipeline.ir import Resource
from nanojax.pipeline.json_format import to_json
from nanojax.pipeline.library import decode_beside_dense
from nanojax.pipeline.profile import ProfileTable
from nanojax.pipeline.search.problem import Problem
from nanojax.pipeline.search.search import known_pipelines, search

CURVES = "card.interference.json"
SEARCH_S = 12.0
SHARES = (0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4)
"""Of decode attention, beside either nano-batch's dense operations, to choose from."""


def cases(setting: Setting) -> list[Case]:
    """The curves, the fits, the search."""
    return [
        Case("curves", lambda: _curves(setting), needs_s=0.0),
        *(
            Case(f"fit {lengths}", lambda lengths=lengths: [_fit(setting, lengths)], needs_s=0.0)
            for lengths in end_to_end.fitted_lengths(setting.is_smoke)
        ),
        Case("search", lambda: [_search(setting)], needs_s=0.0 if setting.is_smoke else 5.0),
    ]


def _curves(setting: Setting) -> list[Row]:
    """Writes the curves; gives them beside the published ones."""
    record = json.loads((setting.out / "cta_curves.json").read_text(encoding="utf-8"))
    times = capped_times(record)
    matmul, attention = (pick(times[kind]) for kind in ("matmul", "attention"))
    name, num_cores = record["device"]["name"], max(record["device"]["num_cores"] or 1, 4)
    found = card_curves.interference(matmul, attention, num_cores, name)
    (setting.out / CURVES).write_text(found.to_json() + "\n", encoding="utf-8")
    return [
        {"share": share, "performance": p, "published_performance": PAPER_TABLE_3.performance(Resource.MEMORY, share)}
        for share, p in found.memory
    ]


def capped_times(record: dict[str, Any]) -> dict[str, dict[tuple[str, str], dict[int, float]]]:
    """kind -> (job, implementation) -> CTAs -> seconds, of the capped programs of a record of `cta_curves`."""
    rows = record["series"]["rows"]
    found: dict[str, dict] = collections.defaultdict(lambda: collections.defaultdict(dict))
    columns = (rows.get(name, []) for name in ("kind", "job", "implementation", "num_ctas", "median_s"))
    for kind, job, implementation, num_ctas, seconds in zip(*columns, strict=True):
        if num_ctas and seconds:
            found[kind][job, implementation][int(num_ctas)] = seconds
    return found


def pick(candidates: dict[tuple[str, str], dict[int, float]]) -> dict[int, float]:
    """The times of the fastest implementation of the largest job.  Raises ValueError without any."""
    if not candidates:
        raise ValueError("no capped kernel was timed: cta_curves has no rows with num_ctas")
    slowest_job = max(candidates, key=lambda key: min(candidates[key].values()))[0]
    return min(
        (times for (job, _), times in candidates.items() if job == slowest_job), key=lambda times: min(times.values())
    )


def _problem(setting: Setting, lengths: str) -> tuple[Problem, str]:
    """A step of a steady state of these lengths on this card; and where its times come from."""
    curves = Interference.from_json((setting.out / CURVES).read_text(encoding="utf-8"))
    profile = ProfileTable.from_json((setting.out / "profile_ops.profile.json").read_text(encoding="utf-8"))
    record = json.loads((setting.out / "cta_curves.json").read_text(encoding="utf-8"))
    means, budget = end_to_end.search_target(setting, record["device"].get("memory_bytes"), lengths)
    durations = profile.durations(steady_shape(budget, *means))
    return Problem(budget, durations, curves, grid=8 if setting.is_smoke else 128), profile.source


def _fit(setting: Setting, lengths: str) -> Row:
    """Writes `decode_beside_dense` with the best of all cuts and shares; says what it is predicted to take, and in order."""
    problem, source = _problem(setting, lengths)
    candidates = [
        (problem.timeline(pipeline).layer_time_s, first, shares, pipeline)
        for first in range(problem.grid, problem.num_tokens, problem.grid)
        for shares in itertools.product(SHARES, SHARES)
        for pipeline in [decode_beside_dense(problem.num_tokens, first, attention_shares=shares)]
    ]
    layer_s, first, (share_one, share_two), best = min(candidates, key=lambda one: one[:3])
    path = setting.out / end_to_end.fitted_file(lengths)
    path.write_text(to_json(best) + "\n", encoding="utf-8")
    in_order = next(one for one in known_pipelines(problem) if one.name == "sequential")
    return {
        "name": f"fitted {lengths}", "num_tokens": problem.num_tokens, "num_first_tokens": first,
        "first_attention_share": share_one, "second_attention_share": share_two, "layer_s": layer_s,
        "sequential_layer_s": problem.timeline(in_order).layer_time_s, "profile": source,
    }  # fmt: skip


def _search(setting: Setting) -> Row:
    """Writes the pipeline found; says what it is predicted to take, beside the ready-made ones."""
    problem, source = _problem(setting, end_to_end.fitted_lengths(setting.is_smoke)[0])
    deadline_s = time.monotonic() + (2 if setting.is_smoke else SEARCH_S)
    found = search(problem, remaining_s=lambda: deadline_s - time.monotonic())
    best = found.timeline.pipeline
    path = setting.out / end_to_end.SEARCHED
    path.write_text(to_json(best) + "\n", encoding="utf-8")
    known = {one.name: problem.timeline(one).layer_time_s for one in known_pipelines(problem)}
    return {
        "name": best.name, "num_tokens": problem.num_tokens, "num_nodes": len(best.nodes),
        "layer_s": found.timeline.layer_time_s, "bound_s": found.bound_s, "is_complete": found.is_complete, "profile": source,
        **{f"{name}_layer_s": seconds for name, seconds in known.items()},
    }  # fmt: skip
