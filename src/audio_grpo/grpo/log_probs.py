"""Log-probabilities of given completions, with the vocabulary taken in blocks: no array spans it all."""

from typing import NamedTuple

import jax
from jaxtyping import Array, Float, Int

from audio_grpo.grpo.blocks import Softmax, chunks_of, head_blocks
from audio_grpo.model.spec import ThinkerSpec
from audio_grpo.model.table import Weights
from audio_grpo.model.thinker import group_forward, output_head
from audio_grpo.parallel.activations import MANY_TOKENS, Placement
from audio_grpo.types import PromptBatch, Routes

_CHUNK_TOKENS = 1024
"""That a device takes through a block of the vocabulary together, or one completion: more of them read the head less
often, and leave blocks of fewer rows."""


class TokenScores(NamedTuple):
    """What the model thinks of each completion token."""

    log_probs: Float[Array, "*N"]
    """Of the tempered full distribution."""
    entropy: Float[Array, "*N"]
    """Of the distribution that the token was drawn from, in nats."""


def compute_log_probs(
    spec: ThinkerSpec,
    weights: Weights,
    prompts: PromptBatch,
    heard: Float[Array, "B A D"],
    completions: Int[Array, "B G C"],
    *,
    audio_pad: int,
    temperature: float,
    routes: Routes | None = None,
) -> TokenScores:
    """Score G completions of each of B prompts, whose audio embeddings are `heard`.

    Padding positions of a completion get values too; mask them. Tokens go to the experts of `routes`, where these say
    any. A device holds the logits of one block of the vocabulary at a time; the backward pass makes them again.
    """
    hidden = group_forward(spec, weights, prompts, heard, completions, audio_pad, routes).hidden
    flat = hidden.reshape(-1, *hidden.shape[2:]), completions.reshape(-1, completions.shape[-1])
    place = Placement(spec.mesh, MANY_TOKENS)
    scores = vocabulary_scores(flat[0], output_head(weights), flat[1], temperature=temperature, place=place)
    return TokenScores(*(x.reshape(completions.shape) for x in scores))


def vocabulary_scores(
    hidden: Float[Array, "N C D"],
    head: Float[Array, "V D"],
    targets: Int[Array, "N C"],
    *,
    temperature: float,
    place: Placement,
) -> TokenScores:
    """Log-probability of each target, and the entropy, of softmax(head · hidden / temperature)."""
    count, length = targets.shape
    chunks = chunks_of(count, length, _CHUNK_TOKENS, place)
    blocks = head_blocks(head, count // chunks.number * length, place)

    def score(chunk: tuple[Float[Array, "R C D"], Int[Array, "R C"]]) -> TokenScores:
        states, wanted = chunk[0].reshape(-1, hidden.shape[-1]), chunk[1].reshape(-1)

        @jax.checkpoint
        def add(seen: Softmax, block: Int[Array, ""]) -> tuple[Softmax, None]:
            logits = blocks.logits(blocks.rows(block, states.dtype), states, temperature)
            return seen.add(logits, blocks.hits(block, wanted)), None

        softmax, _ = jax.lax.scan(add, Softmax.of_nothing(wanted.size), blocks.numbers)
        return TokenScores(softmax.log_prob.reshape(chunk[1].shape), softmax.entropy.reshape(chunk[1].shape))

    scores = jax.lax.map(score, (chunks.cut(hidden), chunks.cut(targets)))
    return TokenScores(*(chunks.join(x) for x in scores))
