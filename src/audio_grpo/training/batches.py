"""Batches of the data pipeline as the carriers of compiled programs."""

from collections.abc import Iterator
from typing import Any, TypeVar

import jax
from jax.sharding import Mesh

from audio_grpo.errors import UserError
from audio_grpo.parallel.mesh import batch_sharding, batch_shards
from audio_grpo.types import AudioBatch, PromptBatch

Tree = TypeVar("Tree")


def prompts_of(batch: dict[str, Any], column: str) -> PromptBatch:
    """Prompt tokens and lengths."""
    return PromptBatch(batch[column], batch[f"{column}_true_length"])


def audio_of(batch: dict[str, Any]) -> AudioBatch:
    """Log-mel features and frame counts."""
    return AudioBatch(batch["audios"], batch["audios_true_length"])


def check_divides(mesh: Mesh, prompts: float) -> None:
    """Raise UserError unless so many prompts can be shared out over the mesh."""
    shards = batch_shards(mesh)
    if prompts % shards:
        raise UserError(
            f"A batch of {prompts:g} prompts does not divide over {shards} devices: set per_device_batch_size so that "
            f"prompts are a multiple of {shards}, or give more devices to ici_tensor_parallelism."
        )


def place(mesh: Mesh, tree: Tree) -> Tree:
    """Split every array along its first dimension over the mesh.

    Raises:
        UserError: the batch does not divide by the mesh's shards.
    """
    check_divides(mesh, jax.tree.leaves(tree)[0].shape[0])
    return jax.device_put(tree, batch_sharding(mesh))


def parts(tree: Tree, count: int) -> Iterator[Tree]:
    """Cut every array along its first dimension into `count` equal parts."""
    size = jax.tree.leaves(tree)[0].shape[0] // count
    for first in range(0, size * count, size):
        yield jax.tree.map(lambda x, first=first: x[first : first + size], tree)
