"""Clips' transcripts as the learner takes them: as the only completion of a clip, or one more beside those sampled."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int32, Shaped

from audio_grpo.config.schema import LossType
from audio_grpo.errors import UserError
from audio_grpo.grpo import token_weights
from audio_grpo.text import target_tokens
from audio_grpo.training.batches import prompts_of
from audio_grpo.training.session import Session
from audio_grpo.types import GroupBatch


class Transcripts(NamedTuple):
    """What the model should write for each of B clips."""

    tokens: Int32[np.ndarray, "B C"]
    """Padded on the right with the pad token."""
    mask: Bool[np.ndarray, "B C"]
    """True for tokens, the stop token included."""


def transcript_ids(session: Session, batch: dict[str, Any]) -> list[list[int]]:
    """Token ids of what the model should write for each of a batch's clips, the stop token included.

    Raises:
        UserError: one does not fit.
    """
    config = session.config
    rows = zip(batch["id"], batch["ground_truth_text"], batch["language"], strict=True)
    settings = {"tags": session.tags, "stop": session.special.stop[0]}
    encoded = []
    for name, text, language in rows:
        ids = target_tokens(session.tokenizer, config.template, text, language=language, **settings)
        if len(ids) > config.max_completion_length:
            raise UserError(
                f"The transcript of {name} has {len(ids)} tokens with its stop token, but max_target_length "
                f"leaves {config.max_completion_length}: raise max_target_length or leave the record out."
            )
        encoded.append(ids)
    return encoded


def transcripts_of(session: Session, batch: dict[str, Any]) -> Transcripts:
    """The same as arrays. Raises UserError likewise."""
    encoded = transcript_ids(session, batch)
    shape = (len(encoded), session.config.max_completion_length)
    tokens, mask = np.full(shape, session.special.pad, np.int32), np.zeros(shape, bool)
    for b, ids in enumerate(encoded):
        tokens[b, : len(ids)] = ids
        mask[b, : len(ids)] = True
    return Transcripts(tokens, mask)


def target_groups(session: Session, batch: dict[str, Any]) -> GroupBatch:
    """Each prompt with its transcript as its only completion.

    Raises:
        UserError: a transcript does not fit.
    """
    tokens, mask = (column[:, None] for column in transcripts_of(session, batch))
    return GroupBatch(
        prompts=prompts_of(batch, session.config.prompt_column),
        completion_tokens=tokens,
        mask=mask,
        advantages=np.ones(mask.shape[:2], np.float32),
        token_weights=token_weights(mask, "dapo"),
    )


def with_transcripts(
    groups: GroupBatch, transcripts: Transcripts, loss_type: LossType, *, injected: bool
) -> GroupBatch:
    """Each prompt's transcript after its G sampled completions, so that the prompt is computed once for all of them.

    Args:
        groups: the sampled completions.
        transcripts: of the same prompts.
        loss_type: decides what each completion weighs where there is one more.
        injected: whether transcripts count in the policy's loss; `groups` has their advantages then, the last of each
            prompt's G + 1. Otherwise only their cross-entropy is learned.
    """
    nothing = np.zeros(transcripts.mask.shape, np.float32)
    mask = _added(groups.mask, transcripts.mask & injected)
    weights = token_weights(mask, loss_type) if injected else _added(groups.token_weights, nothing)
    of_entropy = groups.entropy_weights
    return groups._replace(
        completion_tokens=_added(groups.completion_tokens, transcripts.tokens),
        mask=mask,
        advantages=groups.advantages if injected else _added(groups.advantages, nothing[:, 0]),
        token_weights=weights,
        sampler_log_probs=_added(groups.sampler_log_probs, nothing),
        entropy_weights=None if of_entropy is None else _added(of_entropy, nothing),
        transcript_weights=token_weights(_added(np.zeros_like(groups.mask), transcripts.mask), "dapo"),
    )


def _added(column: Shaped[Any, "B G ..."], row: Shaped[np.ndarray, "B ..."]) -> Shaped[np.ndarray, "B G+1 ..."]:
    return np.concatenate([column, row[:, None]], axis=1)
