"""Where activations lie on the mesh."""

import math
from dataclasses import dataclass

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from audio_grpo.parallel.mesh import BATCH_AXES, Rules

MANY_TOKENS: Rules = {
    "batch": BATCH_AXES,
    "cached": BATCH_AXES,
    "embed": (),
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "spread_vocab": ("fsdp", "expert"),
}
"""Tower, prefill, scoring and learning: tokens are shared out, weights are gathered layer by layer."""

FEW_TOKENS: Rules = {
    "batch": ("data",),
    "cached": BATCH_AXES,
    "embed": ("fsdp", "expert"),
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor", "fsdp", "expert"),
}
"""Decoding: weights stay, the model width is cut as theirs; queries go to where their sequence's cache lies."""


@dataclass(frozen=True, slots=True)
class Placement:
    """A mesh and the rules by which activations lie on it."""

    mesh: Mesh | None
    """None leaves them where the compiler puts them."""
    rules: Rules

    def __call__(self, x: Array, *axes: str | None) -> Array:
        """The same array, laid out by the logical name of each of its dimensions."""
        if self.mesh is None or self.mesh.size == 1:
            return x
        spec = PartitionSpec(*(self.rules[axis] if axis else None for axis in axes))
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))

    def size(self, axis: str) -> int:
        """Parts into which a dimension of this logical name is cut."""
        return 1 if self.mesh is None else math.prod(self.mesh.shape[name] for name in self.rules[axis])

    @property
    def cuts_width(self) -> bool:
        """Whether devices hold parts of the model width, and so parts of the sums over it."""
        return self.size("embed") > 1

    @property
    def platform(self) -> str:
        """Where programs run, e.g. "cpu" or "tpu"."""
        return jax.default_backend() if self.mesh is None else self.mesh.devices.flat[0].platform
