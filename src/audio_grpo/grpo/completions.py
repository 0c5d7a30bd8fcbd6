"""Rollout of a batch: the engine's completions as padded arrays."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int32

from audio_grpo.rollout import OfflineEngine
from audio_grpo.types import AudioBatch, FinishReason, PromptBatch, RequestResult


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
    engine: OfflineEngine,
    prompts: PromptBatch,
    audio: AudioBatch,
    ids: Sequence[str],
    *,
    seed: int,
    on_done: Callable[[int, RequestResult], None] | None = None,
) -> Rollout:
    """Sample the engine's G completions for each prompt; each clip is heard once.

    `on_done` is told each prompt's index and result while others are still being answered.
    """
    heard = engine.hear(audio)

    def listen(indices: Sequence[int | None]) -> Float[Array, "b A D"]:
        return heard[jnp.asarray([0 if i is None else i for i in indices])]

    results: dict[int, RequestResult] = {}
    for b, result in engine.start(prompts, listen, ids, seed=seed):
        results[b] = result
        if on_done is not None:
            on_done(b, result)
    shape = (len(ids), engine.settings.generations, engine.settings.completion_length)
    tokens, mask = np.full(shape, engine.special.pad, np.int32), np.zeros(shape, bool)
    log_probs, log_kept = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    for b, result in results.items():
        for g, completion in enumerate(result.completions):
            length = len(completion.token_ids)
            tokens[b, g, :length] = completion.token_ids
            log_probs[b, g, :length] = completion.logprobs
            log_kept[b, g, :length] = completion.log_kept
            mask[b, g, :length] = True
    reasons: list[list[FinishReason]] = [
        [completion.finish_reason for completion in results[b].completions] for b in range(len(ids))
    ]
    return Rollout(tokens, mask, log_probs, log_kept, reasons, heard)
