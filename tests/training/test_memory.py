"""Runs that a device can not hold are refused before a weight is read."""

import jax
import pytest

from audio_grpo.errors import UserError
from audio_grpo.training import memory
from audio_grpo.training.memory import bytes_per_device, check_fits
from audio_grpo.training.programs import resident
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
