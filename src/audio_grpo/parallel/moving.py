"""Arrays from one mesh to another, from device to device."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Sharding
from jaxtyping import Array

Box = tuple[tuple[int, int], ...]
"""Part of an array: first and end along each dimension."""


def moved(x: Array, sharding: Sharding) -> Array:
    """The same array laid out by `sharding`, on other devices of this process or on its own.

    `jax.device_put` sends an array through the host where the two meshes cut it differently; here each device is sent
    its pieces by the devices that hold them. What then lies on other devices shares no memory with `x`.
    """
    if x.sharding.device_set == sharding.device_set:
        return jax.device_put(x, sharding)
    held = {_box(shard.index, x.shape): shard.data for shard in x.addressable_shards}
    wanted = sharding.devices_indices_map(x.shape)
    shards = [_gathered(held, _box(index, x.shape), device) for device, index in wanted.items()]
    return jax.make_array_from_single_device_arrays(x.shape, sharding, shards)


def _gathered(held: Mapping[Box, Array], wanted: Box, device: Any) -> Array:
    """One device's part, from those that others hold."""
    shared = {box: _common(box, wanted) for box in held}
    pieces = {part: _cut(held[box], box, part) for box, part in shared.items() if part is not None}
    if wanted in pieces:
        return jax.device_put(pieces[wanted], device)
    dtype = next(iter(held.values())).dtype
    whole = jnp.zeros([end - first for first, end in wanted], dtype, device=device)
    for box, piece in pieces.items():
        whole = _written(whole, jax.device_put(piece, device), _starts(box, wanted))
    return whole


def _box(index: tuple[slice, ...], shape: Sequence[int]) -> Box:
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def _common(a: Box, b: Box) -> Box | None:
    """What two parts share; None where that is nothing."""
    box = tuple((max(i, j), min(k, m)) for (i, k), (j, m) in zip(a, b, strict=True))
    return box if all(first < end for first, end in box) else None


def _cut(data: Array, box: Box, part: Box) -> Array:
    """A part of `data`, which lies at `box`."""
    if part == box:
        return data
    return _sliced(data, _starts(part, box), sizes=tuple(end - first for first, end in part))


def _starts(part: Box, box: Box) -> tuple[int, ...]:
    return tuple(first - origin for (first, _), (origin, _) in zip(part, box, strict=True))


@partial(jax.jit, static_argnames="sizes")
def _sliced(data: Array, starts: tuple[int, ...], *, sizes: tuple[int, ...]) -> Array:
    return jax.lax.dynamic_slice(data, starts, sizes)


@partial(jax.jit, donate_argnums=0)
def _written(whole: Array, piece: Array, starts: tuple[int, ...]) -> Array:
    return jax.lax.dynamic_update_slice(whole, piece, starts)
