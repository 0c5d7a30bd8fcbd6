from importlib import import_module

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_runs import metrics_of, tiny_config, with_tones

from audio_grpo.errors import UserError
from audio_grpo.grpo import TokenScores, token_weights
from audio_grpo.training import sft_loop
from audio_grpo.training.run_folder import RunFolder
from audio_grpo.training.session import create_session
from audio_grpo.training.weights import run_weights, starting_weights
from audio_grpo.types import GroupBatch, PromptBatch

# The package's attribute of this name is the function.
sft_module = import_module("audio_grpo.training.sft_loop")

TEXTS = ("seven", "red stop", "")


def batch_of(*texts, language="English"):
    count = len(texts)
    return {
        "ar": np.zeros((count, 8), np.int32),
        "ar_true_length": np.full(count, 8, np.int32),
        "ground_truth_text": list(texts),
        "language": [language] * count,
        "id": [f"clip-{n}" for n in range(count)],
    }


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    return create_session(tiny_config(tmp_path_factory.mktemp("sft")))


def test_the_target_is_the_transcript_and_the_stop_token(session):
    groups = sft_module.target_groups(session, batch_of(*TEXTS))
    assert groups.completion_tokens.shape == groups.mask.shape == (3, 1, 12)
    for text, tokens, mask in zip(TEXTS, groups.completion_tokens[:, 0], groups.mask[:, 0], strict=True):
        count = mask.sum()
        assert mask[:count].all()
        assert tokens[count - 1] == session.special.stop[0]
        assert session.tokenizer.decode(tokens[: count - 1].tolist(), skip_special_tokens=False) == text
        assert (tokens[count:] == session.special.pad).all()


def test_every_target_token_weighs_the_same(session):
    groups = sft_module.target_groups(session, batch_of(*TEXTS))
    np.testing.assert_allclose(groups.token_weights, groups.mask / groups.mask.sum(), rtol=1e-6)


@pytest.mark.parametrize(
    ("template", "target"),
    [
        ("reasoning", "<reasoning></reasoning><answer>red</answer>"),
        ("transcript", "red"),
        ("qwen3-asr", "language None<asr_text>red"),
    ],
)
def test_the_target_follows_the_template(tmp_path, template, target):
    session = create_session(tiny_config(tmp_path, template=template, max_target_length=172))
    groups = sft_module.target_groups(session, batch_of("red", language=None))
    tokens = groups.completion_tokens[groups.mask].tolist()
    assert session.tokenizer.decode(tokens[:-1], skip_special_tokens=False) == target


def test_a_transcript_that_just_fits_is_taken_and_a_longer_one_refused_by_its_name(session):
    """Each digit is a token, and the stop token needs its place too."""
    assert sft_module.target_groups(session, batch_of("1" * 11)).mask.sum() == 12
    with pytest.raises(
        UserError,
        match="The transcript of clip-1 has 13 tokens with its stop token, but max_target_length leaves 12: raise",
    ):
        sft_module.target_groups(session, batch_of("1", "1" * 12))


def test_the_loss_is_the_mean_negative_log_probability_of_target_tokens():
    mask = np.asarray([[[True, True, False]], [[True, False, False]]])
    log_probs = jnp.asarray([[[-1.0, -2.0, -50.0]], [[-6.0, -50.0, -50.0]]])
    prompts = PromptBatch(np.zeros((2, 1), np.int32), np.ones(2, np.int32))
    batch = GroupBatch(
        prompts=prompts,
        completion_tokens=np.zeros((2, 1, 3), np.int32),
        mask=mask,
        advantages=np.ones((2, 1), np.float32),
        token_weights=token_weights(mask, "dapo"),
    )
    loss, aux = sft_module.sft_loss_fn(TokenScores(log_probs, jnp.full((2, 1, 3), 0.5)), batch)
    np.testing.assert_allclose([loss, aux.loss], [3, 3], rtol=1e-6)
    np.testing.assert_allclose([aux.tokens, aux.entropy], [3, 1.5], rtol=1e-6)
    np.testing.assert_allclose(aux.merge(aux)[:3], 2 * np.asarray(aux[:3]), rtol=1e-6)


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    folder = with_tones(tmp_path_factory.mktemp("run"), count=8)
    config = tiny_config(folder, steps=30, learning_rate=1e-2, freeze_audio_encoder_params=False, run_name="sft")
    return config, sft_loop(config)


def test_the_loss_falls_from_that_of_chance(learned):
    losses = [metrics["loss"] for metrics in metrics_of(learned[1])]
    assert losses[0] == pytest.approx(np.log(1024), abs=0.5)
    assert np.mean(losses[-5:]) < 0.5 * losses[0]


def test_a_tower_that_is_not_frozen_learns_too(learned):
    config, _ = learned
    session = create_session(config)
    start, end = starting_weights(session, "sft"), run_weights(session, RunFolder.open(learned[1].path)).weights
    for key, value in start.items():
        assert (np.asarray(end[key]) != value).any(), key
