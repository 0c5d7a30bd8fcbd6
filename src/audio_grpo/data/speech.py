"""Speech from eSpeak NG, driven in process."""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np
from jaxtyping import Float32

from audio_grpo.errors import UserError

_SYNCHRONOUS, _SPEED, _PITCH, _UTF8 = 2, 1, 3, 1
"""Values of eSpeak's enumerations: audio to the callback before the call returns, two parameters, the encoding."""
_DO_NOT_EXIT = 0x8000
"""Lets a failing start return instead of ending the process."""
_INT16_SCALE = 32768
_SAMPLES_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


@dataclass(frozen=True, slots=True)
class Speaker:
    """A voice: an eSpeak accent and variant that keeps to a range of pitches."""

    accent: str
    """e.g. "en-us"."""
    variant: str
    """e.g. "f3"."""
    lowest_pitch: int
    """0 to 99, where 50 is the variant's own."""
    highest_pitch: int

    @property
    def name(self) -> str:
        """Unique among speakers, e.g. "en-us+f3-45"."""
        return f"{self.accent}+{self.variant}-{self.lowest_pitch}"


def _speakers(variants: str) -> tuple[Speaker, ...]:
    return tuple(
        Speaker(accent, variant, pitch, pitch + 15)
        for variant in variants.split()
        for accent in ("en-us", "en-gb-x-rp")
        for pitch in (25, 45, 65)
    )


TRAIN_SPEAKERS = _speakers("m1 m2 m4 m5 m6 m8 f1 f3 f5")
TEST_SPEAKERS = _speakers("m3 m7 f2 f4")


class SpeechSynthesizer:
    """eSpeak NG. The library has one state for the whole process, so use one at a time, from one thread.

    Raises UserError where the extra `speech` is not installed.
    """

    def __init__(self) -> None:
        self._library, self._rate = _start()

    def speak(
        self, text: str, speaker: Speaker, *, pitch: int, words_per_minute: int
    ) -> tuple[Float32[np.ndarray, "samples"], int]:
        """Samples in −1..1 of the spoken text, and their rate in Hz."""
        parts: list[np.ndarray] = []
        callback = _SAMPLES_CALLBACK(_collect_into(parts))
        self._library.espeak_SetSynthCallback(callback)
        encoded = text.encode()
        for status in (
            self._library.espeak_SetVoiceByName(f"{speaker.accent}+{speaker.variant}".encode()),
            self._library.espeak_SetParameter(_SPEED, words_per_minute, 0),
            self._library.espeak_SetParameter(_PITCH, pitch, 0),
            self._library.espeak_Synth(encoded, len(encoded) + 1, 0, 0, 0, _UTF8, None, None),
        ):
            if status != 0:
                raise RuntimeError(f"eSpeak NG failed with status {status} for {speaker} and {text!r}")
        return np.concatenate(parts).astype(np.float32) / _INT16_SCALE, self._rate


def _collect_into(parts: list[np.ndarray]) -> Callable[[Any, int, Any], int]:
    def collect(samples: Any, count: int, _events: Any) -> int:
        if samples and count:
            parts.append(np.ctypeslib.as_array(samples, (count,)).copy())  # eSpeak reuses the buffer
        return 0

    return collect


@cache
def _start() -> tuple[ctypes.CDLL, int]:
    try:
        loader = import_module("espeakng_loader")
    except ModuleNotFoundError as error:
        raise UserError("speech synthesis needs the extra `speech`: pip install 'audio-grpo[speech]'") from error
    library = ctypes.CDLL(loader.get_library_path())
    library.espeak_Synth.argtypes = (
        *(ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_int, ctypes.c_uint, ctypes.c_uint),
        *(ctypes.c_void_p, ctypes.c_void_p),
    )
    rate = library.espeak_Initialize(_SYNCHRONOUS, 0, loader.get_data_path().encode(), _DO_NOT_EXIT)
    if rate <= 0:
        raise RuntimeError("eSpeak NG could not start with the data of the package espeakng-loader")
    return library, rate
