import io
import sys

import av
import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from audio_grpo.audio import decode_audio
from audio_grpo.errors import UserError

RATE = 16_000
TONE = (0.3 * np.sin(2 * np.pi * 300 * np.arange(2 * RATE) / RATE)).astype(np.float32)


def _encode(samples: np.ndarray = TONE, container: str = "WAV", subtype: str | None = None) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, RATE, format=container, subtype=subtype)
    return file.getvalue()


def _encode_with_av(container: str, codec: str, rate: int) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream(codec, rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(TONE[None], format="flt", layout="mono")
        frame.sample_rate = RATE
        for part in [*av.AudioResampler(format=stream.format.name, layout="mono", rate=rate).resample(frame)]:
            output.mux(stream.encode(part))
        output.mux(stream.encode(None))
    return file.getvalue()


def _power_at(samples: np.ndarray, rate: int, hz: float) -> float:
    """Share of the clip's energy within 5 Hz of a frequency."""
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples)))) ** 2
    near = np.abs(np.fft.rfftfreq(len(samples), 1 / rate) - hz) < 5
    return spectrum[near].sum() / spectrum.sum()


@pytest.mark.parametrize(("container", "subtype"), [("WAV", "FLOAT"), ("WAV", "PCM_16"), ("FLAC", "PCM_24")])
def test_lossless_formats_give_the_samples_back(container, subtype):
    samples, rate = decode_audio(_encode(container=container, subtype=subtype))
    assert (samples.dtype, rate) == (np.float32, RATE)
    np.testing.assert_allclose(samples, TONE, atol=1e-4)


@pytest.mark.parametrize(("container", "subtype"), [("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", None)])
def test_lossy_formats_give_the_same_sound_and_length(container, subtype):
    samples, rate = decode_audio(_encode(container=container, subtype=subtype))
    assert (len(samples), rate) == (len(TONE), RATE)
    assert _power_at(samples, RATE, 300) > 0.99


@pytest.mark.parametrize(("container", "codec", "rate"), [("mp4", "aac", 16_000), ("webm", "libopus", 48_000)])
def test_other_containers_are_read_with_pyav(container, codec, rate, tmp_path):
    path = tmp_path / f"clip.{container}"
    path.write_bytes(_encode_with_av(container, codec, rate))
    samples, decoded_rate = decode_audio(path)
    assert decoded_rate == rate
    assert len(samples) / rate == pytest.approx(2, abs=0.15)
    assert _power_at(samples, rate, 300) > 0.99


def test_g722_is_known_by_its_suffix(tmp_path):
    path = tmp_path / "clip.g722"
    path.write_bytes(_encode_with_av("g722", "g722", 16_000))
    samples, rate = decode_audio(path)
    assert (len(samples), rate) == (len(TONE), RATE)
    assert _power_at(samples, RATE, 300) > 0.99


def test_channels_are_averaged():
    stereo = np.stack([TONE, -TONE / 2], axis=1)
    np.testing.assert_allclose(decode_audio(_encode(stereo, subtype="FLOAT"))[0], TONE / 4, atol=1e-6)


def test_without_pyav_the_extra_is_named(monkeypatch):
    encoded = _encode_with_av("mp4", "aac", 16_000)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match=r"audio-grpo\[video\]"):
        decode_audio(encoded)


def test_a_wav_of_a_pipe_that_states_no_length_is_read_whole():
    encoded = bytearray(_encode())
    at = encoded.index(b"data") + 4
    encoded[at : at + 4] = b"\xff\xff\xff\xff"
    np.testing.assert_allclose(decode_audio(bytes(encoded))[0], TONE, atol=1e-4)


@pytest.mark.parametrize("container", ["WAV", "FLAC", "MP3", "OGG"])
def test_half_a_file_is_refused(container):
    encoded = _encode(container=container)
    with pytest.raises(UserError, match=r"cut short|corrupt|empty"):
        decode_audio(encoded[: len(encoded) // 2])


def test_half_an_mp4_is_refused():
    encoded = _encode_with_av("mp4", "aac", 16_000)
    with pytest.raises(UserError, match="corrupt"):
        decode_audio(encoded[: len(encoded) // 2])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_samples_that_are_not_finite_are_refused(value):
    with pytest.raises(UserError, match="not finite"):
        decode_audio(_encode(np.array([0, value, 0], np.float32), subtype="FLOAT"))


def test_a_file_without_samples_is_refused():
    with pytest.raises(UserError, match="empty"):
        decode_audio(_encode(np.zeros(0, np.float32)))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.wav"):
        decode_audio(tmp_path / "nowhere.wav")


@settings(deadline=None, max_examples=60)
@given(content=st.binary(max_size=3000))
def test_bytes_of_any_kind_are_decoded_or_refused_with_a_sentence(content):
    try:
        samples, _ = decode_audio(content)
    except UserError:
        return
    assert len(samples) and np.isfinite(samples).all()
