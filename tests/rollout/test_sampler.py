import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from audio_grpo.rollout.sampler import Sampling, sample

VOCAB = 700
EVERYTHING = jnp.ones(VOCAB, bool)


def logits_of(rows, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(rows, VOCAB)) * 2, jnp.float32)


def uniform_of(rows, seed=1):
    return jax.random.uniform(jax.random.key(seed), (rows,))


def expected_distribution(logits, sampling):
    """Sorting version of temperature, top-k and top-p, in float64."""
    scaled = np.asarray(logits, np.float64) / sampling.temperature
    p = np.exp(scaled - scaled.max())
    order = np.argsort(-p)
    if sampling.top_k:
        p[order[sampling.top_k :]] = 0
    p /= p.sum()
    if sampling.top_p < 1:
        kept = np.cumsum(p[order]) - p[order] < sampling.top_p
        p[order[~kept]] = 0
    return p / p.sum()


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0.5),
        Sampling(temperature=1.7, top_k=20),
        Sampling(top_p=0.8),
        Sampling(temperature=0.9, top_k=50, top_p=0.6),
    ],
    ids=str,
)
def test_draws_follow_the_distribution(sampling):
    draws = 200_000
    logits = logits_of(1)
    run = jax.jit(lambda u: sample(sampling, jnp.broadcast_to(logits, (u.shape[0], VOCAB)), EVERYTHING, u)[0])
    tokens = np.concatenate([run(uniform_of(draws // 20, seed)) for seed in range(20)])
    expected = expected_distribution(logits[0], sampling) * draws
    counts = np.bincount(tokens, minlength=VOCAB)
    assert counts[expected == 0].sum() == 0
    often = expected > 5
    rare_counts, rare_expected = counts[~often].sum(), expected[~often].sum()
    observed = np.append(counts[often], rare_counts)
    wanted = np.append(expected[often], max(rare_expected, 1e-9))
    statistic = ((observed - wanted) ** 2 / wanted).sum()
    assert stats.chi2.sf(statistic, len(wanted) - 1) > 1e-4


def test_greedy_takes_the_likeliest_allowed_token():
    logits = logits_of(16)
    allowed = EVERYTHING.at[jnp.argmax(logits, axis=-1)].set(False)
    tokens, _ = sample(Sampling(greedy=True), logits, allowed, uniform_of(16))
    np.testing.assert_array_equal(tokens, np.where(allowed, logits, -np.inf).argmax(axis=-1))


def test_log_probabilities_are_those_of_the_tempered_full_distribution():
    logits = logits_of(8)
    tokens, log_probs = sample(Sampling(temperature=0.7, top_k=5, top_p=0.5), logits, EVERYTHING, uniform_of(8))
    scaled = np.asarray(logits, np.float64) / 0.7
    expected = scaled - np.log(np.exp(scaled).sum(axis=-1, keepdims=True))
    np.testing.assert_allclose(log_probs, expected[np.arange(8), tokens], atol=1e-5)


@pytest.mark.parametrize("u", [0.0, 1.0 - 2**-24, 1.0])
def test_the_ends_of_the_unit_interval_give_allowed_tokens(u):
    allowed = jnp.zeros(VOCAB, bool).at[jnp.asarray([3, 511, 512, 640])].set(True)
    tokens, _ = sample(Sampling(), logits_of(4), allowed, jnp.full(4, u))
    assert bool(allowed[tokens].all())
