"""Meshes over devices that are not here: enough to see where things would lie."""

from types import SimpleNamespace

import numpy as np
from jax.sharding import Mesh

from audio_grpo.parallel.mesh import MESH_AXES


class Device(SimpleNamespace):
    """What a mesh asks of a device."""

    __hash__ = object.__hash__


def far_devices(count: int, **places: int) -> list[Device]:
    """`count` devices; `slice_index=4` puts each four of them into a slice, `process_index=4` into a process."""
    return [
        Device(id=i, platform="cpu", device_kind="cpu", **{"process_index": 0} | {k: i // n for k, n in places.items()})
        for i in range(count)
    ]


def far_mesh(**sizes: int) -> Mesh:
    """A mesh of these sizes, 1 where none is given."""
    shape = [sizes.get(axis, 1) for axis in MESH_AXES]
    return Mesh(np.asarray(far_devices(int(np.prod(shape)))).reshape(shape), MESH_AXES)
