import pytest

from audio_grpo.config import Config
from audio_grpo.rewards.overlong import soft_overlong_punishment, soft_overlong_punishment_reward


@pytest.mark.parametrize(
    ("length", "punishment"), [(0, 0), (80, 0), (81, -0.05), (90, -0.5), (100, -1), (101, -1), (1000, -1)]
)
def test_punishment_falls_over_the_last_tokens(length, punishment):
    assert soft_overlong_punishment(length, 100, 20) == pytest.approx(punishment)


@pytest.mark.parametrize(("length", "punishment"), [(100, 0), (101, -1)])
def test_without_a_cache_only_what_is_too_long_is_punished(length, punishment):
    assert soft_overlong_punishment(length, 100, 0) == punishment


def test_the_reward_counts_tokens_and_takes_its_amounts_from_the_configuration():
    config = Config(
        max_prefill_predict_length=10,
        max_target_length=14,
        soft_punish_cache=2,
        reward_functions=["soft_overlong_punishment_reward"],
    )
    completions = [[5], [5, 6], [5, 6, 7], [5, 6, 7, 8]]
    assert soft_overlong_punishment_reward(completion_ids=completions, config=config, prompts=None) == [0, 0, -0.5, -1]
    assert soft_overlong_punishment_reward(completion_ids=completions) == [0] * 4
