"""The learner's programs are compiled before there are weights, and a run's steps call just those."""

import logging
import re

import jax
import pytest
from tiny_runs import kept_programs, tiny_config, with_tones

from audio_grpo.rewards import resolve_reward
from audio_grpo.training import setup_train_loop
from audio_grpo.training.grpo_loop import grpo_step

LEARNERS = {"_scores", "program", "_applied"}
RUNS = {
    "plain": {},
    "parts": {"gradient_accumulation_steps": 2, "num_iterations": 2, "importance_sampling_correction": True},
    "adapters": {"lora_rank": 2, "lora_dropout": 0.1},
    "adapters twice": {"lora_rank": 2, "grpo_beta": 0.0, "num_iterations": 2},
    "tower": {"freeze_audio_encoder_params": False, "grpo_beta": 0.0},
    "transcripts": {"inject_transcript": True, "entropy_coef": 0.01, "weight_dtype": "bfloat16"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = with_tones(tmp_path_factory.mktemp("compiled"))
    with kept_programs(folder / "programs"):
        yield folder


@pytest.mark.parametrize("run", RUNS)
def test_no_step_compiles_scores_gradients_or_updates(folder, run, caplog):
    def compiled():
        told = re.findall(r"Finished XLA compilation of jit\((\w+)\)", caplog.text)
        caplog.clear()
        return LEARNERS & set(told)

    config = tiny_config(folder, enable_checkpointing=False, **RUNS[run])
    rewards = [resolve_reward(name) for name in config.reward_functions]
    with jax.log_compiles(), caplog.at_level(logging.WARNING, logger="jax"):
        trainer, engine = setup_train_loop(config)
        before = compiled()
        for step in (1, 2):
            grpo_step(trainer, engine, rewards, next(trainer.data), step)
        later = compiled()
    assert {"program", "_applied"} <= before
    # Fresh adapters' reference is the model without them, which is known only once weights are read.
    assert later == ({"_scores"} if run == "adapters" else set())
