"""Mixture of experts: each token goes to its top experts, and none is ever dropped."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from audio_grpo.model.layers import linear
from audio_grpo.model.spec import DecoderSpec
from audio_grpo.model.table import Weights

_BLOCK_ROWS = 32
"""Rows that share one expert's weights in a batched product: large enough to fill a core, small enough to waste few."""


def experts_mlp(spec: DecoderSpec, w: Weights, x: Float[Array, "tokens D"]) -> Float[Array, "tokens D"]:
    """Weighted sum of each token's top experts, down(silu(gate x) · up x)."""
    shares, chosen = _route(spec, w, x)
    assignments = chosen.reshape(-1)
    order = jnp.argsort(assignments, stable=True)
    sizes = jnp.bincount(assignments, length=spec.experts)
    rows = x[order // spec.experts_per_token]
    experts = tuple(w[f"mlp.experts.*.{name}_proj.weight"].astype(x.dtype) for name in ("gate", "up", "down"))
    y = jax.lax.platform_dependent(rows, sizes, *experts, cpu=_blocked_experts, default=_ragged_experts)
    y = y[jnp.argsort(order)].reshape(*chosen.shape, -1)
    return jnp.einsum("nkd,nk->nd", y, shares.astype(x.dtype))


def _route(
    spec: DecoderSpec, w: Weights, x: Float[Array, "tokens D"]
) -> tuple[Float[Array, "tokens k"], Int[Array, "tokens k"]]:
    probabilities = jax.nn.softmax(linear(w, "mlp.gate", x).astype(jnp.float32), axis=-1)
    shares, chosen = jax.lax.top_k(probabilities, spec.experts_per_token)
    if spec.norm_topk:
        shares = shares / shares.sum(axis=-1, keepdims=True)
    return shares, chosen


def _ragged_experts(
    rows: Float[Array, "n D"],
    sizes: Int[Array, "E"],
    gate: Float[Array, "E F D"],
    up: Float[Array, "E F D"],
    down: Float[Array, "E D F"],
) -> Float[Array, "n D"]:
    """Rows sorted by expert through grouped matrix products, which TPU and GPU have."""
    dims = jax.lax.RaggedDotDimensionNumbers((((1,), (2,)), ((), ())), [0], [0])

    def grouped(x: Float[Array, "n I"], weight: Float[Array, "E O I"]) -> Float[Array, "n O"]:
        return jax.lax.ragged_dot_general(x, weight, sizes, dims)

    return grouped(jax.nn.silu(grouped(rows, gate)) * grouped(rows, up), down)


def _blocked_experts(
    rows: Float[Array, "n D"],
    sizes: Int[Array, "E"],
    gate: Float[Array, "E F D"],
    up: Float[Array, "E F D"],
    down: Float[Array, "E D F"],
) -> Float[Array, "n D"]:
    """Rows sorted by expert, each expert's padded to whole blocks, as one batched product over blocks.

    CPU computes a `ragged_dot` for every row and every expert; here the work follows the routed rows.
    """
    count, experts = rows.shape[0], sizes.shape[0]
    blocks_per_expert = -(-sizes // _BLOCK_ROWS)
    first_block = jnp.cumsum(blocks_per_expert) - blocks_per_expert
    blocks = min(count, count // _BLOCK_ROWS + experts)
    expert_of_row = jnp.repeat(jnp.arange(experts), sizes, total_repeat_length=count)
    rank = jnp.arange(count) - (jnp.cumsum(sizes) - sizes)[expert_of_row]
    slot = first_block[expert_of_row] * _BLOCK_ROWS + rank
    blocked = jnp.zeros((blocks * _BLOCK_ROWS, rows.shape[1]), rows.dtype).at[slot].set(rows)
    blocked = blocked.reshape(blocks, _BLOCK_ROWS, -1)
    expert_of_block = jnp.repeat(jnp.arange(experts), blocks_per_expert, total_repeat_length=blocks)

    def batched(x: Float[Array, "b r I"], weight: Float[Array, "E O I"]) -> Float[Array, "b r O"]:
        return jnp.einsum("bri,boi->bro", x, weight[expert_of_block])

    y = batched(jax.nn.silu(batched(blocked, gate)) * batched(blocked, up), down)
    return y.reshape(blocks * _BLOCK_ROWS, -1)[slot]
