from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from audio_grpo.grpo import blocks, log_probs
from audio_grpo.grpo.log_probs import TokenScores, vocabulary_scores
from audio_grpo.parallel.activations import MANY_TOKENS, Placement
from audio_grpo.parallel.mesh import MESH_AXES

GROUPS, GENERATIONS, LENGTH, WIDTH, VOCAB = 2, 3, 7, 5, 12
POSITIONS = GROUPS * GENERATIONS * LENGTH


@pytest.fixture(params=[1, 40, 10**6])
def _block_logits(request, monkeypatch):
    """Blocks of one entry, of a few, and of all of a vocabulary of twelve."""
    monkeypatch.setattr(blocks, "_BLOCK_LOGITS", request.param)


@pytest.fixture(params=[1, 2 * LENGTH, 10 * POSITIONS])
def _chunk_tokens(request, monkeypatch):
    """Chunks of one, two and six completions."""
    monkeypatch.setattr(log_probs, "_CHUNK_TOKENS", request.param)


def scores_of(hidden, head, targets, temperature, mesh=None):
    flat = (hidden.reshape(-1, *hidden.shape[2:]), head, targets.reshape(-1, targets.shape[-1]))
    scores = vocabulary_scores(*flat, temperature=temperature, place=Placement(mesh, MANY_TOKENS))
    return TokenScores(*(x.reshape(targets.shape) for x in scores))


def inputs_of(seed=0, groups=GROUPS):
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(groups, GENERATIONS, LENGTH, WIDTH)).astype(np.float32)
    head = rng.normal(size=(VOCAB, WIDTH)).astype(np.float32)
    targets = rng.integers(0, VOCAB, (groups, GENERATIONS, LENGTH)).astype(np.int32)
    return jnp.asarray(hidden), jnp.asarray(head), jnp.asarray(targets)


def full_log_softmax(hidden, head, temperature):
    """All logits at once, in float64."""
    logits = np.einsum("bgcd,vd->bgcv", np.asarray(hidden, np.float64), np.asarray(head, np.float64)) / temperature
    logits -= logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


@pytest.mark.usefixtures("_block_logits", "_chunk_tokens")
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_are_those_of_the_full_log_softmax(temperature):
    hidden, head, targets = inputs_of()
    scores = scores_of(hidden, head, targets, temperature)
    everything = full_log_softmax(hidden, head, temperature)
    chosen = np.take_along_axis(everything, np.asarray(targets)[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(scores.log_probs, chosen, atol=1e-5)
    np.testing.assert_allclose(scores.entropy, -(np.exp(everything) * everything).sum(axis=-1), atol=1e-5)


@pytest.mark.usefixtures("_block_logits", "_chunk_tokens")
def test_gradients_are_those_of_the_full_log_softmax():
    """d log p(t) / d logits is one-hot(t) − p, and dH / d logits is −p (log p + H)."""
    hidden, head, targets = inputs_of(1)
    probe = np.random.default_rng(2).normal(size=targets.shape).astype(np.float32)

    def total(hidden, head):
        scores = scores_of(hidden, head, targets, 0.7)
        return (scores.log_probs * probe + scores.entropy).sum()

    for_hidden, for_head = jax.grad(total, argnums=(0, 1))(hidden, head)
    one_hot, everything = np.eye(VOCAB)[np.asarray(targets)], full_log_softmax(hidden, head, 0.7)
    probabilities = np.exp(everything)
    entropy = -(probabilities * everything).sum(axis=-1, keepdims=True)
    for_logits = (probe[..., None] * (one_hot - probabilities) - probabilities * (everything + entropy)) / 0.7
    np.testing.assert_allclose(for_hidden, np.einsum("bgcv,vd->bgcd", for_logits, head), atol=1e-4)
    np.testing.assert_allclose(for_head, np.einsum("bgcv,bgcd->vd", for_logits, hidden), atol=1e-4)


@pytest.mark.parametrize("sizes", [(1, 4, 1, 1), (1, 2, 1, 2), (2, 1, 2, 1), (1, 1, 1, 4)])
@pytest.mark.parametrize("groups", [1, 4])
def test_devices_that_share_the_vocabulary_give_what_one_gives(sizes, groups, monkeypatch):
    """Whether completions divide over the devices or not."""
    monkeypatch.setattr(blocks, "_BLOCK_LOGITS", 50)
    monkeypatch.setattr(log_probs, "_CHUNK_TOKENS", LENGTH)
    mesh = Mesh(np.asarray(jax.devices()).reshape(sizes), MESH_AXES)
    hidden, head, targets = inputs_of(1, groups=groups)

    @partial(jax.jit, static_argnums=2)
    def run(hidden, head, mesh):
        def total(hidden, head):
            scores = scores_of(hidden, head, targets, 0.7, mesh)
            return (jnp.sin(scores.log_probs)).sum(), scores

        return jax.grad(total, argnums=(0, 1), has_aux=True)(hidden, head)

    alone, shared = run(hidden, head, None), run(hidden, head, mesh)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), alone, shared)


def test_entropy_of_equal_logits_is_the_logarithm_of_the_vocabulary():
    hidden, head, targets = inputs_of()
    scores = scores_of(jnp.zeros_like(hidden), head, targets, 0.5)
    np.testing.assert_allclose(scores.entropy, np.log(VOCAB), rtol=1e-6)
    np.testing.assert_allclose(scores.log_probs, -np.log(VOCAB), rtol=1e-6)


def test_hidden_states_in_bfloat16_give_float32_scores():
    """Only the inputs are rounded: products are summed and normalised in float32."""
    hidden, head, targets = inputs_of(3)
    narrow_hidden, narrow_head = hidden.astype(jnp.bfloat16), head.astype(jnp.bfloat16)
    scores = scores_of(narrow_hidden, head, targets, 1.0)
    assert scores.log_probs.dtype == scores.entropy.dtype == jnp.float32
    exact = scores_of(narrow_hidden.astype(jnp.float32), narrow_head.astype(jnp.float32), targets, 1.0)
    np.testing.assert_allclose(scores.log_probs, exact.log_probs, atol=1e-4)
