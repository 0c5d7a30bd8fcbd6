"""Supervised warm start: cross-entropy on the transcripts, with the data, prompts and programs of GRPO."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from audio_grpo.config import Config
from audio_grpo.grpo import TokenScores
from audio_grpo.grpo.metrics import Metric
from audio_grpo.training.batches import audio_of, place
from audio_grpo.training.loop import StepResult, Trainer, create_trainer, run_phase, update, with_next_batch
from audio_grpo.training.run_folder import RunFolder
from audio_grpo.training.transcripts import target_groups
from audio_grpo.types import GroupBatch


class SftAux(NamedTuple):
    """What the loss reports: sums over tokens, and metrics of the experts where there are any."""

    loss: Float[Array, ""]
    tokens: Float[Array, ""]
    entropy: Float[Array, ""]
    metrics: dict[str, Metric]

    def merge(self, other: "SftAux") -> "SftAux":
        """The report on two parts together."""
        others: dict[str, Any] = other.metrics
        metrics = {name: metric.merge(others[name]) for name, metric in self.metrics.items()}
        return SftAux(self.loss + other.loss, self.tokens + other.tokens, self.entropy + other.entropy, metrics)


def sft_loss_fn(scores: TokenScores, batch: GroupBatch) -> tuple[Float[Array, ""], SftAux]:
    """Mean negative log-probability of the whole batch's target tokens (in nats)."""
    loss = -jnp.where(batch.mask, scores.log_probs * batch.token_weights, 0.0).sum()
    entropy = jnp.where(batch.mask, scores.entropy, 0.0).sum()
    return loss, SftAux(loss, batch.mask.sum().astype(jnp.float32), entropy, {})


def sft_loop(config: Config) -> RunFolder:
    """Train on transcripts from the configuration's start, or from the newest checkpoint, to the last step."""
    trainer = create_trainer(config, "sft", sft_loss_fn, temperature=1.0, with_reference=False)
    return run_phase(trainer, with_next_batch(sft_step))


def sft_step(trainer: Trainer, batch: dict[str, Any], _step: int) -> StepResult:
    """Learn one batch of transcripts."""
    session = trainer.session
    groups = target_groups(session, batch)
    heard: Any = audio_of(batch)
    if not session.tower_learns:
        heard = trainer.hearing(trainer.frozen, place(session.mesh, heard))
    aux, told = update(trainer, groups, heard)
    tokens = float(aux.tokens)
    metrics = {
        "loss": float(aux.loss),
        "entropy": float(aux.entropy) / tokens,
        **{name: metric.value() for name, metric in aux.metrics.items()},
        **told,
        "audio_seconds": float(batch["audio_seconds"].sum()),
        "num_tokens": tokens + float(groups.prompts.true_length.sum()),
    }
    return StepResult(metrics)
