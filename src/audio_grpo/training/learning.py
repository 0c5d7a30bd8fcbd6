"""The learning side of a GRPO step: advantages, scores that stay fixed, updates, and what the step tells."""

from typing import Any

import numpy as np
from jaxtyping import Float32

from audio_grpo.grpo import (
    Advantages,
    Rollout,
    advantage_settings,
    compute_advantages,
    mask_truncated,
    token_weights,
)
from audio_grpo.grpo.learner import Heard
from audio_grpo.parallel.mesh import batch_sharding
from audio_grpo.parallel.moving import moved
from audio_grpo.rewards import RewardTable
from audio_grpo.training.answers import ScoredAnswer
from audio_grpo.training.batches import audio_of, prompts_of
from audio_grpo.training.dynamic_sampling import Filled
from audio_grpo.training.grpo_metrics import answer_metrics, length_metrics, reward_metrics, transcript_metrics
from audio_grpo.training.loop import StepResult, Trainer, Update, score, update
from audio_grpo.training.memory import release_freed_memory
from audio_grpo.training.stopwatch import Stopwatch
from audio_grpo.training.telemetry import SampledCompletion
from audio_grpo.training.transcripts import transcripts_of, with_transcripts
from audio_grpo.types import GroupBatch


def learn_groups(trainer: Trainer, filled: Filled, step: int, watch: Stopwatch) -> StepResult:
    """Score and learn from a step's groups; what it tells has no seconds yet."""
    config = trainer.session.config
    (batch, rollout, table, answers), of_sampling = filled
    with watch("rewards"):
        advantages = compute_advantages(table.values, advantage_settings(config))
        sampled = table.first(config.num_generations)
        total = sampled.total(config.reward_weights)
        of_answers = answer_metrics(answers, batch["ground_truth_text"])
    with watch("learn"):
        aux, of_update = learn(trainer, batch, rollout, advantages.values)
    metrics = {
        **reward_metrics(sampled, total, advantages, batch["audio_seconds"]),
        **(transcript_metrics(table.total(config.reward_weights), advantages) if config.inject_transcript else {}),
        **of_answers,
        **length_metrics(rollout),
        **of_sampling,
        **aux.means(),
        **of_update,
    }
    return StepResult(metrics, _shown_completions(trainer, batch, rollout, sampled, total, advantages, answers, step))


def learn(trainer: Trainer, batch: dict[str, Any], rollout: Rollout, advantages: Float32[np.ndarray, "B G"]) -> Update:
    """`num_iterations` updates on one batch of completions; returns what the last one told, and all skipped ones."""
    groups, heard = learner_batch(trainer, batch, rollout, advantages)
    release_freed_memory(trainer.session.mesh.local_devices[0])  # gradients are the most that a step takes
    updates = [update(trainer, groups, heard) for _ in range(trainer.session.config.num_iterations)]
    names = {name for told in updates for name in told.metrics if name.startswith("skipped_updates")}
    skipped = {name: sum(told.metrics.get(name, 0.0) for told in updates) for name in sorted(names)}
    return updates[-1]._replace(metrics=updates[-1].metrics | skipped)


def learner_batch(
    trainer: Trainer, batch: dict[str, Any], rollout: Rollout, advantages: Float32[np.ndarray, "B G"]
) -> tuple[GroupBatch, Heard]:
    """What is learned from a batch of completions, with the scores that stay fixed meanwhile, and what was said.

    With `inject_transcript` the last of each prompt's advantages is its transcript's.
    """
    config = trainer.session.config
    mask = rollout.mask
    if config.mask_truncated_completions:
        mask = mask_truncated(mask, rollout.finish_reasons)
    groups = GroupBatch(
        prompts=prompts_of(batch, config.prompt_column),
        completion_tokens=rollout.tokens,
        mask=mask,
        advantages=advantages,
        token_weights=token_weights(mask, config.loss_type),
        sampler_log_probs=rollout.log_probs - rollout.log_kept * config.importance_sampling_correction,
        entropy_weights=token_weights(mask, "dapo") if config.entropy_coef > 0 else None,
        routes=rollout.routes,
    )
    if config.learns_transcripts:
        transcripts = transcripts_of(trainer.session, batch)
        groups = with_transcripts(groups, transcripts, config.loss_type, injected=config.inject_transcript)
    # A tower that learns must hear within the update; a frozen one has heard already, perhaps on other devices.
    learns = trainer.session.tower_learns
    heard = audio_of(batch) if learns else moved(rollout.heard, batch_sharding(trainer.session.mesh))
    fixed = {}
    if trainer.reference is not None:
        fixed["reference_log_probs"] = score(trainer, trainer.reference.weights, groups, heard)
    if config.num_iterations > 1:
        fixed["old_log_probs"] = score(trainer, trainer.weights, groups, heard)
    return groups._replace(**fixed), heard


def _shown_completions(
    trainer: Trainer,
    batch: dict[str, Any],
    rollout: Rollout,
    table: RewardTable,
    total: Float32[np.ndarray, "B G"],
    advantages: Advantages,
    answers: list[list[ScoredAnswer]],
    step: int,
) -> list[tuple[SampledCompletion, np.ndarray | None]]:
    """The completions of the batch's first prompts, as many as `log_completions` asks for."""
    count, generations = trainer.session.config.log_completions, total.shape[1]
    places = [divmod(i, generations) for i in range(min(count, total.size))]
    shown = []
    for b, g in places:
        answer = answers[b][g]
        completion = SampledCompletion(
            step=step,
            clip_id=batch["id"][b],
            language=batch["language"][b],
            reference=batch["ground_truth_text"][b],
            completion=answer.text,
            hypothesis=answer.answer,
            wer=answer.words.rate,
            rewards={name: float(values[b, g]) for name, values in zip(table.names, table.values, strict=True)},
            reward=float(total[b, g]),
            advantage=float(advantages.values[b, g]),
            length=int(rollout.mask[b, g].sum()),
            finish_reason=rollout.finish_reasons[b][g],
        )
        shown.append((completion, batch["samples"][b]))
    return shown
