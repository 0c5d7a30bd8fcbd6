"""Batches of the data pipeline as the carriers of compiled programs."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Int

from audio_grpo.data import Share
from audio_grpo.errors import UserError
from audio_grpo.parallel.mesh import batch_sharding, batch_shards
from audio_grpo.parallel.processes import gather, global_array, held_rows
from audio_grpo.types import AudioBatch, PromptBatch

Tree = TypeVar("Tree")


def prompts_of(batch: dict[str, Any], column: str) -> PromptBatch:
    """Prompt tokens and lengths."""
    return PromptBatch(batch[column], batch[f"{column}_true_length"])


def audio_of(batch: dict[str, Any]) -> AudioBatch:
    """Log-mel features and frame counts."""
    return AudioBatch(batch["audios"], batch["audios_true_length"])


def reading_share(mesh: Mesh, prompts: int, *, samples: int = 0) -> Share | None:
    """What this process reads of batches of so many prompts: those of its devices; None where it is the only one.

    Features stay in their process, as parts of a global array. Waveforms reach the other processes of the first
    `samples` prompts alone, the rest are None; all other entries are whole everywhere.

    Raises:
        UserError: the prompts can not be shared out, or a process has no device in the mesh.
    """
    if jax.process_count() == 1:
        return None
    check_divides(mesh, prompts)
    sharding = batch_sharding(mesh)
    held = held_rows(sharding, prompts)
    rows = held[jax.process_index()]

    def gather_batch(read: Callable[[], dict[str, Any] | None]) -> dict[str, Any] | None:
        own: dict[str, Any] | None = None

        def told() -> dict[str, Any] | None:
            nonlocal own
            own = read()
            if own is None:
                return None
            waves = [wave if row < samples else None for row, wave in zip(rows, own["samples"], strict=True)]
            return {**{name: column for name, column in own.items() if name != "audios"}, "samples": waves}

        parts = gather(told)
        if own is None:
            return None
        return {**_joined(parts, held), "audios": global_array(sharding, own["audios"], rows, prompts)}

    return Share(rows, gather_batch)


def check_divides(mesh: Mesh, prompts: float) -> None:
    """Raise UserError unless so many prompts can be shared out over the mesh."""
    shards = batch_shards(mesh)
    if prompts % shards:
        raise UserError(
            f"A batch of {prompts:g} prompts does not divide over {shards} devices: set per_device_batch_size so that "
            f"prompts are a multiple of {shards}, or give more devices to ici_tensor_parallelism."
        )


def place(mesh: Mesh, tree: Tree) -> Tree:
    """Split every array along its first dimension over the mesh; what lies on the host is the same in all processes.

    Raises:
        UserError: the batch does not divide by the mesh's shards.
    """
    check_divides(mesh, jax.tree.leaves(tree)[0].shape[0])
    return jax.tree.map(partial(_placed, batch_sharding(mesh)), tree)


def place_parts(mesh: Mesh, tree: Tree, count: int) -> Iterator[Tree]:
    """Cut every array along its first dimension into `count` equal parts, each placed on the mesh.

    Each device keeps its rows: of those that it has of the whole, a part has the first, the second and so on.
    `join_parts` brings them back into order.

    Raises:
        UserError: a part does not divide by the mesh's shards.
    """
    check_divides(mesh, jax.tree.leaves(tree)[0].shape[0] / count)
    for number in range(count):
        yield place(mesh, tree if count == 1 else jax.tree.map(partial(_part, mesh, number, count), tree))


def join_parts(mesh: Mesh, parts: Sequence[np.ndarray]) -> np.ndarray:
    """The whole whose parts came from `place_parts`."""
    by_shard = np.stack([part.reshape(batch_shards(mesh), -1, *part.shape[1:]) for part in parts], axis=1)
    return by_shard.reshape(-1, *parts[0].shape[1:])


def _placed(sharding: NamedSharding, x: Any) -> Array:
    if isinstance(x, jax.Array):
        return jax.device_put(x, sharding)
    return jax.make_array_from_callback(x.shape, sharding, x.__getitem__)


def _part(mesh: Mesh, number: int, count: int, x: Any) -> Any:
    if isinstance(x, jax.Array):
        return _device_part(x, number, count=count, shards=batch_shards(mesh), sharding=batch_sharding(mesh))
    return x.reshape(batch_shards(mesh), count, -1, *x.shape[1:])[:, number].reshape(-1, *x.shape[1:])


@partial(jax.jit, static_argnames=("count", "shards", "sharding"))
def _device_part(x: Array, number: Int[Array, ""], *, count: int, shards: int, sharding: NamedSharding) -> Array:
    by_shard = x.reshape(shards, count, -1, *x.shape[1:])
    part = jax.lax.dynamic_index_in_dim(by_shard, number, axis=1, keepdims=False)
    return jax.lax.with_sharding_constraint(part.reshape(-1, *x.shape[1:]), sharding)


def _joined(parts: Sequence[Any], held: Sequence[Int[np.ndarray, "n"]]) -> dict[str, Any]:
    """Whole columns from those of each process; of a row that several have, the first one's."""
    _, first = np.unique(np.concatenate(held), return_index=True)
    whole = {}
    for name, column in parts[0].items():
        if isinstance(column, np.ndarray):
            whole[name] = np.concatenate([part[name] for part in parts])[first]
        else:
            entries = [entry for part in parts for entry in part[name]]
            whole[name] = [entries[i] for i in first]
    return whole
