"""Records against the wire format written by hand, and back."""

import struct

import numpy as np
import pytest
from clips import flac
from hypothesis import given
from hypothesis import strategies as st

from audio_grpo.data import decode_record, encode_record
from audio_grpo.data.records import load_samples
from audio_grpo.errors import UserError
from audio_grpo.types import AudioRecord

VARINT, FIXED32, LENGTH = 0, 5, 2


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])


def _field(number: int, wire_type: int, payload: bytes) -> bytes:
    length = _varint(len(payload)) if wire_type == LENGTH else b""
    return _varint(number << 3 | wire_type) + length + payload


def _bytes(*values: bytes) -> bytes:
    return _field(1, LENGTH, b"".join(_field(1, LENGTH, value) for value in values))


def _floats(values: list[float], packed: bool) -> bytes:
    parts = [struct.pack("<f", value) for value in values]
    content = _field(1, LENGTH, b"".join(parts)) if packed else b"".join(_field(1, FIXED32, part) for part in parts)
    return _field(2, LENGTH, content)


def _integers(values: list[int], packed: bool = True) -> bytes:
    parts = [_varint(value) for value in values]
    content = _field(1, LENGTH, b"".join(parts)) if packed else b"".join(_field(1, VARINT, part) for part in parts)
    return _field(3, LENGTH, content)


def _example(features: dict[str, bytes]) -> bytes:
    entries = [_field(1, LENGTH, name.encode()) + _field(2, LENGTH, feature) for name, feature in features.items()]
    return _field(1, LENGTH, b"".join(_field(1, LENGTH, entry) for entry in entries))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("backwards", [True, False])
def test_float_samples_of_any_writer_are_read(packed, backwards):
    features = {"audio": _floats([0.0, 0.5, -1.0], packed), "text": _bytes("żółw".encode()), "extra": _bytes(b"?")}
    features |= {"sampling_rate": _integers([8000], packed), "language": _bytes(b"Polish"), "id": _bytes(b"a/1")}
    record = decode_record(_example(dict(reversed(features.items())) if backwards else features))
    assert isinstance(record.audio, np.ndarray)
    assert record.audio.tolist() == [0.0, 0.5, -1.0]
    assert (record.text, record.sampling_rate, record.language, record.id) == ("żółw", 8000, "Polish", "a/1")


@pytest.mark.parametrize("packed", [True, False])
def test_integers_and_headerless_bytes_are_16_bit_samples(packed):
    values = [0, 16_384, -32_768, 32_767]
    for audio in (_integers(values, packed), _bytes(struct.pack("<4h", *values))):
        record = decode_record(_example({"audio": audio, "text": _bytes(b"x"), "sampling_rate": _integers([16_000])}))
        np.testing.assert_array_equal(record.audio, np.array(values, np.float32) / 32_768)


def test_our_bytes_are_what_the_wire_format_says():
    record = AudioRecord(audio=b"fLaC...", text="hi", sampling_rate=16_000, id="x")
    features = {"audio": _bytes(b"fLaC..."), "id": _bytes(b"x"), "sampling_rate": _integers([16_000])}
    assert encode_record(record) == _example(features | {"text": _bytes(b"hi")})


samples = st.lists(st.floats(-1, 1, width=32), max_size=50).map(lambda values: np.array(values, np.float32))
names = st.none() | st.text(st.characters(exclude_categories=["Cs"]))


@given(audio=samples, text=st.text(st.characters(exclude_categories=["Cs"])), language=names, id_=names)
def test_what_is_encoded_is_decoded(audio, text, language, id_):
    record = AudioRecord(audio=audio, text=text, sampling_rate=16_000, language=language, id=id_)
    decoded = decode_record(encode_record(record))
    np.testing.assert_array_equal(decoded.audio, audio)
    assert (decoded.text, decoded.sampling_rate, decoded.language, decoded.id) == (text, 16_000, language, id_)


def test_an_encoded_file_is_kept_byte_for_byte():
    record = decode_record(encode_record(AudioRecord(audio=flac(0.5), text="x")))
    assert record.audio == flac(0.5)
    decoded, rate = load_samples(record)
    assert (len(decoded), rate) == (8000, 16_000)


TEXT, RATE = _bytes(b"x"), _integers([16_000])


@pytest.mark.parametrize(
    ("serialized", "complaint"),
    [
        (b"\x0a\xff", "not a tf.train.Example"),
        (b"", "no feature audio"),
        (_example({"audio": _floats([0.1], True), "sampling_rate": RATE}), "no feature text"),
        (_example({"audio": _bytes(b"a", b"b"), "text": TEXT}), "neither one bytes value"),
        (_example({"audio": b"", "text": TEXT}), "neither one bytes value"),
        (_example({"audio": _bytes(b"no header"), "text": TEXT, "sampling_rate": RATE}), "no audio file"),
        (_example({"audio": _bytes(b"no header!"), "text": TEXT}), "no audio file"),
        (_example({"audio": _integers([40_000]), "text": TEXT, "sampling_rate": RATE}), "outside −32768"),
        (_example({"audio": _floats([0.1], True), "text": _bytes(b"\xff")}), "text is not UTF-8"),
        (_example({"audio": _floats([0.1], True), "text": _integers([1])}), "text is not one value"),
        (_example({"audio": _floats([0.1], True), "text": TEXT, "sampling_rate": _integers([0])}), "not positive"),
        (_example({"audio": _floats([0.1], True), "text": TEXT, "id": _bytes(b"a", b"b")}), "id is not one value"),
    ],
)
def test_a_record_that_breaks_the_schema_is_refused(serialized, complaint):
    with pytest.raises(UserError, match=complaint):
        decode_record(serialized)


@given(st.binary(max_size=200))
def test_bytes_of_any_kind_are_decoded_or_refused_with_a_sentence(serialized):
    try:
        decoded = decode_record(serialized)
    except UserError as refusal:
        assert len(str(refusal).split()) > 3
    else:
        assert isinstance(decoded, AudioRecord)


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        (AudioRecord(audio=np.zeros(9, np.float32), text="x"), "without a sampling_rate"),
        (AudioRecord(audio=np.zeros(0, np.float32), text="x", sampling_rate=8000), "empty"),
        (AudioRecord(audio=np.array([0, np.nan], np.float32), text="x", sampling_rate=8000), "not finite"),
        (AudioRecord(audio=np.array([0, 12_000], np.float32), text="x", sampling_rate=8000), "far outside"),
    ],
)
def test_samples_that_can_not_be_heard_are_refused(record, complaint):
    with pytest.raises(UserError, match=complaint):
        load_samples(record)


def test_a_rate_that_contradicts_the_file_is_refused():
    with pytest.raises(UserError, match="contradicts"):
        load_samples(AudioRecord(audio=flac(), text="x", sampling_rate=8000))
