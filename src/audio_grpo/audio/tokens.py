"""How many audio tokens the tower makes of a clip's frames."""

from typing import Any, TypeVar

Count = TypeVar("Count", bound=Any)
"""An int, or an array of integers."""


def audio_token_count(frames: Count, chunk_frames: int = 100) -> Count:
    """Audio tokens of clips with that many mel frames: 13 for each full chunk of 100, and 1 to 13 for the rest.

    The tower hears every chunk by itself through three convolutions of stride 2, so the count is no function of the
    total alone: 100 → 13, 101 → 14, 200 → 26, 3000 → 390; 0 → 0.
    """
    return _after_convolutions(frames % chunk_frames) + _after_convolutions(chunk_frames) * (frames // chunk_frames)


def _after_convolutions(frames: Count) -> Count:
    for _ in range(3):
        frames = (frames - 1) // 2 + 1
    return frames
