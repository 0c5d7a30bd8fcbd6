"""How completions meet the vocabulary: in chunks of whole completions, each with one block of the head at a time."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from audio_grpo.parallel.activations import Placement

_BLOCK_LOGITS = 2**19
"""Logits of a block on a device, at most: 2 MiB, which stay in a processor's cache from one use to the next."""


@dataclass(frozen=True, slots=True)
class Chunks:
    """N completions cut into chunks of equal size, to which every device brings as many of its own."""

    number: int
    """Of chunks."""
    shards: int
    """Parts in which devices hold the completions: one where these do not divide over the devices."""
    place: Placement

    def cut(self, x: Shaped[Array, "N *rest"]) -> Shaped[Array, "chunks R *rest"]:
        """Chunks of R completions, one after another."""
        own = x.reshape(self.shards, self.number, -1, *x.shape[1:])
        cut = jnp.moveaxis(own, 1, 0).reshape(self.number, -1, *x.shape[1:])
        return self.place(cut, None, self._axis, *[None] * (x.ndim - 1))

    def join(self, x: Shaped[Array, "chunks R *rest"]) -> Shaped[Array, "N *rest"]:
        """The completions of all chunks in their order."""
        own = x.reshape(self.number, self.shards, -1, *x.shape[2:])
        return self.place(jnp.moveaxis(own, 1, 0).reshape(-1, *x.shape[2:]), self._axis, *[None] * (x.ndim - 2))

    @property
    def _axis(self) -> str | None:
        return "batch" if self.shards > 1 else None


def chunks_of(completions: int, length: int, chunk_size: int, place: Placement) -> Chunks:
    """As few chunks as keep each within `chunk_size` tokens a device, or one completion where that is longer."""
    shards = place.size("batch") if completions % place.size("batch") == 0 else 1
    own = completions // shards
    number = next(n for n in range(1, own + 1) if own % n == 0 and (own // n * length <= chunk_size or n == own))
    return Chunks(number, shards, place)


@dataclass(frozen=True, slots=True)
class HeadBlocks:
    """The head's rows in blocks, each an equal part of what every device holds of them."""

    head: Float[Array, "tensor spread blocks v D"]
    """The vocabulary as it lies on the mesh: over `tensor`, which computes its own logits, then over the axes that
    share out tokens and from which every block is gathered."""
    place: Placement

    @property
    def numbers(self) -> Int[Array, "blocks"]:
        """Of the blocks."""
        return jnp.arange(self.head.shape[2])

    def rows(self, block: Int[Array, ""], dtype: jnp.dtype) -> Float[Array, "w D"]:
        """A block's, gathered from the axes that share out tokens; one matrix, whose products CPU computes fastest."""
        rows = jax.lax.dynamic_index_in_dim(self.head, block, axis=2, keepdims=False).astype(dtype)
        rows = self.place(rows, "vocab", None, None, None)
        return self.place(rows.reshape(-1, rows.shape[-1]), "vocab", None)

    def logits(self, rows: Float[Array, "w D"], hidden: Float[Array, "n D"], temperature: float) -> Float[Array, "n w"]:
        """Tempered, in float32."""
        logits = jnp.einsum("nd,vd->nv", hidden, rows, preferred_element_type=jnp.float32)
        return self.place(logits, "batch", "vocab") / temperature

    def hits(self, block: Int[Array, ""], targets: Int[Array, "n"]) -> Bool[Array, "n w"]:
        """Where in a block the targets are."""
        tensor, spread, blocks, size, _ = self.head.shape
        first = (jnp.arange(tensor * spread) * blocks + block) * size
        return targets[:, None] == (first[:, None] + jnp.arange(size)).reshape(-1)

    def zeros(self) -> Float[Array, "tensor spread blocks v D"]:
        """Gradients of all rows, before the first is added."""
        return jnp.zeros(self.head.shape, jnp.float32)

    def add(
        self, sums: Float[Array, "tensor spread blocks v D"], block: Int[Array, ""], rows: Float[Array, "w D"]
    ) -> Float[Array, "tensor spread blocks v D"]:
        """Add the gradients of a block's rows to where the rows lie."""
        tensor, spread, _, size, width = self.head.shape
        cut = self.place(rows.reshape(tensor, spread, size, width), "vocab", "spread_vocab", None, None)
        return sums.at[:, :, block].add(cut)


def head_blocks(head: Float[Array, "V D"], tokens: int, place: Placement) -> HeadBlocks:
    """As few blocks as keep the logits of a chunk of `tokens` small enough."""
    tensor, spread = place.size("vocab"), place.size("spread_vocab")
    own, each = head.shape[0] // (tensor * spread), spread * tokens // place.size("batch")
    number = next(n for n in range(1, own + 1) if own % n == 0 and (own // n * each <= _BLOCK_LOGITS or n == own))
    cut = head.reshape(tensor, spread, number, -1, head.shape[1])
    return HeadBlocks(place(cut, "vocab", "spread_vocab", None, None, None), place)


class Softmax(NamedTuple):
    """Sums over the blocks seen so far, relative to the largest logit."""

    peak: Float[Array, "n"]
    total: Float[Array, "n"]
    """Of exp(logit − peak)."""
    weighted: Float[Array, "n"]
    """Of exp(logit − peak) · logit."""
    chosen: Float[Array, "n"]
    """The target's logit."""

    @classmethod
    def of_nothing(cls, tokens: int) -> "Softmax":
        """Before the first block."""
        zero = jnp.zeros(tokens, jnp.float32)
        return cls(zero - jnp.inf, zero, zero, zero)

    def add(self, logits: Float[Array, "n w"], hits: Bool[Array, "n w"]) -> "Softmax":
        """With one more block, by a running maximum as in FlashAttention (arXiv 2205.14135)."""
        peak: Any = jax.lax.stop_gradient(jnp.maximum(self.peak, logits.max(axis=1)))
        share, mass = jnp.exp(self.peak - peak), jnp.exp(logits - peak[:, None])
        return Softmax(
            peak,
            self.total * share + mass.sum(axis=1),
            self.weighted * share + (mass * logits).sum(axis=1),
            self.chosen + jnp.where(hits, logits, 0.0).sum(axis=1),
        )

    @property
    def normalizer(self) -> Float[Array, "n"]:
        """Logarithm of the sum of exp(logit)."""
        return self.peak + jnp.log(self.total)

    @property
    def log_prob(self) -> Float[Array, "n"]:
        """Of the target."""
        return self.chosen - self.normalizer

    @property
    def entropy(self) -> Float[Array, "n"]:
        """In nats."""
        return self.normalizer - self.weighted / self.total
