"""What should the scheduler do?  The same decisions in plain Python, one request at a time."""

import dataclasses


@dataclasses.dataclass
class Row:
    """A resident request; `pages` counts the pages that it holds."""

    arrival: int
    num_tokens: int
    num_computed: int
    pages: int
    active: bool
    rank: int = 0
    is_first: bool = False

    @property
    def todo(self) -> int:
        return self.num_tokens - self.num_computed

    def is_stuck(self, page_size: int) -> bool:
        return self.num_computed >= self.pages * page_size


def plan(rows: list[Row], num_free: int, budget: int, page_size: int, decode_first: bool):
    """Returns (tokens per row, index of the preempted row or None)."""
    active = [row for row in rows if row.active]
    decoding = [row for row in active if row.todo == 1 and row.is_stuck(page_size)]
    none_moves = bool(active) and num_free == 0 and all(row.is_stuck(page_size) for row in active)
    holders = [row for row in active if row.pages]
    victim = None
    if (len(decoding) > num_free or none_moves) and len(holders) > 1:
        victim = max(holders, key=lambda row: row.arrival)
        num_free += victim.pages
    runnable = [row for row in active if row is not victim]
    runnable.sort(
        key=lambda row: (
            (False, False, 0, row.arrival)
            if row.is_first
            else (True, (row.todo > 1) == decode_first, row.rank, row.arrival)
        )
    )
    tokens = {id(row): 0 for row in rows}
    for row in runnable:
        room = row.pages * page_size - row.num_computed
        take = min(row.todo, budget, room + num_free * page_size)
        tokens[id(row)] = take
        budget -= take
        num_free -= -(-max(take - room, 0) // page_size)
    return [tokens[id(row)] for row in rows], None if victim is None else rows.index(victim)


def peak_pages(num_tokens: list[int], remaining: list[int], page_size: int) -> int:
    """Walks into the future step by step; request i lives for max(remaining, 1) steps."""
    peak = 0
    for t in range(max([1, *remaining])):
        in_use = (-(-(n + t) // page_size) for n, r in zip(num_tokens, remaining, strict=True) if t < max(r, 1))
        peak = max(peak, sum(in_use))
    return peak
