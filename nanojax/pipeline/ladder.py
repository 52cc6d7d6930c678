"""Which pipeline runs on which rung of the budget ladder?  The one that pays; a split that loses gives way to `sequential`."""

from collections.abc import Callable, Iterable

from nanojax.pipeline.ir import Pipeline
from nanojax.pipeline.library import sequential

ROUNDING = 1e-9
"""Gains this near to 1 are none: a split that costs nothing comes out of a simulation with rounding errors."""


def choose_per_rung(
    make: Callable[[int], Pipeline],
    budgets: Iterable[int],
    gain: Callable[[Pipeline], float],
    *,
    make_sequential: Callable[[int], Pipeline] = sequential,
) -> dict[int, Pipeline]:
    """`make(budget)` for each budget where it gains, `make_sequential(budget)` for the others.

    gain: what `sequential` takes over what the pipeline takes, under the caller's cost model; a pipeline is kept above 1.
    Small batches lose: each nano-batch reads all weights again.
    """
    candidates = {budget: make(budget) for budget in budgets}
    return {
        budget: pipeline if gain(pipeline) > 1 + ROUNDING else make_sequential(budget)
        for budget, pipeline in candidates.items()
    }
