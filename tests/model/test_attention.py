import jax.numpy as jnp
import numpy as np
import pytest

from audio_grpo.model import attention
from audio_grpo.model.attention import Membership, Segment, attend

H, K, N = 4, 2, 8


def softmax_attention(queries, keys, values, mask):
    """Plain attention of one sequence: queries [Q, H, N], keys and values [T, K, N], mask [Q, T]."""
    keys, values = (np.repeat(x, H // K, axis=1) for x in (keys, values))
    scores = np.einsum("qhn,thn->hqt", queries, keys) / np.sqrt(N)
    scores = np.where(mask, scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.einsum("hqt,thn->qhn", weights / weights.sum(axis=-1, keepdims=True), values)


def segment_of(keys, values, mask, membership=None):
    """Keys and values [R, T, K, N]."""
    return Segment(jnp.swapaxes(keys, 1, 2), jnp.swapaxes(values, 1, 2), mask, membership)


def random(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def test_segments_attend_like_their_concatenation():
    queries = random(2, 3, H, N)
    parts = [(random(2, 5, K, N), random(2, 5, K, N) + 1), (random(2, 7, K, N), random(2, 7, K, N))]
    masks = [np.random.default_rng(i).random((2, 1, 5 + 2 * i)) < 0.6 for i in (0, 1)]
    masks[0][:, :, 0] = True
    got = attend(jnp.asarray(queries), [segment_of(k, v, m) for (k, v), m in zip(parts, masks, strict=True)])
    for s in range(2):
        keys, values = (np.concatenate([part[i][s] for part in parts]) for i in (0, 1))
        expected = softmax_attention(
            queries[s], keys, values, np.repeat(np.concatenate([m[s] for m in masks], axis=1), 3, axis=0)
        )
        np.testing.assert_allclose(got[s], expected, atol=2e-6)


@pytest.mark.parametrize("scores_at_once", [1 << 22, 80, 15])
def test_new_positions_see_each_other_causally_in_blocks_of_any_size(monkeypatch, scores_at_once):
    monkeypatch.setattr(attention, "_SCORES_AT_ONCE", scores_at_once)
    queries, keys, values = random(2, 20, H, N), random(2, 20, K, N), random(2, 20, K, N) * 2
    earlier = random(2, 6, K, N), random(2, 6, K, N)
    cached = segment_of(*earlier, np.ones((2, 1, 6), bool))
    got = attend(jnp.asarray(queries), [cached, segment_of(keys, values, None)])
    causal = np.concatenate([np.ones((20, 6), bool), np.tril(np.ones((20, 20), bool))], axis=1)
    for s in range(2):
        all_keys = np.concatenate([earlier[0][s], keys[s]])
        expected = softmax_attention(queries[s], all_keys, np.concatenate([earlier[1][s], values[s]]), causal)
        np.testing.assert_allclose(got[s], expected, atol=3e-6)


def test_consecutive_sequences_share_a_row():
    queries, keys, values = random(6, 2, H, N), random(2, 5, K, N), random(2, 5, K, N) * 2
    got = attend(jnp.asarray(queries), [segment_of(keys, values, np.ones((2, 1, 5), bool))])
    for s in range(6):
        expected = softmax_attention(queries[s], keys[s // 3], values[s // 3], np.ones((2, 5), bool))
        np.testing.assert_allclose(got[s], expected, atol=2e-6)


def test_any_sequence_can_read_any_row():
    queries, keys, values = random(4, 1, H, N), random(3, 5, K, N), random(3, 5, K, N) * 2
    rows = [2, 0, 2, 2]
    members = np.asarray([[[1, 0, 0], [0, 0, 0], [0, 2, 3]]], np.int32)
    place = np.asarray([[6, 0, 7, 8]], np.int32)
    segment = segment_of(keys, values, np.ones((3, 1, 5), bool), Membership(jnp.asarray(members), jnp.asarray(place)))
    got = attend(jnp.asarray(queries), [segment])
    for s, row in enumerate(rows):
        expected = softmax_attention(queries[s], keys[row], values[row], np.ones((1, 5), bool))
        np.testing.assert_allclose(got[s], expected, atol=2e-6)


@pytest.mark.parametrize("empty_first", [True, False])
def test_a_segment_without_any_visible_key_changes_nothing(empty_first):
    queries = jnp.asarray(random(2, 3, H, N))
    real = segment_of(random(2, 5, K, N), random(2, 5, K, N), np.ones((2, 1, 5), bool))
    empty = segment_of(random(2, 4, K, N) * 50, random(2, 4, K, N) * 50, np.zeros((2, 1, 4), bool))
    alone = attend(queries, [real])
    together = attend(queries, [empty, real] if empty_first else [real, empty])
    np.testing.assert_array_equal(alone, together)
