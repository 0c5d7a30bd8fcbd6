"""The device mesh and the rules that place logical axes on it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from audio_grpo.config import Config
from audio_grpo.errors import UserError

MESH_AXES = ("data", "fsdp", "expert", "tensor")
BATCH_AXES = ("data", "fsdp", "expert")
"""Mesh axes that share out prompts, completions and decode slots."""

WEIGHT_RULES: Mapping[str, str | None] = {
    "layers": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "expert": "expert",
    "audio_embed": "fsdp",
    "audio_heads": "tensor",
    "audio_mlp": "tensor",
}
"""Mesh axis of each logical axis of a weight."""


def create_mesh(config: Config, devices: Sequence[Any] | None = None) -> Mesh:
    """Arrange devices, all of them by default, by the `ici_*_parallelism` keys; −1 takes what the others leave.

    Raises:
        UserError: the product of the axes is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    asked = {axis: getattr(config, f"ici_{axis}_parallelism") for axis in MESH_AXES}
    fixed = math.prod(size for size in asked.values() if size > 0)
    sizes = {axis: len(devices) // fixed if size == -1 else size for axis, size in asked.items()}
    if math.prod(sizes.values()) != len(devices):
        given = " x ".join(f"ici_{axis}_parallelism {size}" for axis, size in asked.items())
        raise UserError(
            f"{given} does not use exactly the {len(devices)} devices present: make the product {len(devices)}, or set "
            f"one of them to -1 and the others to a product that divides {len(devices)}."
        )
    return Mesh(np.asarray(devices).reshape([sizes[axis] for axis in MESH_AXES]), MESH_AXES)


def weight_sharding(mesh: Mesh, name: str, shape: Sequence[int], axes: Sequence[str | None]) -> NamedSharding:
    """Sharding of one weight by `WEIGHT_RULES`; axes of size 1 are left out.

    Raises:
        UserError: a dimension does not divide by its mesh axis.
    """
    spec = []
    for size, logical in zip(shape, axes, strict=True):
        axis = WEIGHT_RULES[logical] if logical is not None else None
        parts = 1 if axis is None else mesh.shape[axis]
        if size % parts:
            divisors = [n for n in range(1, size + 1) if size % n == 0 and n <= 2 * parts]
            raise UserError(
                f"{name}: dimension {logical} of size {size} does not divide over ici_{axis}_parallelism {parts}; "
                f"sizes that work: {divisors}."
            )
        spec.append(axis if parts > 1 else None)
    return NamedSharding(mesh, PartitionSpec(*spec))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of a batch along its first dimension."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same value on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_shards(mesh: Mesh) -> int:
    """Parts into which a batch is split."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)
