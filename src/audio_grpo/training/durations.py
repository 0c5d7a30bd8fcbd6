"""Clips by how long they are."""

import numpy as np

_ENDS = (2, 5, 10, 20)
"""Seconds."""

DURATIONS = (*(f"{start}-{end} s" for start, end in zip((0, *_ENDS), _ENDS, strict=False)), f"{_ENDS[-1]} s and more")
"""Names of the buckets, in rising order."""


def duration_of(seconds: float) -> str:
    """The bucket of a clip, e.g. "2-5 s"."""
    return DURATIONS[int(np.searchsorted(_ENDS, seconds, side="right"))]
