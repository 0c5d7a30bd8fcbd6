"""GRPO: sample, score, learn."""

import sys
from functools import partial
from typing import Any

from audio_grpo.config import Config
from audio_grpo.grpo import grpo_loss_fn, loss_settings
from audio_grpo.parallel.moving import moved
from audio_grpo.parallel.processes import is_first
from audio_grpo.rewards import RewardFunction, resolve_reward
from audio_grpo.rollout import OfflineEngine
from audio_grpo.training.ahead import AheadSteps
from audio_grpo.training.learning import learn_groups
from audio_grpo.training.loop import StepResult, Trainer, create_trainer, run_phase, with_next_batch
from audio_grpo.training.run_folder import RunFolder
from audio_grpo.training.sampling import move_weights, sample_groups
from audio_grpo.training.stopwatch import Stopwatch


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
        how = " sample and learn " + ("at the same time" if config.sample_ahead else "by turns")
        print(f"{trainer.session.devices}{how if trainer.session.sampler is None else ''}.", file=sys.stderr)
    rewards = [resolve_reward(name) for name in config.reward_functions]

    def step(trainer: Trainer, batch: dict[str, Any], number: int) -> StepResult:
        return grpo_step(trainer, engine, rewards, batch, number)

    return run_phase(trainer, AheadSteps(engine, rewards) if config.sample_ahead else with_next_batch(step))


def grpo_step(
    trainer: Trainer, engine: OfflineEngine, rewards: list[RewardFunction], batch: dict[str, Any], step: int
) -> StepResult:
    """Sample, score and learn from one batch."""
    watch = Stopwatch()
    with watch("weights"):
        move_weights(trainer, engine)
    filled = sample_groups(trainer, engine, rewards, batch, step, watch)
    return learn_groups(trainer, filled, step, watch).timed(watch.metrics)
