"""Clips that teach nothing are passed over, no other clip is lost, and all of it goes on where it stopped."""

import collections
import json

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_runs import kept_programs, metrics_of, tiny_config, with_tones

from audio_grpo.config import Config
from audio_grpo.data import AudioDataIterator
from audio_grpo.data.skipping import SkippingAccount
from audio_grpo.training import grpo_loop, train_loop
from audio_grpo.training.curriculum import ClipHistory, Curriculum

B, CLIPS = 4, 10


class Batches:
    """Clip after clip, round and round."""

    def __init__(self, first):
        self._next = first

    def __iter__(self):
        return self

    def __next__(self):
        numbers = [(self._next * B + row) for row in range(B)]
        self._next += 1
        clips = [number % CLIPS for number in numbers]
        return {
            "id": [str(clip) for clip in clips],
            "number": np.array(numbers),
            "audios": jax.numpy.asarray(numbers, "float32")[:, None],
            "unusable": [None] * B,
        }

    def close(self):
        pass


def curriculum(**keys):
    config = Config.model_validate({"zero_std_skip_after": 2, "zero_std_skip_probability": 0.9, **keys})
    return Curriculum(AudioDataIterator(Batches, SkippingAccount(0.1, CLIPS), {"seed": 0}), config)


def taken(data, batches):
    """Every batch's place in the endless data, by all columns, which must agree."""
    found = []
    for _ in range(batches):
        batch = next(data)
        numbers = batch["number"].tolist()
        assert batch["id"] == [str(number % CLIPS) for number in numbers]
        assert np.asarray(batch["audios"])[:, 0].tolist() == numbers
        found.append(numbers)
    return found


def places(data, batches):
    return [number for batch in taken(data, batches) for number in batch]


def note_all(data, clips, *, teaches=False):
    data.note([str(clip) for clip in clips], np.ones(len(clips)), np.ones(len(clips)), np.full(len(clips), teaches))


def test_a_history_has_the_means_and_the_groups_in_a_row_that_taught_nothing():
    history = ClipHistory()
    for reward, wer, teaches in ((1.0, 0.5, False), (3.0, 0.0, True), (2.0, 1.0, False), (4.0, 0.5, False)):
        history.note(reward, wer, teaches=teaches)
    assert (history.seen, history.reward, history.wer, history.alike) == (4, 2.5, 0.5, 2)


def test_batches_come_as_they_are_where_nothing_is_known():
    assert taken(curriculum(), 6) == [list(range(4 * i, 4 * i + 4)) for i in range(6)]


def test_a_clip_is_passed_over_only_after_so_many_groups_in_a_row_that_taught_nothing():
    data = curriculum(zero_std_skip_probability=0.999)
    note_all(data, [1, 2, 3])
    assert places(data, 2) == list(range(8))
    note_all(data, [1, 2])
    note_all(data, [2], teaches=True)
    left = [number for number in range(8, 80) if number % CLIPS != 1]
    assert places(data, 16) == left[:64]
    assert data.metrics == {"clips/seen": 3, "clips/may_be_passed_over": 1, "clips/passed_over": 7}


def test_with_probability_0_no_clip_is_passed_over():
    data = curriculum(zero_std_skip_probability=0.0)
    for _ in range(3):
        note_all(data, range(CLIPS))
    assert places(data, 5) == list(range(20))


def test_a_clip_is_passed_over_with_the_probability_given():
    data = curriculum(zero_std_skip_probability=0.75, zero_std_skip_after=1)
    note_all(data, range(5))
    counts = collections.Counter(number % CLIPS for number in places(data, 500))
    seen = sum(counts[clip] for clip in range(5)) / sum(counts[clip] for clip in range(5, CLIPS))
    assert seen == pytest.approx(0.25, abs=0.04)


def test_every_clip_may_be_idle():
    data = curriculum(zero_std_skip_probability=0.9)
    for _ in range(2):
        note_all(data, range(CLIPS))
    numbers = places(data, 20)
    assert numbers == sorted(set(numbers))
    assert data.metrics["clips/passed_over"] > 300


def test_a_group_whose_reward_is_no_number_is_not_noted():
    data = curriculum()
    data.note(["a", "b"], np.array([np.nan, 1.0]), np.zeros(2), np.array([True, False]))
    assert data.clips.keys() == {"b"}


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sets(st.integers(0, CLIPS - 1)), min_size=2, max_size=12), st.data())
def test_going_on_from_a_state_is_as_if_nothing_had_happened(noted, draw):
    stop = draw.draw(st.integers(1, len(noted) - 1))
    whole, before, after = curriculum(), curriculum(), curriculum()
    batches = []
    for clips in noted:
        batches += taken(whole, 1)
        note_all(whole, sorted(clips))
    for clips in noted[:stop]:
        next(before)
        note_all(before, sorted(clips))
    after.set_state(json.dumps(json.loads(before.get_state())).encode())
    for clips, expected in zip(noted[stop:], batches[stop:], strict=True):
        assert taken(after, 1) == [expected]
        note_all(after, sorted(clips))
    assert after.get_state() == whole.get_state()


@pytest.mark.slow
def test_a_run_remembers_its_clips_across_an_interruption(tmp_path, monkeypatch):
    folder = with_tones(tmp_path, count=6)
    (folder / "equal.py").write_text("def equal(completions, **_):\n    return [1.0] * len(completions)\n")
    keys = {"reward_functions": [f"{folder / 'equal.py'}:equal"], "steps": 6, "checkpoint_period": 4}
    keys |= {"zero_std_skip_after": 1, "zero_std_skip_probability": 0.5, "log_completions": 8}
    step = grpo_loop.grpo_step

    def stopping(*args):
        if args[-1] == 6:
            raise KeyboardInterrupt
        return step(*args)

    with kept_programs(folder / "programs"):
        whole = train_loop(tiny_config(folder, run_name="whole", **keys))
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(grpo_loop, "grpo_step", stopping)
            train_loop(tiny_config(folder, run_name="interrupted", **keys))
        resumed = train_loop(tiny_config(folder, run_name="interrupted", **keys))
    metrics = metrics_of(whole)
    assert metrics_of(resumed) == metrics
    assert resumed.completions_path.read_text() == whole.completions_path.read_text()
    assert metrics[-1]["clips/seen"] == metrics[-1]["clips/may_be_passed_over"] == 6
    assert metrics[-1]["clips/passed_over"] > 0
