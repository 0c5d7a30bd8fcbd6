"""The sampling side of a GRPO step: weights to the engine, completions from it, and what these are worth."""

from collections.abc import Callable
from threading import Event
from typing import Any

import jax
import numpy as np

from audio_grpo.grpo import Rollout, advantage_settings, generate_offline_completions
from audio_grpo.parallel.moving import moved
from audio_grpo.rewards import RewardFunction
from audio_grpo.rollout import OfflineEngine
from audio_grpo.training.batches import audio_of, place, prompts_of
from audio_grpo.training.dynamic_sampling import Filled, Groups, fill, teaching
from audio_grpo.training.judging import Judging
from audio_grpo.training.loop import Trainer
from audio_grpo.training.stopwatch import Stopwatch
from audio_grpo.types import RequestResult


def generate_completions(trainer: Trainer, engine: OfflineEngine, batch: dict[str, Any], step: int) -> Rollout:
    """Sample G completions for each of the batch's clips from the weights as they are now."""
    move_weights(trainer, engine)
    return sample(trainer, engine, batch, step)


def move_weights(trainer: Trainer, engine: OfflineEngine) -> None:
    """Give the engine the weights as they are now; devices that only sample are sent those that learn.

    With `sample_ahead` they stay as they are now: an update that writes over the trainer's leaves them alone.
    """
    learned = trainer.state.trainable
    if trainer.session.sampler is None:
        if not trainer.session.config.sample_ahead:
            engine.weights = trainer.weights
            return
        # Those of the step before go first: there may not be room for both. So it is below.
        engine.weights = trainer.frozen
        engine.weights = {**trainer.frozen, **{key: value.copy() for key, value in learned.items()}}
        return
    before = engine.weights
    shardings = {key: before[key].sharding for key in learned}
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


def sample_groups(
    trainer: Trainer,
    engine: OfflineEngine,
    rewards: list[RewardFunction],
    batch: dict[str, Any],
    step: int,
    watch: Stopwatch,
    cancelled: Event | None = None,
) -> Filled:
    """A batch's completions from the engine's weights and what they are worth, after all rounds of dynamic sampling.

    Another thread may set `cancelled` to end it.

    Raises:
        concurrent.futures.CancelledError: it was set.
    """
    config, work = trainer.session.config, {"num_tokens": 0.0, "audio_seconds": 0.0}
    heard_before = engine.hearing.clips

    def sampled(batch: dict[str, Any], round_number: int) -> Groups:
        with Judging(trainer.session, rewards, batch, cancelled) as judging:
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
    of_engine = {
        "rollout/utilisation": engine.last_stats.utilisation,
        "rollout/slots": float(engine.last_stats.slots),
        "rollout/bursts": float(engine.last_stats.bursts),
        "rollout/prompts_prefilled": float(engine.last_stats.prompts),
        "rollout/clips_heard": float(engine.hearing.clips - heard_before),
    }
    return filled._replace(metrics={**of_engine, **filled.metrics, **work, **trainer.data.metrics})


def _note(trainer: Trainer, groups: Groups) -> None:
    """Remember how a round's clips did."""
    config = trainer.session.config
    means = groups.rewards.first(config.num_generations).total(config.reward_weights).mean(axis=1)
    rates = np.array([np.mean([answer.words.rate for answer in group]) for group in groups.answers])
    trainer.data.note(groups.batch["id"], means, rates, teaching(groups, advantage_settings(config)))


def _step_seed(seed: int, step: int, round_number: int) -> int:
    """A seed for each round of each step, so that a clip that comes again is not answered by the same draws."""
    return int(np.random.SeedSequence([seed, step, round_number]).generate_state(1)[0])
