"""Log-mel features."""

from functools import cache

import numpy as np
import pytest
from transformers import WhisperFeatureExtractor

from audio_grpo.audio import log_mel
from parity.cases import FRAMES
from parity.conftest import Agree

RATE = 16_000


@cache
def _extractor(bins: int) -> WhisperFeatureExtractor:
    return WhisperFeatureExtractor(feature_size=bins, dither=0.0)


def _sound(kind: str, samples: int, rng: np.random.Generator) -> np.ndarray:
    time = np.arange(samples) / RATE
    noise = rng.normal(size=samples)
    sounds = {
        "noise": 0.3 * noise,
        "faint noise": 1e-4 * noise,
        "tone": 0.8 * np.sin(2 * np.pi * 440 * time),
        # Without much noise, a sweep's quiet bins hold little but the rounding of the reference's float32 spectrum.
        "sweep": 0.5 * np.sin(2 * np.pi * (50 + 1500 * time) * time) + 0.1 * noise,
        "bursts": noise * (np.sin(2 * np.pi * 3 * time) > 0.6),
        "silence": 0 * noise,
    }
    return sounds[kind].clip(-1, 1).astype(np.float32)


def _reference(sound: np.ndarray, bins: int, *, float64: bool) -> np.ndarray:
    if float64:
        return _extractor(bins)._np_extract_fbank_features(sound[None], "cpu")[0]
    features = _extractor(bins)(sound, sampling_rate=RATE, truncation=False, padding=False, return_tensors="np")
    return features.input_features[0]


@pytest.mark.parametrize("bins", [128, 80])
@pytest.mark.parametrize("kind", ["noise", "faint noise", "tone", "sweep", "bursts", "silence"])
def test_features_are_the_same(kind: str, bins: int, agree: Agree) -> None:
    rng = np.random.default_rng(0)
    for frames in FRAMES:
        sound = _sound(kind, 160 * frames, rng)
        features = log_mel(sound, bins)
        agree("log-mel", features, _reference(sound, bins, float64=False), scale=1.0)
        agree("log-mel, reference in float64", features, _reference(sound, bins, float64=True), scale=1.0)


@pytest.mark.parametrize("missing", [1, 79, 80, 159])
def test_a_started_frame_is_filled_with_silence(missing: int, agree: Agree) -> None:
    sound = _sound("noise", 160 * 77 - missing, np.random.default_rng(missing))
    expected = _reference(np.pad(sound, (0, missing)), 128, float64=True)
    agree("log-mel, reference in float64", log_mel(sound, 128), expected, scale=1.0)
