"""Runs that a device can not hold are refused before a weight is read."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from audio_grpo.errors import UserError
from audio_grpo.training import memory
from audio_grpo.training.memory import GIB, bytes_per_device, check_fits, host_memory, peak_memory, program_memory
from audio_grpo.training.programs import resident, run_programs
from audio_grpo.training.session import create_grpo_session, create_session
from small_model import small_config

KEYS = {"vocab_size": 1024, "tokenizer_path": "audio-grpo/tiny", "per_device_batch_size": 1}


@pytest.fixture(scope="module")
def session():
    return create_session(small_config(**KEYS), jax.devices()[:2])


def kept_of(session):
    kept = resident(session)
    return bytes_per_device((kept.weights, kept.optimizer, kept.reference))


def with_memory(monkeypatch, size):
    monkeypatch.setattr(memory, "device_memory", lambda _device: size)


def test_bytes_per_device_are_those_of_its_shards(session):
    weights = session.abstract_weights
    assert bytes_per_device(weights) < sum(x.size * x.dtype.itemsize for x in weights.values())
    head = weights["lm_head.weight"]
    assert bytes_per_device({"head": head}) == 1024 * 32 * 4 // 2


def test_moments_in_bfloat16_take_half():
    def optimizer_bytes(**changes):
        keys = {"weight_dtype": "bfloat16", "num_experts": 4} | KEYS
        return bytes_per_device(resident(create_session(small_config(**keys, **changes), jax.devices()[:1])).optimizer)

    wide, narrow = optimizer_bytes(), optimizer_bytes(mu_dtype="bfloat16", nu_dtype="bfloat16")
    # A master copy and two moments, of four bytes each or of two; beside them a few counters.
    assert wide * 2 / 3 == pytest.approx(narrow, rel=1e-4)


def test_what_is_kept_alone_is_too_much(session, monkeypatch):
    with_memory(monkeypatch, kept_of(session) - 1)
    with pytest.raises(UserError, match=r"each of 2 devices would hold weights .*optimizer state .*reference"):
        check_fits(session, "grpo", with_reference=True)


def test_programs_are_counted_where_what_is_kept_fits_narrowly(session, monkeypatch):
    gradients = bytes_per_device(resident(session).gradients)
    with_memory(monkeypatch, kept_of(session) + gradients + 1000)
    with pytest.raises(UserError, match=r"decode burst|gradients \d"):
        check_fits(session, "grpo", with_reference=True)
    # A supervised phase runs none of them.
    check_fits(session, "sft", with_reference=True)


def test_there_is_room_or_the_device_does_not_tell(session, monkeypatch):
    check_fits(session, "grpo", with_reference=True)
    with_memory(monkeypatch, None)
    check_fits(session, "grpo", with_reference=True)


def test_samplers_apart_hold_all_weights_themselves(monkeypatch):
    apart = {"inference_devices_per_replica": 1, "inference_replicas": 1}
    session = create_grpo_session(small_config(**KEYS, **apart), jax.devices()[:3])
    whole = bytes_per_device(session.sampler.abstract_weights)
    assert whole > bytes_per_device(session.abstract_weights)
    gradients = bytes_per_device(resident(session).gradients)
    with_memory(monkeypatch, max(whole, kept_of(session) + gradients) + 1000)
    with pytest.raises(UserError, match="each of 1 devices would hold weights"):
        check_fits(session, "grpo", with_reference=True)


def test_a_device_that_samples_ahead_has_what_learns_twice_and_both_programs_at_once(monkeypatch):
    keys = KEYS | {"importance_sampling_correction": True}
    by_turns, ahead = (
        create_session(small_config(**keys, sample_ahead=flag), jax.devices()[:1]) for flag in (False, True)
    )
    kept, copied = kept_of(ahead), bytes_per_device(resident(ahead).gradients)
    with_memory(monkeypatch, kept + 2 * copied - 1)
    with pytest.raises(UserError, match=r"weights .*weights to sample ahead .*gradients"):
        check_fits(ahead, "grpo", with_reference=True)
    check_fits(ahead, "sft", with_reference=True)
    sizes = [
        program_memory(x, x.trace().lower()) for x in run_programs(ahead) if x.phase in ("decode burst", "gradients")
    ]
    with_memory(monkeypatch, kept + copied + sum(sizes) - 1)
    check_fits(by_turns, "grpo", with_reference=True)
    with pytest.raises(UserError, match=r"weights to sample ahead .*decode burst .*gradients"):
        check_fits(ahead, "grpo", with_reference=True)
    with_memory(monkeypatch, kept + copied + sum(sizes))
    check_fits(ahead, "grpo", with_reference=True)


def test_the_peak_is_that_of_the_fullest_device_where_devices_tell():
    def device(peak):
        return SimpleNamespace(memory_stats=lambda: peak and {"peak_bytes_in_use": peak, "bytes_limit": 99 << 30})

    assert peak_memory([device(3 << 29), device(5 << 29), device(None)]) == {"memory/device_peak_gib": 2.5}


def test_the_peak_is_the_hosts_where_no_device_tells():
    before = peak_memory(jax.devices())["memory/host_peak_gib"]
    held = np.ones(1 << 26, np.uint8)
    after = peak_memory(jax.devices())["memory/host_peak_gib"]
    assert 0.05 < before <= after < host_memory() / GIB
    assert held.all()
