"""Log-mel features, as the published preprocessor of the Qwen3 family computes them."""

from functools import cache

import numpy as np
from jaxtyping import Float, Float32, Int

from audio_grpo.audio.resample import SAMPLING_RATE

HOP = 160
"""Samples between frames: 100 frames a second."""
_WINDOW = 400
_SHORTEST = SAMPLING_RATE // 2
"""Samples; shorter clips are filled up with silence, because reflection at the ends needs some to reflect."""
_FRAMES_AT_ONCE = 3000
"""Spectra of this many frames exist at the same time, about 25 MB, however long the clip."""


def log_mel(samples: Float32[np.ndarray, "samples"], num_mel_bins: int = 128) -> Float32[np.ndarray, "M F"]:
    """Log-mel features of mono samples at 16 kHz; F is 100 a second, a started frame counts, and at least 50.

    Power of a Hann-windowed 25 ms spectrum every 10 ms → Slaney filters over 0–8000 Hz → log10, limited to 8 below the
    clip's maximum → (x + 4) / 4. Silence fills the clip up to a whole number of frames first, so that its features
    are the same alone and in any batch.
    """
    frames = max(-(-len(samples) // HOP), _SHORTEST // HOP)
    padded = np.pad(samples, (0, frames * HOP - len(samples)))
    # The window's half at either end; with it, the frame that would centre on the end is left out.
    padded = np.pad(padded, _WINDOW // 2, mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, _WINDOW)[::HOP][:frames]
    parts = [_log_power(windows[i : i + _FRAMES_AT_ONCE], num_mel_bins) for i in range(0, frames, _FRAMES_AT_ONCE)]
    features = np.concatenate(parts, axis=1)
    return (np.maximum(features, features.max() - 8) + 4) / 4


def _log_power(windows: Float32[np.ndarray, "F window"], num_mel_bins: int) -> Float32[np.ndarray, "M F"]:
    # The spectrum is float64: float32's rounding of a loud bin would drown quiet ones 80 dB below it.
    spectrum = np.fft.rfft(windows * _hann(), axis=1)
    power = (spectrum.real**2 + spectrum.imag**2).astype(np.float32)
    frequencies, weights, starts = _filter_entries(num_mel_bins)
    mel = np.add.reduceat(power[:, frequencies] * weights, starts, axis=1)
    return np.log10(np.maximum(mel, np.float32(1e-10))).T


@cache
def _filter_entries(
    num_mel_bins: int,
) -> tuple[Int[np.ndarray, "entries"], Float32[np.ndarray, "entries"], Int[np.ndarray, "M"]]:
    """The filters' entries that are not zero, filter after filter, 1 in 65: frequency, weight, and where each begins.

    A matrix product would sum the zeros too, in threads that compete with the other clips' and in an order that
    depends on their number.
    """
    filters = mel_filters(num_mel_bins)
    kept = filters > 0
    kept[np.arange(num_mel_bins), filters.argmax(axis=1)] = True  # narrow filters between two frequencies keep a zero
    rows, frequencies = np.nonzero(kept)
    return frequencies, filters[rows, frequencies], np.searchsorted(rows, np.arange(num_mel_bins))


@cache
def _hann() -> Float[np.ndarray, "window"]:
    """The periodic Hann window."""
    return 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(_WINDOW) / _WINDOW)


@cache
def mel_filters(num_mel_bins: int) -> Float32[np.ndarray, "M frequencies"]:
    """Triangles of unit area, evenly spaced on Slaney's mel scale from 0 to 8000 Hz, over the spectrum's 201 bins."""
    edges = _mel_to_hz(np.linspace(0, _hz_to_mel(SAMPLING_RATE / 2), num_mel_bins + 2))
    frequencies = np.linspace(0, SAMPLING_RATE / 2, _WINDOW // 2 + 1)
    low, centre, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    triangles = np.minimum((frequencies - low) / (centre - low), (high - frequencies) / (high - centre))
    return (np.maximum(triangles, 0) * 2 / (high - low)).astype(np.float32)


_LINEAR_HZ_PER_MEL = 200 / 3
_BREAK_HZ = 1000.0
"""Slaney's scale is linear below and logarithmic above."""
_BREAK_MEL = _BREAK_HZ / _LINEAR_HZ_PER_MEL
_LOG_STEP = np.log(6.4) / 27


def _hz_to_mel(hz: float) -> float:
    return _BREAK_MEL + float(np.log(hz / _BREAK_HZ)) / _LOG_STEP if hz > _BREAK_HZ else hz / _LINEAR_HZ_PER_MEL


def _mel_to_hz(mel: Float[np.ndarray, "points"]) -> Float[np.ndarray, "points"]:
    above = _BREAK_HZ * np.exp(_LOG_STEP * (mel - _BREAK_MEL))
    return np.where(mel > _BREAK_MEL, above, mel * _LINEAR_HZ_PER_MEL)
