import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from audio_grpo.audio import resample


def _tone(rate: int, hz: float = 440) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hz * np.arange(rate) / rate)).astype(np.float32)


@pytest.mark.parametrize("rate", [8000, 22_050, 44_100, 48_000])
def test_a_tone_keeps_its_pitch_level_and_phase(rate):
    resampled = resample(_tone(rate), rate)
    assert resampled.dtype == np.float32
    middle = slice(1000, 15_000)  # the ends ring
    np.testing.assert_allclose(resampled[middle], _tone(16_000)[middle], atol=2e-3)


def test_what_16_khz_can_not_hold_is_removed_and_not_folded_down():
    assert np.abs(resample(_tone(48_000, hz=11_000), 48_000)[1000:15_000]).max() < 1e-3


def test_16_khz_passes_untouched():
    samples = _tone(16_000)
    assert resample(samples, 16_000) is samples


@settings(deadline=None)
@given(length=st.integers(1, 30_000), rate=st.sampled_from([8000, 11_025, 22_050, 24_000, 44_100, 48_000, 96_000]))
def test_a_clip_gets_no_longer_than_its_duration(length, rate):
    """The frames that a batch has room for are counted from seconds."""
    assert len(resample(np.zeros(length, np.float32), rate)) <= math.ceil(length * 16_000 / rate)
