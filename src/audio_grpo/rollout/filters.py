"""What takes tokens out of a distribution, or reshapes it, before the draw; all of it over whole vocabularies."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32


def penalize(logits: Float[Array, "*V S"], seen: Bool[Array, "*V S"], penalty: float) -> Float[Array, "*V S"]:
    """Divide the positive logits of seen tokens by `penalty` and multiply their negative ones with it.

    As transformers does; CTRL (https://arxiv.org/abs/1909.05858, section 4.1) divides all of them.
    """
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_likely(
    logits: Float[Array, "*V S"], allowed: Bool[Array, "*V #S"], *, top_k: int, top_p: float, min_p: float
) -> Bool[Array, "*V S"]:
    """The allowed tokens that remain: top-k comes first, top-p applies to what that leaves, then min-p."""
    over = tuple(range(logits.ndim - 1))
    candidates = jnp.where(allowed, logits, -jnp.inf)
    mass = jnp.exp(candidates - candidates.max(axis=over))
    if top_k:
        mass = _keep_largest(mass, jnp.ones_like(mass), jnp.full(mass.shape[-1], float(top_k)))
    if top_p < 1:
        mass = _keep_largest(mass, mass, top_p * mass.sum(axis=over))
    return allowed & (mass > 0) & (mass >= min_p)


def _keep_largest(
    mass: Float[Array, "*V S"], measure: Float[Array, "*V S"], enough: Float[Array, "S"]
) -> Float[Array, "*V S"]:
    """Zero all but the largest entries whose measures together reach `enough`, and those as large as the last.

    The threshold is found by bisection over the bits of a float, which order non-negative floats: 31 passes, no sort.
    """
    order = jax.lax.bitcast_convert_type(mass, jnp.uint32)
    over = tuple(range(mass.ndim - 1))

    def set_bit(i: Int[Array, ""], threshold: UInt32[Array, "S"]) -> UInt32[Array, "S"]:
        raised = threshold | (jnp.uint32(1) << (30 - i).astype(jnp.uint32))
        reached = jnp.where(order >= raised, measure, 0.0).sum(axis=over)
        return jnp.where(reached >= enough, raised, threshold)

    threshold = jax.lax.fori_loop(0, 31, set_bit, jnp.zeros(mass.shape[-1], jnp.uint32))
    return jnp.where(order >= threshold, mass, 0.0)
