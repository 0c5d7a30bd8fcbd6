"""Rollout of a batch: the engine's completions as padded arrays."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int32

from audio_grpo.model.router import UNKNOWN
from audio_grpo.rollout import OfflineEngine
from audio_grpo.types import AudioBatch, FinishReason, PromptBatch, RequestResult, Routes


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
    routes: Routes | None = None
    """Experts that tokens went to, where the engine keeps them; −1 at padding."""


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
    routes = _routes(results, prompts.tokens.shape, shape) if engine.settings.router_replay else None
    return Rollout(tokens, mask, log_probs, log_kept, reasons, heard, routes)


def _routes(
    results: Mapping[int, RequestResult], prompts_shape: tuple[int, ...], completions_shape: tuple[int, ...]
) -> Routes:
    """Those of all results, padded."""
    some = results[0].prompt_routes
    assert some is not None
    width, dtype = some.shape[1], some.dtype
    prompts = np.full((*prompts_shape, width), UNKNOWN, dtype)
    completions = np.full((*completions_shape, width), UNKNOWN, dtype)
    for b, result in results.items():
        assert result.prompt_routes is not None
        prompts[b, : len(result.prompt_routes)] = result.prompt_routes
        for g, completion in enumerate(result.completions):
            completions[b, g, : len(completion.token_ids)] = completion.routes
    return Routes(prompts, completions)
