"""Log-probabilities of given completions, with the vocabulary taken in blocks: no array spans it all."""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from audio_grpo.model.spec import ThinkerSpec
from audio_grpo.model.table import Weights
from audio_grpo.model.thinker import group_hidden, output_head
from audio_grpo.parallel.activations import MANY_TOKENS, Placement
from audio_grpo.types import PromptBatch


class TokenScores(NamedTuple):
    """What the model thinks of each completion token."""

    log_probs: Float[Array, "*N"]
    """Of the tempered full distribution."""
    entropy: Float[Array, "*N"]
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

    Padding positions of a completion get values too; mask them. Logits in memory at a time, on a device, are at most as
    many as `chunk_size` token positions have over the whole vocabulary.
    """
    hidden = group_hidden(spec, weights, prompts, heard, completions, audio_pad)
    flat = hidden.reshape(-1, spec.decoder.width)
    settings = {"temperature": temperature, "chunk_size": chunk_size, "place": Placement(spec.mesh, MANY_TOKENS)}
    scores = vocabulary_scores(flat, output_head(weights), completions.reshape(-1), **settings)
    return TokenScores(*(x.reshape(completions.shape) for x in scores))


def vocabulary_scores(
    hidden: Float[Array, "n D"],
    head: Float[Array, "V D"],
    targets: Int[Array, "n"],
    *,
    temperature: float,
    chunk_size: int,
    place: Placement,
) -> TokenScores:
    """Log-probability of each target, and the entropy, of softmax(head · hidden / temperature).

    One pass over blocks of the vocabulary, with a running maximum as in FlashAttention; the backward pass makes each
    block's logits again and holds no more.
    """
    return _scores(hidden, head, targets, temperature, chunk_size, place)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _scores(
    hidden: Float[Array, "n D"],
    head: Float[Array, "V D"],
    targets: Int[Array, "n"],
    temperature: float,
    chunk_size: int,
    place: Placement,
) -> TokenScores:
    return _forward(hidden, head, targets, temperature, chunk_size, place)[0]


class _Running(NamedTuple):
    """Sums over the blocks seen so far, relative to the largest logit."""

    peak: Float[Array, "n"]
    total: Float[Array, "n"]
    """Of exp(logit − peak)."""
    weighted: Float[Array, "n"]
    """Of exp(logit − peak) · logit."""
    chosen: Float[Array, "n"]
    """The target's logit."""


def _forward(
    hidden: Float[Array, "n D"],
    head: Float[Array, "V D"],
    targets: Int[Array, "n"],
    temperature: float,
    chunk_size: int,
    place: Placement,
) -> tuple[TokenScores, tuple[Array, Array, Array, Array]]:
    blocks = _blocks(head, hidden, chunk_size, place)

    def add(seen: _Running, block: Int[Array, ""]) -> tuple[_Running, None]:
        logits, hit = blocks.logits(block, hidden, targets, temperature)
        peak = jnp.maximum(seen.peak, logits.max(axis=(1, 2)))
        share, mass = jnp.exp(seen.peak - peak), jnp.exp(logits - peak[:, None, None])
        return _Running(
            peak,
            seen.total * share + mass.sum(axis=(1, 2)),
            seen.weighted * share + (mass * logits).sum(axis=(1, 2)),
            seen.chosen + jnp.where(hit, logits, 0.0).sum(axis=(1, 2)),
        ), None

    zero = jnp.zeros(targets.shape, jnp.float32)
    seen, _ = jax.lax.scan(add, _Running(zero - jnp.inf, zero, zero, zero), jnp.arange(blocks.number))
    normalizer = seen.peak + jnp.log(seen.total)
    scores = TokenScores(seen.chosen - normalizer, normalizer - seen.weighted / seen.total)
    return scores, (hidden, head, targets, normalizer)


def _backward(
    temperature: float, chunk_size: int, place: Placement, kept: tuple[Array, Array, Array, Array], given: TokenScores
) -> tuple[Float[Array, "n D"], Float[Array, "V D"], None]:
    """The derivative of log p(target) with respect to the logits is one-hot(target) − p."""
    hidden, head, targets, normalizer = kept
    blocks = _blocks(head, hidden, chunk_size, place)

    def add(
        for_hidden: Float[Array, "n D"], block: Int[Array, ""]
    ) -> tuple[Float[Array, "n D"], Float[Array, "tensor spread v D"]]:
        logits, hit = blocks.logits(block, hidden, targets, temperature)
        probabilities = jnp.exp(logits - normalizer[:, None, None])
        for_logits = (given.log_probs[:, None, None] * (hit - probabilities) / temperature).astype(hidden.dtype)
        rows = blocks.rows(block, hidden.dtype)
        for_hidden += jnp.einsum("ntv,tvd->nd", for_logits, rows, preferred_element_type=jnp.float32)
        for_rows = jnp.einsum("ntv,nd->tvd", for_logits, hidden, preferred_element_type=jnp.float32)
        return place(for_hidden, "batch", None), blocks.spread(for_rows.astype(head.dtype))

    for_hidden, for_rows = jax.lax.scan(add, jnp.zeros(hidden.shape, jnp.float32), jnp.arange(blocks.number))
    return for_hidden.astype(hidden.dtype), blocks.join(for_rows), None


_scores.defvjp(_forward, _backward)


@dataclass(frozen=True, slots=True)
class _Blocks:
    """A vocabulary cut into blocks, each an equal part of what every device holds of it."""

    head: Float[Array, "tensor spread count v D"]
    """The vocabulary as it lies on the mesh: over `tensor`, which computes its own logits, then over the axes that
    share out tokens and from which every block is gathered."""
    place: Placement

    @property
    def number(self) -> int:
        """Of blocks."""
        return self.head.shape[2]

    def rows(self, block: Int[Array, ""], dtype: jnp.dtype) -> Float[Array, "tensor w D"]:
        """The head's rows of a block, gathered."""
        rows = jax.lax.dynamic_index_in_dim(self.head, block, axis=2, keepdims=False).astype(dtype)
        return self.place(rows.reshape(rows.shape[0], -1, rows.shape[-1]), "vocab", None, None)

    def logits(
        self, block: Int[Array, ""], hidden: Float[Array, "n D"], targets: Int[Array, "n"], temperature: float
    ) -> tuple[Float[Array, "n tensor w"], Bool[Array, "n tensor w"]]:
        """Tempered logits of a block in float32, and where the targets are."""
        logits = jnp.einsum("nd,tvd->ntv", hidden, self.rows(block, hidden.dtype), preferred_element_type=jnp.float32)
        logits = self.place(logits, "batch", "vocab", None) / temperature
        tensor, spread, count, size, _ = self.head.shape
        first = (jnp.arange(tensor * spread) * count + block) * size
        ids = (first[:, None] + jnp.arange(size)).reshape(tensor, -1)
        return logits, targets[:, None, None] == ids

    def spread(self, rows: Float[Array, "tensor w D"]) -> Float[Array, "tensor spread v D"]:
        """Gradients of a block's rows, back to where the rows lie."""
        spread = self.head.shape[1]
        return self.place(rows.reshape(rows.shape[0], spread, -1, rows.shape[-1]), "vocab", "spread_vocab", None, None)

    def join(self, rows: Float[Array, "count tensor spread v D"]) -> Float[Array, "V D"]:
        """All blocks' gradients as the head's."""
        return jnp.moveaxis(rows, 0, 2).reshape(-1, rows.shape[-1])


def _blocks(head: Float[Array, "V D"], hidden: Float[Array, "n D"], chunk_size: int, place: Placement) -> _Blocks:
    """As few blocks as keep a device's logits within those of `chunk_size` positions."""
    tensor, spread = place.size("vocab"), place.size("spread_vocab")
    rows, positions = head.shape[0] // (tensor * spread), hidden.shape[0] // place.size("batch")
    least = -(-positions // chunk_size)
    count = next(n for n in range(1, rows + 1) if rows % n == 0 and n >= min(least, rows))
    cut = head.reshape(tensor, spread, count, rows // count, head.shape[1])
    return _Blocks(place(cut, "vocab", "spread_vocab", None, None, None), place)
