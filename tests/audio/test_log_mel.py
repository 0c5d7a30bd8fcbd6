"""Log-mel against a plain float64 version with loops, written from the definition."""

import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from audio_grpo.audio import log_mel
from audio_grpo.audio.log_mel import mel_filters


def _hz(mel: float) -> float:
    return 1000 * 6.4 ** ((mel - 15) / 27) if mel > 15 else mel * 200 / 3


def _reference_filters(bins: int) -> np.ndarray:
    top = 15 + 27 * math.log(8) / math.log(6.4)
    filters = np.zeros((bins, 201))
    for m in range(bins):
        low, centre, high = (_hz(top * (m + k) / (bins + 1)) for k in range(3))
        for k in range(201):
            hz = k * 40.0
            if low < hz <= centre:
                filters[m, k] = (hz - low) / (centre - low)
            elif centre < hz < high:
                filters[m, k] = (high - hz) / (high - centre)
        filters[m] *= 2 / (high - low)
    return filters


def _reference(samples: np.ndarray, bins: int = 128) -> np.ndarray:
    length = max(8000, math.ceil(len(samples) / 160) * 160)
    signal = np.zeros(length)
    signal[: len(samples)] = samples
    signal = np.concatenate([signal[200:0:-1], signal, signal[-2:-202:-1]])
    window = [math.sin(math.pi * n / 400) ** 2 for n in range(400)]
    frames = [np.abs(np.fft.fft(signal[i : i + 400] * window)[:201]) ** 2 for i in range(0, length, 160)]
    log_power = np.log10(np.maximum(_reference_filters(bins) @ np.array(frames).T, 1e-10))
    return (np.maximum(log_power, log_power.max() - 8) + 4) / 4


def _sweep_over_silence(rng: np.random.Generator) -> np.ndarray:
    seconds = np.arange(32_000) / 16_000
    return (np.sin(2 * np.pi * (50 + 1900 * seconds) * seconds) * (seconds < 1.3)).astype(np.float32)


def _pure_tone(rng: np.random.Generator) -> np.ndarray:
    return np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000).astype(np.float32)


def _noise(rng: np.random.Generator) -> np.ndarray:
    return rng.normal(0, 0.1, 24_321).astype(np.float32)


def _quiet_noise_and_a_click(rng: np.random.Generator) -> np.ndarray:
    samples = rng.normal(0, 1e-5, 20_000).astype(np.float32)
    samples[7000] = 1.0
    return samples


def _silence(rng: np.random.Generator) -> np.ndarray:
    return np.zeros(9000, np.float32)


@pytest.mark.parametrize("signal", [_sweep_over_silence, _pure_tone, _noise, _quiet_noise_and_a_click, _silence])
def test_features_equal_the_float64_reference(signal):
    samples = signal(np.random.default_rng(0))
    features = log_mel(samples)
    assert features.dtype == np.float32
    np.testing.assert_allclose(features, _reference(samples), rtol=0, atol=2e-5)


@settings(deadline=None, max_examples=25)
@given(length=st.integers(1, 20_000), seed=st.integers(0, 99), bins=st.sampled_from([40, 80, 128, 300]))
def test_every_length_and_number_of_bins_equals_the_reference(length, seed, bins):
    samples = np.random.default_rng(seed).normal(0, 0.1, length).astype(np.float32)
    np.testing.assert_allclose(log_mel(samples, bins), _reference(samples, bins), rtol=0, atol=2e-5)


@pytest.mark.parametrize(("samples", "frames"), [(1, 50), (8000, 50), (8001, 51), (16_000, 100), (16_159, 101)])
def test_a_started_frame_counts_and_half_a_second_is_the_least(samples, frames):
    assert log_mel(np.ones(samples, np.float32)).shape == (128, frames)


def test_filters_equal_the_reference():
    np.testing.assert_allclose(mel_filters(128), _reference_filters(128), atol=1e-8)


def test_chunks_of_frames_leave_no_seam():
    samples = np.random.default_rng(1).normal(0, 0.1, 3001 * 160).astype(np.float32)
    np.testing.assert_allclose(log_mel(samples, 40), _reference(samples, 40), rtol=0, atol=2e-5)


def test_twenty_minutes_take_little_more_memory_than_their_features():
    samples = np.zeros(20 * 60 * 16_000, np.float32)
    tracemalloc.start()
    features = log_mel(samples)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * features.nbytes + 2 * samples.nbytes
