import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from audio_grpo.grpo import group_advantages

SCALES = ("group", "batch", "none")
AMOUNTS = st.floats(-8, 8, width=16, allow_subnormal=False)
REWARDS = st_numpy.array_shapes(min_dims=2, max_dims=2, min_side=2, max_side=6).flatmap(
    lambda shape: st_numpy.arrays(np.float32, shape, elements=AMOUNTS)
)


def deviation(values):
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))


def expected_values(rewards, scale_rewards):
    """By loops over Python floats."""
    everything = [reward for group in rewards.tolist() for reward in group]
    values = []
    for group in rewards.tolist():
        scale = 1.0 if scale_rewards == "none" else deviation(group if scale_rewards == "group" else everything) + 1e-4
        mean = sum(group) / len(group)
        values.append([(reward - mean) / scale for reward in group])
    return values


@pytest.mark.parametrize(
    ("scale_rewards", "scales"),
    [
        ("group", [[1 + 1e-4], [3 + 1e-4]]),
        # The six rewards have the mean 1 and squared distances 0, 1, 4, 16, 1, 4 from it.
        ("batch", math.sqrt(26 / 5) + 1e-4),
        ("none", 1),
    ],
)
def test_two_groups_worked_by_hand(scale_rewards, scales):
    rewards = np.asarray([[1, 2, 3], [-3, 0, 3]], np.float32)
    advantages = group_advantages(rewards, scale_rewards)
    np.testing.assert_allclose(advantages.values, np.asarray([[-1, 0, 1], [-3, 0, 3]]) / scales, rtol=1e-6)
    assert advantages.values.dtype == np.float32
    assert advantages.reward_std == pytest.approx(2)
    assert advantages.frac_reward_zero_std == 0


@given(REWARDS, st.sampled_from(SCALES))
def test_values_are_those_of_plain_loops(rewards, scale_rewards):
    values = group_advantages(rewards, scale_rewards).values
    np.testing.assert_allclose(values, expected_values(rewards, scale_rewards), rtol=1e-4, atol=1e-4)


@given(REWARDS, st.sampled_from(SCALES))
def test_each_group_has_mean_zero(rewards, scale_rewards):
    values = group_advantages(rewards, scale_rewards).values
    np.testing.assert_allclose(values.mean(axis=1), 0, atol=1e-4)


@given(REWARDS, st.sampled_from(SCALES), st.integers(-8, 8))
def test_a_constant_added_to_all_rewards_changes_nothing(rewards, scale_rewards, constant):
    before, after = (group_advantages(r, scale_rewards) for r in (rewards, rewards + np.float32(constant)))
    np.testing.assert_allclose(before.values, after.values, atol=2e-3)
    assert before.reward_std == pytest.approx(after.reward_std, abs=1e-4)


@given(st.floats(-8, 8, width=32), st.integers(2, 9), st.sampled_from(SCALES))
def test_equal_rewards_teach_exactly_nothing(reward, generations, scale_rewards):
    rewards = np.full((3, generations), reward, np.float32)
    advantages = group_advantages(rewards, scale_rewards)
    assert (advantages.values == 0).all()
    assert advantages.frac_reward_zero_std == 1


def test_groups_of_equal_rewards_are_counted():
    rewards = np.asarray([[0.1, 0.1, 0.1], [1, 2, 3], [-2, -2, -2], [0, 0, 1]], np.float32)
    assert group_advantages(rewards).frac_reward_zero_std == 0.5
