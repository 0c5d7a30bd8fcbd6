"""Drawing a token by inverting the cumulative distribution: a block of the vocabulary, a group of it, a token of that.

The levels are the same for every number of slots and devices, and so is the token.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from audio_grpo.rollout.vocabulary import Vocabulary


class Masses(NamedTuple):
    """Unnormalised probabilities of blocks and groups of tokens."""

    allowed: Float[Array, "T b S"]
    """Log of the mass of each block's allowed tokens."""
    barred: Float[Array, "T b S"]
    """The same of the tokens that are not allowed."""
    blocks: Float[Array, "T b S"]
    """Log of the weight by which a block is drawn: of its allowed tokens, or of the likeliest of them if greedy."""
    groups: Float[Array, "T b G S"]
    """Weights by which groups are drawn, in proportion within a block."""


def add_up(logits: Float[Array, "T b G M S"], allowed: Bool[Array, "T b G M #S"], *, greedy: bool) -> Masses:
    """Masses of blocks, each relative to its own largest logit, so that none underflows beside another.

    Nor do allowed tokens beside barred ones: they too have their own scale.
    """
    peak = jnp.where(allowed, logits, -jnp.inf).max(axis=(2, 3), keepdims=True)
    barred_peak = jnp.where(allowed, -jnp.inf, logits).max(axis=(2, 3), keepdims=True)
    # Two exponentials: XLA's CPU code for one of a selected peak is not vectorised, which costs more.
    mass = jnp.where(allowed, jnp.exp(logits - peak), jnp.exp(logits - barred_peak))
    groups = jnp.where(allowed, mass, 0.0).sum(axis=3)
    total = jnp.log(groups.sum(axis=2))
    barred = jnp.log(jnp.where(allowed, 0.0, mass).sum(axis=(2, 3)))
    peak, barred_peak = peak[:, :, 0, 0], barred_peak[:, :, 0, 0]
    if greedy:
        largest = allowed & (logits == peak[:, :, None, None])
        return Masses(peak + total, barred_peak + barred, peak, largest.any(axis=3).astype(jnp.float32))
    return Masses(peak + total, barred_peak + barred, peak + total, groups)


def pick(
    vocabulary: Vocabulary,
    masses: Masses,
    members: Callable[[Int[Array, "T S"], Int[Array, "T S"]], Float[Array, "T M S"]],
    uniform: Float[Array, "S 2"],
    *,
    greedy: bool,
) -> tuple[Int[Array, "S"], Float[Array, "S"]]:
    """Draw a token of each row; returns tokens and their logits.

    `members(block, group)` gives the logits of one group for each row, −inf where a token is not allowed, on each
    device of a block that is there. Greedy draws are those at 0 from weights that only the largest have.
    """
    devices, blocks = masses.blocks.shape[:2]
    u, v = (jnp.zeros_like(uniform) if greedy else uniform).T
    block, _ = _land(_weights(vocabulary.place(masses.blocks.reshape(-1, len(u)), None, "batch"), greedy=greedy), u)
    device = jnp.arange(devices)[:, None]
    # Every device draws from a block of its own, and the draw of the one that has the row's block counts.
    here = jnp.clip(block - device * blocks, 0, blocks - 1)
    group, rest = _land(_take(masses.groups, here).swapaxes(0, 1), jnp.broadcast_to(v, here.shape))
    logits = members(here, group)
    member, _ = _land(_weights(logits.swapaxes(0, 1), greedy=greedy), rest)
    tokens = vocabulary.ids(device * blocks + here, group, member)
    chosen = _take(logits, member)
    counts = device == block // blocks
    return jnp.where(counts, tokens, 0).sum(axis=0), jnp.where(counts, chosen, 0.0).sum(axis=0)


def _weights(logits: Float[Array, "n *rest"], *, greedy: bool) -> Float[Array, "n *rest"]:
    """Weights to draw by, along the first dimension."""
    below = logits - logits.max(axis=0)
    return (below == 0).astype(jnp.float32) if greedy else jnp.exp(below)


def _take(x: Float[Array, "T n *rest S"], index: Int[Array, "T S"]) -> Float[Array, "T *rest S"]:
    """Each row's own entry of the second dimension, on each device."""
    index = index.reshape(index.shape[0], *[1] * (x.ndim - 2), index.shape[1])
    return jnp.take_along_axis(x, index, axis=1)[:, 0]


def _land(
    weights: Float[Array, "n *rest"], fraction: Float[Array, "*rest"]
) -> tuple[Int[Array, "*rest"], Float[Array, "*rest"]]:
    """Where the cumulated weights, along the first dimension, pass a fraction of their sum.

    Returns the index, and which fraction of its own weight is passed there. The index is one that has weight, whatever
    rounding does to the sums and for all fractions from 0 to 1.
    """
    cumulated = jnp.cumsum(weights, axis=0)
    target = fraction * cumulated[-1]
    beyond = (cumulated > target) & (weights > 0)
    last = len(weights) - 1 - jnp.argmax(weights[::-1] > 0, axis=0)
    index = jnp.where(beyond.any(axis=0), jnp.argmax(beyond, axis=0), last)
    own, upto = (jnp.take_along_axis(x, index[None], axis=0)[0] for x in (weights, cumulated))
    return index, jnp.clip(1 - (upto - target) / own, 0, 1)
