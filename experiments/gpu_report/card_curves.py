"""What is a share of this card worth to a kernel?  R -> P curves from the speeds of capped kernels, each alone.

The share R of an operation is what the matrix product beside it cannot have (paper, section 4.1.1: R is defined by the
GEMM).  With the multiprocessors divided, attention on n of N leaves N - n to the product, so that R = 1 - P_matmul(N - n),
at which attention reaches P = T(N) / T(n).  The product itself has P = R by definition.
"""

import itertools
from collections.abc import Mapping

from nanojax.pipeline.interference import PAPER_TABLE_3, Curve, Interference

PROPORTIONAL: Curve = ((0.0, 0.0), (1.0, 1.0))


def performance(seconds: Mapping[int, float]) -> dict[int, float]:
    """Number of CTAs -> speed as a fraction of the fastest."""
    fastest_s = min(seconds.values())
    return {num_ctas: fastest_s / s for num_ctas, s in seconds.items()}


def memory_curve(matmul_s: Mapping[int, float], attention_s: Mapping[int, float], num_cores: int) -> Curve:
    """(R, P) of attention from the times of both by number of CTAs, alone; from (0, 0) to (1, 1).

    Counts of one without its complement among the other's are interpolated in the matmul's speed.  Noise that would make P
    descend is taken out by a running maximum.  Raises ValueError without any time.
    """
    if not matmul_s or not attention_s:
        raise ValueError("curves need times of the matmul and of attention")
    matmul = [(0, 0.0), *sorted(performance(matmul_s).items())]
    points = {0.0: 0.0}
    for num_ctas, p in sorted(performance(attention_s).items()):
        share = 1.0 - _along(matmul, num_cores - num_ctas)
        if 0 < share < 1:
            points[share] = max(p, points.get(share, 0.0))
    curve, highest = [], 0.0
    for share, p in sorted(points.items()):
        highest = max(highest, min(p, 1.0))
        curve.append((share, highest))
    return (*curve, (1.0, 1.0))


def interference(
    matmul_s: Mapping[int, float], attention_s: Mapping[int, float], num_cores: int, device: str
) -> Interference:
    """Curves for search and simulation.  The card alone has no network: that curve is the paper's."""
    source = (
        f"measured on {device}, matmul and decode attention alone on part of its {num_cores} multiprocessors; "
        "network: arXiv 2408.12757v2, Table 3 (published)"
    )
    return Interference(PROPORTIONAL, memory_curve(matmul_s, attention_s, num_cores), PAPER_TABLE_3.network, source)


def _along(points: list[tuple[int, float]], x: int) -> float:
    """Linear between points that ascend; beyond the last one its value."""
    for (left, low), (right, high) in itertools.pairwise(points):
        if x <= right:
            return low + (high - low) * (x - left) / (right - left)
    return points[-1][1]
