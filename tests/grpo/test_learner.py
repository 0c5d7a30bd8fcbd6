from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from audio_grpo.grpo import (
    Learner,
    LossSettings,
    compute_log_probs,
    grpo_loss_fn,
    init_train_state,
    token_weights,
)
from audio_grpo.model.spec import thinker_spec
from audio_grpo.model.thinker import hear
from audio_grpo.types import AudioBatch, GroupBatch, PromptBatch
from small_model import AUDIO_PAD, random_weights, request_of, small_config

CONFIG = small_config(num_decoder_layers=1)
SPEC = thinker_spec(CONFIG)
PROMPTS, GENERATIONS, LENGTH = 4, 2, 5
TOWER = "audio_tower."
NORM, HEAD = "model.norm.weight", "lm_head.weight"


def learner_of(optimizer=None, **options):
    return Learner(
        SPEC,
        optimizer or optax.adamw(1e-2),
        partial(grpo_loss_fn, settings=LossSettings(**options)),
        audio_pad=AUDIO_PAD,
        temperature=0.9,
        chunk_bytes=16 << 10,
    )


@pytest.fixture(scope="module")
def weights():
    return random_weights(CONFIG)


@pytest.fixture(scope="module")
def learner():
    return learner_of()


@pytest.fixture(scope="module")
def audio():
    features = np.stack([np.asarray(request_of("r", 100, seed=i).audio_features) for i in range(PROMPTS)])
    return AudioBatch(features, np.full(PROMPTS, 100, np.int32))


@pytest.fixture(scope="module")
def heard(weights, audio):
    return jax.jit(partial(hear, thinker_spec(CONFIG)))(weights, audio)


@pytest.fixture(scope="module")
def batch(learner, weights, heard):
    """Completions of 1 to 5 tokens, so that a mean over parts is not the mean over tokens."""
    rng = np.random.default_rng(5)
    requests = [request_of("r", 100, seed=i, text=1 + i) for i in range(PROMPTS)]
    tokens = np.zeros((PROMPTS, 24), np.int32)
    for row, request in zip(tokens, requests, strict=True):
        row[: request.true_length] = request.tokens
    shape = (PROMPTS, GENERATIONS, LENGTH)
    mask = np.arange(LENGTH) < np.asarray([[1, 5], [2, 4], [3, 3], [5, 5]])[..., None]
    plain = GroupBatch(
        prompts=PromptBatch(tokens, np.asarray([r.true_length for r in requests], np.int32)),
        completion_tokens=rng.integers(6, 200, shape).astype(np.int32),
        mask=mask,
        advantages=rng.normal(size=shape[:2]).astype(np.float32),
        token_weights=token_weights(mask, "dapo"),
    )
    policy = np.asarray(learner.score(weights, plain, heard).log_probs)

    def near_policy(deviation):
        return policy + rng.normal(0, deviation, shape).astype(np.float32)

    return plain._replace(
        old_log_probs=near_policy(0.3), reference_log_probs=near_policy(0.5), sampler_log_probs=near_policy(0.1)
    )


def split(weights):
    tower = {key: value for key, value in weights.items() if key.startswith(TOWER)}
    return {key: value for key, value in weights.items() if key not in tower}, tower


def copied(tree):
    return jax.tree.map(lambda x: x.copy(), tree)


def accumulated(learner, trainable, frozen, batch, heard, sizes):
    """Gradients and report of a batch that passes in parts of these sizes."""
    total = None
    for end, size in zip(np.cumsum(sizes), sizes, strict=True):
        part, part_heard = jax.tree.map(lambda x, end=end, size=size: x[end - size : end], (batch, heard))
        gradients, aux = learner.gradients(trainable, frozen, part, part_heard)
        total = (gradients, aux) if total is None else (learner.add(total[0], gradients), total[1].merge(aux))
    return total


@pytest.fixture(scope="module")
def anchored(batch):
    """A learner with an entropy bonus and an anchor, and the batch with the last completions for transcripts."""
    given = batch.mask & (np.arange(GENERATIONS) == GENERATIONS - 1)[:, None]
    weighed = {"entropy_weights": token_weights(batch.mask & ~given, "dapo")}
    weighed |= {"transcript_weights": token_weights(given, "dapo")}
    return learner_of(entropy_coef=0.3, sft_coef=0.5), batch._replace(**weighed)


@pytest.mark.parametrize("with_transcripts", [False, True])
@pytest.mark.parametrize("sizes", [(2, 2), (1, 1, 1, 1), (1, 2, 1)])
def test_any_split_of_a_batch_gives_the_same_update(learner, weights, batch, heard, anchored, sizes, with_transcripts):
    learner, batch = anchored if with_transcripts else (learner, batch)
    trainable, frozen = split(weights)
    results = []
    for parts in ((PROMPTS,), sizes):
        gradients, aux = accumulated(learner, trainable, frozen, batch, heard, parts)
        state, report = learner.update(init_train_state(copied(trainable), learner._optimizer), gradients, {})
        results.append((gradients, aux, report.norm, state.trainable))
    for key, value in results[0][0].items():
        np.testing.assert_allclose(value, results[1][0][key], atol=1e-5 * np.abs(value).max(), err_msg=key)
        # Adam divides by the gradient's size, so entries that are nearly 0 may step anywhere within the rate.
        steady = np.abs(value) > 1e-3 * np.abs(value).max()
        after = [np.asarray(result[3][key]) for result in results]
        np.testing.assert_allclose(after[0][steady], after[1][steady], atol=1e-5, err_msg=key)
        assert (after[0] != np.asarray(trainable[key])).any(), key
    assert results[0][1].means() == pytest.approx(results[1][1].means(), rel=1e-4, abs=1e-6)
    np.testing.assert_allclose(results[0][2], results[1][2], rtol=1e-5)


def test_a_frozen_tower_has_neither_gradients_nor_optimizer_memory(learner, weights, batch, heard):
    trainable, frozen = split(weights)
    gradients, _ = learner.gradients(trainable, frozen, batch, heard)
    assert gradients.keys() == trainable.keys()
    assert not any(key.startswith(TOWER) for key in gradients)
    state = init_train_state(trainable, learner._optimizer)
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim)
    assert moments == 2 * sum(value.size for value in trainable.values())


def test_a_tower_that_learns_has_gradients_everywhere(learner, weights, batch, audio):
    gradients, _ = learner.gradients(weights, {}, batch, audio)
    assert gradients.keys() == weights.keys()
    for key, value in gradients.items():
        # A constant added to all keys shifts a query's scores alike, which the softmax does not see.
        if not key.endswith("k_proj.bias"):
            assert np.abs(value).max() > 1e-6, key


def test_the_decoder_learns_alike_whether_the_tower_hears_within_the_update_or_before(
    learner, weights, batch, audio, heard
):
    trainable, frozen = split(weights)
    before, aux_before = learner.gradients(trainable, frozen, batch, heard)
    within, aux_within = learner.gradients(weights, {}, batch, audio)
    assert aux_before.means() == pytest.approx(aux_within.means(), rel=1e-4, abs=1e-6)
    for key, value in before.items():
        np.testing.assert_allclose(value, within[key], atol=1e-5 * np.abs(value).max(), err_msg=key)


def test_scores_are_those_of_the_weights_given(learner, weights, batch, heard):
    """Whatever the policy became meanwhile, the reference is asked with its own weights."""
    reference = random_weights(CONFIG, seed=1)
    expected = jax.jit(partial(compute_log_probs, SPEC, audio_pad=AUDIO_PAD, temperature=0.9))
    scores = {}
    for name, given in (("policy", weights), ("reference", reference)):
        scores[name] = learner.score(given, batch, heard).log_probs
        at_once = expected(given, batch.prompts, heard, batch.completion_tokens).log_probs
        np.testing.assert_allclose(scores[name], at_once, atol=1e-5)
    assert np.abs(scores["policy"] - scores["reference"]).min() > 1e-4


def test_small_updates_of_bfloat16_weights_are_not_lost_in_rounding():
    """One step of 10⁻⁴ is a fortieth of what bfloat16 resolves at 1; a hundred of them are 0.01."""
    learner, gradients = learner_of(optax.sgd(1e-4)), {NORM: jnp.ones(3)}
    state = init_train_state({NORM: jnp.ones(3, jnp.bfloat16)}, learner._optimizer)
    state, _ = learner.update(state, gradients, {})
    assert (state.trainable[NORM] == 1).all()
    for _ in range(99):
        state, _ = learner.update(state, gradients, {})
    assert state.trainable[NORM].dtype == jnp.bfloat16
    np.testing.assert_allclose(state.master[NORM], 0.99, rtol=1e-5)
    np.testing.assert_array_equal(state.trainable[NORM], jnp.bfloat16(0.99))
    assert state.step == 100


def test_moments_of_bfloat16_weights_are_float32():
    state = init_train_state({"w": jnp.ones(3, jnp.bfloat16)}, optax.adam(1e-3))
    assert {leaf.dtype for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim} == {jnp.dtype("float32")}


def test_float32_weights_need_no_master_copy():
    assert init_train_state({"w": jnp.ones(3)}, optax.adam(1e-3)).master is None


def test_the_norm_told_is_that_before_clipping():
    learner = learner_of(optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0)))
    state = init_train_state({NORM: jnp.zeros(1), HEAD: jnp.zeros(1)}, learner._optimizer)
    state, report = learner.update(state, {NORM: jnp.asarray([3.0]), HEAD: jnp.asarray([4.0])}, {})
    assert report.norm == 5
    np.testing.assert_allclose([state.trainable[NORM][0], state.trainable[HEAD][0]], [-0.6, -0.8], rtol=1e-6)


def test_norms_are_told_by_part_of_the_model(learner, weights, batch, heard):
    trainable, frozen = split(weights)
    gradients, _ = learner.gradients(trainable, frozen, batch, heard)
    _, report = learner.update(init_train_state(copied(trainable), learner._optimizer), gradients, {})
    assert report.norms.keys() == {"attention", "embeddings", "mlp", "norms"}
    attention = np.concatenate([np.ravel(g) for key, g in gradients.items() if ".self_attn." in key])
    np.testing.assert_allclose(report.norms["attention"], np.linalg.norm(attention), rtol=1e-5)
    np.testing.assert_allclose(report.norm, np.linalg.norm(list(report.norms.values())), rtol=1e-5)


def some_state(learner, dtype=jnp.float32):
    """A state that one update has changed."""
    state = init_train_state({NORM: jnp.ones(3, dtype), HEAD: jnp.ones(2, dtype)}, learner._optimizer)
    state, _ = learner.update(state, some_gradients(), {})
    return state


def some_gradients(last=3.0):
    return {NORM: jnp.asarray([1.0, 2.0, last]), HEAD: jnp.ones(2)}


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_gradient_with_a_nan_or_an_infinity_changes_neither_weights_nor_moments(dtype, wrong):
    learner = learner_of(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1)))
    state = some_state(learner, dtype)
    before = jax.tree.map(np.asarray, state)
    for skipped in (1, 2):
        state, report = learner.update(state, some_gradients(wrong), {"loss": jnp.float32(1)})
        assert (bool(report.finite["loss"]), bool(report.finite["grad_norm"])) == (True, False)
        jax.tree.map(np.testing.assert_array_equal, state._replace(skipped=0), before._replace(skipped=0))
        assert state.skipped == skipped
    after, _ = learner.update(state, some_gradients(), {"loss": jnp.float32(1)})
    unspoiled, _ = learner.update(some_state(learner, dtype), some_gradients(), {})
    jax.tree.map(np.testing.assert_array_equal, after, unspoiled)
    assert (after.step, after.skipped) == (2, 0)


@pytest.mark.parametrize("name", ["rewards", "loss"])
def test_a_nan_in_anything_that_is_checked_skips_the_update(name):
    learner = learner_of()
    state, before = some_state(learner), some_state(learner)
    checked = {"rewards": np.ones((2, 3), np.float32), "loss": np.float32(1)}
    spoiled = checked | {name: checked[name] * np.float32(np.nan)}
    state, report = learner.update(state, some_gradients(), spoiled)
    assert {key for key, finite in report.finite.items() if not finite} == {name}
    jax.tree.map(np.testing.assert_array_equal, state.trainable, before.trainable)
    state, report = learner.update(state, some_gradients(), checked)
    assert all(report.finite.values())
    assert (np.asarray(state.trainable[NORM]) != np.asarray(before.trainable[NORM])).all()
