"""Mixture of experts: each token goes to the experts that `router` says, and none is ever dropped.

Where experts are shared out over devices, either their weights come to the tokens or the tokens to their experts,
whichever moves fewer bytes (`tokens_travel`). Tokens travel by all-gather and return by reduce-scatter: an all-to-all
that drops none needs room for every token at every device all the same, and with eight experts a token nearly every
one has an expert on each of up to eight devices.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from audio_grpo.model.grouped import (
    Matrices,
    Matrix,
    OfLayer,
    every_is_cheaper,
    every_mlp,
    experts_of,
    grouped_mlp,
    taken,
)
from audio_grpo.model.router import Routing
from audio_grpo.model.spec import DecoderSpec
from audio_grpo.model.table import Weights, scope
from audio_grpo.parallel.activations import Placement

_ROWS_AT_ONCE = 1 << 15
"""Routed rows that exist together; more tokens are taken in parts, each computed again in the backward pass."""
_ROWS_OF_EXPERT_ON_CPU = 512
"""There as many parts as leave an expert so many rows of each: its rows fill four blocks, and padding is a quarter of
them, while every block's copy of its expert's matrices exists for a part alone."""

EXPERTS = "mlp.experts.*."
"""Of a layer's weights, those of its experts."""
_INNER = {"weight": ("tensor", "fsdp"), "lora_A.weight": (None, "fsdp"), "lora_B.weight": ("tensor", None)}
_DOWN = {"weight": ("fsdp", "tensor"), "lora_A.weight": (None, "tensor"), "lora_B.weight": ("fsdp", None)}
_MATRIX_AXES = {
    f"{name}_proj.{kind}": PartitionSpec("expert", *axes)
    for name, of_kind in (("gate", _INNER), ("up", _INNER), ("down", _DOWN))
    for kind, axes in of_kind.items()
}
"""Of the experts' matrices and adapters; where one has the model width, it is cut by fsdp."""

Routed = tuple[Float[Array, "tokens d"], Float[Array, "tokens k"], Int[Array, "tokens k"]]
"""Tokens, the shares of their experts, and which those are."""


def experts_mlp(
    spec: DecoderSpec,
    w: Weights,
    x: Float[Array, "tokens D"],
    routing: Routing,
    place: Placement,
    matrices: Matrices | None = None,
) -> Float[Array, "tokens D"]:
    """Weighted sum of each token's experts, down(silu(gate x) · up x).

    `matrices` are the experts' where they are not among the layer's weights.
    """
    routed = (x, routing.shares, routing.chosen)
    given: Matrices = matrices or scope(w, EXPERTS)
    used = jax.tree.map(lambda value: value.astype(x.dtype) if value.ndim else value, dict(given))
    mesh = place.mesh
    if mesh is None or mesh.size == 1:
        return _in_parts(
            partial(_own_experts, spec, used, place.platform, first=0), routed, _part(spec, place.platform, 1)
        )
    weights_stay = place.rules["embed"] != ()
    tokens = PartitionSpec(place.rules["batch"], "fsdp" if weights_stay else None)
    chosen = PartitionSpec(place.rules["batch"])
    program = jax.shard_map(
        partial(_few_tokens if weights_stay else _many_tokens, spec, place),
        mesh=mesh,
        in_specs=((tokens, chosen, chosen), {key: _axes_of(key, value) for key, value in used.items()}),
        out_specs=PartitionSpec(place.rules["batch"], place.rules["embed"] or None),
        check_vma=False,
    )
    return program(routed, used)


def _axes_of(key: str, matrix: Matrix) -> PartitionSpec | OfLayer:
    axes = _MATRIX_AXES[key]
    stacked: Any = PartitionSpec(None, *axes), PartitionSpec()
    return OfLayer(*stacked) if isinstance(matrix, OfLayer) else axes


def tokens_travel(spec: DecoderSpec, tokens: int, shards: int) -> bool:
    """Whether bringing `tokens` of each of `shards` devices to their experts moves less than bringing the experts.

    Tokens come and their results return, (shards − 1) · tokens · width each; weights come as (shards − 1) / shards of
    three matrices an expert, and in the backward pass their gradients return.
    """
    return 2 * tokens * shards < 3 * spec.experts * spec.expert_width


def _many_tokens(spec: DecoderSpec, place: Placement, routed: Routed, matrices: Matrices) -> Float[Array, "tokens d"]:
    """One device's share: weights are gathered along the width, and then either tokens or experts are exchanged."""
    shards = jax.lax.axis_size("expert")
    travel = shards > 1 and tokens_travel(spec, routed[0].shape[0], shards)
    matrices = {key: _gather_width(taken(value), _MATRIX_AXES[key]) for key, value in matrices.items()}
    if not travel:
        matrices = jax.tree.map(partial(_gather, axis="expert", dimension=0), matrices)
    first = jax.lax.axis_index("expert") * experts_of(matrices) if travel else 0
    own = partial(_own_experts, spec, matrices, place.platform, first=first)

    def part(routed: Routed) -> Float[Array, "part d"]:
        if not travel:
            return jax.lax.psum(own(routed), "tensor")
        y = own(jax.tree.map(partial(_gather, axis="expert", dimension=0), routed))
        return jax.lax.psum_scatter(jax.lax.psum(y, "tensor"), "expert", scatter_dimension=0, tiled=True)

    return _in_parts(part, routed, _part(spec, place.platform, shards if travel else 1))


def _few_tokens(
    spec: DecoderSpec, place: Placement, routed: Routed, matrices: Matrices
) -> Float[Array, "tokens own_d"]:
    """One device's share where every device has all tokens and its part of every weight, and keeps it."""
    first = jax.lax.axis_index("expert") * experts_of(matrices)
    y = _own_experts(spec, matrices, place.platform, routed, first=first, width_axis="fsdp")
    y = jax.lax.psum(y.astype(jnp.float32), "tensor")
    return jax.lax.psum_scatter(y, "expert", scatter_dimension=1, tiled=True).astype(routed[0].dtype)


def _own_experts(
    spec: DecoderSpec,
    matrices: Matrices,
    platform: str,
    routed: Routed,
    *,
    first: int | Int[Array, ""],
    width_axis: str | None = None,
) -> Float[Array, "own_tokens d"]:
    """What the experts from number `first` on, whose matrices are given, add to each token."""
    x, shares, chosen = routed
    own = experts_of(matrices)
    if platform == "cpu" and every_is_cheaper(x.shape[0], spec.experts_per_token, own):
        of_each = jax.nn.one_hot(chosen - first, own, dtype=x.dtype)
        return every_mlp(x, jnp.einsum("nke,nk->ne", of_each, shares.astype(x.dtype)), matrices, width_axis=width_axis)
    # Own experts' rows come first; the rest belong to none of them.
    assignments = (chosen.reshape(-1) - first) % spec.experts
    order = jnp.argsort(assignments, stable=True)
    sizes = jnp.bincount(assignments, length=spec.experts)[:own]
    rows = x[order // spec.experts_per_token]
    y = grouped_mlp(rows, sizes, matrices, platform=platform, width_axis=width_axis)
    y = y[jnp.argsort(order)].reshape(*chosen.shape, -1)
    return jnp.einsum("nkd,nk->nd", y, shares.astype(x.dtype))


def _part(spec: DecoderSpec, platform: str, shards: int) -> int:
    """Tokens of each device that are taken together, at most."""
    rows = _ROWS_AT_ONCE
    if platform == "cpu":
        rows = min(rows, _ROWS_OF_EXPERT_ON_CPU * spec.experts)
    return max(1, rows // (shards * spec.experts_per_token))


def _in_parts(
    program: Callable[[Routed], Float[Array, "part d"]], routed: Routed, size: int
) -> Float[Array, "tokens d"]:
    """Run a program on at most `size` tokens at a time, in equal parts."""
    tokens = routed[0].shape[0]
    if tokens <= size:
        return program(routed)
    parts = -(-tokens // size)
    padding = -tokens % parts

    def split(x: Array) -> Array:
        return jnp.pad(x, ((0, padding), (0, 0))).reshape(parts, -1, x.shape[1])

    y = jax.lax.map(jax.checkpoint(program), jax.tree.map(split, routed))
    return y.reshape(tokens + padding, -1)[:tokens]


def _gather_width(matrix: Float[Array, "e o i"], axes: PartitionSpec) -> Float[Array, "e whole_o whole_i"]:
    return _gather(matrix, axes.index("fsdp"), "fsdp") if "fsdp" in axes else matrix


def _gather(x: Array, dimension: int, axis: str) -> Array:
    return jax.lax.all_gather(x, axis, axis=dimension, tiled=True)
