"""Log-probabilities of given completions, with the vocabulary never spread out for more than a chunk of positions."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from audio_grpo.model.spec import ThinkerSpec
from audio_grpo.model.table import Weights
from audio_grpo.model.thinker import group_hidden, output_head
from audio_grpo.types import PromptBatch


class TokenScores(NamedTuple):
    """What the model thinks of each completion token."""

    log_probs: Float[Array, "B G C"]
    """Of the tempered full distribution."""
    entropy: Float[Array, "B G C"]
    """Of the distribution that the token was drawn from, in nats; carries no gradient."""


def compute_log_probs(
    spec: ThinkerSpec,
    weights: Weights,
    prompts: PromptBatch,
    heard: Float[Array, "B A D"],
    completions: Int[Array, "B G C"],
    *,
    audio_pad: int,
    temperature: float,
    chunk_size: int,
) -> TokenScores:
    """Score G completions of each of B prompts, whose audio embeddings are `heard`.

    Padding positions of a completion get values too; mask them. `chunk_size` token positions have logits at a time.
    """
    hidden = group_hidden(spec, weights, prompts, heard, completions, audio_pad)
    return chunked_log_probs(hidden, output_head(weights), completions, temperature, chunk_size)


def chunked_log_probs(
    hidden: Float[Array, "B G C D"],
    head: Float[Array, "V D"],
    targets: Int[Array, "B G C"],
    temperature: float,
    chunk_size: int,
) -> TokenScores:
    """Log-probabilities of `targets`; chunks run along C, so that a batch sharded along B stays where it is.

    The backward pass computes each chunk's logits again instead of keeping them.
    """
    groups, generations, length, _ = hidden.shape
    columns = max(1, min(length, chunk_size // (groups * generations)))
    chunks = -(-length // columns)
    padding = chunks * columns - length

    def split(x: Array) -> Array:
        padded = jnp.pad(x, ((0, 0), (0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 3))
        return jnp.moveaxis(padded.reshape(groups, generations, chunks, columns, *x.shape[3:]), 2, 0)

    @jax.checkpoint
    def score(_: None, chunk: tuple[Array, Array]) -> tuple[None, TokenScores]:
        x, target = chunk
        logits = jnp.einsum("bgcd,vd->bgcv", x, head.astype(x.dtype), preferred_element_type=jnp.float32) / temperature
        normalizer = jax.nn.logsumexp(logits, axis=-1)
        chosen = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
        fixed = jax.lax.stop_gradient(logits - normalizer[..., None])
        return None, TokenScores(chosen - normalizer, -(jnp.exp(fixed) * fixed).sum(axis=-1))

    _, scores = jax.lax.scan(score, None, (split(hidden), split(targets)))

    def join(x: Float[Array, "n B G c"]) -> Float[Array, "B G C"]:
        return jnp.moveaxis(x, 0, 2).reshape(groups, generations, -1)[:, :, :length]

    return TokenScores(join(scores.log_probs), join(scores.entropy))
