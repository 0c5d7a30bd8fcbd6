import sys

import numpy as np
import pytest

from audio_grpo.data import decode_record, synthesize
from audio_grpo.data.records import load_samples
from audio_grpo.data.source import RecordSource
from audio_grpo.data.speech import TEST_SPEAKERS, TRAIN_SPEAKERS, SpeechSynthesizer, _start
from audio_grpo.data.synthesize import WORDS
from audio_grpo.errors import UserError


def _records(path):
    source = RecordSource(path)
    return [decode_record(source[i].content) for i in range(len(source))]


def test_tones_are_1_to_3_seconds_at_16_khz_and_spell_their_words(tmp_path):
    assert synthesize(tmp_path / "out", "tones", 20, seed=3) == {"": 20}
    records = _records(tmp_path / "out")
    assert len(records) == len({record.id for record in records}) == 20
    for record in records:
        samples, rate = load_samples(record)
        words = record.text.split()
        assert rate == 16_000
        assert 0.99 < len(samples) / rate < 3
        for word, part in zip(words, np.split(samples, len(words)), strict=True):
            loudest = np.abs(np.fft.rfft(part)).argmax() * rate / len(part)
            assert loudest == pytest.approx(200 * 1.15 ** WORDS.index(word), abs=4)


def test_a_seed_gives_the_same_tones_and_another_seed_others(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        synthesize(tmp_path / name, "tones", 5, seed)
    first, again, other = (_records(tmp_path / name) for name in "abc")
    assert first == again
    assert all(ours.audio != theirs.audio for ours, theirs in zip(first, other, strict=True))


def test_speech_has_words_splits_and_speakers_of_its_own_in_each(tmp_path):
    assert synthesize(tmp_path / "out", "speech", 40, seed=0) == {"train": 32, "test": 8}
    speakers = {}
    for split in ("train", "test"):
        records = _records(tmp_path / "out" / split)
        speakers[split] = {record.id.split("/")[1] for record in records}
        for record in records:
            samples, rate = load_samples(record)
            assert set(record.text.split()) <= set(WORDS)
            assert rate == 16_000
            assert 0.2 < len(samples) / rate < 4
            assert np.abs(samples).max() > 0.05
    assert len(speakers["train"]) > 10
    assert not speakers["train"] & speakers["test"]


def test_no_voice_of_the_train_split_speaks_in_the_test_split():
    assert not {speaker.variant for speaker in TRAIN_SPEAKERS} & {speaker.variant for speaker in TEST_SPEAKERS}


def test_every_speaker_speaks_and_more_words_take_longer():
    synthesizer = SpeechSynthesizer()
    for speaker in (*TRAIN_SPEAKERS, *TEST_SPEAKERS):
        short, long = (
            len(synthesizer.speak(text, speaker, pitch=50, words_per_minute=160)[0])
            for text in ("two", "seven green lamps")
        )
        assert long > 1.5 * short > 0


def test_texts_and_voices_follow_from_the_seed(tmp_path):
    for name in "ab":
        synthesize(tmp_path / name, "speech", 10, seed=7)
    first, again = ([(r.text, r.id) for r in _records(tmp_path / name / "train")] for name in "ab")
    assert first == again


def test_without_the_library_the_extra_is_named_and_nothing_is_left(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    _start.cache_clear()
    with pytest.raises(UserError, match=r"audio-grpo\[speech\]"):
        synthesize(tmp_path / "out", "speech", 4)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("kind", "count"), [("speech", 1), ("tones", 0)])
def test_too_few_clips_are_refused(tmp_path, kind, count):
    with pytest.raises(UserError, match="too small"):
        synthesize(tmp_path / "out", kind, count)
