import jax
import jax.numpy as jnp
import numpy as np
import pytest

from audio_grpo.model.packing import Rows, pack_windows


def packed(lengths, chunks, window):
    rows = Rows.for_clips(len(lengths), chunks, window)
    packing = jax.jit(pack_windows, static_argnums=(1, 2, 3))(jnp.asarray(lengths), chunks, window, rows)
    return rows, *map(np.asarray, packing)


def first_fit(lengths, window, row_length):
    """The same by plain lists: chunks of each row, as (clip, number)."""
    pieces = [
        [(b, j) for j in range(k, min(k + window, n))] for b, n in enumerate(lengths) for k in range(0, n, window)
    ]
    rows = []
    for piece in sorted(pieces, key=len, reverse=True):
        for row in rows:
            if len(row) + len(piece) <= row_length:
                row.extend(piece)
                break
        else:
            rows.append(list(piece))
    return rows


@pytest.mark.parametrize("clips, chunks, window", [(1, 1, 8), (1, 30, 8), (3, 5, 8), (8, 5, 8), (64, 30, 8), (9, 7, 3)])
def test_packing_equals_first_fit_by_lists(clips, chunks, window):
    for seed in range(5):
        lengths = np.random.default_rng(seed).integers(0, chunks + 1, clips)
        rows, chunk, place = packed(lengths, chunks, window)
        expected = first_fit(lengths, window, rows.chunks)
        assert len(expected) <= rows.count
        for row, wanted in zip(chunk, expected + [[]] * (rows.count - len(expected)), strict=True):
            assert [(c // chunks, c % chunks) for c in row[row >= 0]] == wanted
        for b, n in enumerate(lengths):
            np.testing.assert_array_equal(
                chunk.reshape(-1)[place.reshape(clips, chunks)[b, :n]], b * chunks + np.arange(n)
            )


@pytest.mark.parametrize("clips, chunks", [(1, 5), (8, 5), (8, 30), (64, 30), (7, 9), (1, 300)])
def test_the_rows_are_enough_and_full_when_all_clips_are_longest(clips, chunks):
    rows, chunk, _ = packed([chunks] * clips, chunks, 8)
    assert (chunk >= 0).sum() == clips * chunks
    used = (chunk >= 0).any(axis=1).sum()
    assert clips * chunks / (used * rows.chunks) > 0.75


def test_mixed_lengths_fill_their_rows():
    lengths = np.random.default_rng(0).integers(1, 31, 64)
    rows, chunk, _ = packed(lengths, 30, 8)
    used = (chunk >= 0).any(axis=1).sum()
    assert lengths.sum() / (used * rows.chunks) > 0.9
