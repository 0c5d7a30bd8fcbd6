"""From logits to a token and its log-probability, with one uniform number for each draw."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

_BLOCK = 512
"""Vocabulary entries summed together in the first level of the inverse cumulative distribution."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How a token is drawn."""

    greedy: bool = False
    """Take the likeliest token."""
    temperature: float = 1.0
    """Divides the logits; also in reported log-probabilities."""
    top_k: int = 0
    """Draw from the k likeliest tokens (ties with the k-th included); 0 draws from all."""
    top_p: float = 1.0
    """Draw from the fewest likeliest tokens that together have this probability (ties included)."""


def sample(
    sampling: Sampling, logits: Float[Array, "S V"], allowed: Bool[Array, "V"], uniform: Float[Array, "S"]
) -> tuple[Int[Array, "S"], Float[Array, "S"]]:
    """Draw one allowed token per row; returns tokens and log-probabilities.

    Log-probabilities are those of the *tempered full* distribution, before `allowed`, top-k and top-p take tokens out:
    the learner computes the same quantity from the same logits.
    """
    tempered = logits.astype(jnp.float32) / sampling.temperature
    candidates = jnp.where(allowed, tempered, -jnp.inf)
    if sampling.greedy:
        tokens = jnp.argmax(candidates, axis=-1)
    else:
        tokens = _inverse_cdf(_filtered(sampling, candidates), uniform)
    chosen = jnp.take_along_axis(tempered, tokens[:, None], axis=-1)[:, 0]
    return tokens, chosen - jax.nn.logsumexp(tempered, axis=-1)


def _filtered(sampling: Sampling, candidates: Float[Array, "S V"]) -> Float[Array, "S V"]:
    """Unnormalised probabilities, zero where top-k or top-p rule a token out; top-p applies to what top-k leaves."""
    mass = jnp.exp(candidates - candidates.max(axis=-1, keepdims=True))
    if sampling.top_k:
        mass = _keep_largest(mass, jnp.ones_like(mass), jnp.full(mass.shape[0], float(sampling.top_k)))
    if sampling.top_p < 1:
        mass = _keep_largest(mass, mass, sampling.top_p * mass.sum(axis=-1))
    return mass


def _keep_largest(
    mass: Float[Array, "S V"], measure: Float[Array, "S V"], enough: Float[Array, "S"]
) -> Float[Array, "S V"]:
    """Zero all but the largest entries whose measures together reach `enough`.

    The threshold is found by bisection over the bits of a float, which order non-negative floats: 31 passes, no sort.
    """
    order = jax.lax.bitcast_convert_type(mass, jnp.uint32)

    def set_bit(i: Int[Array, ""], threshold: UInt32[Array, "S"]) -> UInt32[Array, "S"]:
        raised = threshold | (jnp.uint32(1) << (30 - i).astype(jnp.uint32))
        reached = jnp.where(order >= raised[:, None], measure, 0.0).sum(axis=-1)
        return jnp.where(reached >= enough, raised, threshold)

    threshold = jax.lax.fori_loop(0, 31, set_bit, jnp.zeros(mass.shape[0], jnp.uint32))
    return jnp.where(order >= threshold[:, None], mass, 0.0)


def _inverse_cdf(mass: Float[Array, "S V"], uniform: Float[Array, "S"]) -> Int[Array, "S"]:
    """Index at which the cumulated mass passes `uniform` times its total: first a block, then an entry of it."""
    rows, vocab = mass.shape
    blocks = jnp.pad(mass, ((0, 0), (0, -vocab % _BLOCK))).reshape(rows, -1, _BLOCK)
    block_mass = blocks.sum(axis=-1)
    block, rest = _pass_point(block_mass, uniform * block_mass.sum(axis=-1))
    entries = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    entry, _ = _pass_point(entries, rest)
    return block * _BLOCK + entry


def _pass_point(mass: Float[Array, "S n"], target: Float[Array, "S"]) -> tuple[Int[Array, "S"], Float[Array, "S"]]:
    """First index whose cumulated mass exceeds the target, and what of the target remains there.

    Where rounding puts the target at or above the total, the last index that has mass.
    """
    cumulated = jnp.cumsum(mass, axis=-1)
    last = mass.shape[-1] - 1 - jnp.argmax(mass[:, ::-1] > 0, axis=-1)
    index = jnp.minimum((cumulated <= target[:, None]).sum(axis=-1), last)
    before = jnp.take_along_axis(cumulated, index[:, None], axis=-1) - jnp.take_along_axis(
        mass, index[:, None], axis=-1
    )
    return index, target - before[:, 0]
