"""What the engine says of experts, and what becomes of the learner's scores with it."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from audio_grpo.grpo import generate_offline_completions
from audio_grpo.model.router import UNKNOWN
from audio_grpo.model.spec import thinker_spec
from audio_grpo.model.thinker import group_forward, output_head
from audio_grpo.parallel.mesh import create_mesh
from audio_grpo.rollout import OfflineEngine, engine_settings
from audio_grpo.types import AudioBatch, PromptBatch
from small_model import AUDIO_PAD, SPECIAL, random_weights, request_of, small_config

EXPERTS = {"num_experts": 32, "num_experts_per_tok": 4, "num_decoder_layers": 3, "router_replay": True}
LENGTHS = (5, 9, 17, 30, 31, 40)
GATE = "model.layers.*.mlp.gate.weight"


def config_of(**changes):
    return small_config(**(EXPERTS | changes))


@pytest.fixture(scope="module")
def weights():
    """Experts that say much, chosen by a router that is often undecided: then it matters which of two is taken."""
    drawn = random_weights(config_of())
    scales = {key: 4 for key in drawn if "experts" in key} | {GATE: 0.1}
    return {key: value * scales.get(key, 1) for key, value in drawn.items()}


def rollout_of(config, weights, *, mesh=None, special=SPECIAL, **settings):
    """Prompts of text, and their completions."""
    tokens = np.random.default_rng(0).integers(6, 200, (len(LENGTHS), config.max_prefill_predict_length))
    prompts = PromptBatch(tokens.astype(np.int32), np.asarray(LENGTHS, np.int32))
    sizes = replace(engine_settings(config), **settings)
    engine = OfflineEngine(config, weights, special=special, settings=sizes, mesh=mesh)
    silence = AudioBatch(jnp.zeros((len(LENGTHS), 128, 0)), jnp.zeros(len(LENGTHS), jnp.int32))
    return prompts, generate_offline_completions(engine, prompts, silence, [f"r{n}" for n in LENGTHS], seed=0)


def learner_scores(spec, weights, prompts, rollout, routes=None):
    """The learner's log-probabilities of a rollout's tokens."""

    @jax.jit
    def score(weights, prompts, heard, completions, routes):
        hidden = group_forward(spec, weights, prompts, heard, completions, AUDIO_PAD, routes).hidden
        head = output_head(weights).astype(hidden.dtype)
        logits = jnp.einsum("bgcd,vd->bgcv", hidden, head, preferred_element_type=jnp.float32)
        return jnp.take_along_axis(jax.nn.log_softmax(logits), completions[..., None], axis=-1)[..., 0]

    return np.asarray(score(weights, prompts, rollout.heard, rollout.tokens, routes))


def gap(spec, weights, prompts, rollout, routes=None):
    """Mean difference to the sampler's log-probabilities, in nats."""
    difference = learner_scores(spec, weights, prompts, rollout, routes) - rollout.log_probs
    return np.abs(difference)[rollout.mask].mean()


@pytest.fixture(scope="module")
def sampled(weights):
    return rollout_of(config_of(), weights)


def test_every_token_has_its_experts_and_padding_has_none(sampled):
    prompts, rollout = sampled
    real = np.arange(prompts.tokens.shape[1]) < prompts.true_length[:, None]
    assert rollout.routes.prompts.dtype == rollout.routes.completions.dtype == np.int8
    for routes, there in ((rollout.routes.prompts, real), (rollout.routes.completions, rollout.mask)):
        assert (routes[~there] == UNKNOWN).all()
        by_layer = np.sort(routes[there].reshape(-1, 3, 4), axis=-1)
        assert by_layer.min() >= 0 and by_layer.max() == 31
        assert (np.diff(by_layer, axis=-1) > 0).all()


def test_the_learner_agrees_with_replay_and_without_in_float32(weights, sampled):
    prompts, rollout = sampled
    spec = thinker_spec(config_of())
    for routes in (None, rollout.routes):
        np.testing.assert_allclose(
            learner_scores(spec, weights, prompts, rollout, routes)[rollout.mask],
            rollout.log_probs[rollout.mask],
            atol=1e-4,
        )


def test_replay_takes_away_the_gap_that_other_routes_make(weights, sampled):
    """A learner whose router has moved a little: it would choose other experts here and there."""
    prompts, rollout = sampled
    spec = thinker_spec(config_of())
    noise = np.random.default_rng(0).normal(size=weights[GATE].shape).astype(np.float32)
    moved = weights | {GATE: weights[GATE] + 1e-3 * noise}
    free, replayed = (gap(spec, moved, prompts, rollout, routes) for routes in (None, rollout.routes))
    assert free > 20 * replayed


def test_replay_takes_away_the_gap_that_rounding_makes(weights):
    """Sampled in bfloat16, learned in bfloat16: what is left is bfloat16's rounding."""
    config = config_of(dtype="bfloat16")
    prompts, rollout = rollout_of(config, weights)
    free, replayed = (gap(thinker_spec(config), weights, prompts, rollout, r) for r in (None, rollout.routes))
    assert free > 2 * replayed


@pytest.mark.parametrize(("slots", "burst"), [(1, 3), (5, 1), (64, 12)])
def test_routes_depend_on_neither_slots_nor_bursts(weights, sampled, slots, burst):
    _, rollout = rollout_of(config_of(), weights, max_slots=slots, burst=burst)
    np.testing.assert_array_equal(rollout.tokens, sampled[1].tokens)
    jax.tree.map(np.testing.assert_array_equal, rollout.routes, sampled[1].routes)


def test_slots_that_are_given_up_take_no_routes_with_them(weights):
    """36 completions of 1 to 12 tokens on 36 slots, of which half and half again are given up."""
    rng = np.random.default_rng(0)
    limits = rng.integers(1, 13, 12).astype(np.int32)
    requests = [request_of(f"r{i}", 57, seed=i) for i in range(12)]
    results = []
    for slots, burst in ((36, 2), (3, 5)):
        settings = replace(engine_settings(config_of()), max_slots=slots, burst=burst)
        engine = OfflineEngine(config_of(), weights, special=replace(SPECIAL, stop=()), settings=settings)
        results.append(engine.batch_inference(requests, max_new_tokens=limits.tolist()))
    for wide, narrow, limit in zip(*results, limits, strict=True):
        np.testing.assert_array_equal(wide.prompt_routes, narrow.prompt_routes)
        for a, b in zip(wide.completions, narrow.completions, strict=True):
            assert len(a.routes) == limit
            np.testing.assert_array_equal(a.routes, b.routes)


@pytest.mark.parametrize("sizes", [{"fsdp": 2, "tensor": 2}, {"expert": 2, "data": 2}])
def test_four_devices_tell_the_routes_of_one(weights, sampled, sizes):
    keys = {f"ici_{axis}_parallelism": sizes.get(axis, 1) for axis in ("data", "fsdp", "expert", "tensor")}
    mesh = create_mesh(config_of(**keys))
    _, rollout = rollout_of(config_of(), weights, mesh=mesh)
    np.testing.assert_array_equal(rollout.tokens, sampled[1].tokens)
    jax.tree.map(np.testing.assert_array_equal, rollout.routes, sampled[1].routes)


def test_without_replay_nothing_is_kept(weights):
    config = config_of(router_replay=False)
    _, rollout = rollout_of(config, weights)
    assert rollout.routes is None
    engine = OfflineEngine(config, weights, special=SPECIAL)
    (result,) = engine.batch_inference([request_of("r", 57)])
    assert result.prompt_routes is None and result.completions[0].routes is None
