"""A metric over steps, and what makes a long one readable."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64

MOST_POINTS = 400
"""Steps drawn one by one; a longer run shows the smallest and the largest value of each stretch."""
_WINDOWS_PER_SERIES = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """A metric over steps; a value that is not finite is a gap."""

    name: str
    """E.g. "completions/mean_length"."""
    steps: Int64[np.ndarray, "n"]
    """Rising; n may be 0."""
    values: Float64[np.ndarray, "n"]
    low: Float64[np.ndarray, "n"] | None = None
    """Lower edge of a band around the values; None for no band."""
    high: Float64[np.ndarray, "n"] | None = None
    detail: str | None = None
    """What the band is at the last step, e.g. "± 0.31" or "6 – 23"."""


def thin(values: Float64[np.ndarray, "n"]) -> Int64[np.ndarray, "k"]:
    """Indices of at most about `MOST_POINTS` values that keep every peak, the first and the last value."""
    if len(values) <= MOST_POINTS:
        return np.arange(len(values))
    stretches = np.array_split(np.arange(len(values)), MOST_POINTS // 2)
    finite = np.isfinite(values)
    kept = {0, len(values) - 1}
    for stretch in stretches:
        shown = stretch[finite[stretch]]
        kept |= {shown[values[shown].argmin()], shown[values[shown].argmax()]} if len(shown) else {stretch[0]}
    return np.array(sorted(kept))


def running_mean(values: Float64[np.ndarray, "n"]) -> Float64[np.ndarray, "n"]:
    """Mean of the finite values in a window around each one; not a number where that one is not."""
    finite = np.isfinite(values)
    window = np.ones(max(1, len(values) // _WINDOWS_PER_SERIES))
    total = np.convolve(np.where(finite, values, 0.0), window)
    count = np.convolve(finite.astype(float), window)
    start = len(window) // 2
    inside = slice(start, start + len(values))
    return np.where(finite, total[inside] / np.maximum(count[inside], 1), np.nan)
