"""One clip and its transcript as the bytes of an ArrayRecord record.

A record is a serialised `tf.train.Example` with these features, in any order; further ones are left unread:

| feature | list | content |
|---|---|---|
| `audio` | bytes | one encoded file, known by its first bytes: wav, flac, ogg, mp3, and what PyAV reads |
| | bytes | or mono 16-bit little-endian samples; needs `sampling_rate` |
| | float | or mono samples in −1..1; needs `sampling_rate` |
| | int64 | or mono samples in −32768..32767; needs `sampling_rate` |
| `text` | bytes | the transcript, UTF-8 |
| `sampling_rate` | int64 | optional for an encoded file, whose own rate it must equal; Hz |
| `language` | bytes | optional; English name of the language, e.g. "Arabic" |
| `id` | bytes | optional; names the record in results and messages |

16-bit samples are scaled to −1..1 when read.
"""

import re
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from jaxtyping import Float32

from audio_grpo.audio import decode_audio
from audio_grpo.data.tf_example import Example
from audio_grpo.errors import UserError
from audio_grpo.types import AudioRecord

Samples = Float32[np.ndarray, "samples"]

_CONTAINER = re.compile(
    rb"RIFF....WAVE|RF64|riff|fLaC|OggS|ID3|\xff[\xe2\xe3\xf2\xf3\xfa\xfb]|FORM....AIF|\.snd|caff|....ftyp|\x1aE\xdf\xa3",
    re.DOTALL,
)
"""How an encoded file begins: wav, flac, ogg, mp3, aiff, au, caf, mp4 and webm."""
_INT16_SCALE = 32768
_FAR_OUTSIDE = 16.0
"""Float samples beyond this are 16-bit values that were not scaled; a hot master stays far below."""


def is_encoded_audio(content: bytes) -> bool:
    """Whether the first bytes are those of an audio file that states its own format."""
    return _CONTAINER.match(content) is not None


def encode_record(record: AudioRecord) -> bytes:
    """The record's bytes; float samples are kept as they are, an encoded file byte for byte."""
    example = Example()
    feature = example.features.feature
    if isinstance(record.audio, bytes):
        feature["audio"].bytes_list.value.append(record.audio)
    else:
        feature["audio"].float_list.value.extend(record.audio)
    if record.sampling_rate is not None:
        feature["sampling_rate"].int64_list.value.append(record.sampling_rate)
    for name in ("text", "language", "id"):
        value = getattr(record, name)
        if value is not None:
            feature[name].bytes_list.value.append(value.encode())
    return example.SerializeToString(deterministic=True)


def decode_record(serialized: bytes) -> AudioRecord:
    """The record of these bytes. Raises UserError where they do not follow this module's schema."""
    try:
        features = Example.FromString(serialized).features.feature
    except DecodeError as error:
        raise UserError("the record is not a tf.train.Example") from error
    for name in ("audio", "text"):
        if name not in features:
            raise UserError(f"the record has no feature {name}")
    rate = _single(features, "sampling_rate", "int64_list")
    if rate is not None and rate <= 0:
        raise UserError("the record's sampling_rate is not positive")
    text = _text(features, "text")
    assert text is not None
    return AudioRecord(
        audio=_audio(features["audio"], rate),
        text=text,
        sampling_rate=rate,
        language=_text(features, "language"),
        id=_text(features, "id"),
    )


def load_samples(record: AudioRecord) -> tuple[Samples, int]:
    """Mono samples of a record and their rate in Hz.

    Raises UserError for audio that can not be decoded, is empty or not finite, or whose file contradicts the record.
    """
    if isinstance(record.audio, bytes):
        samples, rate = decode_audio(record.audio)
        if record.sampling_rate not in (None, rate):
            raise UserError("the record's sampling_rate contradicts that of its audio file")
        return samples, rate
    if record.sampling_rate is None:
        raise UserError("the record has samples without a sampling_rate")
    if len(record.audio) == 0:
        raise UserError("the audio is empty")
    if not np.isfinite(record.audio).all():
        raise UserError("the audio holds samples that are not finite numbers")
    if np.abs(record.audio).max() > _FAR_OUTSIDE:
        raise UserError("the record's float samples are far outside −1..1: scale them")
    return record.audio, record.sampling_rate


def _audio(feature: Any, rate: int | None) -> bytes | Samples:
    kind = feature.WhichOneof("kind")
    if kind == "bytes_list" and len(feature.bytes_list.value) == 1:
        content = feature.bytes_list.value[0]
        return content if is_encoded_audio(content) else _int16_samples(content, rate)
    if kind == "float_list":
        return np.array(feature.float_list.value, np.float32)
    if kind == "int64_list":
        values = np.array(feature.int64_list.value, np.int64)
        if len(values) and (values.min() < -_INT16_SCALE or values.max() >= _INT16_SCALE):
            raise UserError("the record's integer samples are outside −32768..32767")
        return values.astype(np.float32) / _INT16_SCALE
    raise UserError("the record's audio is neither one bytes value nor floats nor integers")


def _int16_samples(content: bytes, rate: int | None) -> Samples:
    if rate is None or len(content) % 2:
        raise UserError(
            "the record's audio bytes are no audio file that is known by its first bytes, nor 16-bit samples with a "
            "sampling_rate"
        )
    return np.frombuffer(content, "<i2").astype(np.float32) / _INT16_SCALE


def _text(features: Any, name: str) -> str | None:
    value = _single(features, name, "bytes_list")
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"the record's {name} is not UTF-8") from error


def _single(features: Any, name: str, kind: str) -> Any:
    """The one value of a feature; None where the record lacks the feature."""
    if name not in features:
        return None
    feature = features[name]
    values = getattr(feature, kind).value
    if feature.WhichOneof("kind") != kind or len(values) != 1:
        raise UserError(f"the record's {name} is not one value of kind {kind}")
    return values[0]
