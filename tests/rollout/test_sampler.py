import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from audio_grpo.parallel.activations import FEW_TOKENS, Placement
from audio_grpo.rollout.sampler import Sampling, draw, drawable
from audio_grpo.rollout.vocabulary import cut_vocabulary

HERE = Placement(None, FEW_TOKENS)
SEVERAL_BLOCKS, ONE_BLOCK = 192, 77
ALMOST_ONE = 1 - 2**-24


def logits_of(rows, vocab=SEVERAL_BLOCKS, seed=0):
    return (np.random.default_rng(seed).normal(size=(rows, vocab)) * 2).astype(np.float32)


def uniform_of(rows, seed=1):
    return jax.random.uniform(jax.random.key(seed), (rows, 2))


def draw_from(sampling, logits, uniform, allowed=None, seen=None):
    """Draws from given logits: hidden states pick them out of the head one by one."""
    logits = np.asarray(logits, np.float32)
    allowed = np.ones((1, logits.shape[1]), bool) if allowed is None else np.atleast_2d(allowed)
    run = jax.jit(lambda *args, **kwargs: draw(sampling, *args, HERE, **kwargs))
    hidden, head = jnp.eye(len(logits)), jnp.asarray(logits.T)
    seen = None if seen is None else jnp.asarray(seen)
    return jax.tree.map(np.asarray, run(hidden, head, jnp.asarray(allowed), jnp.asarray(uniform), seen=seen))


def full_log_probs(logits, temperature=1.0):
    scaled = np.asarray(logits, np.float64) / temperature
    scaled -= scaled.max(axis=-1, keepdims=True)
    return scaled - np.log(np.exp(scaled).sum(axis=-1, keepdims=True))


def expected_distribution(logits, sampling, seen=None):
    """Sorting version of penalty, temperature, top-k, top-p and min-p for one row, in float64."""
    logits, penalty = np.asarray(logits, np.float64), sampling.repetition_penalty
    if seen is not None:
        logits = np.where(seen, np.where(logits > 0, logits / penalty, logits * penalty), logits)
    p = np.exp(full_log_probs(logits, sampling.temperature))
    order = np.argsort(-p)
    if sampling.top_k:
        p[order[sampling.top_k :]] = 0
    p /= p.sum()
    if sampling.top_p < 1:
        kept = np.cumsum(p[order]) - p[order] < sampling.top_p
        p[order[~kept]] = 0
    p[p < sampling.min_p * p.max()] = 0
    return p / p.sum()


MIXED = Sampling(temperature=1.3, top_k=60, top_p=0.9, min_p=0.1)


@pytest.mark.parametrize(
    ("sampling", "vocab"),
    [
        (Sampling(), SEVERAL_BLOCKS),
        (Sampling(), ONE_BLOCK),
        (Sampling(temperature=0.5), SEVERAL_BLOCKS),
        (Sampling(temperature=1.7), SEVERAL_BLOCKS),
        (Sampling(temperature=1.7, top_k=20), SEVERAL_BLOCKS),
        (Sampling(top_p=0.8), SEVERAL_BLOCKS),
        (Sampling(min_p=0.05), SEVERAL_BLOCKS),
        (MIXED, SEVERAL_BLOCKS),
        (MIXED, ONE_BLOCK),
        (Sampling(repetition_penalty=1.5), SEVERAL_BLOCKS),
    ],
    ids=str,
)
def test_draws_follow_the_distribution(sampling, vocab):
    draws, at_a_time = 200_000, 10_000
    logits = logits_of(1, vocab)
    seen = np.arange(vocab) % 3 == 0 if sampling.repetition_penalty != 1 else None
    seen_rows = None if seen is None else jnp.broadcast_to(seen, (at_a_time, vocab))
    ones, everything = jnp.ones((at_a_time, 1)), jnp.ones((1, vocab), bool)
    run = jax.jit(lambda u: draw(sampling, ones, jnp.asarray(logits.T), everything, u, HERE, seen=seen_rows))
    tokens = np.concatenate([run(uniform_of(at_a_time, seed)).tokens for seed in range(draws // at_a_time)])
    expected = expected_distribution(logits[0], sampling, seen) * draws
    counts = np.bincount(tokens, minlength=vocab)
    assert counts[expected == 0].sum() == 0
    often = expected > 5
    observed, wanted = (
        np.append(counts[often], counts[~often].sum()),
        np.append(expected[often], expected[~often].sum()),
    )
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    assert stats.chi2.sf(((observed - wanted) ** 2 / wanted).sum(), len(wanted) - 1) > 1e-3


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.7),
        Sampling(greedy=True, temperature=0.7),
        Sampling(temperature=0.7, top_k=5, top_p=0.5),
        Sampling(temperature=1.4, repetition_penalty=1.3),
        Sampling(greedy=True, repetition_penalty=1.3),
    ],
    ids=str,
)
def test_log_probabilities_are_those_of_the_tempered_full_distribution(sampling):
    rows = 64
    logits, allowed = logits_of(rows), np.arange(SEVERAL_BLOCKS) % 2 == 0
    seen = None if sampling.repetition_penalty == 1 else np.arange(SEVERAL_BLOCKS) % 3 == logits[:, :1].astype(int) % 3
    drawn = draw_from(sampling, logits, uniform_of(rows), allowed, seen)
    expected = full_log_probs(logits, sampling.temperature)[np.arange(rows), drawn.tokens]
    np.testing.assert_allclose(drawn.log_probs, expected, atol=1e-5)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.7),
        Sampling(temperature=1.2, top_k=9),
        Sampling(top_p=0.7),
        Sampling(min_p=0.1),
        Sampling(temperature=0.8, repetition_penalty=1.4, top_p=0.9),
    ],
    ids=str,
)
def test_less_the_log_of_what_is_kept_they_are_those_of_the_distribution_drawn_from(sampling):
    rows = 16
    logits, allowed = logits_of(rows), np.random.default_rng(3).random(SEVERAL_BLOCKS) < 0.5
    seen = np.random.default_rng(4).random(logits.shape) < 0.3
    seen = seen if sampling.repetition_penalty != 1 else None
    drawn = draw_from(sampling, logits, uniform_of(rows), allowed, seen)
    for row, token in enumerate(drawn.tokens):
        candidates = np.where(allowed, logits[row], -np.inf)
        expected = np.log(expected_distribution(candidates, sampling, None if seen is None else seen[row])[token])
        assert drawn.log_probs[row] - drawn.log_kept[row] == pytest.approx(expected, abs=2e-5)


def test_greedy_takes_the_likeliest_allowed_token():
    logits = logits_of(64)
    allowed = np.ones(SEVERAL_BLOCKS, bool)
    allowed[logits.argmax(axis=-1)] = False
    drawn = draw_from(Sampling(greedy=True), logits, uniform_of(64), allowed)
    np.testing.assert_array_equal(drawn.tokens, np.where(allowed, logits, -np.inf).argmax(axis=-1))


@pytest.mark.parametrize("equal", [[3, 4], [5, 190], [7, 20, 100], range(SEVERAL_BLOCKS)], ids=str)
def test_greedy_takes_the_first_of_equals(equal):
    logits = np.full((1, SEVERAL_BLOCKS), -1.0)
    logits[:, equal] = 2.5
    assert draw_from(Sampling(greedy=True), logits, uniform_of(1)).tokens == min(equal)


def test_greedy_tells_logits_apart_whose_probabilities_round_to_the_same():
    logits = np.full((1, SEVERAL_BLOCKS), 1e-9)
    logits[:, 150] = 2e-9
    assert draw_from(Sampling(greedy=True), logits, uniform_of(1)).tokens == 150


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.sampled_from([-1e4, -100.0, -1.0, 0.0, 0.5, 100.0, 1e4]), min_size=64, max_size=64),
    allowed=st.sets(st.integers(0, 63), min_size=1),
    u=st.sampled_from([0.0, 0.3, ALMOST_ONE, 1.0]),
    v=st.sampled_from([0.0, 0.7, ALMOST_ONE, 1.0]),
    sampling=st.sampled_from([Sampling(), Sampling(greedy=True), Sampling(top_p=0.9), Sampling(top_k=3, min_p=0.1)]),
)
def test_extremes_give_allowed_tokens_and_finite_numbers(values, allowed, u, v, sampling):
    logits, mask = np.asarray([values]), np.isin(np.arange(64), list(allowed))
    (token,), (log_prob,), (log_kept,) = draw_from(sampling, logits, [[u, v]], mask)
    assert mask[token]
    assert logits[0, token] > logits[0, mask].max() - 90  # what is less likely has probability zero
    assert log_prob <= 0
    rounding = np.abs(logits).max() * 2**-22
    np.testing.assert_allclose(log_prob, full_log_probs(logits)[0, token], atol=1e-5 + rounding)
    assert np.isfinite(log_kept)


def test_a_single_allowed_token_is_drawn_however_unlikely():
    logits = logits_of(4)
    logits[:, 100] = -1e4
    for u in (0.0, 0.5, ALMOST_ONE):
        drawn = draw_from(Sampling(), logits, np.full((4, 2), u), np.arange(SEVERAL_BLOCKS) == 100)
        assert (drawn.tokens == 100).all()
        np.testing.assert_allclose(drawn.log_probs - drawn.log_kept, 0, atol=2e-3)


def test_tokens_without_probability_are_never_drawn_where_sums_round():
    """Sums of floats cumulated as a tree may rise at an entry that adds nothing."""
    rows = 20_000
    allowed = np.arange(SEVERAL_BLOCKS) % 2 == 0
    hidden, head = jnp.ones((rows, 1)), jnp.asarray(logits_of(1).T)
    run = jax.jit(lambda u: draw(Sampling(), hidden, head, jnp.asarray(allowed[None]), u, HERE).tokens)
    for seed in range(10):
        assert allowed[run(uniform_of(rows, seed))].all()


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(greedy=True), Sampling(top_p=0.9)], ids=str)
def test_a_row_is_drawn_alike_alone_and_among_many(sampling):
    """Many rows take the vocabulary block by block, few take all blocks at once."""
    rows, vocab, width = 256, 4096, 16
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(rows, width)), jnp.float32)
    head = jnp.asarray(rng.normal(size=(vocab, width)), jnp.float32)
    uniform, allowed = uniform_of(rows), jnp.ones((1, vocab), bool)
    run = jax.jit(lambda hidden, uniform: draw(sampling, hidden, head, allowed, uniform, HERE))
    together = run(hidden, uniform)
    for i in range(0, rows, 37):
        alone = run(hidden[i : i + 1], uniform[i : i + 1])
        assert alone.tokens[0] == together.tokens[i]
        np.testing.assert_allclose(alone.log_probs[0], together.log_probs[i], atol=1e-5)


def test_no_array_spans_slots_and_vocabulary():
    rows, vocab, width = 64, 32 * 4096, 8
    shapes = [(rows, width), (vocab, width), (1, vocab), (rows, 2)]
    args = [jax.ShapeDtypeStruct(shape, bool if shape[0] == 1 else jnp.float32) for shape in shapes]
    compiled = jax.jit(lambda *args: draw(Sampling(), *args, HERE)).lower(*args).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < rows * vocab * 4 / 2


def test_rows_may_have_tokens_of_their_own():
    rows = 32
    allowed = np.random.default_rng(0).random((rows, SEVERAL_BLOCKS)) < 0.02
    allowed[np.arange(rows), 3 * np.arange(rows)] = True
    for sampling in (Sampling(), Sampling(greedy=True), Sampling(top_k=3)):
        drawn = draw_from(sampling, logits_of(rows), uniform_of(rows), allowed)
        assert allowed[np.arange(rows), drawn.tokens].all()


def test_stop_tokens_are_drawable_once_the_minimum_is_reached():
    allowed = jnp.asarray([True, True, False, True])
    assert drawable(Sampling(), allowed, (3,), jnp.arange(2)).tolist() == [[True, True, False, True]]
    assert drawable(Sampling(min_length=2), allowed, (1, 3), jnp.arange(4)).tolist() == [
        [True, False, False, False],
        [True, False, False, False],
        [True, True, False, True],
        [True, True, False, True],
    ]


def test_a_repetition_penalty_without_seen_tokens_is_an_error():
    with pytest.raises(ValueError, match="seen"):
        draw_from(Sampling(repetition_penalty=1.2), logits_of(1), uniform_of(1))


@pytest.mark.parametrize(
    ("vocab", "blocks", "members"), [(152064, 32, 16), (151936, 16, 8), (192, 8, 8), (77, 1, 1), (256, 32, 8)]
)
def test_vocabularies_are_cut_into_equal_blocks_and_groups(vocab, blocks, members):
    vocabulary = cut_vocabulary(jnp.zeros((vocab, 1)), HERE)
    assert vocabulary.head.shape == (1, blocks, vocab // blocks // members, members, 1)
