"""Data out of thin air: tones that spell words, and synthesised speech."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import soundfile
from jaxtyping import Float32

from audio_grpo.audio import SAMPLING_RATE, resample
from audio_grpo.data.speech import TEST_SPEAKERS, TRAIN_SPEAKERS, Speaker, SpeechSynthesizer
from audio_grpo.data.write import new_folder, write_records
from audio_grpo.errors import UserError
from audio_grpo.types import AudioRecord

Kind = Literal["speech", "tones"]

WORDS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    *("red", "green", "blue", "black", "white", "stop", "go", "left", "right", "down"),
)
_TEST_SHARE = 5
"""One clip in this many is spoken by a held-out speaker."""


def synthesize(out: Path, kind: Kind = "speech", count: int = 32, seed: int = 0) -> dict[str, int]:
    """Writes `count` clips at 16 kHz as ArrayRecord to the new folder `out`; returns the clips of each sub-folder.

    `tones` are 1–3 s in which each word sounds as a tone of its own pitch in some noise, written to `out` itself.
    `speech` is one to four English words from eSpeak NG, written to `train` and `test`, whose speakers differ; every
    fifth clip is for `test`. Texts, voices, speeds and pitches follow from `seed`; speech is not identical to the
    sample when made again.

    Raises UserError for fewer than 2 clips of speech or 1 of tones, for a folder that is not empty, and for speech
    without the extra `speech`.
    """
    if count < (2 if kind == "speech" else 1):
        raise UserError(f"count {count} is too small: tones need 1 clip, speech 2, to learn from and to test with")
    rng = np.random.default_rng(seed)
    with new_folder(out) as folder:
        if kind == "tones":
            return {"": write_records(_tones(rng, count), folder)}
        synthesizer = SpeechSynthesizer()
        test = max(1, count // _TEST_SHARE)
        splits = {"train": (count - test, TRAIN_SPEAKERS), "test": (test, TEST_SPEAKERS)}
        return {
            split: write_records(_speech(rng, split, clips, speakers, synthesizer), folder / split)
            for split, (clips, speakers) in splits.items()
        }


def _tones(rng: np.random.Generator, count: int) -> Iterator[AudioRecord]:
    for number in range(count):
        words = rng.integers(len(WORDS), size=rng.integers(1, 4))
        length = int(rng.uniform(1, 3) * SAMPLING_RATE) // len(words)
        seconds = np.arange(length) / SAMPLING_RATE
        tones = [np.sin(2 * np.pi * 200 * 1.15**word * seconds) * np.hanning(length) for word in words]
        samples = 0.3 * np.concatenate(tones)
        samples += rng.normal(0, rng.uniform(0.001, 0.05), len(samples))
        yield _record(samples.astype(np.float32), words, f"tones/{number:05d}")


def _speech(
    rng: np.random.Generator, split: str, count: int, speakers: tuple[Speaker, ...], synthesizer: SpeechSynthesizer
) -> Iterator[AudioRecord]:
    for number in range(count):
        words = rng.integers(len(WORDS), size=rng.integers(1, 5))
        speaker = speakers[rng.integers(len(speakers))]
        samples, rate = synthesizer.speak(
            " ".join(WORDS[word] for word in words),
            speaker,
            pitch=int(rng.integers(speaker.lowest_pitch, speaker.highest_pitch + 1)),
            words_per_minute=int(rng.integers(120, 201)),
        )
        yield _record(resample(samples, rate), words, f"{split}/{speaker.name}/{number:05d}")


def _record(samples: Float32[np.ndarray, "samples"], words: np.ndarray, name: str) -> AudioRecord:
    file = io.BytesIO()
    soundfile.write(file, samples, SAMPLING_RATE, format="FLAC", subtype="PCM_16")
    return AudioRecord(
        audio=file.getvalue(),
        text=" ".join(WORDS[word] for word in words),
        sampling_rate=SAMPLING_RATE,
        language="English",
        id=name,
    )
