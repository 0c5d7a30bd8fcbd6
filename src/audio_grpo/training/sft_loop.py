"""Supervised warm start: cross-entropy on the transcripts, with the data, prompts and programs of GRPO."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from audio_grpo.config import Config
from audio_grpo.errors import UserError
from audio_grpo.grpo import TokenScores, token_weights
from audio_grpo.text import target_text
from audio_grpo.training.batches import audio_of, place, prompts_of
from audio_grpo.training.loop import StepResult, Trainer, create_trainer, run_phase, update
from audio_grpo.training.run_folder import RunFolder
from audio_grpo.training.session import Session
from audio_grpo.types import GroupBatch


class SftAux(NamedTuple):
    """What the loss reports, as sums over tokens."""

    loss: Float[Array, ""]
    tokens: Float[Array, ""]
    entropy: Float[Array, ""]

    def merge(self, other: "SftAux") -> "SftAux":
        """The report on two parts together."""
        return SftAux(*(a + b for a, b in zip(self, other, strict=True)))


def sft_loss_fn(scores: TokenScores, batch: GroupBatch) -> tuple[Float[Array, ""], SftAux]:
    """Mean negative log-probability of the whole batch's target tokens (in nats)."""
    loss = -jnp.where(batch.mask, scores.log_probs * batch.token_weights, 0.0).sum()
    entropy = jnp.where(batch.mask, scores.entropy, 0.0).sum()
    return loss, SftAux(loss, batch.mask.sum().astype(jnp.float32), entropy)


def sft_loop(config: Config) -> RunFolder:
    """Train on transcripts from the configuration's start, or from the newest checkpoint, to the last step."""
    trainer = create_trainer(config, "sft", sft_loss_fn, temperature=1.0, with_reference=False)
    return run_phase(trainer, sft_step)


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
        **told,
        "audio_seconds": float(batch["audio_seconds"].sum()),
        "num_tokens": tokens + float(groups.prompts.true_length.sum()),
    }
    return StepResult(metrics)


def target_groups(session: Session, batch: dict[str, Any]) -> GroupBatch:
    """Each prompt with its target text as its only completion, the stop token included.

    Raises:
        UserError: a target does not fit.
    """
    capacity = session.config.max_completion_length
    count = len(batch["ground_truth_text"])
    tokens = np.full((count, 1, capacity), session.special.pad, np.int32)
    mask = np.zeros((count, 1, capacity), bool)
    for b, (text, language) in enumerate(zip(batch["ground_truth_text"], batch["language"], strict=True)):
        target = target_text(session.config.template, text, language=language, tags=session.tags)
        ids = [*session.tokenizer.encode(target), session.special.stop[0]]
        if len(ids) > capacity:
            raise UserError(
                f"The transcript of {batch['id'][b]} has {len(ids)} tokens with its stop token, but max_target_length "
                f"leaves {capacity}: raise max_target_length or leave the record out."
            )
        tokens[b, 0, : len(ids)] = ids
        mask[b, 0, : len(ids)] = True
    return GroupBatch(
        prompts=prompts_of(batch, session.config.prompt_column),
        completion_tokens=tokens,
        mask=mask,
        advantages=np.ones((count, 1), np.float32),
        token_weights=token_weights(mask, "dapo"),
    )
