"""Attention over segments: partial results over several sets of keys, merged by log-sum-exp.

S sequences ask queries of R rows of keys. A sequence's own keys are a segment with R = S; keys that W sequences share,
such as a prompt's, are a segment with R = S / W rows, stored once and read in one batched product for all W.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

_MASKED = -1e30
"""Score of a masked key: finite, so that a row with no key at all stays free of NaN and weighs nothing when merged."""

_SCORES_AT_ONCE = 1 << 22
"""Scores of one sequence and head beyond which queries are taken in blocks: 2,000 positions against themselves."""


class Projected(NamedTuple):
    """Queries, keys and values of new positions; H is a multiple of K."""

    queries: Float[Array, "S Q H N"]
    keys: Float[Array, "S Q K N"]
    values: Float[Array, "S Q K N"]


class Membership(NamedTuple):
    """Which sequences read which row, where that is not simply W consecutive sequences to a row.

    Sequences and rows come in P parts of R = rows / P and S = sequences / P, one for each device that holds some; a
    sequence reads rows of its own part only, and all indices count within the part.
    """

    members: Int[Array, "P R W"]
    """Index of the w-th sequence that reads row r; any index where there are fewer than W."""
    place: Int[Array, "P S"]
    """Index into the flattened `members` of its part at which sequence s stands."""


class Segment(NamedTuple):
    """Keys and values that queries attend to; heads come before positions, as matrix products want them."""

    keys: Float[Array, "R K T N"]
    values: Float[Array, "R K T N"]
    mask: Bool[Array, "R #Q T"] | None
    """True for keys that may be looked at, by each query or by all. None for a sequence's own new positions: query i
    sees keys up to i."""
    membership: Membership | None = None
    """None: sequences r·W … r·W + W − 1 read row r."""


def heads_first(x: Float[Array, "S Q K N"]) -> Float[Array, "S K Q N"]:
    """Projected keys or values as segments have them."""
    return jnp.swapaxes(x, 1, 2)


def own_segment(new: Projected) -> Segment:
    """New positions among themselves."""
    return Segment(heads_first(new.keys), heads_first(new.values), None)


class _Partial(NamedTuple):
    weighted: Float[Array, "S Q H N"]
    """Sum of values times exp(score − peak)."""
    peak: Float[Array, "S Q H"]
    total: Float[Array, "S Q H"]
    """Sum of exp(score − peak)."""


def attend(queries: Float[Array, "S Q H N"], segments: Sequence[Segment]) -> Float[Array, "S Q H N"]:
    """Softmax attention over all keys of all segments together, scaled by N^−0.5, softmax in float32.

    Equals attention over the concatenated keys (FlashAttention's merge, arXiv 2205.14135, section 3.1).
    """
    partials = [_attend_segment(queries, segment) for segment in segments]
    peak = partials[0].peak
    for partial in partials[1:]:
        peak = jnp.maximum(peak, partial.peak)
    shares = [jnp.exp(partial.peak - peak) for partial in partials]
    total = sum(share * partial.total for share, partial in zip(shares, partials, strict=True))
    weighted = sum(share[..., None] * partial.weighted for share, partial in zip(shares, partials, strict=True))
    return (weighted / jnp.asarray(total)[..., None]).astype(queries.dtype)


def _attend_segment(queries: Float[Array, "S Q H N"], segment: Segment) -> _Partial:
    """One block of queries after another where the scores of all would not fit."""
    length, keys = queries.shape[1], segment.keys.shape[2]
    block = max(1, _SCORES_AT_ONCE // keys)
    if length <= block:
        return _attend_block(queries, segment, jnp.int32(0))
    blocks = -(-length // block)
    padded = jnp.pad(queries, ((0, 0), (0, blocks * block - length), (0, 0), (0, 0)))
    split = jnp.moveaxis(padded.reshape(queries.shape[0], blocks, block, *queries.shape[2:]), 1, 0)
    each = jax.checkpoint(lambda x: _attend_block(x[0], segment, x[1]))
    partials = jax.lax.map(each, (split, jnp.arange(blocks) * block))

    def join(x: Array) -> Array:
        return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], blocks * block, *x.shape[3:])[:, :length]

    return _Partial(*map(join, partials))


def _attend_block(queries: Float[Array, "S Q H N"], segment: Segment, first: Int[Array, ""]) -> _Partial:
    """`first` is the first query's position among the sequence's own."""
    rows, kv_heads, keys, _ = segment.keys.shape
    _, length, heads, width = queries.shape
    mask = segment.mask
    if mask is None:
        mask = (jnp.arange(keys) <= (first + jnp.arange(length))[:, None])[None]
    by_row = queries if segment.membership is None else _take(queries, segment.membership.members)
    members = by_row.reshape(rows, -1, length, kv_heads, heads // kv_heads, width)
    scores = jnp.einsum("rwqkhn,rktn->rkhwqt", members, segment.keys, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, None, None, None], scores * width**-0.5, _MASKED)
    peak = scores.max(axis=-1)
    weights = jnp.exp(scores - peak[..., None])
    total = weights.sum(axis=-1)
    weighted = _weigh(weights.astype(segment.values.dtype), segment.values)
    partial = _Partial(
        weighted.reshape(-1, length, heads, width),
        peak.transpose(0, 3, 4, 1, 2).reshape(-1, length, heads),
        total.transpose(0, 3, 4, 1, 2).reshape(-1, length, heads),
    )
    if segment.membership is None:
        return partial
    return _Partial(*(_take(value, segment.membership.place) for value in partial))


def _weigh(weights: Float[Array, "R K h W Q T"], values: Float[Array, "R K T N"]) -> Float[Array, "R W Q K h N"]:
    def product(weights: Array, values: Array) -> Array:
        return jnp.einsum("rkhwqt,rktn->rwqkhn", weights, values, preferred_element_type=jnp.float32)

    def widened(weights: Array, values: Array) -> Array:
        return product(weights.astype(jnp.float32), values.astype(jnp.float32))

    # XLA for CPU has no such product of bfloat16.
    return jax.lax.platform_dependent(weights, values, cpu=widened, default=product)


def _take(values: Float[Array, "n *rest"], indices: Int[Array, "P *index"]) -> Float[Array, "m *rest"]:
    """Values at indices that count within each of P equal parts; a part's values stay on its device."""
    parts = values.reshape(indices.shape[0], -1, *values.shape[1:])
    flat = indices.reshape(indices.shape[0], -1)
    return jax.vmap(lambda part, index: part[index])(parts, flat).reshape(-1, *values.shape[1:])
