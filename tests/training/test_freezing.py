import jax
import numpy as np
import pytest
from pydantic import ValidationError
from tiny_runs import tiny_config, with_tones

from audio_grpo.errors import UserError
from audio_grpo.model.spec import thinker_spec
from audio_grpo.model.thinker import thinker_table
from audio_grpo.rewards import RewardFunction
from audio_grpo.training import sft_loop
from audio_grpo.training.freezing import frozen_weights
from audio_grpo.training.grpo_loop import grpo_step, setup_train_loop
from audio_grpo.training.run_folder import RunFolder
from audio_grpo.training.session import create_session
from audio_grpo.training.weights import run_weights, starting_weights
from small_model import small_config

PROJECTOR = {f"audio_tower.proj{n}.{kind}" for n in (1, 2) for kind in ("weight", "bias")}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_mlp_dim": 24}
ROUTER, EMBEDDING = "model.layers.*.mlp.gate.weight", "model.embed_tokens.weight"


def table_of(**changes):
    return thinker_table(thinker_spec(small_config(num_experts=4, **changes)))


def frozen(**changes):
    return frozen_weights(small_config(num_experts=4, **changes), table_of())


def test_the_whole_tower_and_the_router_are_frozen_by_default():
    tower = {key for key in table_of() if key.startswith("audio_tower.")}
    assert frozen().keys() == tower | {ROUTER}
    assert frozen(freeze_audio_encoder_params=False, freeze_router_params=False) == {}
    assert frozen(freeze_embedding_params=True).keys() == tower | {ROUTER, EMBEDDING, "lm_head.weight"}


def test_the_projector_goes_with_the_encoder_or_its_own_way():
    tower = {key for key in table_of() if key.startswith("audio_tower.")}
    assert frozen(freeze_projector_params=False).keys() == (tower - PROJECTOR) | {ROUTER}
    assert frozen(freeze_audio_encoder_params=False, freeze_projector_params=True).keys() == PROJECTOR | {ROUTER}


@pytest.mark.parametrize(
    ("pattern", "keys"),
    [
        ("model.norm", {"model.norm.weight"}),
        ("model.norm.weight", {"model.norm.weight"}),
        ("*.down_proj", {"model.layers.*.mlp.experts.*.down_proj.weight"}),
        ("lm_*", {"lm_head.weight"}),
        ("*.fc?.bias", {"audio_tower.layers.*.fc1.bias", "audio_tower.layers.*.fc2.bias"}),
    ],
)
def test_patterns_freeze_what_they_match_beside_the_parts(pattern, keys):
    found = frozen(freeze_patterns=[pattern], freeze_audio_encoder_params=False, freeze_router_params=False)
    assert found == dict.fromkeys(keys, "freeze_patterns")
    assert frozen(freeze_patterns=[pattern, ROUTER]).keys() == frozen().keys() | keys


@pytest.mark.parametrize(
    ("pattern", "near"),
    [
        ("model.layers.*.self_atn.q_proj", "model.layers.*.self_attn.q_proj.weight"),
        ("model.layers.1.mlp.gate", "model.layers.*.mlp.gate.weight"),
        ("zzz", ""),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused_with_the_nearest_name(pattern, near):
    with pytest.raises(UserError) as caught:
        frozen(freeze_patterns=["model.norm", pattern])
    assert f"freeze_patterns {pattern} matches no weight; the nearest is {near}" in str(caught.value)


def test_freezing_everything_is_refused():
    with pytest.raises(
        UserError, match="frozen, by freeze_audio_encoder_params, freeze_patterns, freeze_router_params"
    ):
        frozen(freeze_patterns=["model.*", "lm_head"])


def test_a_vision_encoder_that_should_learn_is_refused():
    with pytest.raises(ValidationError):
        small_config(freeze_vision_encoder_params=False)


@pytest.mark.parametrize(
    ("targets", "changes", "freezes"),
    [
        (["*.mlp.gate"], {}, "freeze_router_params"),
        (["*.fc1"], {}, "freeze_audio_encoder_params"),
        (["*.proj1"], {"freeze_projector_params": True}, "freeze_projector_params"),
        (["*.q_proj"], {"freeze_audio_encoder_params": False, "freeze_patterns": ["*.q_proj"]}, "freeze_patterns"),
    ],
)
def test_adapters_of_frozen_weights_are_refused(tmp_path, targets, changes, freezes):
    keys = EXPERTS | {"lora_rank": 2, "lora_target_modules": targets}
    with pytest.raises(UserError, match=f"but {freezes} freezes it"):
        create_session(tiny_config(tmp_path, **keys, **changes))


@pytest.mark.parametrize(
    ("changes", "learns"),
    [
        ({}, False),
        ({"freeze_audio_encoder_params": False}, True),
        ({"freeze_projector_params": False}, True),
        ({"freeze_audio_encoder_params": False, "lora_rank": 2}, False),
        ({"freeze_audio_encoder_params": False, "lora_rank": 2, "lora_target_modules": ["*.fc1"]}, True),
        ({"freeze_audio_encoder_params": False, "freeze_patterns": ["audio_tower.*"]}, False),
    ],
)
def test_the_tower_learns_where_any_of_its_weights_does(tmp_path, changes, learns):
    session = create_session(tiny_config(tmp_path, audio_store_gib=0.1, **changes))
    assert session.tower_learns == learns
    # What is heard may only be kept while it stays as it is.
    assert (session.clip_store is None) == learns


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return with_tones(tmp_path_factory.mktemp("freezing"), count=4)


def changed_by(config):
    """Keys of the weights that a supervised run changes."""
    session = create_session(config)
    start, end = starting_weights(session, "sft"), run_weights(session, RunFolder.open(sft_loop(config).path)).weights
    return session, {key for key, value in start.items() if (np.asarray(end[key]) != value).any()}


def test_the_projector_learns_alone_of_the_tower_and_what_is_frozen_stays_bit_equal(folder):
    session, changed = changed_by(
        tiny_config(
            folder,
            run_name="sft",
            steps=2,
            **EXPERTS,
            freeze_projector_params=False,
            freeze_embedding_params=True,
            freeze_patterns=["*.up_proj"],
        )
    )
    assert changed == session.trainable
    tower = {key for key in changed if key.startswith("audio_tower.")}
    assert tower == PROJECTOR
    assert not changed & {ROUTER, EMBEDDING, "model.layers.*.mlp.experts.*.up_proj.weight"}


def test_grpo_hears_within_the_update_where_only_the_projector_learns(folder):
    """Its gradient reaches the projector, and the engine samples from the projector as it is now."""
    config = tiny_config(folder, run_name="grpo", steps=1, freeze_projector_params=False, max_target_length=76)
    trainer, engine = setup_train_loop(config)
    before = jax.tree.map(np.asarray, trainer.weights)

    def reward(completions, **_):
        return [float(len(completion)) + 0.1 * n for n, completion in enumerate(completions)]

    grpo_step(trainer, engine, [RewardFunction("made up", reward)], next(trainer.data), 1)
    trainer.data.close()
    changed = {key for key, value in trainer.weights.items() if (np.asarray(value) != before[key]).any()}
    assert {key for key in changed if key.startswith("audio_tower.")} == PROJECTOR
