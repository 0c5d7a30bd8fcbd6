"""A CPU convolves a few chunks at a time, and none where all of them are silent."""

import jax
import jax.numpy as jnp
import numpy as np

from audio_grpo.model.audio_tower import _audible_few

AUDIBLE = jnp.asarray([[1, 1], [1, 0], [0, 0], [0, 0], [0, 1], [0, 0], [1, 1]], bool)
"""Chunks 2 and 3, a few of their own, are silent in both parts; the last chunk has no neighbour."""


def run(chunk):
    return jnp.cos(chunk)[:, :2]


def test_what_is_audible_is_what_all_would_give_and_only_a_silent_few_is_left_out():
    chunks = jnp.asarray(np.random.default_rng(0).normal(size=(*AUDIBLE.shape, 3)), jnp.float32)
    given = _audible_few(run, chunks, AUDIBLE)
    expected = np.array(jax.vmap(run)(chunks))
    expected[2:4] = 0
    np.testing.assert_array_equal(given, expected)
    gradients = jax.grad(lambda x: jnp.square(_audible_few(run, x, AUDIBLE)).sum())(chunks)
    all_chunks = np.array(jax.grad(lambda x: jnp.square(jax.vmap(run)(x)).sum())(chunks))
    all_chunks[2:4] = 0
    np.testing.assert_allclose(gradients, all_chunks, atol=1e-6)
