import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from audio_grpo.grpo import AdvantageSettings, compute_advantages, group_advantages

SCALES = ("group", "batch", "none")
AMOUNTS = st.floats(-8, 8, width=16, allow_subnormal=False)
REWARDS = st_numpy.array_shapes(min_dims=2, max_dims=2, min_side=2, max_side=6).flatmap(
    lambda shape: st_numpy.arrays(np.float32, shape, elements=AMOUNTS)
)


def deviation(values):
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))


def expected_scales(rewards, scale_rewards):
    """What divides each group's advantages."""
    groups = rewards.tolist()
    everything = [reward for group in groups for reward in group]
    scales = {"group": [deviation(group) for group in groups], "batch": [deviation(everything)] * len(groups)}
    return [1.0] * len(groups) if scale_rewards == "none" else [scale + 1e-4 for scale in scales[scale_rewards]]


def expected_values(rewards, scale_rewards):
    """By loops over Python floats."""
    scales = expected_scales(rewards, scale_rewards)
    return [
        [(reward - sum(group) / len(group)) / scale for reward in group]
        for group, scale in zip(rewards.tolist(), scales, strict=True)
    ]


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


@given(st.floats(-8, 8, width=32), st.integers(2, 9), st.sampled_from(SCALES))
def test_equal_rewards_teach_exactly_nothing(reward, generations, scale_rewards):
    rewards = np.full((3, generations), reward, np.float32)
    advantages = group_advantages(rewards, scale_rewards)
    assert (advantages.values == 0).all()
    assert advantages.frac_reward_zero_std == 1


def test_groups_of_equal_rewards_are_counted():
    rewards = np.asarray([[0.1, 0.1, 0.1], [1, 2, 3], [-2, -2, -2], [0, 0, 1]], np.float32)
    assert group_advantages(rewards).frac_reward_zero_std == 0.5


def plain_advantages(rewards, settings):
    """By loops over Python floats, from R tables of B groups of G rewards."""
    weights = settings.reward_weights or [1.0] * len(rewards)
    if settings.multi_objective_aggregation == "normalize_then_sum":
        each = [expected_values(table, "group") for table in rewards]
        total = [
            [math.fsum(w * table[b][g] for w, table in zip(weights, each, strict=True)) for g in range(len(each[0][b]))]
            for b in range(len(each[0]))
        ]
        scale = deviation([value for group in total for value in group]) + 1e-4
        return [[value / scale for value in group] for group in total]
    total = np.float32(sum(w * np.float64(table) for w, table in zip(weights, rewards, strict=True)))
    values = expected_values(total, settings.scale_rewards)
    if not settings.use_leave_one_out_baseline:
        return values
    scales = expected_scales(total, settings.scale_rewards)
    return [
        [(reward - (sum(group) - reward) / (len(group) - 1)) / scale for reward in group]
        for group, scale in zip(total.tolist(), scales, strict=True)
    ]


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(
        [
            *(AdvantageSettings(scale_rewards=s, use_leave_one_out_baseline=o) for s in SCALES for o in (True, False)),
            AdvantageSettings(multi_objective_aggregation="normalize_then_sum"),
        ]
    ),
    st.sampled_from([None, (2.0, 0.5, -1.0)]),
)
def test_advantages_of_several_rewards_are_those_of_plain_loops(seed, settings, weights):
    rewards = np.random.default_rng(seed).integers(-3, 4, (3, 4, 5)).astype(np.float32)
    settings = replace(settings, reward_weights=weights)
    values = compute_advantages(rewards, settings).values
    assert values.dtype == np.float32
    np.testing.assert_allclose(values, plain_advantages(rewards, settings), rtol=1e-4, atol=1e-4)


def test_leave_one_out_worked_by_hand():
    rewards = np.asarray([[1, 2, 6]], np.float32)
    values = group_advantages(rewards, "none", leave_one_out=True).values
    np.testing.assert_allclose(values, [[1 - 4, 2 - 3.5, 6 - 1.5]])


def test_a_small_reward_counts_as_much_as_a_large_one_where_each_is_normalised():
    rewards = np.asarray([[[0, 100], [0, 100]], [[1, 0], [0, 1]]], np.float32)
    one, both = (
        compute_advantages(rewards, AdvantageSettings(multi_objective_aggregation=how)).values
        for how in ("sum_then_normalize", "normalize_then_sum")
    )
    assert np.abs(one[0, 0]) > 0.7
    np.testing.assert_allclose(both[0], 0, atol=1e-4)
    np.testing.assert_allclose(both[1], [-np.sqrt(3 / 2), np.sqrt(3 / 2)], rtol=1e-3)


def test_groups_count_as_equal_only_where_they_teach_nothing():
    """Rewards whose sum is always 1 teach something where each is normalised, with unequal weights of the two."""
    rewards = np.asarray([[[0, 1], [1, 1]], [[1, 0], [2, 2]]], np.float32)
    assert compute_advantages(rewards, AdvantageSettings()).frac_reward_zero_std == 1
    separate = AdvantageSettings(multi_objective_aggregation="normalize_then_sum", reward_weights=(1.0, 0.5))
    assert compute_advantages(rewards, separate).frac_reward_zero_std == 0.5
