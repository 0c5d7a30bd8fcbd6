"""Usable records and data sets of them, for tests."""

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from audio_grpo.data.write import write_records
from audio_grpo.types import AudioRecord

RATE = 16_000


def flac(seconds: float = 1.0, rate: int = RATE) -> bytes:
    file = io.BytesIO()
    tone = 0.3 * np.sin(2 * np.pi * 300 * np.arange(round(seconds * rate)) / rate)
    soundfile.write(file, tone, rate, format="FLAC")
    return file.getvalue()


def clip(number: int, seconds: float = 1.0, **replaced: Any) -> AudioRecord:
    fields = {"audio": flac(seconds), "text": f"clip {number}", "language": "English", "id": f"clip-{number}"}
    return AudioRecord(**(fields | replaced))


def data_set(folder: Path, records: Iterable[AudioRecord], shards: int = 1) -> Path:
    write_records(records, folder, shards=shards)
    return folder
