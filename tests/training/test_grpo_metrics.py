"""A step's metrics against numbers worked out by hand."""

import numpy as np
import pytest

from audio_grpo.grpo import group_advantages
from audio_grpo.rewards import EditCounts, RewardTable, word_edits
from audio_grpo.training.answers import ScoredAnswer
from audio_grpo.training.durations import DURATIONS, duration_of
from audio_grpo.training.grpo_metrics import answer_metrics, reward_metrics, transcript_metrics


def scored(reference, answer, text=None):
    return ScoredAnswer(text or answer or "", answer, word_edits(reference, answer or ""), EditCounts())


def test_errors_are_told_by_their_kind_per_reference_word():
    english, arabic = "seven blue lamps stand", "ذهب الولد إلى المدرسة"
    answers = [
        [scored(english, "seven blue lamp stand"), scored(english, "seven lamps stand there now")],
        [scored(arabic, "ذهب الولد إلى المدرسة"), scored(arabic, "ذهب إلى المدرسة")],
    ]
    metrics = answer_metrics(answers, [english, arabic])
    assert metrics["errors/substitution_rate"] == 1 / 16
    assert metrics["errors/deletion_rate"] == 2 / 16
    assert metrics["errors/insertion_rate"] == 2 / 16
    assert metrics["wer"] == 5 / 16
    assert metrics["answers/length_ratio"] == (4 + 5 + 4 + 3) / 16


def test_answers_that_went_wrong_are_counted_by_what_went_wrong():
    reference = "ذهب الولد إلى المدرسة"
    good = scored(reference, reference)
    answers = [
        [good, scored(reference, None, "<answer>ذهب ذهب ذهب ذهب ذهب"), scored(reference, "")],
        [good, scored(reference, "the boy went to school"), scored(reference, "the the the the the")],
        [good, good, scored(reference, None, "<answer>ذهب")],
    ]
    metrics = answer_metrics(answers, [reference] * 3)
    assert metrics["answers/empty_rate"] == 3 / 9
    assert metrics["answers/repetition_rate"] == 2 / 9
    assert metrics["answers/wrong_script_rate"] == 2 / 9


def test_groups_that_teach_nothing_are_counted_by_duration():
    rewards = np.float32([[1, 1], [1, 2], [3, 3], [0, 1]])
    table = RewardTable(names=("r",), values=rewards[None])
    seconds = np.float32([0.5, 1.9, 2.0, 25.0])
    metrics = reward_metrics(table, rewards, group_advantages(rewards), seconds)
    shares = {name: value for name, value in metrics.items() if name.startswith("frac_reward_zero_std")}
    assert shares == {
        "frac_reward_zero_std": 0.5,
        "frac_reward_zero_std/0-2_s": 0.5,
        "frac_reward_zero_std/2-5_s": 1.0,
        "frac_reward_zero_std/20_s_and_more": 0.0,
    }
    assert metrics["reward"] == metrics["rewards/r/mean"] == 1.5
    assert metrics["reward_std"] == pytest.approx((0 + 0.5**0.5 + 0 + 0.5**0.5) / 4)


def test_a_group_of_equal_rewards_teaches_where_its_transcript_earns_another():
    rewards = np.float32([[1, 1, 3], [3, 3, 3]])
    advantages = group_advantages(rewards, "none")
    sampled = RewardTable(names=("r",), values=rewards[None]).first(2)
    metrics = reward_metrics(sampled, sampled.total(), advantages, np.float32([1, 1]))
    assert (metrics["reward"], metrics["reward_std"], metrics["frac_reward_zero_std"]) == (2, 0, 0.5)
    assert transcript_metrics(rewards, advantages) == {
        "transcript/reward": 3,
        "transcript/advantage": pytest.approx(4 / 3 / 2),
    }


@pytest.mark.parametrize(
    ("seconds", "name"),
    [(0.0, "0-2 s"), (1.99, "0-2 s"), (2.0, "2-5 s"), (19.9, "10-20 s"), (20.0, "20 s and more"), (999, DURATIONS[-1])],
)
def test_a_clip_falls_into_the_bucket_that_holds_its_duration(seconds, name):
    assert duration_of(seconds) == name
