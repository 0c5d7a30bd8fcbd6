import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from audio_grpo.grpo import LossAux, LossSettings, TokenScores, grpo_loss_fn, token_weights
from audio_grpo.grpo.loss import k3
from audio_grpo.types import GroupBatch, PromptBatch

SETTINGS = LossSettings(epsilon=0.2, beta=0.04)
LOSS_TYPES = ("grpo", "dapo", "dr_grpo")
run = jax.jit(grpo_loss_fn, static_argnames="settings")


def batch_of(mask, advantages, weights, **log_probs):
    prompts = PromptBatch(np.zeros((len(mask), 1), np.int32), np.ones(len(mask), np.int32))
    return GroupBatch(
        prompts=prompts,
        completion_tokens=jnp.zeros(mask.shape, jnp.int32),
        mask=jnp.asarray(mask),
        advantages=jnp.asarray(advantages, jnp.float32),
        token_weights=jnp.asarray(weights, jnp.float32),
        **{name: jnp.asarray(values, jnp.float32) for name, values in log_probs.items()},
    )


def scores_of(log_probs, entropy=None):
    entropy = np.zeros_like(log_probs) if entropy is None else entropy
    return TokenScores(jnp.asarray(log_probs, jnp.float32), jnp.asarray(entropy, jnp.float32))


def random_case(seed, old=True, reference=True, sampler=True, loss_type="grpo", groups=2):
    """Completions of 0 to 5 tokens whose ratios lie on both sides of the interval."""
    rng = np.random.default_rng(seed)
    shape = (groups, 3, 5)
    policy = rng.uniform(-6, 0, shape)
    mask = np.arange(5) < rng.integers(0, 6, shape[:2])[..., None]
    near = {
        "old_log_probs": policy + rng.normal(0, 0.3, shape) if old else None,
        "reference_log_probs": policy + rng.normal(0, 1, shape) if reference else None,
        "sampler_log_probs": policy + rng.normal(0, 0.01, shape) if sampler else None,
    }
    log_probs = {name: values for name, values in near.items() if values is not None}
    batch = batch_of(mask, rng.normal(size=shape[:2]), token_weights(mask, loss_type), **log_probs)
    return policy, rng.uniform(0, 3, shape), batch


def reference_report(policy, entropy, batch, settings, fixed=None):
    """The loss by loops over Python floats; `fixed` is the policy that a batch without old log-probs departs from."""
    fixed = policy if fixed is None else fixed
    sums = dict.fromkeys(LossAux._fields, 0.0)
    for at in zip(*np.nonzero(np.asarray(batch.mask)), strict=True):
        advantage, weight = float(batch.advantages[at[:2]]), float(batch.token_weights[at])
        old = fixed[at] if batch.old_log_probs is None else float(batch.old_log_probs[at])
        ratio = math.exp(min(20, max(-20, policy[at] - old)))
        token_loss = -min(ratio * advantage, min(1 + settings.epsilon, max(1 - settings.epsilon, ratio)) * advantage)
        if batch.reference_log_probs is not None:
            difference = min(20, max(-20, float(batch.reference_log_probs[at]) - policy[at]))
            kl = math.exp(difference) - difference - 1
            token_loss += settings.beta * kl
            sums["kl"] += kl
        gap = 0.0 if batch.sampler_log_probs is None else abs(policy[at] - float(batch.sampler_log_probs[at]))
        sums["loss"] += weight * token_loss
        sums["tokens"] += 1
        sums["entropy"] += entropy[at]
        sums["clipped_low"] += ratio < 1 - settings.epsilon and advantage < 0
        sums["clipped_high"] += ratio > 1 + settings.epsilon and advantage > 0
        sums["ratio"] += ratio
        sums["sampler_gap"] += gap
        sums["sampler_gap_max"] = max(sums["sampler_gap_max"], gap)
    return sums


@settings(deadline=None)  # the first of each kind compiles
@given(st.integers(0, 2**32 - 1), st.booleans(), st.booleans(), st.booleans(), st.sampled_from(LOSS_TYPES))
def test_every_reported_number_is_that_of_plain_loops(seed, old, reference, sampler, loss_type):
    policy, entropy, batch = random_case(seed, old, reference, sampler, loss_type)
    loss, aux = run(scores_of(policy, entropy), batch, settings=SETTINGS)
    assert loss == aux.loss
    for name, expected in reference_report(policy, entropy, batch, SETTINGS).items():
        np.testing.assert_allclose(getattr(aux, name), expected, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_the_gradient_is_that_of_finite_differences(seed, old):
    policy, entropy, batch = random_case(seed, old)
    gradient = jax.grad(lambda x: run(TokenScores(x, scores_of(entropy).log_probs), batch, settings=SETTINGS)[0])(
        jnp.asarray(policy, jnp.float32)
    )
    expected = np.zeros_like(policy)
    for at in np.ndindex(policy.shape):
        nudge = np.zeros_like(policy)
        nudge[at] = 1e-5
        ends = [reference_report(policy + s * nudge, entropy, batch, SETTINGS, fixed=policy) for s in (1, -1)]
        expected[at] = (ends[0]["loss"] - ends[1]["loss"]) / 2e-5
    np.testing.assert_allclose(gradient, expected, atol=1e-4)
    assert np.abs(expected).max() > 0.01


def test_clipping_worked_by_hand():
    """Ratios 1.5 and 0.5, once praised and once blamed: only moves that went too far in their direction are cut off."""
    batch = batch_of(
        np.ones((1, 2, 2), bool), [[1, -1]], np.full((1, 2, 2), 0.25), old_log_probs=np.full((1, 2, 2), -2.0)
    )
    policy = -2 + jnp.log(jnp.asarray([[[1.5, 0.5], [1.5, 0.5]]]))
    (loss, aux), gradient = jax.value_and_grad(
        lambda x: run(TokenScores(x, jnp.zeros_like(x)), batch, settings=SETTINGS), has_aux=True
    )(policy)
    np.testing.assert_allclose(loss, (-1.2 - 0.5 + 1.5 + 0.8) / 4, rtol=1e-6)
    np.testing.assert_allclose(gradient, [[[0, -0.5 / 4], [1.5 / 4, 0]]], rtol=1e-6)
    assert (aux.clipped_high, aux.clipped_low) == (1, 1)
    means = aux.means()
    assert means["clip_ratio/high_mean"] == means["clip_ratio/low_mean"] == 0.25
    assert means["clip_ratio/region_mean"] == 0.5
    assert means["sampling/importance_sampling_ratio/mean"] == pytest.approx(1)


def test_kl_worked_by_hand():
    """Where the reference gives a token twice the probability, k3 is 2 − ln 2 − 1; where half, ½ + ln 2 − 1."""
    policy = jnp.asarray([[[-3.0, -3.0, -3.0]]])
    reference = policy + jnp.log(jnp.asarray([2.0, 0.5, 1.0]))
    double, half = 1 - math.log(2), math.log(2) - 0.5
    np.testing.assert_allclose(k3(policy, reference)[0, 0], [double, half, 0], atol=1e-6)
    batch = batch_of(np.asarray([[[1, 1, 0]]], bool), [[0]], [[[0.5, 0.5, 0]]], reference_log_probs=reference)
    loss, aux = run(scores_of(policy), batch, settings=SETTINGS)
    np.testing.assert_allclose(loss, 0.04 * (double + half) / 2, rtol=1e-5)
    np.testing.assert_allclose(aux.means()["kl"], (double + half) / 2, rtol=1e-5)


def test_the_first_iteration_has_ratio_one_and_clips_nothing():
    policy, entropy, batch = random_case(7, old=False)
    _, aux = run(scores_of(policy, entropy), batch, settings=SETTINGS)
    means = aux.means()
    assert means["sampling/importance_sampling_ratio/mean"] == 1
    assert means["clip_ratio/region_mean"] == 0


def test_without_old_log_probabilities_the_gradient_is_that_of_the_policy_gradient():
    policy, entropy, batch = random_case(8, old=False, reference=False)
    gradient = jax.grad(lambda x: run(TokenScores(x, jnp.asarray(entropy)), batch, settings=SETTINGS)[0])(
        jnp.asarray(policy, jnp.float32)
    )
    np.testing.assert_allclose(gradient, -batch.advantages[..., None] * batch.token_weights, atol=1e-7)


def test_old_log_probabilities_that_equal_the_policy_are_those_of_the_first_iteration():
    policy, entropy, batch = random_case(8, old=False)
    report = jax.value_and_grad(
        lambda x, b: run(TokenScores(x, jnp.asarray(entropy)), b, settings=SETTINGS)[0], argnums=0
    )
    policy = jnp.asarray(policy, jnp.float32)
    without, stated = (report(policy, b) for b in (batch, batch._replace(old_log_probs=policy)))
    np.testing.assert_array_equal(without[0], stated[0])
    np.testing.assert_array_equal(without[1], stated[1])


def test_padding_counts_nowhere():
    policy, entropy, batch = random_case(9)
    padding = ~np.asarray(batch.mask)
    spoilt = {
        name: jnp.where(padding, -77.0, getattr(batch, name))
        for name in ("old_log_probs", "reference_log_probs", "sampler_log_probs", "token_weights")
    }
    expected = run(scores_of(policy, entropy), batch, settings=SETTINGS)
    noisy = scores_of(np.where(padding, -1e4, policy), np.where(padding, np.nan, entropy))
    (loss, aux), gradient = jax.value_and_grad(
        lambda x: run(TokenScores(x, noisy.entropy), batch._replace(**spoilt), settings=SETTINGS), has_aux=True
    )(noisy.log_probs)
    np.testing.assert_array_equal([loss, *aux], [expected[0], *expected[1]])
    assert (np.asarray(gradient)[padding] == 0).all()


@pytest.mark.parametrize("far", [21.0, 1e3])
def test_far_apart_policies_give_large_but_finite_losses(far):
    """Beyond e²⁰ the ratio and k3 stay what they are there."""
    one = np.full((1, 1, 1), -1e4)
    batch = batch_of(one < 0, [[-1]], one < 0, old_log_probs=one - far, reference_log_probs=one + far)
    loss, aux = run(scores_of(one), batch, settings=SETTINGS)
    np.testing.assert_allclose(aux.ratio, math.exp(20), rtol=1e-5)
    np.testing.assert_allclose(aux.kl, math.exp(20) - 21, rtol=1e-5)
    np.testing.assert_allclose(loss, math.exp(20) + 0.04 * (math.exp(20) - 21), rtol=1e-5)
    opposite = batch_of(one < 0, [[-1]], one < 0, old_log_probs=one + far, reference_log_probs=one - far)
    loss, aux = run(scores_of(one), opposite, settings=SETTINGS)
    np.testing.assert_allclose(aux.ratio, math.exp(-20), rtol=1e-5)
    np.testing.assert_allclose(loss, 0.8 + 0.04 * (math.exp(-20) + 19), rtol=1e-5)


@pytest.mark.parametrize("first", [1, 2, 3])
def test_reports_on_two_parts_merge_to_that_on_the_whole(first):
    policy, entropy, batch = random_case(10, groups=4)
    _, whole = run(scores_of(policy, entropy), batch, settings=SETTINGS)
    parts = []
    for rows in (slice(first), slice(first, None)):
        part = jax.tree.map(lambda x, rows=rows: x[rows], batch)
        parts.append(run(scores_of(policy[rows], entropy[rows]), part, settings=SETTINGS)[1])
    np.testing.assert_allclose(parts[0].merge(parts[1]), whole, rtol=1e-5, atol=1e-6)


def test_a_report_without_tokens_has_means_of_zero():
    policy, entropy, batch = random_case(11)
    _, aux = run(scores_of(policy, entropy), batch._replace(mask=jnp.zeros_like(batch.mask)), settings=SETTINGS)
    assert set(aux.means().values()) == {0.0}


MASK = np.asarray([[[1, 1, 0, 0], [1, 1, 1, 1]], [[1, 0, 0, 0], [0, 0, 0, 0]]], bool)


@pytest.mark.parametrize(
    ("loss_type", "per_token"),
    [
        # Four sequences of 2, 4, 1 and no tokens.
        ("grpo", [[1 / 8, 1 / 16], [1 / 4, 0]]),
        # Seven tokens.
        ("dapo", [[1 / 7, 1 / 7], [1 / 7, 0]]),
        # Four sequences that could have had four tokens each.
        ("dr_grpo", [[1 / 16, 1 / 16], [1 / 16, 0]]),
    ],
)
def test_token_weights_worked_by_hand(loss_type, per_token):
    weights = token_weights(MASK, loss_type)
    assert weights.dtype == np.float32
    np.testing.assert_allclose(weights, np.asarray(per_token)[..., None] * MASK, rtol=1e-6)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_batch_without_tokens_has_weights_of_zero(loss_type):
    assert (token_weights(np.zeros((2, 2, 3), bool), loss_type) == 0).all()
