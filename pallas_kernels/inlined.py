"""How is a kernel that many layers call traced and lowered once, and yet no call inside its callers?"""

from collections.abc import Callable
from typing import Any

import jax


def inlined(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel`, a function of arrays, traced once for each kind of arguments; what it does becomes part of its caller.

    To lower a Mosaic kernel takes half a second, and a step has hundreds: JAX does it once for calls that share a trace.  A
    jit that stayed a call would not be borne by a GPU stream, whose caller therefore disables jits; a kernel's loops need it.
    """
    traced = jax.jit(kernel, inline=True)

    def call(*args: Any) -> Any:
        with jax.disable_jit(False):
            return traced(*args)

    return call
