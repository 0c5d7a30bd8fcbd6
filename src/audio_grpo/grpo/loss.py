"""The GRPO loss on per-token log-probabilities, with its relatives; docs/losses.md has them all.

Options bear TRL's names (its `GRPOConfig`), but for `grpo_epsilon` and `grpo_beta`, which are MaxText's.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from audio_grpo.config import Config
from audio_grpo.config.schema import LossType
from audio_grpo.grpo.log_probs import TokenScores
from audio_grpo.grpo.metrics import LossAux, Metric, Total, average, largest, least
from audio_grpo.grpo.objectives import KlEstimator, cispo_loss, clipped_loss, kl_divergence, sapo_loss
from audio_grpo.grpo.ratios import Level, SamplerCorrection, policy_ratio, sampler_ratio, sequence_mean
from audio_grpo.types import GroupBatch

_UNBOUNDED = SamplerCorrection(mode="token_truncate", clip_min=None, clip_max=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class LossSettings:
    """Constants of the loss; left out, they are those of plain GRPO."""

    loss_type: LossType = "grpo"
    """Which objective; its averaging is in the batch's token weights."""
    importance_sampling_level: Level = "token"
    """Whether each token has its own ratio or each sequence has one for all of its tokens."""
    epsilon: float = 0.2
    """The ratio counts from 1 − epsilon …"""
    epsilon_high: float | None = None
    """… to 1 + epsilon_high, or 1 + epsilon where this is None; for cispo, the largest weight itself."""
    delta: float | None = None
    """Largest ratio, whatever the advantage."""
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    beta: float = 0.04
    """Weight of the KL term."""
    kl_estimator: KlEstimator = "k3"
    use_bias_correction_kl: bool = False
    """The KL term is multiplied by the ratio (DeepSeek-V3.2, arXiv 2512.02556)."""
    correction: SamplerCorrection | None = None
    """The policy's term is multiplied by the ratio of learner to sampler."""
    off_policy_mask_threshold: float | None = None
    """Largest mean of s − π, in nats, of a sequence of negative advantage that counts (arXiv 2512.02556)."""
    entropy_coef: float = 0.0
    """Weight of the mean entropy of the distributions that tokens were sampled from, where the batch weighs it."""
    sft_coef: float = 0.0
    """Weight of the mean cross-entropy of the batch's transcripts, where it has some."""

    @property
    def upper(self) -> float:
        """The upper end's epsilon."""
        return self.epsilon if self.epsilon_high is None else self.epsilon_high


def loss_settings(config: Config) -> LossSettings:
    """The configured constants of the loss."""
    correction = SamplerCorrection(
        mode=config.importance_sampling_mode,
        clip_min=config.importance_sampling_clip_min,
        clip_max=config.importance_sampling_clip_max,
    )
    return LossSettings(
        loss_type=config.loss_type,
        importance_sampling_level=config.importance_sampling_level,
        epsilon=config.grpo_epsilon,
        epsilon_high=config.epsilon_high,
        delta=config.delta,
        sapo_temperature_pos=config.sapo_temperature_pos,
        sapo_temperature_neg=config.sapo_temperature_neg,
        beta=config.grpo_beta,
        kl_estimator=config.kl_estimator,
        use_bias_correction_kl=config.use_bias_correction_kl,
        correction=correction if config.importance_sampling_correction else None,
        off_policy_mask_threshold=config.off_policy_mask_threshold,
        entropy_coef=config.entropy_coef,
        sft_coef=config.sft_coef,
    )


def grpo_loss_fn(scores: TokenScores, batch: GroupBatch, settings: LossSettings) -> tuple[Float[Array, ""], LossAux]:
    """Σ_t w_t · (c_t · objective(ρ_t, A) + β · KL_t) − entropy_coef · Σ_t e_t · H_t − sft_coef · Σ_t x_t · π_t.

    ρ_t = exp(π_t − o_t). w are the batch's token weights, e and x those of entropy and transcripts; o its old
    log-probabilities: the policy's own, without gradient, where it has none. c = exp(o − s) corrects for the sampler's
    log-probabilities s, which are taken to be o where the batch has none, and of a transcript, which nothing sampled.
    The KL is to the reference's. KL and entropy are means over what was sampled, and so are all metrics but the
    transcripts' own: a transcript has no part in them.
    """
    policy, mask, sampled, advantage = scores.log_probs, batch.mask, batch.sampled, batch.advantages[..., None]
    fixed = jax.lax.stop_gradient(policy)
    old = fixed if batch.old_log_probs is None else batch.old_log_probs
    sampler = old if batch.sampler_log_probs is None else jnp.where(sampled, batch.sampler_log_probs, old)
    ratio = policy_ratio(policy - old, mask, settings.importance_sampling_level)
    correction = sampler_ratio(old - sampler, mask, settings.correction or _UNBOUNDED)
    metrics: dict[str, Metric] = {
        "entropy": average(scores.entropy, sampled),
        "policy_ratio/mean": average(ratio, sampled),
        **_clipping(ratio, advantage, sampled, settings),
        **_sampling(jnp.abs(old - sampler), correction, sampled),
    }
    per_token = _objective(ratio, advantage, policy, settings)
    if settings.off_policy_mask_threshold is not None:
        drift = sequence_mean(sampler - fixed, mask)
        dropped = (advantage < 0) & (drift > settings.off_policy_mask_threshold)
        per_token = jnp.where(dropped, 0.0, per_token)
        metrics["sampling/off_policy_fraction"] = average(dropped, sampled)
    if settings.correction is not None:
        per_token = per_token * correction
        metrics["sampling/masked_fraction"] = average(correction == 0, sampled)
    if batch.reference_log_probs is not None:
        kl = kl_divergence(policy, batch.reference_log_probs, settings.kl_estimator)
        kl = kl * ratio if settings.use_bias_correction_kl else kl
        per_token = per_token + jnp.where(sampled, settings.beta * kl, 0.0)
        metrics["kl"] = average(kl, sampled)
    policy_loss = jnp.where(mask, per_token * batch.token_weights, 0.0).sum()
    further, of_further = _beside_the_policy(scores, batch, settings)
    if batch.entropy_weights is not None or batch.transcript_weights is not None:
        metrics |= {"policy_loss": Total(policy_loss), **of_further}
    loss = policy_loss + further
    return loss, jax.lax.stop_gradient(LossAux(loss, metrics))


def _beside_the_policy(
    scores: TokenScores, batch: GroupBatch, settings: LossSettings
) -> tuple[Float[Array, ""], dict[str, Metric]]:
    """The bonus for entropy and the cross-entropy of transcripts; 0 where the batch weighs neither."""
    added, metrics = jnp.float32(0), {}
    if batch.entropy_weights is not None:
        added -= settings.entropy_coef * _weighted(scores.entropy, batch.entropy_weights)
    if batch.transcript_weights is not None:
        added -= settings.sft_coef * _weighted(scores.log_probs, batch.transcript_weights)
        metrics["transcript/cross_entropy"] = average(-scores.log_probs, batch.transcript_weights > 0)
    return added, metrics


def _weighted(values: Float[Array, "B G C"], weights: Float[Array, "B G C"]) -> Float[Array, ""]:
    return jnp.where(weights > 0, values * weights, 0.0).sum()


def _objective(
    ratio: Float[Array, "B G #C"],
    advantage: Float[Array, "B G 1"],
    policy: Float[Array, "B G C"],
    settings: LossSettings,
) -> Float[Array, "B G #C"]:
    if settings.loss_type == "cispo":
        return cispo_loss(ratio, advantage, policy, epsilon_high=settings.upper)
    if settings.loss_type == "sapo":
        return sapo_loss(
            ratio,
            advantage,
            temperature_pos=settings.sapo_temperature_pos,
            temperature_neg=settings.sapo_temperature_neg,
        )
    return clipped_loss(ratio, advantage, epsilon=settings.epsilon, epsilon_high=settings.upper, delta=settings.delta)


def _clipping(
    ratio: Float[Array, "B G #C"], advantage: Float[Array, "B G 1"], mask: Bool[Array, "B G C"], settings: LossSettings
) -> dict[str, Metric]:
    """Shares of the ratios that the objective holds back: below for blame, above for praise."""
    if settings.loss_type == "sapo":
        return {}
    if settings.loss_type == "cispo":
        return {"cispo_clip_ratio": average((ratio > settings.upper) & (advantage > 0), mask)}
    low = (ratio < 1 - settings.epsilon) & (advantage < 0)
    high = (ratio > 1 + settings.upper) & (advantage > 0)
    return {
        "clip_ratio/low_mean": average(low, mask),
        "clip_ratio/low_min": least(sequence_mean(low.astype(jnp.float32), mask), mask),
        "clip_ratio/high_mean": average(high, mask),
        "clip_ratio/high_max": largest(sequence_mean(high.astype(jnp.float32), mask), mask),
        "clip_ratio/region_mean": average(low | high, mask),
    }


def _sampling(
    gap: Float[Array, "B G C"], ratio: Float[Array, "B G #C"], mask: Bool[Array, "B G C"]
) -> dict[str, Metric]:
    """How far the sampler's log-probabilities are from the learner's."""
    return {
        "sampling/sampling_logp_difference/mean": average(gap, mask),
        "sampling/sampling_logp_difference/max": largest(gap, mask),
        "sampling/importance_sampling_ratio/min": least(ratio, mask),
        "sampling/importance_sampling_ratio/mean": average(ratio, mask),
        "sampling/importance_sampling_ratio/max": largest(ratio, mask),
    }
