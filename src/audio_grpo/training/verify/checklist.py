"""All lines in their order, on the weights, data and programs that `train` would begin with."""

import jax

from audio_grpo.config import Config
from audio_grpo.errors import UserError
from audio_grpo.parallel.processes import start_processes
from audio_grpo.rewards import RewardFunction, resolve_reward
from audio_grpo.rollout import OfflineEngine
from audio_grpo.training.answers import decode_completions, token_ids
from audio_grpo.training.batches import audio_of
from audio_grpo.training.grpo_loop import setup_train_loop
from audio_grpo.training.learning import learner_batch
from audio_grpo.training.loop import Trainer, split
from audio_grpo.training.sampling import generate_completions
from audio_grpo.training.verify.check import Check, attempt, line
from audio_grpo.training.verify.data import batch_is_sound, configuration_loads
from audio_grpo.training.verify.hearing import (
    audio_is_heard,
    padding_changes_nothing,
    tower_can_learn,
    tower_learns_only_if_configured,
)
from audio_grpo.training.verify.memory import memory_suffices, memory_use
from audio_grpo.training.verify.practice import (
    loss_changes,
    loss_is_finite,
    made_up_advantages,
    practise,
    probe_loss,
    snapshot,
    weights_change_unless_frozen,
)
from audio_grpo.training.verify.sampling import (
    completions_are_not_empty,
    rewards_are_finite,
    sampler_and_learner_agree,
)

_PEAK_RATE = {"learning_rate_schedule": "constant", "warmup_steps_fraction": 0.0}
"""A few steps of a warm-up may be too small to be seen in the weights."""


def verify_run(config: Config) -> list[Check]:
    """Try out a GRPO run from its starting weights for a few steps; nothing is written to its folder.

    Raises:
        UserError: the run could not begin: `train` would say the same; or it has several processes.
    """
    start_processes()
    if jax.process_count() > 1:
        raise UserError(
            f"verify looks at whole batches and weights, which {jax.process_count()} processes do not have: run it in "
            "one, on one host, with a configuration that fits there."
        )
    rewards = [resolve_reward(name) for name in config.reward_functions]
    trainer, engine = setup_train_loop(config.model_copy(update=_PEAK_RATE))
    try:
        return checklist(trainer, engine, rewards)
    finally:
        trainer.data.close()


def checklist(trainer: Trainer, engine: OfflineEngine, rewards: list[RewardFunction]) -> list[Check]:
    """All lines; the trainer takes a few steps.

    Raises:
        UserError: the data or the size of its batches does not do for the run.
    """
    session, batch = trainer.session, next(trainer.data)
    for _ in split(trainer, audio_of(batch)):
        pass  # raises where batches do not divide over the devices
    rollout = attempt(lambda: generate_completions(trainer, engine, batch, 1))
    ids = attempt(lambda: token_ids(rollout.result().tokens, rollout.result().mask))
    texts = attempt(lambda: decode_completions(session, rollout.result().tokens, rollout.result().mask))
    generations = engine.settings.generations + session.config.inject_transcript
    advantages = made_up_advantages(len(batch["id"]), generations)
    learned = attempt(lambda: learner_batch(trainer, batch, rollout.result(), advantages))
    checks = [
        line("configuration loads", lambda: configuration_loads(session)),
        line("batches have the right shapes", lambda: batch_is_sound(session, batch, trainer.data.skipped)),
        line("audio is heard", lambda: audio_is_heard(trainer, batch)),
        line("padding changes nothing", lambda: padding_changes_nothing(trainer, batch)),
        line("completions are not empty", lambda: completions_are_not_empty(rollout.result(), texts.result())),
        line("sampler and learner agree", lambda: sampler_and_learner_agree(trainer, *learned.result())),
        line("rewards are finite", lambda: rewards_are_finite(trainer, rewards, batch, texts.result(), ids.result())),
        line(
            "audio tower learns only if configured", lambda: tower_learns_only_if_configured(trainer, *learned.result())
        ),
    ]
    before, start = attempt(lambda: snapshot(trainer)), attempt(lambda: probe_loss(trainer, *learned.result()))
    practice = attempt(lambda: practise(trainer, engine, rewards, batch, rollout.result()))
    after, end = attempt(lambda: snapshot(trainer)), attempt(lambda: probe_loss(trainer, *learned.result()))
    return [
        *checks,
        line("loss is finite", lambda: loss_is_finite(practice.result())),
        line("loss changes", lambda: loss_changes(practice.result(), start.result(), end.result())),
        line("weights change unless frozen", lambda: weights_change_unless_frozen(before.result(), after.result())),
        line("memory suffices", lambda: memory_suffices(memory_use(session.mesh.devices.flatten().tolist()))),
        # After memory was measured, since a run with a frozen tower has no need of these gradients' room.
        line("audio tower can learn", lambda: tower_can_learn(trainer, batch, learned.result()[0])),
    ]
