"""Published checkpoints into sharded device arrays, a layer of a weight at a time."""

import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Int
from rich.console import Console
from rich.progress import Progress

from audio_grpo.model.checkpoint.folder import open_files, table_tensors
from audio_grpo.model.checkpoint.tensor_file import StoredTensor
from audio_grpo.model.table import Table, Weight, published_names, sharding_of

_Tensors = Mapping[tuple[int, ...], StoredTensor]
"""Stored tensors by their index into the stacked weight."""


def read_published(folder: Path, table: Table, mesh: Mesh, dtype: jnp.dtype) -> dict[str, Array]:
    """Read the weights of `table`, cast to `dtype` and sharded by `WEIGHT_RULES`.

    Accepts one file or several, with an index or without, published names with and without `thinker.`, the `-hf` names
    of Qwen3-ASR, and experts one by one or fused. A process reads only the slices that its devices hold, and keeps one
    layer of one weight in host memory.

    Raises:
        UserError: a file is missing or damaged, or names, shapes or dtypes are not the table's.
    """
    stored = table_tensors(folder, open_files(folder), table)
    weights = {}
    with Progress(console=Console(file=sys.stderr), disable=not sys.stderr.isatty(), transient=True) as progress:
        task = progress.add_task(f"reading {folder.name}", total=sum(weight.size for weight in table.values()))
        for key, weight in table.items():
            tensors = {index: stored[name] for name, index in published_names(key, weight)}
            weights[key] = _read_weight(key, weight, tensors, mesh, dtype)
            progress.advance(task, weight.size)
    return weights


def _read_weight(key: str, weight: Weight, tensors: _Tensors, mesh: Mesh, dtype: jnp.dtype) -> Array:
    sharding = sharding_of(mesh, key, weight)
    if "*" not in key:
        return _read_part(weight.shape, tensors, sharding, dtype)
    layer_sharding = sharding_of(mesh, key, replace(weight, shape=weight.shape[1:], axes=weight.axes[1:]))
    whole = jnp.zeros(weight.shape, dtype, device=sharding)
    for layer in range(weight.shape[0]):
        of_layer = {index[1:]: tensor for index, tensor in tensors.items() if index[0] == layer}
        part = _read_part(weight.shape[1:], of_layer, layer_sharding, dtype)
        # Waiting keeps the host from reading ahead of the device, and so its memory to one layer.
        whole = jax.block_until_ready(_put_layer(whole=whole, part=part, layer=layer, sharding=sharding))
    return whole


@partial(jax.jit, static_argnames="sharding", donate_argnames="whole")
def _put_layer(*, whole: Array, part: Array, layer: Int[Array, ""], sharding: NamedSharding) -> Array:
    return jax.lax.with_sharding_constraint(jax.lax.dynamic_update_index_in_dim(whole, part, layer, 0), sharding)


def _read_part(shape: tuple[int, ...], tensors: _Tensors, sharding: NamedSharding, dtype: jnp.dtype) -> Array:
    """Tensors stacked to one array; each device gets its slice alone."""
    stacked = len(next(iter(tensors)))

    def read(index: tuple[slice, ...] | None) -> np.ndarray:
        ranges = [range(size)[part] for size, part in zip(shape, index or (), strict=True)]
        values = np.empty([len(numbers) for numbers in ranges], dtype)
        for position in np.ndindex(*values.shape[:stacked]):
            tensor = tensors[tuple(numbers[i] for numbers, i in zip(ranges, position, strict=False))]
            values[position] = tensor.array()[(index or ())[stacked:]]
            tensor.release()
        return values

    return jax.make_array_from_callback(shape, sharding, read)
