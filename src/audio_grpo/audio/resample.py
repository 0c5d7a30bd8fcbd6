"""Resampling to the rate that the model hears."""

import numpy as np
import soxr
from jaxtyping import Float32

SAMPLING_RATE = 16_000
"""Hz of everything behind this room."""


def resample(
    samples: Float32[np.ndarray, "samples"], rate: int, target_rate: int = SAMPLING_RATE
) -> Float32[np.ndarray, "resampled"]:
    """Band-limited resampling from `rate` to `target_rate` Hz (soxr, high quality)."""
    if rate == target_rate:
        return samples
    return soxr.resample(samples, rate, target_rate, quality="HQ").astype(np.float32, copy=False)
