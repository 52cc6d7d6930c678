"""How many CTAs is a share of the device?  Whole numbers of persistent CTAs, one for each multiprocessor, none left over."""

import dataclasses
import math
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Split:
    """Multiprocessors of the two operations; they add up to the device's."""

    matmul: int
    attention: int

    def __post_init__(self) -> None:
        if min(self.matmul, self.attention) < 1:
            raise ValueError(f"{self} leaves an operation without a multiprocessor")

    @property
    def num_sms(self) -> int:
        """Multiprocessors of both."""
        return self.matmul + self.attention


def ctas_of_shares(shares: Sequence[float], num_sms: int) -> tuple[int, ...]:
    """CTAs of operations that run side by side: as near to their shares as whole numbers are, at least 1, `num_sms` in all.

    shares: positive; only their ratios count, so that a group that claims less than the device fills it all the same.
    The largest remainders are rounded up, of equal ones the earlier operation's.
    Raises ValueError for a share that is not positive, or more operations than multiprocessors.
    """
    if not shares or not all(share > 0 and math.isfinite(share) for share in shares):
        raise ValueError(f"shares={tuple(shares)} must be positive")
    if len(shares) > num_sms:
        raise ValueError(f"{len(shares)} operations side by side on num_sms={num_sms}")
    exact = [num_sms * share / sum(shares) for share in shares]
    counts = [max(math.floor(part), 1) for part in exact]
    while sum(counts) != num_sms:
        step = 1 if sum(counts) < num_sms else -1
        able = [i for i, count in enumerate(counts) if count + step >= 1]
        counts[max(able, key=lambda i: step * (exact[i] - counts[i]))] += step
    return tuple(counts)


def split_of_share(share: float, num_sms: int) -> Split:
    """The split that gives the matrix product a share between 0 and 1 of the device.  Raises ValueError."""
    if not 0 < share < 1:
        raise ValueError(f"share={share} must be between 0 and 1")
    return Split(*ctas_of_shares((share, 1 - share), num_sms))
