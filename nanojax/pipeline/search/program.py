"""How is a mixed-integer program written down and solved?  Columns, rows, HiGHS."""

import math
from collections.abc import Mapping

import numpy as np
from scipy import optimize, sparse

__all__ = ["LEAST_GAIN", "Program", "solve"]

LEAST_GAIN = 1e-4
"""A relative improvement below this is none."""


class Program:
    """A program under construction: columns (variables) with bounds, rows `low <= sum(coefficient * column) <= high`."""

    def __init__(self) -> None:
        self.lower: list[float] = []
        self.upper: list[float] = []
        self.integral: list[bool] = []
        self.rows: list[tuple[Mapping[int, int | float], float, float]] = []

    def column(self, lower: int | float, upper: int | float, *, is_integral: bool = False) -> int:
        """A new variable; gives its index."""
        self.lower.append(lower)
        self.upper.append(upper)
        self.integral.append(is_integral)
        return len(self.lower) - 1

    def row(
        self, coefficients: Mapping[int, int | float], *, low: int | float = -math.inf, high: int | float = math.inf
    ) -> None:
        """A new constraint."""
        self.rows.append((coefficients, low, high))


def solve(
    program: Program, maximized: int, *, node_limit: int, time_limit_s: float
) -> tuple[list[float] | None, float]:
    """Values of the columns, None if none were found, and the bound on column `maximized`: -inf if nothing is feasible.

    The limit on branch-and-bound nodes makes the answer the same each time; the one in seconds is for emergencies.
    """
    cost = np.zeros(len(program.lower))
    cost[maximized] = -1
    coefficients, low, high = zip(*program.rows, strict=True)
    entries = [(i, j, value) for i, row in enumerate(coefficients) for j, value in row.items()]
    i, j, value = zip(*entries, strict=True)
    matrix = sparse.csr_array((value, (i, j)), shape=(len(program.rows), len(cost)))
    result = optimize.milp(
        cost,
        integrality=np.array(program.integral, dtype=int),
        bounds=optimize.Bounds(program.lower, program.upper),  # pyright: ignore[reportArgumentType]
        constraints=optimize.LinearConstraint(matrix, low, high),  # pyright: ignore[reportArgumentType]
        options={"node_limit": node_limit, "time_limit": max(time_limit_s, 0.1), "mip_rel_gap": LEAST_GAIN / 2},
    )
    if result.status == 2:
        return None, -math.inf
    bound = program.upper[maximized] if result.mip_dual_bound is None else -float(result.mip_dual_bound)
    return None if result.x is None else [float(v) for v in result.x], min(bound, program.upper[maximized])
