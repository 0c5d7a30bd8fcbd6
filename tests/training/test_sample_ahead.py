"""Steps that sample the next batch while they learn: one step off-policy, weighed for it, and the same every time."""

import threading
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_runs import kept_programs, metrics_of, tiny_config, with_tones

from audio_grpo.config import initialize
from audio_grpo.errors import UserError
from audio_grpo.grpo import TokenScores, grpo_loss_fn, loss_settings
from audio_grpo.rewards import RewardFunction, resolve_reward
from audio_grpo.training import ahead, loop, sampling, setup_train_loop, train_loop
from audio_grpo.training.ahead import AheadSteps, beside
from audio_grpo.training.learning import learn_groups, learner_batch
from audio_grpo.training.loop import score
from audio_grpo.training.sampling import move_weights, sample_groups
from audio_grpo.training.session import create_grpo_session
from audio_grpo.training.stopwatch import Stopwatch

STEPS = 5
APART = {"inference_devices_per_replica": 2, "per_device_batch_size": 1}
CURRICULUM = {"dynamic_sampling_max_rounds": 1, "zero_std_skip_probability": 0.5, "zero_std_skip_after": 1}
"""The next batch's clips depend on what this one's earned."""


def varied(completion_ids, **_):
    """Some groups have equal rewards, others not."""
    return [float(ids[0] % 3 > 1) for ids in completion_ids]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = with_tones(tmp_path_factory.mktemp("ahead"))
    with kept_programs(folder / "programs"):
        yield folder


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    on_devices(monkeypatch, 1)


def on_devices(patch, count):
    patch.setattr(loop, "create_grpo_session", partial(create_grpo_session, devices=jax.devices()[:count]))


def config_of(folder, **changes):
    settings = {
        "steps": STEPS,
        "sample_ahead": True,
        "importance_sampling_correction": True,
        "importance_sampling_mode": "token_truncate",
        "enable_checkpointing": False,
        "learning_rate": 1e-2,
        "warmup_steps_fraction": 0.0,
        "per_device_batch_size": 2,
        "num_generations": 3,
        "reward_functions": [f"{__file__}:varied"],
    }
    return tiny_config(folder, **(settings | changes))


@pytest.fixture
def tokens(monkeypatch):
    """Those of every rollout from now on."""
    sampled, sample = [], sampling.sample

    def noting(*args):
        rollout = sample(*args)
        sampled.append(rollout.tokens)
        return rollout

    monkeypatch.setattr(sampling, "sample", noting)
    return sampled


def threads():
    """Those that sample ahead or judge."""
    return [thread for thread in threading.enumerate() if thread.name.startswith(("ahead", "judging"))]


def delayed_by_hand(config):
    """Every step's metrics where each is sampled, without a thread, from the weights of before the last update."""
    trainer, engine = setup_train_loop(config)
    rewards = [resolve_reward(name) for name in config.reward_functions]
    history, told = [], []
    for step in range(1, config.steps + 1):
        history.append({key: np.asarray(value) for key, value in trainer.state.trainable.items()})
        older = history[max(0, step - 2)]
        engine.weights = {
            key: jax.device_put(older.get(key, value), value.sharding) for key, value in engine.weights.items()
        }
        groups = sample_groups(trainer, engine, rewards, next(trainer.data), step, Stopwatch())
        told.append(learn_groups(trainer, groups, step, Stopwatch()).metrics)
    trainer.data.close()
    return told


@pytest.mark.parametrize(
    ("devices", "changes"),
    [(1, CURRICULUM), (1, {"lora_rank": 2, "num_iterations": 2}), (4, APART | CURRICULUM)],
)
def test_completions_are_those_of_the_weights_one_update_older(folder, devices, changes, tokens, monkeypatch):
    on_devices(monkeypatch, devices)
    name = "-".join([str(devices), *changes])
    told = metrics_of(train_loop(config_of(folder, run_name=name, **changes)))
    sampled = list(tokens)
    tokens.clear()
    expected = delayed_by_hand(config_of(folder, **changes))
    np.testing.assert_array_equal(sampled, tokens)
    assert [metrics["rollout/ahead"] for metrics in told] == [0, 1, 1, 1, 1]
    for ours, theirs in zip(told, expected, strict=True):
        assert {name: ours[name] for name in theirs} == theirs


def test_the_first_step_is_that_of_a_run_that_takes_turns_and_later_ones_are_not(folder, tokens):
    ahead_of = metrics_of(train_loop(config_of(folder, run_name="ahead")))
    sampled = list(tokens)
    tokens.clear()
    by_turns = metrics_of(train_loop(config_of(folder, run_name="by turns", sample_ahead=False)))
    assert ahead_of[0].pop("rollout/ahead") == 0
    assert ahead_of[0] == by_turns[0]
    np.testing.assert_array_equal(sampled[0], tokens[0])
    assert all((ours != theirs).any() for ours, theirs in zip(sampled[1:], tokens[1:], strict=True))


def test_a_run_is_the_same_whether_sampling_or_learning_takes_longer(folder, monkeypatch):
    """Each step's sides, one after the other has returned, in either order."""
    told, sides = [], {"sample_groups": lambda args: args[4] - 1, "learn_groups": lambda args: args[2]}
    for slow in sides:
        over = [threading.Event() for _ in range(STEPS + 1)]  # by the step that learns

        def in_order(run, step_of, over, waits):
            def side(*args):
                step = step_of(args)
                # The first batch is sampled, and the last one learned, with nothing beside it.
                assert not waits or step in (0, STEPS) or over[step].wait(timeout=60)
                told = run(*args)
                over[step].set()
                return told

            return side

        with monkeypatch.context() as patch:
            for name, step_of in sides.items():
                patch.setattr(ahead, name, in_order(getattr(ahead, name), step_of, over, name == slow))
            run = train_loop(config_of(folder, run_name=f"slow {slow}", **CURRICULUM))
        told.append((metrics_of(run), run.completions_path.read_text()))
    assert told[0] == told[1]


def test_a_run_that_is_killed_goes_on_bit_for_bit_from_its_checkpoint(folder, monkeypatch):
    changes = {"enable_checkpointing": True, "checkpoint_period": 2, **CURRICULUM}
    whole = train_loop(config_of(folder, run_name="whole", **changes))
    assert [metrics["rollout/ahead"] for metrics in metrics_of(whole)] == [0, 1, 0, 1, 0]
    config, learn = config_of(folder, run_name="killed", **changes), ahead.learn_groups

    def killed(trainer, groups, step, watch):
        if step == 3:
            raise KeyboardInterrupt
        return learn(trainer, groups, step, watch)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ahead, "learn_groups", killed)
        train_loop(config)
    resumed = train_loop(config)
    assert metrics_of(resumed) == metrics_of(whole)
    assert resumed.completions_path.read_text() == whole.completions_path.read_text()


def test_what_a_reward_function_raises_while_the_batch_before_is_learned_reaches_the_caller(folder):
    calls = []

    def failing(completions, **_):
        calls.append(completions)
        if len(calls) == 3:
            raise ValueError("the third prompt")
        return [0.0] * len(completions)

    trainer, engine = setup_train_loop(config_of(folder))
    with pytest.raises(ValueError, match="the third prompt"):
        AheadSteps(engine, [RewardFunction("failing", failing)])(trainer, 1)
    trainer.data.close()
    assert trainer.state.step == 1
    assert not threads()


def test_an_interrupted_step_ends_its_thread_before_all_prompts_are_judged(folder, monkeypatch):
    calls, reached = [], threading.Event()

    def slow(completions, **_):
        calls.append(completions)
        if len(calls) == 3:
            reached.set()
            time.sleep(0.3)
        return [0.0] * len(completions)

    def interrupted(*_):
        assert reached.wait(60)
        raise KeyboardInterrupt

    monkeypatch.setattr(ahead, "learn_groups", interrupted)
    trainer, engine = setup_train_loop(config_of(folder))
    with pytest.raises(KeyboardInterrupt):
        AheadSteps(engine, [RewardFunction("slow", slow)])(trainer, 1)
    trainer.data.close()
    assert len(calls) == 3
    assert not threads()


def test_a_body_that_raises_cancels_what_runs_beside_it_and_waits_for_its_end():
    ended = []
    with pytest.raises(KeyError), beside(lambda cancelled: ended.append(cancelled.wait(60))):
        raise KeyError
    assert ended == [True]


def test_only_what_learns_is_copied_for_the_sampler_and_an_update_leaves_the_copy_alone(folder):
    trainer, engine = setup_train_loop(config_of(folder))
    move_weights(trainer, engine)
    before = {key: np.asarray(value) for key, value in engine.weights.items()}
    assert all(engine.weights[key] is value for key, value in trainer.frozen.items())
    groups = sample_groups(trainer, engine, [RewardFunction("varied", varied)], next(trainer.data), 1, Stopwatch())
    learn_groups(trainer, groups, 1, Stopwatch())
    trainer.data.close()
    for key, value in before.items():
        np.testing.assert_array_equal(engine.weights[key], value, err_msg=key)
        assert (np.asarray(trainer.weights[key]) == value).all() == (key in trainer.frozen), key


def test_the_second_step_weighs_each_token_by_the_ratio_of_the_weights_that_learn_to_those_that_sampled(
    folder, monkeypatch
):
    """Against the learner's own scores under both sets of weights, and the gradient of Σ w · min(exp(π − s), 3) · A."""
    config = config_of(folder, steps=2, grpo_beta=0.0)
    trainer, engine = setup_train_loop(config)
    start = {key: np.asarray(value) for key, value in trainer.weights.items()}
    learned, learn = [], ahead.learn_groups

    def noting(trainer, filled, step, watch):
        (batch, rollout, table, _), _ = filled
        groups, heard = learner_batch(trainer, batch, rollout, table.values[0] - table.values[0].mean(1, keepdims=True))
        now = score(trainer, trainer.weights, groups, heard)
        then = score(trainer, {key: jnp.asarray(value) for key, value in start.items()}, groups, heard)
        learned.append((groups, rollout, now, then))
        return learn(trainer, filled, step, watch)

    monkeypatch.setattr(ahead, "learn_groups", noting)
    steps = AheadSteps(engine, [RewardFunction("varied", varied)])
    steps(trainer, 1)
    told = steps(trainer, 2).metrics
    trainer.data.close()
    groups, rollout, now, then = learned[1]
    mask = groups.mask
    np.testing.assert_allclose(groups.sampler_log_probs[mask], (then - rollout.log_kept)[mask], atol=1e-4)
    ratio = np.exp(now - groups.sampler_log_probs)
    assert np.abs(now - then)[mask].mean() > 1e-2
    assert told["policy_ratio/mean"] == 1
    assert told["sampling/importance_sampling_ratio/max"] == pytest.approx(np.minimum(ratio, 3)[mask].max(), rel=1e-3)
    assert told["sampling/importance_sampling_ratio/mean"] == pytest.approx(np.minimum(ratio, 3)[mask].mean(), rel=1e-3)

    def loss(log_probs):
        scores = TokenScores(log_probs, jnp.zeros_like(log_probs))
        return grpo_loss_fn(scores, jax.tree.map(jnp.asarray, groups), loss_settings(config))[0]

    expected = -np.minimum(ratio, 3) * groups.advantages[..., None] * np.where(mask, groups.token_weights, 0)
    assert np.abs(groups.advantages).max() > 0
    np.testing.assert_allclose(jax.grad(loss)(jnp.asarray(now)), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ([], "as if they were of the newest: set importance_sampling_correction to true"),
        (["importance_sampling_correction=true", "checkpoint_period=1"], "make checkpoint_period larger, or leave"),
    ],
)
def test_options_that_contradict_it_are_refused(overrides, sentence):
    with pytest.raises(UserError, match=sentence):
        initialize(["grpo_audio_qwen3_omni_test", "sample_ahead=true", *overrides])


def test_devices_that_all_sample_and_learn_are_refused(folder, monkeypatch):
    on_devices(monkeypatch, 4)
    with pytest.raises(UserError, match=r"on the same 4 devices at once, .* set inference_devices_per_replica below"):
        setup_train_loop(config_of(folder))


def test_several_processes_are_refused(folder, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="needs a run of one process, and this one has 2: start one process"):
        setup_train_loop(config_of(folder))
