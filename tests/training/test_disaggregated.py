"""Devices that only sample beside devices that only learn."""

from functools import partial

import jax
import numpy as np
import pytest
from tiny_runs import kept_programs, metrics_of, tiny_config, with_tones

from audio_grpo.errors import UserError
from audio_grpo.training import loop, sampling, setup_train_loop, train_loop
from audio_grpo.training.json_lines import JsonLinesFile
from audio_grpo.training.session import create_grpo_session

pytestmark = pytest.mark.slow

STEPS = 3
KINDS = {
    "dense, adapters": {"lora_rank": 2, "per_device_batch_size": 1, "gradient_accumulation_steps": 2},
    "experts, tower too": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_mlp_dim": 24,
        "freeze_audio_encoder_params": False,
        "num_iterations": 2,
        "router_replay": True,
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = with_tones(tmp_path_factory.mktemp("apart"))
    with kept_programs(folder / "programs"):
        yield folder


def config_of(folder, **changes):
    settings = {"steps": STEPS, "enable_checkpointing": False, "per_device_batch_size": 2}
    return tiny_config(folder, **(settings | changes))


def assert_same_weights(ours, theirs):
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        np.testing.assert_array_equal(ours[key], value, err_msg=key)


def run(config, devices):
    """Train on the first `devices`; gives every step's metrics, sampled tokens and the engine's devices.

    At every step the engine must have the learner's weights.
    """
    told, sample = [], sampling.sample

    def noting(trainer, engine, *args):
        assert_same_weights(engine.weights, trainer.weights)
        rollout = sample(trainer, engine, *args)
        told.append((rollout.tokens, {device.id for x in engine.weights.values() for device in x.sharding.device_set}))
        return rollout

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "create_grpo_session", partial(create_grpo_session, devices=jax.devices()[:devices]))
        patch.setattr(sampling, "sample", noting)
        done = train_loop(config)
    return done, *zip(*told, strict=True)


@pytest.mark.parametrize("kind", KINDS)
def test_two_devices_that_sample_and_two_that_learn_do_what_two_do_that_do_both(folder, kind, capfd):
    config = config_of(folder, run_name=kind, **KINDS[kind])
    together, tokens, _ = run(config, 2)
    assert "2 x cpu sample and learn by turns." in capfd.readouterr().err
    apart_config = config.model_copy(update={"run_name": f"{kind} apart", "inference_devices_per_replica": 2})
    apart, tokens_apart, engines = run(apart_config, 4)
    assert "2 x cpu learn, 2 x cpu sample." in capfd.readouterr().err
    assert engines == ({2, 3},) * STEPS
    np.testing.assert_array_equal(tokens_apart, tokens)
    for ours, theirs in zip(metrics_of(apart), metrics_of(together), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - {"phase"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-4), name
    assert all(step["seconds/weights"] > 0 for step in JsonLinesFile(apart.metrics_path).read().records)
    assert metrics_of(apart)[-1]["kl"] > 0


def test_a_batch_that_does_not_divide_over_the_devices_that_sample_is_refused(folder):
    config = config_of(folder, inference_devices_per_replica=2, ici_tensor_parallelism=2, per_device_batch_size=0.5)
    with pytest.raises(UserError, match=r"A step of 1 prompts \(2 devices learn\) does not divide over the 2 devices"):
        setup_train_loop(config)


def test_weights_that_can_not_be_cut_over_the_devices_that_sample_are_refused(folder):
    config = config_of(folder, inference_devices_per_replica=3)
    with pytest.raises(UserError, match=r"change inference_devices_per_replica, .* 3 equal parts"):
        create_grpo_session(config)
