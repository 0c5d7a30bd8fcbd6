from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from audio_grpo.grpo.log_probs import TokenScores, vocabulary_scores
from audio_grpo.parallel.activations import MANY_TOKENS, Placement
from audio_grpo.parallel.mesh import MESH_AXES

GROUPS, GENERATIONS, LENGTH, WIDTH, VOCAB = 2, 3, 7, 5, 12
POSITIONS = GROUPS * GENERATIONS * LENGTH
CHUNK_SIZES = (1, 4, 7, 11, 18, POSITIONS - 1, POSITIONS, 10 * POSITIONS)
"""In blocks of one, two, three and four entries, half and all of a vocabulary of twelve."""


def scores_of(hidden, head, targets, temperature, chunk_size, mesh=None):
    flat = (hidden.reshape(-1, hidden.shape[-1]), head, targets.reshape(-1))
    scores = vocabulary_scores(
        *flat, temperature=temperature, chunk_size=chunk_size, place=Placement(mesh, MANY_TOKENS)
    )
    return TokenScores(*(x.reshape(targets.shape) for x in scores))


def inputs_of(seed=0, length=LENGTH):
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(GROUPS, GENERATIONS, length, WIDTH)).astype(np.float32)
    head = rng.normal(size=(VOCAB, WIDTH)).astype(np.float32)
    targets = rng.integers(0, VOCAB, (GROUPS, GENERATIONS, length)).astype(np.int32)
    return jnp.asarray(hidden), jnp.asarray(head), jnp.asarray(targets)


def full_log_softmax(hidden, head, temperature):
    """All logits at once, in float64."""
    logits = np.einsum("bgcd,vd->bgcv", np.asarray(hidden, np.float64), np.asarray(head, np.float64)) / temperature
    logits -= logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
def test_values_are_those_of_the_full_log_softmax(chunk_size, temperature):
    hidden, head, targets = inputs_of()
    scores = scores_of(hidden, head, targets, temperature, chunk_size)
    everything = full_log_softmax(hidden, head, temperature)
    chosen = np.take_along_axis(everything, np.asarray(targets)[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(scores.log_probs, chosen, atol=1e-5)
    np.testing.assert_allclose(scores.entropy, -(np.exp(everything) * everything).sum(axis=-1), atol=1e-5)


@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
def test_gradients_are_those_of_the_full_log_softmax(chunk_size):
    """d log p(t) / d logits is one-hot(t) − p; the entropy adds nothing."""
    hidden, head, targets = inputs_of(1)
    probe = np.random.default_rng(2).normal(size=targets.shape).astype(np.float32)

    def total(hidden, head):
        scores = scores_of(hidden, head, targets, 0.7, chunk_size)
        return (scores.log_probs * probe + scores.entropy).sum()

    for_hidden, for_head = jax.grad(total, argnums=(0, 1))(hidden, head)
    one_hot = np.eye(VOCAB)[np.asarray(targets)]
    for_logits = probe[..., None] * (one_hot - np.exp(full_log_softmax(hidden, head, 0.7))) / 0.7
    np.testing.assert_allclose(for_hidden, np.einsum("bgcv,vd->bgcd", for_logits, head), atol=1e-4)
    np.testing.assert_allclose(for_head, np.einsum("bgcv,bgcd->vd", for_logits, hidden), atol=1e-4)


@pytest.mark.parametrize("sizes", [(1, 4, 1, 1), (1, 2, 1, 2), (2, 1, 2, 1), (1, 1, 1, 4)])
@pytest.mark.parametrize("chunk_size", [1, 5, 100])
def test_devices_that_share_the_vocabulary_give_what_one_gives(sizes, chunk_size):
    mesh = Mesh(np.asarray(jax.devices()).reshape(sizes), MESH_AXES)
    hidden, head, targets = inputs_of(1, length=8)

    @partial(jax.jit, static_argnums=2)
    def run(hidden, head, mesh):
        def total(hidden, head):
            scores = scores_of(hidden, head, targets, 0.7, chunk_size, mesh)
            return (jnp.sin(scores.log_probs)).sum(), scores

        return jax.grad(total, argnums=(0, 1), has_aux=True)(hidden, head)

    alone, shared = run(hidden, head, None), run(hidden, head, mesh)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), alone, shared)


def test_entropy_of_equal_logits_is_the_logarithm_of_the_vocabulary():
    hidden, head, targets = inputs_of()
    scores = scores_of(jnp.zeros_like(hidden), head, targets, 0.5, 6)
    np.testing.assert_allclose(scores.entropy, np.log(VOCAB), rtol=1e-6)
    np.testing.assert_allclose(scores.log_probs, -np.log(VOCAB), rtol=1e-6)


def test_hidden_states_in_bfloat16_give_float32_scores():
    """Only the inputs are rounded: products are summed and normalised in float32."""
    hidden, head, targets = inputs_of(3)
    narrow_hidden, narrow_head = hidden.astype(jnp.bfloat16), head.astype(jnp.bfloat16)
    scores = scores_of(narrow_hidden, head, targets, 1.0, 6)
    assert scores.log_probs.dtype == scores.entropy.dtype == jnp.float32
    exact = scores_of(narrow_hidden.astype(jnp.float32), narrow_head.astype(jnp.float32), targets, 1.0, 6)
    np.testing.assert_allclose(scores.log_probs, exact.log_probs, atol=1e-4)


def temporary_bytes(length, chunk_size, vocab=4096):
    """What the compiled value-and-gradient program holds besides its arguments and results."""
    hidden = jax.ShapeDtypeStruct((1, 2, length, 8), jnp.float32)
    head = jax.ShapeDtypeStruct((vocab, 8), jnp.float32)
    targets = jax.ShapeDtypeStruct((1, 2, length), jnp.int32)

    def total(hidden, head, targets):
        return scores_of(hidden, head, targets, 1.0, chunk_size).log_probs.sum()

    program = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))
    return program.lower(hidden, head, targets).compile().memory_analysis().temp_size_in_bytes


def test_no_program_holds_the_logits_of_more_than_a_few_chunks():
    chunk_bytes, position_bytes = 16 * 4096 * 4, 4096 * 4
    short, long = (temporary_bytes(length, chunk_size=16) for length in (32, 1024))
    assert long < 8 * chunk_bytes
    assert (long - short) / (2 * (1024 - 32)) < position_bytes / 50
    # What this guards against shows where one chunk takes everything.
    assert temporary_bytes(1024, chunk_size=2048) > 2048 * position_bytes
