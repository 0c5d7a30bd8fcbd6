"""Our side of a whole GRPO iteration: rollout, reference scoring and policy update of one workload."""

import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Float32, Int32
from ours import config_of, random_weights, special_of
from reference_work import Work, answers, requests, rewards
from worker import Job, peak_bytes, serve, timed

from audio_grpo.grpo import (
    LossSettings,
    Rollout,
    generate_offline_completions,
    group_advantages,
    grpo_loss_fn,
    token_weights,
)
from audio_grpo.rollout import OfflineEngine
from audio_grpo.training.batches import place
from audio_grpo.training.memory import release_freed_memory
from audio_grpo.training.programs import compile_learner, create_learner
from audio_grpo.training.session import create_session
from audio_grpo.types import AudioBatch, GroupBatch, PromptBatch


class Iteration:
    """A policy, its reference, its optimizer and one batch."""

    def __init__(self, work: Work) -> None:
        config = config_of(work, warmup_steps_fraction=0.0, freeze_router_params=False)
        special = special_of(work)
        self._session = replace(create_session(config), special=special)
        settings = LossSettings(epsilon=config.grpo_epsilon, beta=config.grpo_beta)
        loss = partial(grpo_loss_fn, settings=settings)
        self._learner = create_learner(self._session, "grpo", loss, temperature=config.decode_sampling_temperature)
        compile_learner(self._session, self._learner)
        release_freed_memory(self._session.mesh.local_devices[0])
        self._reference = jax.device_put(random_weights(), self._session.shardings)
        trainable = {key: self._reference[key].copy() for key in self._session.trainable}
        self._frozen = {key: value for key, value in self._reference.items() if key not in trainable}
        self._state = self._learner.start(trainable)
        self._engine = OfflineEngine(config, self._reference, special=special)
        asked = requests(work, special.audio_pad)
        self._ids = [request.id for request in asked]
        lengths = np.asarray([request.true_length for request in asked], np.int32)
        self._prompts = PromptBatch(np.stack([request.tokens for request in asked]), lengths)
        features = np.stack([request.audio_features for request in asked])
        self._audio = AudioBatch(features, np.full(len(asked), features.shape[2], np.int32))
        self._answers = answers(work)

    def iterate(self, seed: int, rewarded: bool = False) -> dict[str, Any]:
        """A whole iteration, each phase until its results are there.

        What was sampled is what is learned from where it is `rewarded`; otherwise it makes place for given answers.
        """
        peaks, started = {"start": peak_bytes()}, time.perf_counter()
        self._engine.weights = {**self._frozen, **self._state.trainable}
        seconds, self._rollout = timed(partial(self._sampled, seed))
        self._engine.weights = {}  # the update takes the policy's buffers for its results
        peaks["rollout"] = peak_bytes()
        learned = self._learned(*self._rewarded()) if rewarded else self.learn()
        told = {"seconds": time.perf_counter() - started, "rollout": seconds, **learned}
        return {**told, "peaks": {**peaks, **learned["peaks"]}}

    def learn(self) -> dict[str, Any]:
        """Reference scoring and policy update of given answers to the newest rollout's clips."""
        return self._learned(*self._answers)

    def _sampled(self, seed: int) -> Rollout:
        return generate_offline_completions(self._engine, self._prompts, self._audio, self._ids, seed=seed)

    def _rewarded(self) -> tuple[Int32[np.ndarray, "B G C"], Float32[np.ndarray, "B G"]]:
        tokens = self._rollout.tokens
        return tokens, group_advantages(rewards(tokens).astype(np.float32)).values

    def _learned(self, tokens: Int32[np.ndarray, "B G C"], advantages: Float32[np.ndarray, "B G"]) -> dict[str, Any]:
        scoring_seconds, batch = timed(partial(self._scored, tokens, advantages))
        peaks = {"scoring": peak_bytes()}
        update_seconds, told = timed(partial(self._update, batch))
        peaks["update"] = peak_bytes()
        return {"scoring": scoring_seconds, "update": update_seconds, **told, "peaks": peaks}

    def _scored(self, tokens: Int32[np.ndarray, "B G C"], advantages: Float32[np.ndarray, "B G"]) -> GroupBatch:
        mask = np.ones(tokens.shape, bool)
        batch = GroupBatch(
            prompts=self._prompts,
            completion_tokens=tokens,
            mask=mask,
            advantages=advantages,
            token_weights=token_weights(mask, "grpo"),
            sampler_log_probs=self._rollout.log_probs,
        )
        scores = self._learner.score(self._reference, *self._placed(batch))
        return batch._replace(reference_log_probs=np.asarray(scores.log_probs))

    def _placed(self, batch: GroupBatch) -> tuple[GroupBatch, Any]:
        return place(self._session.mesh, (batch, self._rollout.heard))

    def _update(self, batch: GroupBatch) -> dict[str, float]:
        release_freed_memory(self._session.mesh.local_devices[0])
        gradients, aux = self._learner.gradients(self._state.trainable, self._frozen, *self._placed(batch))
        checked = {"sampler_log_probs": batch.sampler_log_probs, "rewards": batch.advantages, "loss": aux.loss}
        self._state, report = jax.block_until_ready(self._learner.update(self._state, gradients, checked))
        return {"gradient_norm": float(report.norm), "entropy": aux.means()["entropy"]}


def _start(work: Mapping[str, Any]) -> Mapping[str, Job]:
    iteration = Iteration(Work(**work))
    return {"iterate": iteration.iterate, "learn": iteration.learn}


if __name__ == "__main__":
    serve(_start)
