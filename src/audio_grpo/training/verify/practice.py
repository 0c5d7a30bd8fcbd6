"""Some real steps of GRPO, and checks of what they do to the loss and to the weights."""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

from audio_grpo.grpo import (
    Rollout,
    TokenScores,
    advantage_settings,
    compute_advantages,
    grpo_loss_fn,
    loss_settings,
)
from audio_grpo.grpo.learner import Heard
from audio_grpo.rewards import RewardFunction
from audio_grpo.rollout import OfflineEngine
from audio_grpo.training.answers import decode_completions, token_ids
from audio_grpo.training.judging import reward_table
from audio_grpo.training.learning import learn
from audio_grpo.training.loop import Trainer, score
from audio_grpo.training.sampling import generate_completions
from audio_grpo.training.verify.check import Finding, span
from audio_grpo.types import GroupBatch

STEPS = 5


class Practice(NamedTuple):
    """What the steps told."""

    losses: list[float]
    gradient_norms: list[float]
    made_up: int
    """Steps in which all rewards of each group were equal, so that advantages were made up."""


class Snapshot(NamedTuple):
    """Fingerprints of all weights at one time: equal ones mean bit-equal weights."""

    frozen: dict[str, str]
    learned: dict[str, str]
    """As the optimizer keeps them, in float32."""
    stored: dict[str, str]
    """The same weights as the model runs on them."""


def practise(
    trainer: Trainer, engine: OfflineEngine, rewards: list[RewardFunction], batch: dict[str, Any], rollout: Rollout
) -> Practice:
    """Train for `STEPS` steps, the first of them on `batch` and its completions, the others on what comes next."""
    practice = Practice([], [], 0)
    for step_batch, step_rollout in _completions(trainer, engine, batch, rollout):
        advantages = _advantages(trainer, rewards, step_batch, step_rollout)
        if not advantages.any():
            advantages = made_up_advantages(*advantages.shape)
            practice = practice._replace(made_up=practice.made_up + 1)
        aux, told = learn(trainer, step_batch, step_rollout, advantages)
        practice.losses.append(float(aux.loss))
        practice.gradient_norms.append(told["grad_norm"])
    return practice


def loss_is_finite(practice: Practice) -> Finding:
    """Neither a loss nor a gradient is NaN or infinite."""
    losses = ", ".join(f"{loss:.4g}" for loss in practice.losses)
    return Finding(
        bool(np.isfinite([*practice.losses, *practice.gradient_norms]).all()),
        f"losses of {len(practice.losses)} steps {losses}; gradient norms {span(practice.gradient_norms)}",
    )


def probe_loss(trainer: Trainer, groups: GroupBatch, heard: Heard) -> float:
    """Loss of fixed completions against the policy that sampled them, under the weights as they are now.

    A step's own loss tells little: its completions come from the policy itself, so that it is 0 but for the KL.
    """
    log_probs = jnp.asarray(score(trainer, trainer.weights, groups, heard))
    scores = TokenScores(log_probs, entropy=jnp.zeros_like(log_probs))
    fixed = jax.tree.map(jnp.asarray, groups._replace(old_log_probs=groups.sampler_log_probs))
    return float(grpo_loss_fn(scores, fixed, loss_settings(trainer.session.config))[0])


def loss_changes(practice: Practice, start: float, end: float) -> Finding:
    """The steps change the loss of the first batch's completions."""
    measured = (
        f"{len(practice.losses)} steps at the peak learning rate take the loss of the first completions, with made-up "
        f"advantages from 1 to -1, from {start:.6g} to {end:.6g}"
    )
    if practice.made_up:
        measured += (
            f"; in {practice.made_up} of the steps all rewards of each group were equal, which teaches nothing, so "
            "these advantages took their place there too"
        )
    return Finding(bool(np.isfinite(end)) and start != end, measured)


def weights_change_unless_frozen(before: Snapshot, after: Snapshot) -> Finding:
    """The steps change every weight that learns, and no bit of a frozen one."""
    same = [key for key in before.learned if before.learned[key] == after.learned[key]]
    moved = [key for key in before.frozen if before.frozen[key] != after.frozen.get(key)]
    stored = sum(before.stored[key] != after.stored[key] for key in before.stored)
    learned, frozen = len(before.learned), len(before.frozen)
    measured = (
        f"{learned - len(same)} of {learned} tensors that learn changed ({stored} in the precision they are stored in),"
        f" {frozen - len(moved)} of {frozen} frozen ones are bit-equal"
    )
    if same:
        measured += f"; unchanged: {', '.join(same)}"
    if moved:
        measured += f"; frozen but changed: {', '.join(moved)}"
    return Finding(not same and not moved, measured)


def snapshot(trainer: Trainer) -> Snapshot:
    """Fingerprints of the weights as they are now."""
    state = trainer.state
    stored = _fingerprints(state.trainable)
    learned = stored if state.master is None else _fingerprints(state.master)
    return Snapshot(frozen=_fingerprints(trainer.frozen), learned=learned, stored=stored)


def made_up_advantages(prompts: int, generations: int) -> Float32[np.ndarray, "B G"]:
    """From 1 to −1 in each group."""
    return np.tile(np.linspace(1, -1, generations, dtype=np.float32), (prompts, 1))


def _completions(
    trainer: Trainer, engine: OfflineEngine, batch: dict[str, Any], rollout: Rollout
) -> Iterator[tuple[dict[str, Any], Rollout]]:
    yield batch, rollout
    for step in range(2, STEPS + 1):
        following = next(trainer.data)
        yield following, generate_completions(trainer, engine, following, step)


def _advantages(
    trainer: Trainer, rewards: list[RewardFunction], batch: dict[str, Any], rollout: Rollout
) -> Float32[np.ndarray, "B G"]:
    texts = decode_completions(trainer.session, rollout.tokens, rollout.mask)
    table = reward_table(trainer.session, rewards, batch, texts, token_ids(rollout.tokens, rollout.mask))
    return compute_advantages(table.values, advantage_settings(trainer.session.config)).values


def _fingerprints(weights: Mapping[str, Array]) -> dict[str, str]:
    """One tensor at a time comes to the host."""
    return {key: hashlib.sha256(np.asarray(value).tobytes()).hexdigest() for key, value in weights.items()}
