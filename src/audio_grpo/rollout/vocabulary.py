"""The output head cut into blocks of the vocabulary, each an equal part of what every device holds of it.

Shapes: T devices with b blocks each, of which k are looked at together; G groups of a block with M tokens each.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from audio_grpo.parallel.activations import Placement

Summary = TypeVar("Summary")

_BLOCKS = 32
"""Blocks that a vocabulary is cut into, where it divides by so many."""
_TILE = 8
_GROUP = 16
"""Tokens of a block that are summed together, where the block divides by so many."""
_FEW_LOGITS, _STORED_LOGITS = 5 * 2**19, 2**26
"""Logits that a device makes at once, at most: on a CPU as many as are faster so than by blocks that stay in its cache,
elsewhere as its memory holds."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The head's rows by device, block, group and place in the group: a view, since all lie in the order of their ids.

    There are 32 blocks, or as many as the largest power of two below that leaves them whole groups. They are the same
    ranges of ids on every number of devices that divides their number. Others, such as 3 or 64, cut more blocks, and so
    the same uniform numbers draw other tokens (of the same distribution).
    """

    head: Float[Array, "T b G M D"]
    place: Placement

    def cut(self, x: Shaped[Array, "V *rest"]) -> Shaped[Array, "T b G M *rest"]:
        """An array over the vocabulary, laid out as the head."""
        return x.reshape(*self.head.shape[:4], *x.shape[1:])

    def ids(self, block: Int[Array, "..."], group: Int[Array, "..."], member: Int[Array, "..."]) -> Int[Array, "..."]:
        """Token ids; `block` counts through all devices."""
        groups, members = self.head.shape[2:4]
        return (block * groups + group) * members + member

    def logits(self, hidden: Float[Array, "S D"]) -> Float[Array, "T b G M S"]:
        """Of all tokens at once."""
        return self._products(self.head, hidden)

    def group_logits(
        self, hidden: Float[Array, "S D"], block: Int[Array, "T S"], group: Int[Array, "T S"]
    ) -> Float[Array, "T M S"]:
        """Of one group for each row, on each device of a block that is there."""
        rows = jax.vmap(lambda head, block, group: head[block, group])(self.head, block, group)
        return jnp.einsum("tsmd,sd->tms", rows, hidden, preferred_element_type=jnp.float32)

    def group(
        self, x: Shaped[Array, "T b G M #S"], block: Int[Array, "T S"], group: Int[Array, "T S"]
    ) -> Shaped[Array, "T M S"]:
        """Values of an array that is laid out as the head, for the same tokens as `group_logits`."""
        row = jnp.arange(x.shape[-1])
        return jax.vmap(lambda x, block, group: x[block, group, :, row].T)(x, block, group)

    def summarize(
        self,
        hidden: Float[Array, "S D"],
        allowed: Bool[Array, "T b G M #S"],
        summary: Callable[[Float[Array, "T k G M S"], Bool[Array, "T k G M #S"]], Summary],
    ) -> Summary:
        """What `summary` makes of the logits, some blocks at a time: arrays [T, k, …], joined to [T, b, …]."""
        devices, blocks = self.head.shape[:2]
        steps = self._steps(hidden.shape[0])

        def at(x: Shaped[Array, "T b *rest"], step: Int[Array, ""]) -> Shaped[Array, "T k *rest"]:
            some = x.reshape(devices, steps, blocks // steps, *x.shape[2:])
            return jax.lax.dynamic_index_in_dim(some, step, axis=1, keepdims=False)

        def one(step: Int[Array, ""]) -> Summary:
            return summary(self._products(at(self.head, step), hidden), at(allowed, step))

        parts = jax.lax.map(one, jnp.arange(steps))
        return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(devices, blocks, *x.shape[3:]), parts)

    def _steps(self, rows: int) -> int:
        """All blocks in one step where their logits are few enough, else one at a time."""
        limit = _FEW_LOGITS if self.place.platform == "cpu" else _STORED_LOGITS
        logits = math.prod(self.head.shape[1:4]) * rows // self.place.size("batch")
        return 1 if logits <= limit else self.head.shape[1]

    def _products(self, rows: Float[Array, "T k G M D"], hidden: Float[Array, "S D"]) -> Float[Array, "T k G M S"]:
        logits = jnp.einsum("tkgmd,sd->tkgms", rows, hidden, preferred_element_type=jnp.float32)
        return self.place(logits, "vocab", None, None, None, "batch")


def cut_vocabulary(head: Float[Array, "V D"], place: Placement) -> Vocabulary:
    """Cut an output head that lies over the mesh as the rule "vocab" says, or on one device."""
    devices, (vocab, width) = place.size("vocab"), head.shape
    # A TPU's tiles hold eight rows: groups of fewer would have the whole head copied.
    blocks = math.lcm(math.gcd(vocab // _TILE if vocab % _TILE == 0 else vocab, _BLOCKS), devices)
    members = math.gcd(vocab // blocks, _GROUP)
    rows = head.reshape(devices, blocks // devices, -1, members, width)
    return Vocabulary(place(rows, "vocab", None, None, None, None), place)
