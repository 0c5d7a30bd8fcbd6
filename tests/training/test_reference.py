"""The reference is the policy that a run departed from, and takes no more memory than it must."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pydantic import ValidationError
from tiny_runs import tiny_config, with_tones

from audio_grpo.config import Config
from audio_grpo.rewards import RewardFunction
from audio_grpo.training import sft_loop
from audio_grpo.training.grpo_loop import grpo_step, setup_train_loop
from audio_grpo.training.learning import learner_batch
from audio_grpo.training.loop import gradients, score
from audio_grpo.training.memory import bytes_per_device
from audio_grpo.training.programs import resident, run_programs
from audio_grpo.training.sampling import generate_completions
from audio_grpo.training.session import create_session

ADAPTERS = {"lora_rank": 2, "lora_alpha": 8.0, "lora_target_modules": ["model.layers.*_proj"]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_mlp_dim": 24}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return with_tones(tmp_path_factory.mktemp("reference"), count=6)


def longer_is_better(completions, **_):
    return [float(len(completion)) + 0.1 * n for n, completion in enumerate(completions)]


def stepped(folder, **changes):
    """A run's trainer after a step, its reference and its weights before, and its next batch's groups."""
    config = tiny_config(folder, steps=2, max_target_length=76, **changes)
    trainer, engine = setup_train_loop(config)
    before = jax.tree.map(np.asarray, (trainer.reference.weights, trainer.weights))
    grpo_step(trainer, engine, [RewardFunction("longer", longer_is_better)], next(trainer.data), 1)
    batch = next(trainer.data)
    advantages = np.zeros((len(batch["id"]), 2), np.float32)
    trainer.data.close()
    groups, heard = learner_batch(trainer, batch, generate_completions(trainer, engine, batch, 2), advantages)
    return trainer, before, groups, heard


def test_fresh_adapters_are_off_in_the_reference_which_then_has_nothing_of_its_own(folder):
    trainer, (reference, start), groups, heard = stepped(folder, **ADAPTERS, **EXPERTS)
    assert trainer.reference.own == {}
    assert reference.keys() == trainer.session.base.keys()
    for key, value in trainer.reference.weights.items():
        assert value is trainer.frozen[key]
    changed = [key for key in trainer.session.adapters if (np.asarray(trainer.weights[key]) != start[key]).any()]
    assert any(".experts." in key for key in changed)
    off = {key: value for key, value in trainer.weights.items() if key in trainer.session.base}
    np.testing.assert_array_equal(groups.reference_log_probs, score(trainer, off, groups, heard))
    gap = np.abs(groups.reference_log_probs - score(trainer, trainer.weights, groups, heard))
    assert gap[groups.mask].max() > 1e-5


def test_adapters_that_an_earlier_phase_trained_are_part_of_the_reference(folder):
    keys = {**ADAPTERS, "run_name": "two phases"}
    sft_loop(tiny_config(folder, steps=3, learning_rate=1e-2, **keys))
    trainer, (_, start), *_ = stepped(folder, **keys)
    assert trainer.reference.own.keys() == trainer.session.adapters.keys()
    assert np.abs(start["model.layers.*.self_attn.q_proj.lora_B.weight"]).max() > 0
    for key, value in trainer.reference.weights.items():
        np.testing.assert_array_equal(value, start[key], err_msg=key)
        assert key in trainer.reference.own or value is trainer.frozen[key]


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_full_fine_tuning_keeps_the_start_in_the_references_own_format_and_place(folder, offload, dtype):
    name = f"{offload} {dtype}"
    trainer, (_, start), groups, heard = stepped(
        folder, run_name=name, reference_offload=offload, reference_weight_dtype=dtype, freeze_projector_params=False
    )
    own = trainer.reference.own
    assert own.keys() == trainer.session.trainable
    assert {value.sharding.memory_kind for value in own.values()} == {"pinned_host" if offload else "device"}
    for key, value in trainer.reference.weights.items():
        assert value.sharding.memory_kind == "device"
        expected = start[key].astype(dtype) if dtype and key in own else start[key]
        assert value.dtype == expected.dtype
        np.testing.assert_array_equal(value, expected, err_msg=key)
        assert key in own or value is trainer.frozen[key]
    as_it_was = {key: jnp.asarray(value) for key, value in start.items()}
    plain = score(trainer, as_it_was, groups, heard)
    tolerance = 0.1 if dtype else 1e-5
    np.testing.assert_allclose(groups.reference_log_probs[groups.mask], plain[groups.mask], atol=tolerance)


def test_the_plan_counts_the_reference_in_its_format_and_where_it_is(tmp_path):
    def sizes(**changes):
        session = create_session(tiny_config(tmp_path, **changes), jax.devices()[:1])
        scoring = next(program for program in run_programs(session) if program.phase == "scoring")
        return bytes_per_device(resident(session).reference), bytes_per_device(scoring.beside)

    learned = create_session(tiny_config(tmp_path), jax.devices()[:1])
    whole = bytes_per_device({key: learned.abstract_weights[key] for key in learned.trainable})
    assert sizes() == (whole, 0)
    assert sizes(reference_weight_dtype="bfloat16") == (whole // 2, 0)
    assert sizes(reference_offload=True) == (0, whole)
    assert sizes(grpo_beta=0.0, num_iterations=2) == (0, 0)


def test_dropout_is_drawn_for_each_part_and_update_and_touches_gradients_alone(folder):
    keys = {**ADAPTERS, "lora_dropout": 0.5, "run_name": "dropout", "gradient_accumulation_steps": 2}
    trainer, _, groups, heard = stepped(folder, **keys)
    groups = groups._replace(advantages=np.tile(np.asarray([1.0, -1.0], np.float32), (len(groups.advantages), 1)))

    def taken(state):
        trainer.state = state
        return {key: np.asarray(value) for key, value in gradients(trainer, groups, heard)[0].items()}

    def alike(a, b):
        return all((a[key] == b[key]).all() for key in a)

    now = taken(trainer.state)
    assert alike(now, taken(trainer.state))
    assert not alike(now, taken(trainer.state._replace(step=trainer.state.step + 1)))
    a = now["model.layers.*.self_attn.q_proj.lora_A.weight"]
    # A part leaves out half of the features, and two parts a quarter.
    assert 0.05 < (a == 0).all(axis=1).mean() < 0.6
    np.testing.assert_allclose(
        groups.sampler_log_probs[groups.mask], score(trainer, trainer.weights, groups, heard)[groups.mask], atol=1e-4
    )


def test_dropout_without_adapters_is_refused():
    with pytest.raises(ValidationError, match=r"lora_dropout 0\.1 has no adapters to act on"):
        Config.model_validate({"lora_dropout": 0.1})
