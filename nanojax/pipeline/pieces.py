"""Where is a result that was computed in pieces?  By what it is, its layer and its tokens; cut and joined as it is asked for."""

import collections
from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp

from nanojax.pipeline.ir import NanoBatch


class Pieces:
    """Results of nano-operations while a step is traced.  All leaves of a value have the tokens as their first axis."""

    def __init__(self) -> None:
        self._found: dict[tuple[Hashable, int], dict[NanoBatch, Any]] = collections.defaultdict(dict)
        self._new: list[tuple[tuple[Hashable, int], NanoBatch]] = []

    def put(self, name: Hashable, layer: int, tokens: NanoBatch, value: Any) -> None:
        """Keeps `value` as result `name` of `layer` on `tokens`."""
        self._found[name, layer][tokens] = value
        self._new.append(((name, layer), tokens))

    def settle(self, *, is_join: bool = False) -> None:
        """Ends a phase.  `is_join`: whatever uses one of the results put since the last call waits for all of them."""
        new, self._new = self._new, []
        if is_join:
            distinct = {id(value): value for value in (self._found[key][tokens] for key, tokens in new)}
            joined = dict(zip(distinct, jax.lax.optimization_barrier(list(distinct.values())), strict=True))
            for key, tokens in new:
                self._found[key][tokens] = joined[id(self._found[key][tokens])]

    def touching(self, name: Hashable, layer: int, tokens: NanoBatch) -> list[tuple[NanoBatch, Any]]:
        """The pieces that cover `tokens`, in order.  Raises ValueError if some of the tokens are in none."""
        found = self._found[name, layer]
        pieces = [(own, found[own]) for own in sorted(found) if own.intersects(tokens)]
        reached = tokens.start
        for own, _ in pieces:
            if own.start > reached:
                break
            reached = own.stop
        if reached < tokens.stop:
            raise ValueError(f"{name} of layer {layer} is not known on tokens {reached}..{tokens.stop}")
        return pieces

    def get(self, name: Hashable, layer: int, tokens: NanoBatch) -> Any:
        """The result on `tokens`: one piece as it is, or parts of several, joined.  Raises ValueError as `touching`."""
        parts = [_part(own, value, tokens) for own, value in self.touching(name, layer, tokens)]
        return parts[0] if len(parts) == 1 else jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


def _part(own: NanoBatch, value: Any, tokens: NanoBatch) -> Any:
    """What `value`, on the tokens `own`, says of those in `tokens`."""
    start, stop = max(own.start, tokens.start), min(own.stop, tokens.stop)
    if (start, stop) == (own.start, own.stop):
        return value
    return jax.tree.map(lambda leaf: leaf[start - own.start : stop - own.start], value)
