"""Rollout of a batch: the engine's completions as padded arrays."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int32

from audio_grpo.rollout import OfflineEngine
from audio_grpo.types import AudioBatch, FinishReason, PromptBatch


class Rollout(NamedTuple):
    """G completions of each of B prompts."""

    tokens: Int32[np.ndarray, "B G C"]
    """Padded on the right with the pad token."""
    mask: Bool[np.ndarray, "B G C"]
    """True for sampled tokens, the stop token included."""
    log_probs: Float32[np.ndarray, "B G C"]
    """The sampler's, 0 at padding."""
    log_kept: Float32[np.ndarray, "B G C"]
    """Log of the share of the distribution that could be drawn, 0 at padding: `log_probs - log_kept` is the
    log-probability of the draw."""
    finish_reasons: list[list[FinishReason]]
    heard: Float[Array, "B A D"]
    """The clips' audio embeddings, heard once and good for the learner too while the tower is frozen."""


def generate_offline_completions(
    engine: OfflineEngine, prompts: PromptBatch, audio: AudioBatch, ids: Sequence[str], *, seed: int
) -> Rollout:
    """Sample the engine's G completions for each prompt; each clip is heard once."""
    heard = engine.hear(audio)

    def listen(indices: Sequence[int | None]) -> Float[Array, "b A D"]:
        return heard[jnp.asarray([0 if i is None else i for i in indices])]

    results = engine.generate(prompts, listen, ids, seed=seed)
    shape = (len(ids), engine.settings.generations, engine.settings.completion_length)
    tokens, mask = np.full(shape, engine.special.pad, np.int32), np.zeros(shape, bool)
    log_probs, log_kept = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    for b, result in enumerate(results):
        for g, completion in enumerate(result.completions):
            length = len(completion.token_ids)
            tokens[b, g, :length] = completion.token_ids
            log_probs[b, g, :length] = completion.logprobs
            log_kept[b, g, :length] = completion.log_kept
            mask[b, g, :length] = True
    reasons: list[list[FinishReason]] = [[c.finish_reason for c in result.completions] for result in results]
    return Rollout(tokens, mask, log_probs, log_kept, reasons, heard)
