"""Checks of the audio's way into the model and of its gradients' way back."""

from collections.abc import Collection
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Array, Float

from audio_grpo.audio import log_mel
from audio_grpo.grpo import Learner, grpo_loss_fn, loss_settings
from audio_grpo.grpo.learner import Heard
from audio_grpo.model.audio_tower import PREFIX
from audio_grpo.model.lora import A
from audio_grpo.training.batches import audio_of
from audio_grpo.training.freezing import frozen_weights
from audio_grpo.training.loop import Trainer, gradients, score
from audio_grpo.training.optimizer import create_optimizer
from audio_grpo.training.transcripts import target_groups
from audio_grpo.training.verify.check import Finding, rounding, span
from audio_grpo.types import GroupBatch

_AUDIBLE = 1e-4
"""A model that does not hear gives exactly the same numbers, in any precision: one program computes both."""
_FURTHER_TOKENS = 8
_MAY_BE_ZERO = ("self_attn.k_proj.bias", A)
"""The bias moves all of a query's attention scores alike, which softmax does not see: its gradient is rounding,
possibly 0. That of an adapter's A is 0 while its B is."""


def audio_is_heard(trainer: Trainer, batch: dict[str, Any]) -> Finding:
    """Each reference transcript gets other log-probabilities when its clip is replaced by silence."""
    silence = np.zeros_like(batch["audios"])
    for row, samples, frames in zip(silence, batch["samples"], batch["audios_true_length"], strict=True):
        row[:, :frames] = log_mel(np.zeros_like(samples), len(row))[:, :frames]
    change = _largest_change(trainer, batch, {**batch, "audios": silence})
    return Finding(
        bool((change > _AUDIBLE).all()),
        f"silence in place of the clip changes the log-probabilities of {len(change)} reference transcripts by "
        f"{span(change)}; more than {_AUDIBLE} is asked",
    )


def padding_changes_nothing(trainer: Trainer, batch: dict[str, Any]) -> Finding:
    """Each reference transcript keeps its log-probabilities when clip and prompt are padded further."""
    session = trainer.session
    column, frames = session.config.prompt_column, session.spec.audio.chunk_frames
    tokens = np.pad(batch[column], ((0, 0), (0, _FURTHER_TOKENS)), constant_values=session.special.pad)
    audios = np.pad(batch["audios"], ((0, 0), (0, 0), (0, frames)))
    change = _largest_change(trainer, batch, {**batch, column: tokens, "audios": audios})
    bound = rounding(session.spec)
    return Finding(
        bool((change <= bound.token).all()),
        f"{frames} frames and {_FURTHER_TOKENS} tokens of further padding change the log-probabilities of "
        f"{len(change)} reference transcripts by {span(change)}; at most {bound.token} is asked in {bound.dtype}",
    )


def tower_learns_only_if_configured(trainer: Trainer, groups: GroupBatch, heard: Heard) -> Finding:
    """The run takes no gradient for a frozen audio tower, and one for each tensor of a tower that learns."""
    taken, _ = gradients(trainer, groups, heard)
    of_tower = {key: value for key, value in taken.items() if key.startswith(PREFIX)}
    session = trainer.session
    learning = session.adapters or session.base.keys() - frozen_weights(session.config, session.base).keys()
    asked = [key for key in learning if key.startswith(PREFIX)]
    wrong = _norms({key: value for key, value in of_tower.items() if key not in asked})
    if wrong:
        return Finding(
            False,
            f"gradients are taken for {len(wrong)} frozen tensors of the tower, of norm {span([*wrong.values()])}",
        )
    if asked:
        return _all_non_zero(asked, of_tower, "of the tower's tensors that are not frozen")
    return Finding(True, f"no gradient is taken for the frozen tower, but for {len(taken)} tensors of the decoder")


def tower_can_learn(trainer: Trainer, batch: dict[str, Any], groups: GroupBatch) -> Finding:
    """With the audio tower trainable, gradients reach each of its tensors."""
    weights = trainer.weights
    tower = {key: value for key, value in weights.items() if key.startswith(PREFIX)}
    unfrozen = replace(
        trainer,
        learner=_unsharded_learner(trainer),
        state=trainer.state._replace(trainable=tower),
        frozen={key: value for key, value in weights.items() if key not in tower},
    )
    taken, _ = gradients(unfrozen, groups, audio_of(batch))
    return _all_non_zero(tower, taken, "of the tower's tensors, made trainable for one batch")


def _largest_change(trainer: Trainer, batch: dict[str, Any], changed: dict[str, Any]) -> Float[np.ndarray, "B"]:
    """By how much the log-probability of a clip's reference transcript changes, at the token that changes most."""
    scores = []
    for version in (batch, changed):
        groups = target_groups(trainer.session, version)
        scores.append(np.where(groups.mask, score(trainer, trainer.weights, groups, audio_of(version)), 0))
    return np.abs(scores[0] - scores[1]).max(axis=(1, 2))


def _unsharded_learner(trainer: Trainer) -> Learner:
    """A learner for any share of the weights: the run's own expects the run's trainable ones."""
    session = trainer.session
    return Learner(
        session.spec,
        create_optimizer(session.config),
        partial(grpo_loss_fn, settings=loss_settings(session.config)),
        audio_pad=session.special.audio_pad,
        temperature=session.config.decode_sampling_temperature,
        chunk_bytes=session.config.logits_chunk_mib << 20,
    )


def _all_non_zero(asked: Collection[str], of_tower: dict[str, Array], state: str) -> Finding:
    norms = _norms(of_tower)
    silent = [key for key in asked if not 0 < norms.get(key, 0) < np.inf and not key.endswith(_MAY_BE_ZERO)]
    measured = f"{state}, {len(asked) - len(silent)} of {len(asked)} have gradients"
    if norms:
        measured += f", of norm {span([*norms.values()])}"
    return Finding(not silent, f"{measured}; zero or not finite: {', '.join(silent)}" if silent else measured)


def _norms(of_tower: dict[str, Array]) -> dict[str, float]:
    return {key: float(np.linalg.norm(np.asarray(value))) for key, value in of_tower.items()}
