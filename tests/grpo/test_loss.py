import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_loss import batch_of, plain_report, random_case, scores_of

from audio_grpo.grpo import LossSettings, SamplerCorrection, TokenScores, grpo_loss_fn
from audio_grpo.grpo.objectives import kl_divergence

SETTINGS = LossSettings(epsilon=0.2, beta=0.04)
run = jax.jit(grpo_loss_fn, static_argnames="settings")


def corrected(mode, clip_min=None, clip_max=1.3, **more):
    return LossSettings(correction=SamplerCorrection(mode=mode, clip_min=clip_min, clip_max=clip_max), **more)


# Bounds are narrow, so that they hold something back in the random cases.
OPTIONS = {
    "grpo": SETTINGS,
    "bnpo": LossSettings(loss_type="bnpo"),
    "dapo": LossSettings(loss_type="dapo", epsilon_high=0.28, beta=0.0),
    "dr_grpo, delta": LossSettings(loss_type="dr_grpo", delta=1.35, epsilon_high=0.3),
    "GSPO": LossSettings(importance_sampling_level="sequence", epsilon=0.05, epsilon_high=0.08),
    "GSPO, delta": LossSettings(importance_sampling_level="sequence", epsilon=0.05, delta=1.1),
    "cispo": LossSettings(loss_type="cispo", epsilon_high=1.2),
    "cispo of sequences": LossSettings(loss_type="cispo", epsilon_high=1.05, importance_sampling_level="sequence"),
    "sapo": LossSettings(loss_type="sapo", sapo_temperature_pos=2.0, sapo_temperature_neg=3.0),
    "sapo of sequences": LossSettings(loss_type="sapo", importance_sampling_level="sequence"),
    "k1": LossSettings(kl_estimator="k1", beta=0.5),
    "k2": LossSettings(kl_estimator="k2", beta=0.5),
    "k1, unbiased gradient": LossSettings(kl_estimator="k1", beta=0.5, use_bias_correction_kl=True),
    "k3, unbiased gradient": LossSettings(beta=0.5, use_bias_correction_kl=True, importance_sampling_level="sequence"),
    "token_truncate": corrected("token_truncate", clip_min=0.9),
    "token_mask": corrected("token_mask", loss_type="dapo"),
    "sequence_truncate": corrected("sequence_truncate", loss_type="sapo"),
    "sequence_mask": corrected("sequence_mask", clip_min=0.7, importance_sampling_level="sequence"),
    "off-policy mask": LossSettings(off_policy_mask_threshold=0.02, beta=0.5),
    "entropy bonus": LossSettings(loss_type="dapo", entropy_coef=0.3),
    "injected": corrected("sequence_truncate", importance_sampling_level="sequence", off_policy_mask_threshold=0.02),
    "cross-entropy": LossSettings(sft_coef=0.5),
    "injected, with cross-entropy and bonus": LossSettings(sft_coef=0.5, entropy_coef=0.3, beta=0.5),
}
CASES = {
    "entropy bonus": {"bonus": True},
    "injected": {"transcripts": "injected"},
    "cross-entropy": {"transcripts": "apart"},
    "injected, with cross-entropy and bonus": {"transcripts": "injected", "bonus": True},
}
"""What a batch has for the options that ask for it."""


def case_of(name, seed, **changes):
    return random_case(seed, loss_type=OPTIONS[name].loss_type, **CASES.get(name, {}), **changes)


@settings(deadline=None, max_examples=100)  # the first of each kind compiles
@given(st.integers(0, 2**32 - 1), st.sampled_from(list(OPTIONS)), *[st.booleans()] * 3)
def test_the_loss_and_every_metric_are_those_of_plain_loops(seed, name, old, reference, sampler):
    options = OPTIONS[name]
    policy, entropy, batch = case_of(name, seed, old=old, reference=reference, sampler=sampler)
    loss, aux = run(scores_of(policy, entropy), batch, settings=options)
    expected, metrics = plain_report(policy, entropy, batch, options)
    means = aux.means()
    assert loss == means.pop("loss")
    np.testing.assert_allclose(loss, expected, rtol=1e-4, atol=1e-5)
    assert means.keys() == metrics.keys()
    for key, value in metrics.items():
        np.testing.assert_allclose(means[key], value, rtol=1e-4, atol=1e-5, err_msg=key)


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("name", OPTIONS)
def test_the_gradient_is_that_of_finite_differences(name, old):
    options = OPTIONS[name]
    policy, entropy, batch = case_of(name, 1, old=old)
    gradient = jax.grad(lambda x: run(TokenScores(x, scores_of(entropy).log_probs), batch, settings=options)[0])(
        jnp.asarray(policy, jnp.float32)
    )
    expected = np.zeros_like(policy)
    for at in np.ndindex(policy.shape):
        nudge = np.zeros_like(policy)
        nudge[at] = 1e-5
        ends = [plain_report(policy + s * nudge, entropy, batch, options, fixed=policy)[0] for s in (1, -1)]
        expected[at] = (ends[0] - ends[1]) / 2e-5
    np.testing.assert_allclose(gradient, expected, atol=1e-4)
    assert np.abs(expected).max() > 0.01


@pytest.mark.parametrize("name", [name for name in OPTIONS if name not in ("grpo", "bnpo")])
def test_each_option_matters_in_the_cases_tried_here(name):
    options = OPTIONS[name]
    policy, entropy, batch = random_case(1, **CASES.get(name, {}))

    def report(settings):
        return jax.value_and_grad(lambda x: run(TokenScores(x, jnp.asarray(entropy, jnp.float32)), batch, settings)[0])(
            jnp.asarray(policy, jnp.float32)
        )

    (loss, gradient), (plain_loss, plain_gradient) = report(options), report(replace(SETTINGS, beta=options.beta))
    assert abs(loss - plain_loss) > 1e-3 or np.abs(gradient - plain_gradient).max() > 1e-3


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
    means = aux.means()
    assert means["clip_ratio/high_mean"] == means["clip_ratio/low_mean"] == 0.25
    assert means["clip_ratio/region_mean"] == 0.5
    assert (means["clip_ratio/high_max"], means["clip_ratio/low_min"]) == (0.5, 0)
    assert means["policy_ratio/mean"] == pytest.approx(1)


def test_kl_worked_by_hand():
    """Where the reference gives a token twice the probability, k3 is 2 − ln 2 − 1; where half, ½ + ln 2 − 1."""
    policy = jnp.asarray([[[-3.0, -3.0, -3.0]]])
    reference = policy + jnp.log(jnp.asarray([2.0, 0.5, 1.0]))
    double, half = 1 - math.log(2), math.log(2) - 0.5
    np.testing.assert_allclose(kl_divergence(policy, reference, "k3")[0, 0], [double, half, 0], atol=1e-6)
    np.testing.assert_allclose(
        kl_divergence(policy, reference, "k1")[0, 0], [-math.log(2), math.log(2), 0], rtol=1e-6, atol=1e-6
    )
    np.testing.assert_allclose(
        kl_divergence(policy, reference, "k2")[0, 0], [math.log(2) ** 2 / 2] * 2 + [0], rtol=1e-6, atol=1e-6
    )
    batch = batch_of(np.asarray([[[1, 1, 0]]], bool), [[0]], [[[0.5, 0.5, 0]]], reference_log_probs=reference)
    loss, aux = run(scores_of(policy), batch, settings=SETTINGS)
    np.testing.assert_allclose(loss, 0.04 * (double + half) / 2, rtol=1e-5)
    np.testing.assert_allclose(aux.means()["kl"], (double + half) / 2, rtol=1e-5)


def test_the_first_iteration_has_ratio_one_and_clips_nothing():
    policy, entropy, batch = random_case(7, old=False)
    _, aux = run(scores_of(policy, entropy), batch, settings=SETTINGS)
    means = aux.means()
    assert means["policy_ratio/mean"] == 1
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


@pytest.mark.parametrize("name", OPTIONS)
def test_padding_counts_nowhere(name):
    options = OPTIONS[name]
    policy, entropy, batch = random_case(9, **CASES.get(name, {}))
    padding = ~np.asarray(batch.mask)
    if batch.transcript_weights is not None:
        padding &= np.asarray(batch.transcript_weights) == 0
    spoilt = {
        name: jnp.where(padding, -77.0, getattr(batch, name))
        for name in ("old_log_probs", "reference_log_probs", "sampler_log_probs", "token_weights")
    }
    expected = run(scores_of(policy, entropy), batch, settings=options)
    noisy = scores_of(np.where(padding, -1e4, policy), np.where(padding, np.nan, entropy))
    (loss, aux), gradient = jax.value_and_grad(
        lambda x: run(TokenScores(x, noisy.entropy), batch._replace(**spoilt), settings=options), has_aux=True
    )(noisy.log_probs)
    assert loss == expected[0]
    assert aux.means() == expected[1].means()
    assert (np.asarray(gradient)[padding] == 0).all()


@pytest.mark.parametrize("far", [21.0, 1e3])
def test_far_apart_policies_give_large_but_finite_losses(far):
    """Beyond e²⁰ the ratio and k3 stay what they are there."""
    one = np.full((1, 1, 1), -1e4)
    batch = batch_of(one < 0, [[-1]], one < 0, old_log_probs=one - far, reference_log_probs=one + far)
    loss, aux = run(scores_of(one), batch, settings=SETTINGS)
    np.testing.assert_allclose(aux.means()["policy_ratio/mean"], math.exp(20), rtol=1e-5)
    np.testing.assert_allclose(aux.means()["kl"], math.exp(20) - 21, rtol=1e-5)
    np.testing.assert_allclose(loss, math.exp(20) + 0.04 * (math.exp(20) - 21), rtol=1e-5)
    opposite = batch_of(one < 0, [[-1]], one < 0, old_log_probs=one + far, reference_log_probs=one - far)
    loss, aux = run(scores_of(one), opposite, settings=SETTINGS)
    np.testing.assert_allclose(aux.means()["policy_ratio/mean"], math.exp(-20), rtol=1e-5)
    np.testing.assert_allclose(loss, 0.8 + 0.04 * (math.exp(-20) + 19), rtol=1e-5)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("first", [1, 2])
def test_reports_on_two_parts_merge_to_that_on_the_whole(name, first):
    policy, entropy, batch = case_of(name, 10, groups=4)
    _, whole = run(scores_of(policy, entropy), batch, settings=OPTIONS[name])
    parts = []
    for rows in (slice(first), slice(first, None)):
        part = jax.tree.map(lambda x, rows=rows: x[rows], batch)
        parts.append(run(scores_of(policy[rows], entropy[rows]), part, settings=OPTIONS[name])[1])
    merged, expected = parts[0].merge(parts[1]).means(), whole.means()
    np.testing.assert_allclose([merged[key] for key in expected], list(expected.values()), rtol=1e-5, atol=1e-6)


def test_a_report_without_tokens_has_means_of_zero():
    policy, entropy, batch = random_case(11)
    _, aux = run(scores_of(policy, entropy), batch._replace(mask=jnp.zeros_like(batch.mask)), settings=SETTINGS)
    assert set(aux.means().values()) == {0.0}


def with_entropy_gradient(policy, entropy, batch, options):
    """The loss's gradients with respect to log-probabilities and entropy."""
    return jax.grad(lambda scores: run(scores, batch, settings=options)[0])(scores_of(policy, entropy))


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo", "sapo"])
def test_the_bonus_is_the_mean_entropy_of_sampled_tokens_whatever_the_policys_averaging(loss_type):
    options = LossSettings(loss_type=loss_type, entropy_coef=0.3)
    policy, entropy, batch = random_case(3, loss_type=loss_type, bonus=True, transcripts="injected")
    gradients = with_entropy_gradient(policy, entropy, batch, options)
    np.testing.assert_allclose(gradients.entropy, -0.3 * batch.sampled / batch.sampled.sum(), rtol=1e-6)
    without = with_entropy_gradient(policy, entropy, batch._replace(entropy_weights=None), options)
    np.testing.assert_array_equal(gradients.log_probs, without.log_probs)
    assert (np.asarray(without.entropy) == 0).all()


def test_without_a_bonus_or_transcripts_the_loss_is_the_policys_and_has_no_name_of_its_own():
    policy, entropy, batch = random_case(3)
    _, aux = run(scores_of(policy, entropy), batch, settings=LossSettings(entropy_coef=0.3, sft_coef=0.5))
    assert not aux.metrics.keys() & {"policy_loss", "transcript/cross_entropy"}


def test_a_transcript_in_a_group_worked_by_hand():
    """Of two completions the second was given: praised in the first iteration, it gains by its advantage alone."""
    weights = np.full((1, 2, 2), 0.25)
    given = np.asarray([[[0, 0], [0.5, 0.5]]])
    options = LossSettings(beta=0.5, kl_estimator="k1", sft_coef=0.1, correction=corrected("token_truncate").correction)
    policy = np.log([[[0.5, 0.5], [0.25, 0.125]]])
    near = {"sampler_log_probs": policy - 9, "reference_log_probs": policy - 1}
    near["sampler_log_probs"][0, 0] = policy[0, 0]
    batch = batch_of(np.ones((1, 2, 2), bool), [[-1, 1]], weights, transcript_weights=given, **near)
    (loss, aux), gradient = jax.value_and_grad(
        lambda x: run(TokenScores(x, jnp.ones_like(x)), batch, settings=options), has_aux=True
    )(jnp.asarray(policy, jnp.float32))
    # The KL is that of the sampled completion's two tokens, 1 nat each.
    cross_entropy = math.log(32) / 2
    np.testing.assert_allclose(loss, (2 - 2) / 4 + 0.5 * 2 / 4 + 0.1 * cross_entropy, rtol=1e-5)
    np.testing.assert_allclose(gradient, [[[0.25 + 0.125] * 2, [-0.25 - 0.05] * 2]], rtol=1e-5)
    means = aux.means()
    assert means["transcript/cross_entropy"] == pytest.approx(cross_entropy)
    assert means["policy_loss"] == pytest.approx(0.25)
    assert means["sampling/sampling_logp_difference/max"] == 0
    assert means["kl"] == pytest.approx(1)


def test_what_the_sampler_would_have_said_of_a_transcript_counts_nowhere():
    options = OPTIONS["injected"]
    policy, entropy, batch = random_case(5, transcripts="injected")
    spoilt = jnp.where(batch.sampled, batch.sampler_log_probs, 77.0)
    expected = run(scores_of(policy, entropy), batch, settings=options)
    found = run(scores_of(policy, entropy), batch._replace(sampler_log_probs=spoilt), settings=options)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
