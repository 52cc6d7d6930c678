"""What is a share of the device worth to a kernel?  The paper's map from resource share R to performance P.

R is what a nano-operation gets of the device while others run beside it, P the fraction of its stand-alone speed that it
then reaches (arXiv 2408.12757v2, section 4.1.1).  R is *defined* by the GEMM, so compute has P = R; memory- and
network-bound kernels reach more than their share, which is what makes overlapping pay.
"""

import dataclasses
import itertools
import json

from nanojax.pipeline.ir import Resource

__all__ = ["NO_INTERFERENCE", "PAPER_TABLE_3", "PAPER_TABLE_3_AND_TEXT", "RELEASED_TABLES", "Curve", "Interference"]

Curve = tuple[tuple[float, float], ...]
"""(R, P) points from R = 0 to R = 1, linear in between."""

PROPORTIONAL: Curve = ((0.0, 0.0), (1.0, 1.0))
INDEPENDENT: Curve = ((0.0, 1.0), (1.0, 1.0))


@dataclasses.dataclass(frozen=True)
class Interference:
    """A curve for each resource that can bind, and where they come from.

    Raises ValueError for a curve that does not go from R = 0 to (1, 1), R ascending, P in [0, 1] and never descending.
    """

    compute: Curve
    memory: Curve
    network: Curve
    source: str

    def __post_init__(self) -> None:
        for resource in Resource:
            curve = self.curve(resource)
            ascends = all(a[0] < b[0] and a[1] <= b[1] for a, b in itertools.pairwise(curve))
            if len(curve) < 2 or curve[0][0] != 0 or curve[-1] != (1, 1) or curve[0][1] < 0 or not ascends:
                raise ValueError(
                    f"{resource.value} curve {curve} must go from R = 0 to (1, 1), R ascending, P not descending"
                )

    def curve(self, resource: Resource) -> Curve:
        """The points of one resource."""
        return {Resource.COMPUTE: self.compute, Resource.MEMORY: self.memory, Resource.NETWORK: self.network}[resource]

    def performance(self, resource: Resource, share: int | float) -> float:
        """P of a kernel bound by `resource` that gets `share`.  Raises ValueError unless it is in [0, 1]."""
        if not 0 <= share <= 1:
            raise ValueError(f"share={share} must be in [0, 1]")
        for (left, low), (right, high) in itertools.pairwise(self.curve(resource)):
            if share <= right:
                return low + (high - low) * (share - left) / (right - left)
        return 1.0

    def share_for(self, resource: Resource, performance: int | float) -> float:
        """The smallest share that gives at least `performance`.  Raises ValueError unless that is in [0, 1]."""
        if not 0 <= performance <= 1:
            raise ValueError(f"performance={performance} must be in [0, 1]")
        curve = self.curve(resource)
        if performance <= curve[0][1]:
            return 0.0
        for (left, low), (right, high) in itertools.pairwise(curve):
            if performance <= high:
                return left + (right - left) * (performance - low) / (high - low)
        return 1.0

    def to_json(self) -> str:
        """Text that `from_json` reads."""
        curves = {resource.value: [list(point) for point in self.curve(resource)] for resource in Resource}
        return json.dumps(curves | {"source": self.source}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Interference":
        """Reads measured curves: `{"compute": [[R, P], ...], "memory": ..., "network": ..., "source": text}`.

        Raises ValueError naming what is wrong.
        """
        try:
            plain = json.loads(text)
            curves = {
                resource.value: tuple(
                    (float(share), float(performance)) for share, performance in plain[resource.value]
                )
                for resource in Resource
            }
            return cls(**curves, source=str(plain["source"]))
        except (KeyError, TypeError) as error:
            raise ValueError(f"these are no interference curves: {type(error).__name__} {error}") from error


NO_INTERFERENCE = Interference(INDEPENDENT, INDEPENDENT, INDEPENDENT, "assumed: kernels do not slow each other down")

_TABLE_3_NETWORK: Curve = ((0.0, 0.0), (0.1, 0.3), (0.2, 0.5), (0.8, 0.9), (0.9, 1.0), (1.0, 1.0))

PAPER_TABLE_3 = Interference(
    compute=PROPORTIONAL,
    memory=((0.0, 0.0), (0.1, 0.2), (0.2, 0.3), (0.8, 0.85), (0.9, 0.95), (1.0, 1.0)),
    network=_TABLE_3_NETWORK,
    source="arXiv 2408.12757v2, Table 3; its columns for R from 0.3 to 0.7 are not printed: interpolated",
)

PAPER_TABLE_3_AND_TEXT = Interference(
    compute=PROPORTIONAL,
    memory=((0.0, 0.0), (0.1, 0.2), (0.2, 0.3), (0.4, 0.8), (0.8, 0.85), (0.9, 0.95), (1.0, 1.0)),
    network=_TABLE_3_NETWORK,
    source="arXiv 2408.12757v2, Table 3, and its text: decode attention reaches 80 % with R = 0.4",
)
"""The text's point lies far above the line between Table 3's printed neighbours (0.48) and the released table (0.60)."""

RELEASED_TABLES = Interference(
    compute=PROPORTIONAL,
    memory=(
        (0.0, 0.0), (0.1, 0.25), (0.2, 0.4), (0.3, 0.5), (0.4, 0.6), (0.5, 0.7), (0.6, 0.8), (0.7, 0.85), (0.8, 0.9),
        (0.9, 0.95), (1.0, 1.0),
    ),
    network=((0.0, 0.0), (0.1, 0.4), (0.2, 0.6), (0.3, 0.7), (0.4, 0.8), (0.5, 0.9), (1.0, 1.0)),
    source="github efeslab/Nanoflow, autosearch/trace/gemv_interference.csv and net_interference.csv, commit d1bbe27",
)  # fmt: skip
