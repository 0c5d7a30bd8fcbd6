"""The clipped policy loss of GRPO (arXiv 2402.03300, equation 3) with KL to a frozen reference."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32

from audio_grpo.config import Config
from audio_grpo.grpo.log_probs import TokenScores
from audio_grpo.types import GroupBatch

_LARGEST_EXPONENT = 20.0
"""exp(20) is far outside any clip interval and far inside float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossSettings:
    """Constants of the loss."""

    epsilon: float = 0.2
    """The ratio counts within 1 − epsilon … 1 + epsilon."""
    beta: float = 0.04
    """Weight of the KL term."""


class LossAux(NamedTuple):
    """What a loss reports besides its value, as sums over tokens, so that two parts can be merged."""

    loss: Float[Array, ""]
    tokens: Float[Array, ""]
    """Tokens that counted; divides the sums below into means."""
    kl: Float[Array, ""]
    entropy: Float[Array, ""]
    clipped_low: Float[Array, ""]
    """Tokens whose ratio was below the interval while their advantage was negative."""
    clipped_high: Float[Array, ""]
    """Tokens whose ratio was above the interval while their advantage was positive."""
    ratio: Float[Array, ""]
    sampler_gap: Float[Array, ""]
    """|learner's − sampler's log-probability|."""
    sampler_gap_max: Float[Array, ""]
    """The largest of them; combine by maximum."""

    def merge(self, other: "LossAux") -> "LossAux":
        """The report on two parts together."""
        summed = [a + b for a, b in zip(self, other, strict=True)]
        return LossAux(*summed)._replace(sampler_gap_max=jnp.maximum(self.sampler_gap_max, other.sampler_gap_max))

    def means(self) -> dict[str, float]:
        """Metrics by TRL's names."""
        tokens = max(float(self.tokens), 1.0)
        return {
            "loss": float(self.loss),
            "kl": float(self.kl) / tokens,
            "entropy": float(self.entropy) / tokens,
            "clip_ratio/low_mean": float(self.clipped_low) / tokens,
            "clip_ratio/high_mean": float(self.clipped_high) / tokens,
            "clip_ratio/region_mean": float(self.clipped_low + self.clipped_high) / tokens,
            "sampling/importance_sampling_ratio/mean": float(self.ratio) / tokens,
            "sampling/sampling_logp_difference/mean": float(self.sampler_gap) / tokens,
            "sampling/sampling_logp_difference/max": float(self.sampler_gap_max),
        }


def loss_settings(config: Config) -> LossSettings:
    """The configured constants of the loss."""
    return LossSettings(epsilon=config.grpo_epsilon, beta=config.grpo_beta)


def grpo_loss_fn(scores: TokenScores, batch: GroupBatch, settings: LossSettings) -> tuple[Float[Array, ""], LossAux]:
    """Σ_t w_t · (−min(ρ_t A, clip(ρ_t, 1 − ε, 1 + ε) A) + β · k3_t), with ρ_t = exp(π_t − o_t).

    w are the batch's token weights, o its old log-probabilities (the policy's own, without gradient, where it has
    none) and k3 = exp(f − π) − (f − π) − 1 for the reference's log-probabilities f.
    """
    policy, mask = scores.log_probs, batch.mask
    fixed = jax.lax.stop_gradient(policy)
    old = fixed if batch.old_log_probs is None else batch.old_log_probs
    ratio = jnp.exp(jnp.clip(policy - old, -_LARGEST_EXPONENT, _LARGEST_EXPONENT))
    advantage = batch.advantages[..., None]
    clipped = jnp.clip(ratio, 1 - settings.epsilon, 1 + settings.epsilon)
    per_token = -jnp.minimum(ratio * advantage, clipped * advantage)
    kl = jnp.zeros_like(policy)
    if batch.reference_log_probs is not None:
        kl = k3(policy, batch.reference_log_probs)
        per_token = per_token + settings.beta * kl
    loss = jnp.where(mask, per_token * batch.token_weights, 0.0).sum()
    sampler = fixed if batch.sampler_log_probs is None else batch.sampler_log_probs
    gap = jnp.where(mask, jnp.abs(fixed - sampler), 0.0)
    aux = LossAux(
        loss=loss,
        tokens=mask.sum().astype(jnp.float32),
        kl=_masked_sum(kl, mask),
        entropy=_masked_sum(scores.entropy, mask),
        clipped_low=_masked_sum((ratio < 1 - settings.epsilon) & (advantage < 0), mask),
        clipped_high=_masked_sum((ratio > 1 + settings.epsilon) & (advantage > 0), mask),
        ratio=_masked_sum(ratio, mask),
        sampler_gap=gap.sum(),
        sampler_gap_max=gap.max(),
    )
    return loss, jax.lax.stop_gradient(aux)


def k3(policy: Float[Array, "*N"], reference: Float[Array, "*N"]) -> Float[Array, "*N"]:
    """Unbiased, non-negative estimate of KL(policy ‖ reference) from one draw (Schulman, Approximating KL, 2020)."""
    difference = jnp.clip(reference - policy, -_LARGEST_EXPONENT, _LARGEST_EXPONENT)
    return jnp.exp(difference) - difference - 1


def token_weights(
    mask: Bool[np.ndarray, "B G C"], loss_type: Literal["grpo", "dapo", "dr_grpo"]
) -> Float32[np.ndarray, "B G C"]:
    """Weight of each token in the loss of the *whole* accumulated batch, whichever parts it is computed in.

    grpo: mean over a sequence's tokens, then over sequences. dapo: mean over all tokens (arXiv 2503.14476).
    dr_grpo: sum over tokens divided by sequences × C (arXiv 2503.20783).
    """
    sequences, length = mask.shape[0] * mask.shape[1], mask.shape[2]
    if loss_type == "grpo":
        return (mask / np.maximum(mask.sum(axis=2, keepdims=True), 1) / sequences).astype(np.float32)
    denominator = mask.sum() if loss_type == "dapo" else sequences * length
    return (mask / max(denominator, 1)).astype(np.float32)


def _masked_sum(values: Array, mask: Bool[Array, "B G C"]) -> Float[Array, ""]:
    return jnp.where(mask, values, 0).sum().astype(jnp.float32)
