"""Group-relative advantages (GRPO, arXiv 2402.03300, section 4.1.2)."""

from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float32


class Advantages(NamedTuple):
    """Advantages and what the run reports of them."""

    values: Float32[np.ndarray, "B G"]
    reward_std: float
    """Standard deviation of the rewards within a group, mean over groups."""
    frac_reward_zero_std: float
    """Share of groups whose rewards are all equal: they teach nothing."""


def group_advantages(
    rewards: Float32[np.ndarray, "B G"], scale_rewards: Literal["group", "batch", "none"] = "group"
) -> Advantages:
    """A = (r − mean_G r) / (std + 1e-4), with the standard deviation of the group, of the whole batch, or 1.

    Standard deviations have the G − 1 denominator. The 1e-4 keeps groups of equal rewards at 0.
    """
    # In float64 the mean of equal float32 rewards is exactly their value; a rounding error would count 10⁴ times.
    precise = rewards.astype(np.float64)
    centred = precise - precise.mean(axis=1, keepdims=True)
    deviation = precise.std(axis=1, ddof=1, keepdims=True)
    scale = {"group": deviation, "batch": precise.std(ddof=1), "none": None}[scale_rewards]
    values = centred if scale is None else centred / (scale + 1e-4)
    return Advantages(values.astype(np.float32), float(deviation.mean()), float((np.ptp(rewards, axis=1) == 0).mean()))
