"""Group-relative advantages (GRPO, arXiv 2402.03300, section 4.1.2)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float32, Float64

from audio_grpo.config import Config

Scale = Literal["group", "batch", "none"]

_SMALL = 1e-4
"""Keeps groups of equal rewards at 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdvantageSettings:
    """How rewards become advantages."""

    scale_rewards: Scale = "group"
    """Which standard deviation divides them."""
    use_leave_one_out_baseline: bool = False
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize"
    reward_weights: Sequence[float] | None = None
    """One for each reward; None weighs them equally with 1."""


class Advantages(NamedTuple):
    """Advantages and what the run reports of them."""

    values: Float32[np.ndarray, "B G"]
    frac_reward_zero_std: float
    """Share of groups whose rewards are all equal: they teach nothing."""


def advantage_settings(config: Config) -> AdvantageSettings:
    """The configured way from rewards to advantages."""
    return AdvantageSettings(
        scale_rewards=config.scale_rewards,
        use_leave_one_out_baseline=config.use_leave_one_out_baseline,
        multi_objective_aggregation=config.multi_objective_aggregation,
        reward_weights=config.reward_weights,
    )


def compute_advantages(rewards: Float32[np.ndarray, "R B G"], settings: AdvantageSettings) -> Advantages:
    """Advantages of completions that R functions rewarded.

    sum_then_normalize: those of the weighted sum. normalize_then_sum: each reward's own advantages, weighted, summed
    and divided by the standard deviation of the whole batch (GDPO, arXiv 2601.05242).
    """
    weights = np.ones(len(rewards)) if settings.reward_weights is None else np.asarray(settings.reward_weights)
    if settings.multi_objective_aggregation == "sum_then_normalize":
        total = np.tensordot(weights, rewards, axes=1).astype(np.float32)
        return group_advantages(total, settings.scale_rewards, leave_one_out=settings.use_leave_one_out_baseline)
    # The mean is 0 in every group, so in the batch too.
    summed = np.tensordot(weights, [_relative(reward, "group") for reward in rewards], axes=1)
    values = summed / (summed.std(ddof=1) + _SMALL)
    return Advantages(values.astype(np.float32), _share_of_zeros(values))


def group_advantages(
    rewards: Float32[np.ndarray, "B G"], scale_rewards: Scale = "group", *, leave_one_out: bool = False
) -> Advantages:
    """A = (r − baseline) / (std + 1e-4), with the standard deviation of the group, of the whole batch, or 1.

    The baseline is the mean of the group, or with `leave_one_out` that of the group's other completions (RLOO, arXiv
    2402.14740). Standard deviations have the G − 1 denominator.
    """
    values = _relative(rewards, scale_rewards)
    if leave_one_out:
        generations = rewards.shape[1]
        values = values * (generations / (generations - 1))
    return Advantages(values.astype(np.float32), _share_of_zeros(values))


def _relative(rewards: Float32[np.ndarray, "B G"], scale_rewards: Scale) -> Float64[np.ndarray, "B G"]:
    # In float64 the mean of equal float32 rewards is exactly their value; a rounding error would count 10⁴ times.
    precise = rewards.astype(np.float64)
    centred = precise - precise.mean(axis=1, keepdims=True)
    if scale_rewards == "none":
        return centred
    deviation = precise.std(ddof=1) if scale_rewards == "batch" else precise.std(axis=1, ddof=1, keepdims=True)
    return centred / (deviation + _SMALL)


def _share_of_zeros(values: Float64[np.ndarray, "B G"]) -> float:
    return float((values == 0).all(axis=1).mean())
