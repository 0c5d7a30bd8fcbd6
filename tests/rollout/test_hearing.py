"""Clips heard once: fingerprints, the store, and the tower that runs over what is not in it."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from audio_grpo.audio import audio_token_count
from audio_grpo.model.spec import thinker_spec
from audio_grpo.parallel.mesh import single_device_mesh
from audio_grpo.rollout import OfflineEngine, engine_settings
from audio_grpo.rollout.clip_store import ClipStore
from audio_grpo.rollout.engine import bucketed_frames
from audio_grpo.rollout.fingerprint import fingerprints
from audio_grpo.rollout.hearing import Hearing
from audio_grpo.types import AudioBatch
from small_model import SPECIAL, random_weights, request_of, small_config

CONFIG = small_config()
SPEC = thinker_spec(CONFIG)
MESH = single_device_mesh(jax.devices()[0])


@pytest.fixture(scope="module")
def weights():
    return random_weights(CONFIG)


def clips(*frames, padded=200, seed=0):
    features = np.zeros((len(frames), 128, padded), np.float32)
    for i, count in enumerate(frames):
        features[i, :, :count] = np.random.default_rng([seed, count]).normal(size=(128, count))
    return AudioBatch(features, np.asarray(frames, np.int32))


def assert_heard(found, expected, frames):
    for a, b, count in zip(found, expected, frames, strict=True):
        length = int(audio_token_count(count))
        np.testing.assert_allclose(a[:length], b[:length], atol=1e-5)


def test_a_fingerprint_tells_bits_and_places_apart_but_not_padding():
    x = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
    x[1] = x[0]
    x[1, 2, 3] = np.nextafter(x[1, 2, 3], np.inf)
    x[2] = x[0][:, ::-1]
    names = {row.tobytes() for row in np.asarray(fingerprints(jnp.asarray(x)))}
    assert len(names) == 3
    padded = jnp.pad(jnp.asarray(x), ((0, 0), (0, 0), (0, 3)))
    real = jnp.broadcast_to(jnp.arange(8) < 5, padded.shape)
    np.testing.assert_array_equal(fingerprints(padded, real), fingerprints(jnp.asarray(x)))


def test_fingerprints_of_many_random_clips_differ_in_both_halves():
    x = jax.random.normal(jax.random.key(0), (2000, 16))
    halves = np.asarray(fingerprints(x))
    assert len(np.unique(halves[:, 0])) == len(np.unique(halves[:, 1])) == 2000


def test_what_was_heard_once_is_not_heard_again(weights):
    hearing, plain = Hearing(SPEC, MESH, ClipStore(1 << 20)), Hearing(SPEC, MESH)
    first = clips(57, 180, 0)
    assert_heard(hearing(weights, first), plain(weights, first), (57, 180, 0))
    assert hearing.clips == 2
    mixed = clips(180, 101, 57, padded=300)
    assert_heard(hearing(weights, mixed), plain(weights, mixed), (180, 101, 57))
    assert hearing.clips == 3
    hearing(weights, mixed)
    assert hearing.clips == 3


def test_another_tower_hears_anew_and_another_decoder_does_not(weights):
    hearing = Hearing(SPEC, MESH, ClipStore(1 << 20))
    audio = clips(57, 180)
    hearing(weights, audio)
    hearing({**weights, "model.norm.weight": weights["model.norm.weight"] * 2}, audio)
    assert hearing.clips == 2
    key = "audio_tower.ln_post.bias"
    changed = {**weights, key: weights[key] + 1}
    heard = hearing(changed, audio)
    assert hearing.clips == 4
    assert_heard(heard, Hearing(SPEC, MESH)(changed, audio), (57, 180))


def test_a_folder_serves_the_next_run(weights, tmp_path: Path):
    audio = clips(57, 180)
    first = Hearing(SPEC, MESH, ClipStore(1 << 20, tmp_path))
    heard = first(weights, audio)
    second = Hearing(SPEC, MESH, ClipStore(1 << 20, tmp_path))
    assert_heard(second(weights, audio), heard, (57, 180))
    assert second.clips == 0


def test_narrow_numbers_survive_the_folder(tmp_path: Path):
    values = np.asarray(jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3))
    ClipStore(100, tmp_path).put("a", values)
    found = ClipStore(100, tmp_path).get("a")
    assert found is not None
    np.testing.assert_array_equal(found.view(jnp.bfloat16), values)


@pytest.mark.parametrize("in_folder", [False, True])
def test_a_store_keeps_to_its_bytes_and_drops_what_was_used_longest_ago(tmp_path: Path, in_folder):
    store = ClipStore(300, tmp_path if in_folder else None)
    for name in "abc":
        store.put(name, np.full((4, 5), ord(name), np.float32))
    assert store.get("a") is not None
    store.put("d", np.zeros((4, 5), np.float32))
    assert store.get("b") is None
    assert store.bytes <= 300
    assert [name for name in "acd" if store.get(name) is not None] == ["a", "c", "d"]
    store.put("large", np.zeros((40, 25), np.float32))
    assert store.get("large") is None and store.get("a") is not None


def test_an_interrupted_write_leaves_nothing_that_is_taken_for_a_clip(tmp_path: Path):
    (tmp_path / "a.part").write_bytes(b"half")
    assert ClipStore(100, tmp_path).get("a") is None


def test_the_engine_gives_the_same_completions_with_a_store_and_hears_once(weights):
    requests = [request_of(f"r{n}", n, seed=n) for n in (57, 100, 180)]
    store = ClipStore(1 << 20)

    def engine(store):
        return OfflineEngine(CONFIG, weights, special=SPECIAL, store=store, settings=engine_settings(CONFIG))

    expected = engine(None).batch_inference(requests)
    for run in range(2):
        kept = engine(store)
        results = kept.batch_inference([replace(request, id=request.id) for request in requests])
        assert kept.hearing.clips == (3, 0)[run]
        for a, b in zip(results, expected, strict=True):
            for x, y in zip(a.completions, b.completions, strict=True):
                np.testing.assert_array_equal(x.token_ids, y.token_ids)


def test_lengths_of_clips_fall_into_few_buckets():
    buckets = [bucketed_frames(frames, 100) for frames in range(6001)]
    assert all(0 <= bucket - frames <= max(99, 0.5 * frames) for frames, bucket in enumerate(buckets))
    assert len(set(buckets)) == 13
