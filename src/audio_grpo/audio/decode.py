"""Decoding audio files and bytes into mono samples."""

import io
import re
from importlib import import_module
from types import ModuleType

import numpy as np
import soundfile
from etils import epath
from jaxtyping import Float32

from audio_grpo.errors import UserError

Samples = Float32[np.ndarray, "samples"]

_UNRECOGNISED_FORMAT, _UNSUPPORTED_ENCODING = 1, 4
_UNKNOWN_SIZE = 0x7FFFF000
"""Writers to a pipe can not know the length of a wav file's data and state this or more."""
_TRAILING_LOSS_SECONDS = 0.1
"""Lossy codecs may end this much before the duration that their header rounds or estimates."""


def decode_audio(source: bytes | epath.PathLike) -> tuple[Samples, int]:
    """Samples in −1..1, channels averaged to mono, and their rate in Hz.

    `source` is the content of a file or a path, local or remote. libsndfile reads wav, flac, ogg (Vorbis, Opus), mp3
    and its further formats; PyAV (the extra `video`) reads all others: m4a, mp4, webm, and G.722 from a path that
    ends in `.g722`, since that format has no header to know it by.

    Raises UserError for audio that is missing, empty, corrupt, cut short or not finite.
    """
    if isinstance(source, bytes):
        return _decode(source, headerless_format=None)
    path = epath.Path(source)
    try:
        return _decode(path.read_bytes(), headerless_format="g722" if path.suffix.lower() == ".g722" else None)
    except (OSError, UserError) as error:
        raise UserError(f"{path}: {error}") from error


def _decode(encoded: bytes, headerless_format: str | None) -> tuple[Samples, int]:
    if headerless_format:
        channels, rate, promised = _read_with_av(encoded, headerless_format)
    else:
        try:
            channels, rate, promised = _read_with_soundfile(encoded)
        except soundfile.LibsndfileError as error:
            if error.code not in (_UNRECOGNISED_FORMAT, _UNSUPPORTED_ENCODING):
                raise UserError(f"the audio is corrupt: {error.error_string}") from error
            channels, rate, promised = _read_with_av(encoded, None)
    _require_complete(channels, rate, promised)
    return channels.mean(axis=1, dtype=np.float32), rate


def _read_with_soundfile(encoded: bytes) -> tuple[Float32[np.ndarray, "samples channels"], int, int]:
    """Samples, rate and the number of samples per channel that the header promises."""
    with soundfile.SoundFile(io.BytesIO(encoded)) as sound:
        channels = sound.read(dtype="float32", always_2d=True)
        promised = sound.frames
        # libsndfile quietly shortens a wav file's data chunk to what the file holds, and only notes it in its log.
        stated = re.search(r"^data : (\d+) \(should be (\d+)\)", sound.extra_info, re.MULTILINE)
        if stated and int(stated[1]) < _UNKNOWN_SIZE and int(stated[2]) > 0:
            promised = sound.frames * int(stated[1]) // int(stated[2])
        return channels, sound.samplerate, promised


def _read_with_av(
    encoded: bytes, headerless_format: str | None
) -> tuple[Float32[np.ndarray, "samples channels"], int, int]:
    """Samples of the first audio stream, rate and the number of samples per channel that the header promises."""
    av = _import_av()
    try:
        with av.open(io.BytesIO(encoded), format=headerless_format) as container:
            if not container.streams.audio:
                raise UserError("the file has no audio stream")
            stream = container.streams.audio[0]
            planar = av.AudioResampler(format="fltp")
            frames = [part for frame in container.decode(stream) for part in planar.resample(frame)]
            frames += planar.resample(None) if frames else []
            duration = 0.0 if stream.duration is None else float(stream.duration * stream.time_base)
            rate = stream.codec_context.sample_rate
    except av.FFmpegError as error:
        raise UserError(f"the audio is corrupt or of an unknown format: {error.strerror}") from error
    channels = [frame.to_ndarray().T for frame in frames]
    return np.concatenate(channels) if channels else np.zeros((0, 1), np.float32), rate, int(duration * rate)


def _import_av() -> ModuleType:
    try:
        return import_module("av")
    except ModuleNotFoundError as error:
        raise UserError(
            "the audio is not in a format that libsndfile reads (wav, flac, ogg, mp3): convert it, or for m4a, mp4, "
            "webm and G.722 install the extra `video`: pip install 'audio-grpo[video]'"
        ) from error


def _require_complete(channels: Float32[np.ndarray, "samples channels"], rate: int, promised: int) -> None:
    if len(channels) == 0:
        raise UserError("the audio is empty")
    if len(channels) < promised - _TRAILING_LOSS_SECONDS * rate:
        raise UserError("the audio is cut short: its header promises more samples than it holds")
    if not np.isfinite(channels).all():
        raise UserError("the audio holds samples that are not finite numbers")
