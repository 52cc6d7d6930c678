"""What does the search choose from, and who judges?  The work of one layer, and the layer simulator."""

import dataclasses
from collections.abc import Sequence

from nanojax.pipeline.cost_model import Duration
from nanojax.pipeline.interference import Interference
from nanojax.pipeline.ir import NanoBatch, OpKind, Pipeline, Resource
from nanojax.pipeline.simulate import Timeline, simulate

__all__ = ["Part", "Problem", "Structure", "area_bound_s", "work_bound_s"]

NUM_LAYERS = 8
"""Layers that are simulated to judge a pipeline: the loop has settled in the second half."""
SHARE_LEVELS = tuple(tenth / 10 for tenth in range(1, 11))
"""Shares to choose from: the rows of the paper's Table 3."""

Part = tuple[OpKind, NanoBatch]
"""A nano-operation before it has a place in an order, or a share."""
Structure = tuple[Part, ...]
"""All nano-operations of a layer, sorted by operation (the order of `OpKind`, which respects the data flow) and tokens."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """One layer's work.

    num_tokens: the dense batch.    duration: seconds of a nano-operation alone on all devices (the paper's D_best).
    interference: what a share is worth.    grid: cuts are at multiples of this many tokens.
    Raises ValueError for counts below 1.
    """

    num_tokens: int
    duration: Duration
    interference: Interference
    num_devices: int = 1
    is_moe: bool = False
    grid: int = 128

    def __post_init__(self) -> None:
        for name in ("num_tokens", "num_devices", "grid"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be >= 1")

    @property
    def is_free(self) -> bool:
        """Whether kernels do not slow each other down, so that shares mean nothing."""
        return all(self.interference.performance(resource, 0.0) == 1 for resource in Resource)

    def timeline(self, pipeline: Pipeline) -> Timeline:
        """What the layer simulator says of a pipeline: the one judge of the search."""
        return simulate(pipeline, self.duration, self.interference, num_layers=NUM_LAYERS)

    def durations_s(self, structure: Structure) -> tuple[float, ...]:
        """Seconds of each nano-operation alone."""
        return tuple(self.duration(op, tokens) for op, tokens in structure)


def work_bound_s(structure: Structure, durations_s: Sequence[float]) -> float:
    """The work of the busiest resource: each does one thing at a time, so no layer is shorter."""
    return max(
        sum(s for (op, _), s in zip(structure, durations_s, strict=True) if op.resource is resource)
        for resource in Resource
    )


def area_bound_s(problem: Problem, structure: Structure, durations_s: Sequence[float]) -> float:
    """Under interference: a node of duration d holds a share R for d / P(R), and shares add up to at most 1 at any time.

    So a layer takes at least the sum of d * min(R / P(R)), over the shares on offer.
    """
    price = {
        resource: min(share / problem.interference.performance(resource, share) for share in SHARE_LEVELS)
        for resource in Resource
    }
    area_s = sum(price[op.resource] * s for (op, _), s in zip(structure, durations_s, strict=True))
    return max(work_bound_s(structure, durations_s), 0.0 if problem.is_free else area_s)
