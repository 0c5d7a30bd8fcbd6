"""GRPO: sample, score, learn."""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Float32

from audio_grpo.config import Config
from audio_grpo.grpo import (
    Advantages,
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
from audio_grpo.rewards import RewardFunction, RewardTable, resolve_reward
from audio_grpo.rollout import OfflineEngine
from audio_grpo.training.answers import ScoredAnswer
from audio_grpo.training.batches import audio_of, place, prompts_of
from audio_grpo.training.dynamic_sampling import Filled, Groups, fill, teaching
from audio_grpo.training.grpo_metrics import answer_metrics, length_metrics, reward_metrics, transcript_metrics
from audio_grpo.training.judging import Judging
from audio_grpo.training.loop import StepResult, Trainer, Update, create_trainer, run_phase, score, update
from audio_grpo.training.run_folder import RunFolder
from audio_grpo.training.stopwatch import Stopwatch
from audio_grpo.training.telemetry import SampledCompletion
from audio_grpo.training.transcripts import transcripts_of, with_transcripts
from audio_grpo.types import GroupBatch, RequestResult


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


def sample(
    trainer: Trainer,
    engine: OfflineEngine,
    batch: dict[str, Any],
    step: int,
    round_number: int = 0,
    on_done: Callable[[int, RequestResult], None] | None = None,
) -> Rollout:
    """Sample G completions for each of the batch's clips from the engine's weights, telling which prompts are done."""
    config = trainer.session.config
    prompts = prompts_of(batch, config.prompt_column)
    audio = place((trainer.session.sampler or trainer.session).mesh, audio_of(batch))
    seed = _step_seed(config.seed, step, round_number)
    return generate_offline_completions(engine, prompts, audio, batch["id"], seed=seed, on_done=on_done)


def grpo_step(
    trainer: Trainer, engine: OfflineEngine, rewards: list[RewardFunction], batch: dict[str, Any], step: int
) -> StepResult:
    """Sample, score and learn from one batch."""
    config, watch = trainer.session.config, Stopwatch()
    with watch("weights"):
        move_weights(trainer, engine)
    heard_before = engine.hearing.clips
    (batch, rollout, table, answers), of_sampling = sample_groups(trainer, engine, rewards, batch, step, watch)
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
        **_rollout_metrics(engine),
        "rollout/clips_heard": float(engine.hearing.clips - heard_before),
        **of_sampling,
        **aux.means(),
        **of_update,
        **watch.metrics,
    }
    return StepResult(metrics, _shown_completions(trainer, batch, rollout, sampled, total, advantages, answers, step))


def sample_groups(
    trainer: Trainer,
    engine: OfflineEngine,
    rewards: list[RewardFunction],
    batch: dict[str, Any],
    step: int,
    watch: Stopwatch,
) -> Filled:
    """A batch's completions and what they are worth, after as many rounds of dynamic sampling as it takes."""
    config, work = trainer.session.config, {"num_tokens": 0.0, "audio_seconds": 0.0}

    def sampled(batch: dict[str, Any], round_number: int) -> Groups:
        with Judging(trainer.session, rewards, batch) as judging:
            with watch("rollout"):
                rollout = sample(trainer, engine, batch, step, round_number, judging.take)
            with watch("rewards"):
                groups = Groups(batch, rollout, *judging.result())
                _note(trainer, groups)
        work["num_tokens"] += float(rollout.mask.sum() + batch[f"{config.prompt_column}_true_length"].sum())
        work["audio_seconds"] += float(batch["audio_seconds"].sum())
        return groups

    def sampled_further(round_number: int) -> Groups:
        with watch("data"):
            further = next(trainer.data)
        return sampled(further, round_number)

    first, most = sampled(batch, 0), config.dynamic_sampling_max_rounds
    filled = fill(first, sampled_further, advantage_settings(config), most) if most else Filled(first, {})
    return filled._replace(metrics={**filled.metrics, **work, **trainer.data.metrics})


def _note(trainer: Trainer, groups: Groups) -> None:
    """Remember how a round's clips did."""
    config = trainer.session.config
    means = groups.rewards.first(config.num_generations).total(config.reward_weights).mean(axis=1)
    rates = np.array([np.mean([answer.words.rate for answer in group]) for group in groups.answers])
    trainer.data.note(groups.batch["id"], means, rates, teaching(groups, advantage_settings(config)))


def learn(trainer: Trainer, batch: dict[str, Any], rollout: Rollout, advantages: Float32[np.ndarray, "B G"]) -> Update:
    """`num_iterations` updates on one batch of completions; returns what the last one told, and all skipped ones."""
    groups, heard = learner_batch(trainer, batch, rollout, advantages)
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
    if trainer.reference is not None:
        reference = score(trainer, trainer.reference.weights, groups, heard)
        groups = groups._replace(reference_log_probs=reference)
    if config.num_iterations > 1:
        groups = groups._replace(old_log_probs=score(trainer, trainer.weights, groups, heard))
    return groups, heard


def _rollout_metrics(engine: OfflineEngine) -> dict[str, float]:
    stats = engine.last_stats
    return {
        "rollout/utilisation": stats.utilisation,
        "rollout/slots": float(stats.slots),
        "rollout/bursts": float(stats.bursts),
        "rollout/prompts_prefilled": float(stats.prompts),
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


def _step_seed(seed: int, step: int, round_number: int) -> int:
    """A seed for each round of each step, so that a clip that comes again is not answered by the same draws."""
    return int(np.random.SeedSequence([seed, step, round_number]).generate_state(1)[0])
