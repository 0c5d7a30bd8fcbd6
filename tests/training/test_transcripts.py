"""Transcripts beside sampled completions: in the rewards, the advantages and the batch, and what is learned of them."""

from dataclasses import replace
from importlib import import_module

import jax
import numpy as np
import pytest
from tiny_runs import kept_programs, metrics_of, tiny_config, with_tones

from audio_grpo.errors import UserError
from audio_grpo.grpo import AdvantageSettings, mask_truncated, token_weights
from audio_grpo.rewards import RewardTable, resolve_reward
from audio_grpo.training import learning, sampling, setup_train_loop, train_loop
from audio_grpo.training.batches import audio_of, place
from audio_grpo.training.dynamic_sampling import Groups, teaching
from audio_grpo.training.grpo_loop import grpo_step
from audio_grpo.training.judging import reward_table
from audio_grpo.training.learning import learner_batch
from audio_grpo.training.loop import gradients
from audio_grpo.training.programs import create_learner, run_programs
from audio_grpo.training.session import create_session
from audio_grpo.training.transcripts import Transcripts, target_groups, transcript_ids, transcripts_of, with_transcripts
from audio_grpo.types import GroupBatch, PromptBatch

sft_loss_fn = import_module("audio_grpo.training.sft_loop").sft_loss_fn

B, G, C = 4, 2, 12
LOSS_TYPES = ("grpo", "bnpo", "dapo", "dr_grpo", "cispo", "sapo")
WER = [resolve_reward("asr_wer_reward")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = with_tones(tmp_path_factory.mktemp("transcripts"))
    with kept_programs(folder / "programs"):
        yield folder


def config_of(folder, **changes):
    return tiny_config(folder, enable_checkpointing=False, **changes)


def sampled_groups(loss_type="dapo", bonus=True):
    """B prompts with G completions; the second of the first prompt was cut off, and counts nothing."""
    rng = np.random.default_rng(0)
    mask = np.arange(C) < rng.integers(1, C + 1, (B, G))[..., None]
    mask = mask_truncated(mask, [["stop", "length"], *[["stop", "stop"]] * (B - 1)])
    return GroupBatch(
        prompts=PromptBatch(np.zeros((B, 3), np.int32), np.ones(B, np.int32)),
        completion_tokens=rng.integers(0, 1000, mask.shape).astype(np.int32),
        mask=mask,
        advantages=rng.normal(size=(B, G)).astype(np.float32),
        token_weights=token_weights(mask, loss_type),
        sampler_log_probs=rng.normal(size=mask.shape).astype(np.float32),
        entropy_weights=token_weights(mask, "dapo") if bonus else None,
    )


def some_transcripts():
    """Of 3 to 6 tokens."""
    return Transcripts(np.full((B, C), 7, np.int32), np.arange(C) < np.arange(3, 3 + B)[:, None])


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_an_injected_transcript_weighs_what_one_more_completion_does(loss_type):
    groups, written = sampled_groups(loss_type), some_transcripts()
    three = groups._replace(advantages=np.zeros((B, 3), np.float32))
    joined = with_transcripts(three, written, loss_type, injected=True)
    np.testing.assert_array_equal(joined.completion_tokens[:, :G], groups.completion_tokens)
    np.testing.assert_array_equal(joined.completion_tokens[:, G], written.tokens)
    np.testing.assert_array_equal(joined.mask[:, :G], groups.mask)
    np.testing.assert_array_equal(joined.mask[:, G], written.mask)
    np.testing.assert_array_equal(joined.token_weights, token_weights(joined.mask, loss_type))
    assert joined.advantages is three.advantages
    np.testing.assert_array_equal(joined.sampled[:, :G], groups.mask)
    assert not joined.sampled[:, G].any()


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_transcript_whose_cross_entropy_alone_is_learned_changes_nothing_for_the_policy(loss_type):
    groups = sampled_groups(loss_type)
    joined = with_transcripts(groups, some_transcripts(), loss_type, injected=False)
    for name in ("mask", "advantages", "token_weights", "sampler_log_probs", "entropy_weights"):
        np.testing.assert_array_equal(getattr(joined, name)[:, :G], getattr(groups, name), err_msg=name)
        assert not getattr(joined, name)[:, G].any(), name


@pytest.mark.parametrize("injected", [True, False])
def test_tokens_of_transcripts_weigh_alike_in_the_cross_entropy_and_nothing_in_the_entropy(injected):
    written = some_transcripts()
    joined = with_transcripts(sampled_groups(), written, "grpo", injected=injected)
    np.testing.assert_allclose(joined.transcript_weights[:, G], written.mask / written.mask.sum(), rtol=1e-6)
    assert not joined.transcript_weights[:, :G].any()
    assert not joined.entropy_weights[:, G].any()
    assert with_transcripts(sampled_groups(bonus=False), written, "grpo", injected=injected).entropy_weights is None


@pytest.fixture(scope="module")
def tiny(folder):
    """The run that most tests look at: transcripts are injected and anchored to, and there is a bonus for entropy."""
    options = {"inject_transcript": True, "sft_coef": 0.5, "entropy_coef": 0.01}
    return setup_train_loop(config_of(folder, mask_truncated_completions=True, num_iterations=2, **options))


@pytest.fixture(scope="module")
def stepped(tiny):
    """A step's batch, what it learned from and what it told."""
    trainer, engine = tiny
    learned, batch = [], next(trainer.data)
    with pytest.MonkeyPatch.context() as patch:
        make = learning.learner_batch
        patch.setattr(learning, "learner_batch", lambda *args: learned.append((args, make(*args))) or learned[-1][1])
        result = grpo_step(trainer, engine, WER, batch, 1)
    ((_, _, rollout, advantages), (groups, _)) = learned[0]
    return batch, rollout, advantages, groups, result


def test_the_last_of_each_group_is_its_clips_transcript_with_the_stop_token(tiny, stepped):
    session = tiny[0].session
    batch, rollout, _, groups, _ = stepped
    assert groups.completion_tokens.shape == (4, G + 1, C)
    np.testing.assert_array_equal(groups.completion_tokens[:, :G], rollout.tokens)
    for text, tokens, mask in zip(
        batch["ground_truth_text"], groups.completion_tokens[:, G], groups.mask[:, G], strict=True
    ):
        *words, stop = tokens[mask].tolist()
        assert stop == session.special.stop[0]
        assert session.tokenizer.decode(words, skip_special_tokens=False) == text


def test_the_transcript_earns_rewards_and_its_advantage_in_its_group(tiny, stepped):
    config = tiny[0].session.config
    _, _, advantages, groups, result = stepped
    assert advantages.shape == (4, G + 1)
    np.testing.assert_array_equal(groups.advantages, advantages)
    np.testing.assert_allclose(advantages.sum(axis=1), 0, atol=1e-5)
    best = config.asr_format_bonus + config.asr_exact_match_bonus
    assert result.metrics["transcript/reward"] == pytest.approx(best)
    assert result.metrics["transcript/advantage"] == pytest.approx(advantages[:, G].mean())
    assert (advantages[:, G] > advantages[:, :G].max(axis=1)).all()


def test_rewards_answers_and_lengths_are_told_of_sampled_completions_alone(stepped):
    batch, rollout, _, _, result = stepped
    metrics = result.metrics
    assert metrics["reward"] == metrics["rewards/asr_wer_reward/mean"] < metrics["transcript/reward"]
    assert metrics["wer"] > 0
    assert metrics["completions/mean_length"] == pytest.approx(rollout.mask.sum(axis=2).mean())
    assert metrics["num_tokens"] == rollout.mask.sum() + batch["ar_true_length"].sum()
    assert metrics["frac_reward_zero_std"] == 0
    shown = [completion.completion for completion, _ in result.completions]
    assert len(shown) == 4
    assert not set(batch["ground_truth_text"]) & set(shown)


def test_a_transcript_has_no_gap_to_a_sampler_and_its_cross_entropy_is_that_of_chance(stepped):
    metrics = stepped[-1].metrics
    assert metrics["sampling/sampling_logp_difference/max"] < 1e-4
    assert metrics["transcript/cross_entropy"] == pytest.approx(np.log(1024), abs=0.5)
    # With a bonus and an anchor, the policy's own loss has its own name.
    expected = metrics["policy_loss"] + 0.5 * metrics["transcript/cross_entropy"] - 0.01 * metrics["entropy"]
    assert metrics["loss"] == pytest.approx(expected, rel=1e-4)


def test_the_plan_counts_what_the_run_learns_from(tiny, stepped):
    trainer, _ = tiny
    groups = stepped[3]
    planned = {program.phase: program.arguments for program in run_programs(trainer.session)}
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), planned["gradients"][2])
    assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), groups)
    checked = planned["update"][2]
    assert checked["rewards"].shape == groups.advantages.shape
    assert checked["sampler_log_probs"].shape == groups.sampler_log_probs.shape


def test_rewards_are_those_of_the_completions_and_then_of_the_transcript(tiny):
    session, batch = tiny[0].session, next(tiny[0].data)
    wrong = session.tokenizer.encode("no such word")
    texts, ids = [["no such word"] * G] * 4, [[wrong] * G] * 4
    values = reward_table(session, WER, batch, texts, ids).values[0]
    assert values.shape == (4, G + 1)
    assert (values[:, :G] < values[:, G:]).all()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_anchors_gradient_is_that_of_supervised_training(folder, temperature):
    """Where no completion has an advantage and there is no KL, nothing else is learned."""
    config = config_of(folder, sft_coef=2.0, grpo_beta=0.0, decode_sampling_temperature=temperature)
    trainer, engine = setup_train_loop(config)
    batch = next(trainer.data)
    rollout = sampling.generate_completions(trainer, engine, batch, 1)
    groups, heard = learner_batch(trainer, batch, rollout, np.zeros((4, G), np.float32))
    anchored, aux = gradients(trainer, groups, heard)
    learner = create_learner(trainer.session, "sft", sft_loss_fn, temperature=temperature)
    heard = trainer.hearing(trainer.frozen, place(trainer.session.mesh, audio_of(batch)))
    expected, told = gradients(replace(trainer, learner=learner), target_groups(trainer.session, batch), heard)
    assert float(aux.loss) == pytest.approx(2 * float(told.loss), rel=1e-5)
    assert aux.means()["policy_loss"] == 0
    for key, value in expected.items():
        assert np.abs(value).max() > 0, key
        np.testing.assert_allclose(anchored[key], 2 * value, atol=2e-5 * np.abs(value).max(), err_msg=key)


def test_transcripts_are_learned_where_completions_teach_nothing(folder):
    """An untrained model's answers are all equally wrong, or nearly so: what it learns is to write transcripts."""
    run = train_loop(config_of(folder, run_name="anchored", sft_coef=1.0, grpo_beta=0.0, steps=8, learning_rate=1e-2))
    told = [metrics["transcript/cross_entropy"] for metrics in metrics_of(run)]
    assert told[-1] < told[0] - 1
    assert not any(name in metrics_of(run)[0] for name in ("transcript/reward", "transcript/advantage"))


def test_groups_teach_where_only_the_transcript_earns_something_else():
    rewards = np.float32([[-1, -1, 4], [4, 4, 4], [-1, 0, 4]])
    table = RewardTable(names=("r",), values=rewards[None])
    assert teaching(Groups({}, None, table, []), AdvantageSettings()).tolist() == [True, False, True]
    np.testing.assert_array_equal(table.first(2).total(), rewards[:, :2])


EXACT = """
def exact(completions, ground_truth_text, **_):
    return [float(text == truth) for text, truth in zip(completions, ground_truth_text)]
"""


@pytest.mark.parametrize("injected", [True, False])
def test_a_reward_that_no_completion_earns_teaches_by_the_transcript(folder, injected):
    (folder / "exact.py").write_text(EXACT)
    options = {"reward_functions": [f"{folder / 'exact.py'}:exact"], "dynamic_sampling_max_rounds": 1, "steps": 2}
    config = config_of(folder, run_name=f"exact-{injected}", inject_transcript=injected, grpo_beta=0.0, **options)
    for metrics in metrics_of(train_loop(config)):
        assert (metrics["reward"], metrics["reward_std"]) == (0, 0)
        assert metrics["frac_reward_zero_std"] == metrics["dynamic_sampling/rounds"] == (not injected)
        assert (metrics["grad_norm"] > 0) == injected


def test_a_transcript_that_does_not_fit_is_refused_by_its_name(folder):
    session = create_session(config_of(folder, inject_transcript=True))
    batch = {"id": ["long"], "ground_truth_text": ["1" * C], "language": [None]}
    for encode in (transcript_ids, transcripts_of, target_groups):
        with pytest.raises(UserError, match="The transcript of long has 13 tokens with its stop token"):
            encode(session, batch)
