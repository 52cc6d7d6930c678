"""How does a step avoid work that nobody needs?  On a CPU by a condition; elsewhere the work is done all the same.

A condition inside of a compiled program is the host's to decide on a GPU: it waits for the device, and until then launches
nothing of what follows.  A step without conditions is launched while the one before it runs.
"""

from collections.abc import Callable
from typing import TypeVar

import jax

from nanojax.array_types import Array, Bool

T = TypeVar("T")


def skip_unless(is_needed: Bool[Array, ""], compute: Callable[[], T], otherwise: Callable[[], T]) -> T:
    """`compute()`; a CPU takes `otherwise()` instead where it is not needed.

    The caller guarantees that both agree there.
    """
    return jax.lax.platform_dependent(cpu=lambda: jax.lax.cond(is_needed, compute, otherwise), default=compute)
