"""Checks of what the engine samples and of what it earns."""

from typing import Any

import numpy as np

from audio_grpo.grpo import Rollout
from audio_grpo.grpo.learner import Heard
from audio_grpo.rewards import RewardFunction, resolve_reward
from audio_grpo.training.judging import reward_table
from audio_grpo.training.loop import Trainer, score
from audio_grpo.training.verify.check import Finding, rounding, span
from audio_grpo.types import GroupBatch

_ALWAYS = ("asr_wer_reward", "asr_cer_reward")


def completions_are_not_empty(rollout: Rollout, texts: list[list[str]]) -> Finding:
    """Every completion has a token, and some have text."""
    lengths = rollout.mask.sum(axis=2)
    written = sum(bool(text.strip()) for group in texts for text in group)
    return Finding(
        bool((lengths > 0).all()) and written > 0,
        f"{lengths.size} completions of {span(lengths, 'tokens')}; {written} of them have text",
    )


def sampler_and_learner_agree(trainer: Trainer, groups: GroupBatch, heard: Heard) -> Finding:
    """The learner gives every sampled token the log-probability that the sampler reported."""
    learner, sampler = score(trainer, trainer.weights, groups, heard), groups.sampler_log_probs
    gap = np.abs(learner - sampler)[groups.sampled]
    if not gap.size:
        return Finding(False, "no token was sampled to compare")
    bound = rounding(trainer.session.spec)
    return Finding(
        bool(gap.max() <= bound.token and gap.mean() <= bound.mean),
        f"largest gap {gap.max():.2g}, mean {gap.mean():.2g} of {gap.size} tokens; at most {bound.token} and "
        f"{bound.mean} are asked in {bound.dtype}",
    )


def rewards_are_finite(
    trainer: Trainer,
    rewards: list[RewardFunction],
    batch: dict[str, Any],
    texts: list[list[str]],
    ids: list[list[list[int]]],
) -> Finding:
    """WER, CER and the configured rewards of sampled completions, and their weighted sum, are finite."""
    built_in = reward_table(trainer.session, [resolve_reward(name) for name in _ALWAYS], batch, texts, ids)
    configured = reward_table(trainer.session, rewards, batch, texts, ids)
    values = dict(zip(built_in.names, built_in.values, strict=True))
    values |= dict(zip(configured.names, configured.values, strict=True))
    values["reward"] = configured.total(trainer.session.config.reward_weights)
    return Finding(
        all(np.isfinite(value).all() for value in values.values()),
        ", ".join(f"{name} {span(value)}" for name, value in values.items()),
    )
