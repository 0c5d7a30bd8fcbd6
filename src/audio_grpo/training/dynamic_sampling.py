"""Dynamic sampling: groups that teach nothing make room for those of further prompts (DAPO, arXiv 2503.14476, 3.2).

A step has a fixed number of prompts, and its programs are compiled for that number. So every round samples as many
prompts again, and those of its groups that teach take the places of those that do not, as far as there are places.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from audio_grpo.grpo import AdvantageSettings, Rollout, compute_advantages
from audio_grpo.rewards import RewardTable
from audio_grpo.training.answers import ScoredAnswer
from audio_grpo.training.rows import picked, picked_batch


class Groups(NamedTuple):
    """B prompts, their completions, and what these are worth."""

    batch: dict[str, Any]
    """Of the data pipeline."""
    rollout: Rollout
    rewards: RewardTable
    """With `inject_transcript`, the transcript's too, as one more completion."""
    answers: list[list[ScoredAnswer]]


class Filled(NamedTuple):
    """A step's groups, and what it took to have them."""

    groups: Groups
    metrics: dict[str, float]


def teaching(groups: Groups, settings: AdvantageSettings) -> Bool[np.ndarray, "B"]:
    """Which groups have an advantage that is not 0; one that is NaN is none to be hidden."""
    return (compute_advantages(groups.rewards.values, settings).values != 0).any(axis=1)


def fill(
    groups: Groups, sample_further: Callable[[int], Groups], settings: AdvantageSettings, max_rounds: int
) -> Filled:
    """Replace groups that teach nothing, in their places.

    Args:
        groups: the step's own.
        sample_further: gives as many groups again, of the next prompts; called with the round's number, from 1 on.
        settings: how rewards become advantages.
        max_rounds: of them at most; what teaches nothing after the last one stays.
    """
    teaches = teaching(groups, settings)
    found, replaced, rounds = [teaches], 0, 0
    while not teaches.all() and rounds < max_rounds:
        rounds += 1
        further = sample_further(rounds)
        found.append(teaching(further, settings))
        useful, places = np.flatnonzero(found[-1]), np.flatnonzero(~teaches)
        count = min(len(useful), len(places))
        groups = _replaced(groups, places[:count], further, useful[:count])
        teaches = teaches.copy()
        teaches[places[:count]] = True
        replaced += count
    metrics = {
        "rounds": rounds,
        "replaced": replaced,
        "unused": sum(int(each.sum()) for each in found[1:]) - replaced,
        "frac_reward_zero_std": 1 - float(np.mean(found)),
    }
    return Filled(groups, {f"dynamic_sampling/{name}": float(value) for name, value in metrics.items()})


def _replaced(groups: Groups, places: Int[np.ndarray, "n"], further: Groups, rows: Int[np.ndarray, "n"]) -> Groups:
    source = np.arange(len(groups.answers))
    source[places] = len(source) + rows
    values = picked(groups.rewards.values.swapaxes(0, 1), further.rewards.values.swapaxes(0, 1), source)
    return Groups(
        batch=picked_batch(groups.batch, further.batch, source),
        rollout=Rollout(*(picked(*columns, source) for columns in zip(groups.rollout, further.rollout, strict=True))),
        rewards=RewardTable(names=groups.rewards.names, values=values.swapaxes(0, 1)),
        answers=picked(groups.answers, further.answers, source),
    )
