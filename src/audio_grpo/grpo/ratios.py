"""Ratios of probabilities: of the policy to its old self, and of that to the sampler.

What is of a whole sequence has C = 1 and counts for all of the sequence's tokens.
"""

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Level = Literal["token", "sequence"]

_LARGEST_EXPONENT = 20.0
"""exp(20) is far outside any clip interval and far inside float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerCorrection:
    """What becomes of the ratio of learner to sampler before it weighs the loss."""

    mode: Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
    """Whose ratio it is, and whether one outside the bounds is moved to the nearest or weighs nothing."""
    clip_min: float | None
    clip_max: float | None

    @property
    def level(self) -> Level:
        """Whose ratio it is."""
        return "token" if self.mode.startswith("token") else "sequence"


def policy_ratio(log_ratio: Float[Array, "B G C"], mask: Bool[Array, "B G C"], level: Level) -> Float[Array, "B G #C"]:
    """ρ = exp(π − o) of each token, or the exponential of a sequence's mean of that (GSPO, arXiv 2507.18071)."""
    return jnp.exp(bounded(log_ratio if level == "token" else sequence_mean(log_ratio, mask)))


def sampler_ratio(
    log_ratio: Float[Array, "B G C"], mask: Bool[Array, "B G C"], correction: SamplerCorrection
) -> Float[Array, "B G #C"]:
    """exp(o − s) of each token, or of each sequence as a whole, within the correction's bounds."""
    if correction.level == "sequence":
        log_ratio = jnp.where(mask, log_ratio, 0.0).sum(axis=-1, keepdims=True)
    ratio = jnp.exp(bounded(log_ratio))
    truncated = jnp.clip(ratio, correction.clip_min, correction.clip_max)
    return truncated if correction.mode.endswith("truncate") else jnp.where(truncated == ratio, ratio, 0.0)


def sequence_mean(values: Float[Array, "B G #C"], mask: Bool[Array, "B G C"]) -> Float[Array, "B G 1"]:
    """Mean over each sequence's tokens, 0 where it has none."""
    count = mask.sum(axis=-1, keepdims=True)
    return jnp.where(mask, values, 0.0).sum(axis=-1, keepdims=True) / jnp.maximum(count.astype(jnp.float32), 1.0)


def bounded(exponent: Float[Array, "*N"]) -> Float[Array, "*N"]:
    """The exponent, or the nearest that makes no trouble."""
    return jnp.clip(exponent, -_LARGEST_EXPONENT, _LARGEST_EXPONENT)
