"""A loss and its gradients in one pass over the vocabulary: logits are made once.

A loss of log-probabilities and entropies is a sum over completions, so once the logits of a chunk of whole completions
are known, so are the loss's derivatives with respect to them, and with these the gradients of hidden states and head.
Liger (arXiv 2410.10989) fuses the cross-entropy likewise.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from audio_grpo.grpo.blocks import HeadBlocks, Softmax, chunks_of, head_blocks
from audio_grpo.grpo.log_probs import TokenScores, vocabulary_scores
from audio_grpo.parallel.activations import Placement
from audio_grpo.types import GroupBatch, PromptBatch

LossFn = Callable[[TokenScores, GroupBatch], tuple[Float[Array, ""], Any]]
"""Gives the loss of a part of a batch, which is a sum over its completions, and what is reported of it, which has
`merge` to join two parts' reports."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitsSettings:
    """How logits are made."""

    temperature: float
    chunk_bytes: int
    """That a device's logits may take at a time; where a completion's take more, these."""
    place: Placement

    def chunk_size(self, vocabulary: int) -> int:
        """Tokens whose logits, in float32, a device holds at a time."""
        own = vocabulary // self.place.size("vocab")
        return max(1, self.chunk_bytes // (4 * own))


def fused_loss(
    hidden: Float[Array, "B G C D"], head: Float[Array, "V D"], batch: GroupBatch, loss_fn: LossFn, how: LogitsSettings
) -> tuple[Float[Array, ""], Any]:
    """`loss_fn` of what `hidden` say of the batch's completions, and its report.

    Only where it is differentiated does it hold a chunk's logits; a head that does not learn costs no gradient.
    """
    return _loss(hidden, head, batch, loss_fn, how)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _loss(
    hidden: Float[Array, "B G C D"], head: Float[Array, "V D"], batch: GroupBatch, loss_fn: LossFn, how: LogitsSettings
) -> tuple[Float[Array, ""], Any]:
    tokens = batch.completion_tokens
    flat = hidden.reshape(-1, *hidden.shape[2:]), head, tokens.reshape(-1, tokens.shape[-1])
    scores = vocabulary_scores(*flat, temperature=how.temperature, place=how.place)
    return loss_fn(TokenScores(*(x.reshape(tokens.shape) for x in scores)), batch)


def _forward(
    hidden: Any, head: Any, batch: Any, loss_fn: LossFn, how: LogitsSettings
) -> tuple[tuple[Float[Array, ""], Any], tuple[Float[Array, "B G C D"], Float[Array, "V D"] | None]]:
    """The arguments say whether they are differentiated."""
    values: GroupBatch = jax.tree.map(lambda leaf: leaf.value, batch, is_leaf=lambda leaf: hasattr(leaf, "perturbed"))
    alone = _each_alone(values)
    count, _, length = alone.completion_tokens.shape
    chunks = chunks_of(count, length, how.chunk_size(len(head.value)), how.place)
    blocks = head_blocks(head.value, count // chunks.number * length, how.place)
    one = partial(_chunk, blocks, loss_fn, how.temperature)
    for_rows = blocks.zeros() if head.perturbed else None
    states = hidden.value.reshape(-1, *hidden.value.shape[2:])
    for_rows, (scores, for_states) = jax.lax.scan(one, for_rows, jax.tree.map(chunks.cut, (states, alone)))
    shape = values.completion_tokens.shape
    scores = TokenScores(*(chunks.join(x).reshape(shape) for x in scores))
    for_hidden = chunks.join(for_states).reshape(hidden.value.shape)
    for_head = None if for_rows is None else for_rows.astype(head.value.dtype).reshape(head.value.shape)
    return loss_fn(scores, values), (for_hidden, for_head)


def _backward(
    _loss_fn: LossFn, _how: LogitsSettings, kept: tuple[Array, Array | None], given: tuple[Array, Any]
) -> tuple[Float[Array, "B G C D"], Float[Array, "V D"] | None, None]:
    for_hidden, for_head = jax.tree.map(lambda gradient: gradient * given[0].astype(gradient.dtype), kept)
    return for_hidden, for_head, None


_loss.defvjp(_forward, _backward, symbolic_zeros=True)


def _each_alone(batch: GroupBatch) -> GroupBatch:
    """Every completion as a group of its own, with what losses look at."""
    generations = batch.completion_tokens.shape[1]
    prompts = PromptBatch(*(jnp.repeat(x, generations, axis=0) for x in batch.prompts))
    rest: Any = jax.tree.map(lambda x: x.reshape(-1, 1, *x.shape[2:]), batch._replace(prompts=(), routes=None))
    return rest._replace(prompts=prompts)


_Chunk = tuple[Float[Array, "R C D"], GroupBatch]


def _chunk(
    blocks: HeadBlocks, loss_fn: LossFn, temperature: float, for_rows: Array | None, chunk: _Chunk
) -> tuple[Array | None, tuple[TokenScores, Float[Array, "R C D"]]]:
    """A chunk's scores and the gradients of its hidden states; those of the head's rows are added to `for_rows`."""
    states, batch = chunk
    hidden, targets = states.reshape(-1, states.shape[-1]), batch.completion_tokens.reshape(-1)

    def make(seen: Softmax, block: Int[Array, ""]) -> tuple[Softmax, Float[Array, "n w"]]:
        logits = blocks.logits(blocks.rows(block, hidden.dtype), hidden, temperature)
        return seen.add(logits, blocks.hits(block, targets)), logits

    softmax, logits = jax.lax.scan(make, Softmax.of_nothing(targets.size), blocks.numbers)
    scores = TokenScores(softmax.log_prob, softmax.entropy)
    shaped = TokenScores(*(x.reshape(batch.completion_tokens.shape) for x in scores))
    wanted: TokenScores = jax.grad(lambda scores: loss_fn(scores, batch)[0])(shaped)
    slopes = _Slopes(softmax, wanted.log_probs.reshape(-1) / temperature, wanted.entropy.reshape(-1) / temperature)

    def use(sums: tuple[Array, Array | None], block: tuple[Array, Array]) -> tuple[tuple[Any, Any], None]:
        (for_hidden, for_rows), (number, logits) = sums, block
        for_logits = slopes.of(logits, blocks.hits(number, targets)).astype(hidden.dtype)
        rows = blocks.rows(number, hidden.dtype)
        for_hidden += jnp.einsum("nv,vd->nd", for_logits, rows, preferred_element_type=jnp.float32)
        if for_rows is not None:
            more = jnp.einsum("nv,nd->vd", for_logits, hidden, preferred_element_type=jnp.float32)
            for_rows = blocks.add(for_rows, number, more)
        return (blocks.place(for_hidden, "batch", None), for_rows), None

    sums = jnp.zeros(hidden.shape, jnp.float32), for_rows
    (for_hidden, for_rows), _ = jax.lax.scan(use, sums, (blocks.numbers, logits))
    flat = TokenScores(*(x.reshape(states.shape[:2]) for x in scores))
    return for_rows, (flat, for_hidden.astype(states.dtype).reshape(states.shape))


@dataclass(frozen=True, slots=True)
class _Slopes:
    """The loss's derivatives with respect to logits, from those with respect to log p(target) and the entropy H.

    d log p(target) / d logit = one-hot(target) − p; dH / d logit = −p · (log p + H).
    """

    softmax: Softmax
    log_prob: Float[Array, "n"]
    entropy: Float[Array, "n"]

    def of(self, logits: Float[Array, "n w"], hits: Bool[Array, "n w"]) -> Float[Array, "n w"]:
        """Of one block."""
        log_prob, entropy, of_all = (x[:, None] for x in (self.log_prob, self.entropy, self.softmax.entropy))
        log_probabilities = logits - self.softmax.normalizer[:, None]
        pulled = log_prob + entropy * (log_probabilities + of_all)
        return jnp.where(hits, log_prob, 0.0) - jnp.exp(log_probabilities) * pulled
