"""What does a mixture-of-experts feed-forward compute?  Mixtral: top-k routing, grouped matrix products, no dropped tokens."""

import flax.struct
import jax
import jax.numpy as jnp
from flax import nnx

from nanojax.array_types import Array, Float, Int32
from nanojax.config import ModelConfig
from nanojax.models.layers import contract, normal


@flax.struct.dataclass
class Routes:
    """Each token's experts, best first, and the router's score of each."""

    scores: Float[Array, "t top"]
    experts: Int32[Array, "t top"]


@flax.struct.dataclass
class RoutedHidden:
    """Hidden states of (token, expert) pairs sorted by expert, and the way back.  X = t * experts per token."""

    hidden: Float[Array, "X F"]
    group_sizes: Int32[Array, "E"]
    token: Int32[Array, "X"]
    weight: Float[Array, "X"]
    num_tokens: int = flax.struct.field(pytree_node=False)

    def cut(self, start: int, stop: int) -> "RoutedHidden":
        """The pairs of tokens `start` to `stop` (exclusive), still sorted by expert; tokens count from `start` then."""
        if (start, stop) == (0, self.num_tokens):
            return self
        size = self.token.shape[0] // self.num_tokens * (stop - start)
        is_inside = (self.token >= start) & (self.token < stop)
        (kept,) = jnp.nonzero(is_inside, size=size)
        before = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(is_inside, dtype=jnp.int32)])
        ends = before[jnp.cumsum(self.group_sizes)]
        group_sizes = jnp.diff(ends, prepend=0).astype(jnp.int32)
        return RoutedHidden(self.hidden[kept], group_sizes, self.token[kept] - start, self.weight[kept], stop - start)


class MixtureOfExperts(nnx.Module):
    """Each token goes to its `num_experts_per_token` best experts, weighted by a softmax over those (Mixtral, arXiv 2401.04088)."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, rngs: nnx.Rngs | None):
        experts = config.num_experts
        self.top_k = config.num_experts_per_token
        self.router = normal(rngs, (config.d_model, experts), dtype)
        self.gate_up = normal(rngs, (experts, config.d_model, 2, config.d_ff), dtype)
        self.down = normal(rngs, (experts, config.d_ff, config.d_model), dtype)

    def route(self, x: Float[Array, "t D"]) -> Routes:
        """Picks the experts of each token."""
        return Routes(*jax.lax.top_k(contract(x, self.router[...]), self.top_k))

    def up_gate(self, x: Float[Array, "t D"], routes: Routes | None = None) -> RoutedHidden:
        """Sorts by expert and runs each expert's gate and up projections on its tokens; routes them first if need be."""
        t = x.shape[0]
        routes = self.route(x) if routes is None else routes
        scores, experts = routes.scores, routes.experts
        order = jnp.argsort(experts.reshape(-1))
        token = (order // self.top_k).astype(jnp.int32)
        group_sizes = jnp.bincount(experts.reshape(-1), length=self.router.shape[-1]).astype(jnp.int32)
        kernel = self.gate_up[...]
        both = _grouped(x[token], kernel.reshape(*kernel.shape[:2], -1), group_sizes)
        gate, up = jnp.split(both, 2, axis=-1)
        weight = jax.nn.softmax(scores, axis=-1).reshape(-1)[order]
        return RoutedHidden(jax.nn.silu(gate) * up, group_sizes, token, weight, t)

    def project_down(self, routed: RoutedHidden) -> Float[Array, "t D"]:
        """Each expert's down projection, weighted and added up per token."""
        y = _grouped(routed.hidden, self.down[...], routed.group_sizes) * routed.weight[:, None]
        return jnp.zeros((routed.num_tokens, y.shape[1]), y.dtype).at[routed.token].add(y)


def _grouped(
    x: Float[Array, "X c"], kernels: Float[Array, "E c f"], group_sizes: Int32[Array, "E"]
) -> Float[Array, "X f"]:
    """Rows of `x`, sorted by group, each times its group's kernel; sums in float32."""
    return jax.lax.ragged_dot(x.astype(kernels.dtype), kernels, group_sizes, preferred_element_type=jnp.float32)
