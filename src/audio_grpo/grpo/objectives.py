"""What each token adds to the loss: the policy's objectives and the estimators of the KL divergence."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from audio_grpo.grpo.ratios import bounded

KlEstimator = Literal["k1", "k2", "k3"]


def clipped_loss(
    ratio: Float[Array, "B G #C"],
    advantage: Float[Array, "B G 1"],
    *,
    epsilon: float,
    epsilon_high: float,
    delta: float | None,
) -> Float[Array, "B G #C"]:
    """−min(min(ρ, delta) A, clip(ρ, 1 − epsilon, 1 + epsilon_high) A).

    GRPO (arXiv 2402.03300) with an upper end of its own (DAPO, 2503.14476). `delta` bounds what a token of negative
    advantage can do (INTELLECT-2, 2505.07291).
    """
    clipped = jnp.clip(ratio, 1 - epsilon, 1 + epsilon_high)
    capped = ratio if delta is None else jnp.minimum(ratio, delta)
    return -jnp.minimum(capped * advantage, clipped * advantage)


def cispo_loss(
    ratio: Float[Array, "B G #C"],
    advantage: Float[Array, "B G 1"],
    log_probs: Float[Array, "B G C"],
    *,
    epsilon_high: float,
) -> Float[Array, "B G C"]:
    """−stop_gradient(min(ρ, epsilon_high)) A π: no token loses its gradient (MiniMax-M1, arXiv 2506.13585).

    As in TRL and ScaleRL (2510.13786), `epsilon_high` is the largest weight itself.
    """
    return -jax.lax.stop_gradient(jnp.minimum(ratio, epsilon_high)) * advantage * log_probs


def sapo_loss(
    ratio: Float[Array, "B G #C"],
    advantage: Float[Array, "B G 1"],
    *,
    temperature_pos: float,
    temperature_neg: float,
) -> Float[Array, "B G #C"]:
    """−4/τ σ(τ (ρ − 1)) A, where τ is `temperature_pos` for A > 0, else `temperature_neg` (arXiv 2511.20347)."""
    temperature = jnp.where(advantage > 0, temperature_pos, temperature_neg)
    return -jax.nn.sigmoid(temperature * (ratio - 1)) * (4 / temperature) * advantage


def kl_divergence(
    policy: Float[Array, "*N"], reference: Float[Array, "*N"], estimator: KlEstimator
) -> Float[Array, "*N"]:
    """Estimate of KL(policy ‖ reference) from one draw of each token (Schulman, Approximating KL Divergence, 2020).

    With d = f − π: k1 = −d (unbiased), k2 = d²/2, k3 = exp(d) − d − 1 (unbiased and never negative).
    """
    difference = reference - policy
    if estimator == "k1":
        return -difference
    if estimator == "k2":
        return jnp.square(difference) / 2
    difference = bounded(difference)
    return jnp.exp(difference) - difference - 1
