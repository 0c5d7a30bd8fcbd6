"""GRPO: sample, score, learn."""

import sys
import time
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Float32

from audio_grpo.config import Config
from audio_grpo.grpo import (
    Advantages,
    LossAux,
    Rollout,
    advantage_settings,
    compute_advantages,
    generate_offline_completions,
    grpo_loss_fn,
    loss_settings,
    mask_truncated,
    token_weights,
)
from audio_grpo.grpo.learner import Heard
from audio_grpo.parallel.mesh import batch_sharding
from audio_grpo.parallel.moving import moved
from audio_grpo.parallel.processes import is_first
from audio_grpo.rewards import EditCounts, RewardFunction, RewardTable, resolve_reward
from audio_grpo.rollout import OfflineEngine
from audio_grpo.training.answers import ScoredAnswer
from audio_grpo.training.batches import audio_of, place, prompts_of
from audio_grpo.training.judging import judge
from audio_grpo.training.loop import StepResult, Trainer, create_trainer, run_phase, score, update
from audio_grpo.training.run_folder import RunFolder
from audio_grpo.training.telemetry import SampledCompletion
from audio_grpo.types import GroupBatch

_TIMED = ("weights", "rollout", "rewards", "learn")


def setup_train_loop(config: Config) -> tuple[Trainer, OfflineEngine]:
    """Build a GRPO run: weights, reference, optimizer, data, and the engine that samples from the same weights.

    Devices that only sample get a copy of them all.
    """
    trainer = create_trainer(
        config,
        "grpo",
        partial(grpo_loss_fn, settings=loss_settings(config)),
        temperature=config.decode_sampling_temperature,
        with_reference=config.grpo_beta > 0,
    )
    sampler, weights = trainer.session.sampler, trainer.weights
    if sampler is not None:
        shardings = sampler.shardings
        weights = {key: moved(value, shardings[key]) for key, value in weights.items()}
    session = sampler or trainer.session
    engine = OfflineEngine(
        config,
        weights,
        mesh=session.mesh,
        special=session.special,
        tokenizer=session.tokenizer,
        store=session.clip_store,
    )
    return trainer, engine


def train_loop(config: Config) -> RunFolder:
    """Train from the configuration's start, or from the newest checkpoint of its run, to its last step."""
    trainer, engine = setup_train_loop(config)
    if is_first():
        all_do_both = " sample and learn by turns" if trainer.session.sampler is None else ""
        print(f"{trainer.session.devices}{all_do_both}.", file=sys.stderr)
    rewards = [resolve_reward(name) for name in config.reward_functions]

    def step(trainer: Trainer, batch: dict[str, Any], number: int) -> StepResult:
        return grpo_step(trainer, engine, rewards, batch, number)

    return run_phase(trainer, step)


def generate_completions(trainer: Trainer, engine: OfflineEngine, batch: dict[str, Any], step: int) -> Rollout:
    """Sample G completions for each of the batch's clips from the weights as they are now."""
    move_weights(trainer, engine)
    return sample(trainer, engine, batch, step)


def move_weights(trainer: Trainer, engine: OfflineEngine) -> None:
    """Give the engine the weights as they are now; devices that only sample are sent those that learn."""
    if trainer.session.sampler is None:
        engine.weights = trainer.weights
        return
    learned, before = trainer.state.trainable, engine.weights
    shardings = {key: before[key].sharding for key in learned}
    # Those of the step before go first: there may not be room for both.
    engine.weights = before = {key: value for key, value in before.items() if key not in learned}
    sent = {key: moved(value, shardings[key]) for key, value in learned.items()}
    engine.weights = jax.block_until_ready({**before, **sent})


def sample(trainer: Trainer, engine: OfflineEngine, batch: dict[str, Any], step: int) -> Rollout:
    """Sample G completions for each of the batch's clips from the engine's weights."""
    config = trainer.session.config
    prompts = prompts_of(batch, config.prompt_column)
    audio = place((trainer.session.sampler or trainer.session).mesh, audio_of(batch))
    return generate_offline_completions(engine, prompts, audio, batch["id"], seed=_step_seed(config.seed, step))


def grpo_step(
    trainer: Trainer, engine: OfflineEngine, rewards: list[RewardFunction], batch: dict[str, Any], step: int
) -> StepResult:
    """Sample, score and learn from one batch."""
    clock = [time.perf_counter()]
    move_weights(trainer, engine)
    clock.append(time.perf_counter())
    heard_before = engine.hearing.clips
    rollout = sample(trainer, engine, batch, step)
    clock.append(time.perf_counter())
    table, answers = judge(trainer.session, rewards, batch, rollout)
    total = table.total(trainer.session.config.reward_weights)
    advantages = compute_advantages(table.values, advantage_settings(trainer.session.config))
    clock.append(time.perf_counter())
    aux, norm = learn(trainer, batch, rollout, advantages.values)
    clock.append(time.perf_counter())
    seconds = np.diff(clock)
    metrics = {
        "reward": float(total.mean()),
        **_reward_metrics(table, advantages),
        "wer": sum((answer.words for group in answers for answer in group), EditCounts()).rate,
        **_length_metrics(rollout),
        **_rollout_metrics(engine),
        "rollout/clips_heard": float(engine.hearing.clips - heard_before),
        **aux.means(),
        "grad_norm": norm,
        "num_tokens": float(rollout.mask.sum() + batch[f"{trainer.session.config.prompt_column}_true_length"].sum()),
        **{f"seconds/{name}": float(s) for name, s in zip(_TIMED, seconds, strict=True)},
    }
    return StepResult(metrics, _shown_completions(trainer, batch, rollout, table, total, advantages, answers, step))


def learn(
    trainer: Trainer, batch: dict[str, Any], rollout: Rollout, advantages: Float32[np.ndarray, "B G"]
) -> tuple[LossAux, float]:
    """`num_iterations` updates on one batch of completions; returns the last one's report and gradient norm."""
    groups, heard = learner_batch(trainer, batch, rollout, advantages)
    reports = [update(trainer, groups, heard) for _ in range(trainer.session.config.num_iterations)]
    return reports[-1]


def learner_batch(
    trainer: Trainer, batch: dict[str, Any], rollout: Rollout, advantages: Float32[np.ndarray, "B G"]
) -> tuple[GroupBatch, Heard]:
    """What is learned from a batch of completions, with the scores that stay fixed meanwhile, and what was said."""
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
    )
    # A tower that learns must hear within the update; a frozen one has heard already, perhaps on other devices.
    frozen = config.freeze_audio_encoder_params
    heard = moved(rollout.heard, batch_sharding(trainer.session.mesh)) if frozen else audio_of(batch)
    if trainer.reference is not None:
        reference = score(trainer, trainer.reference, groups, heard)
        groups = groups._replace(reference_log_probs=reference)
    if config.num_iterations > 1:
        groups = groups._replace(old_log_probs=score(trainer, trainer.weights, groups, heard))
    return groups, heard


def _reward_metrics(table: RewardTable, advantages: Advantages) -> dict[str, float]:
    metrics = {
        "reward_std": advantages.reward_std,
        "frac_reward_zero_std": advantages.frac_reward_zero_std,
    }
    for name, values in zip(table.names, table.values, strict=True):
        metrics[f"rewards/{name}/mean"] = float(values.mean())
        metrics[f"rewards/{name}/std"] = float(values.std())
    return metrics


def _rollout_metrics(engine: OfflineEngine) -> dict[str, float]:
    stats = engine.last_stats
    return {
        "rollout/utilisation": stats.utilisation,
        "rollout/slots": float(stats.slots),
        "rollout/bursts": float(stats.bursts),
        "rollout/prompts_prefilled": float(stats.prompts),
    }


def _length_metrics(rollout: Rollout) -> dict[str, float]:
    lengths = rollout.mask.sum(axis=2)
    reasons = [reason for group in rollout.finish_reasons for reason in group]
    return {
        "completions/mean_length": float(lengths.mean()),
        "completions/min_length": float(lengths.min()),
        "completions/max_length": float(lengths.max()),
        "completions/clipped_ratio": reasons.count("length") / len(reasons),
    }


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


def _step_seed(seed: int, step: int) -> int:
    """A seed for each step, so that a clip that comes again is not answered by the same draws."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1)[0])
