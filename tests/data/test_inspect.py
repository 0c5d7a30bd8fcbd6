import dataclasses
import json

import numpy as np
import pytest
from clips import clip, data_set

from audio_grpo.data import inspect


@pytest.fixture
def folder(tmp_path):
    records = [clip(n, seconds=n + 1) for n in range(4)]
    records += [clip(4, 2, language="Arabic"), clip(5, 1, language=None, id=None), clip(6, audio=b"fLaC broken")]
    return data_set(tmp_path / "set", records)


def test_counts_hours_languages_and_lengths(folder):
    summary = inspect(folder)
    assert summary.records == 7
    assert summary.hours == pytest.approx(13 / 3600)
    assert list(summary.languages) == ["English", "Arabic", "unknown"]
    assert summary.languages["English"].records == 4
    assert summary.languages["English"].hours == pytest.approx(10 / 3600)
    seconds = [1, 2, 3, 4, 2, 1]
    assert summary.seconds_percentiles["p50"] == np.median(seconds)
    assert (summary.seconds_percentiles["p0"], summary.seconds_percentiles["p100"]) == (1, 4)


def test_unusable_records_are_named_with_their_reason(folder):
    ((reason, names),) = inspect(folder).unusable.items()
    assert "corrupt" in reason
    assert names == ["clip-6"]


def test_the_first_records_are_shown(folder):
    looks = inspect(folder, look=2).first
    assert [(look.id, look.seconds, look.sampling_rate, look.text) for look in looks] == [
        ("clip-0", 1, 16_000, "clip 0"),
        ("clip-1", 2, 16_000, "clip 1"),
    ]


def test_the_summary_is_json(folder):
    assert json.loads(json.dumps(dataclasses.asdict(inspect(folder))))["records"] == 7


def test_a_set_without_usable_records_has_no_percentiles(tmp_path):
    summary = inspect(data_set(tmp_path / "set", [clip(0, audio=b"OggS")]))
    assert (summary.hours, summary.seconds_percentiles, summary.first) == (0, {}, [])
