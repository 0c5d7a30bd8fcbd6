"""The device mesh, and the rules that place the logical axes of weights and activations on it.

Four mesh axes, after MaxText's: `data` repeats all weights, `fsdp` cuts every matrix's model width, `expert` cuts the
experts and, of all other matrices, the model width too, `tensor` cuts heads and MLP widths; embedding and head are cut
along the vocabulary by all three. Each is the
product of `ici_*_parallelism` (chips of one slice) and `dcn_*_parallelism` (slices).

One layout of the weights serves two layouts of activations. Where there are many tokens (tower, prefill, scoring,
learning) tokens are shared out over `data`, `fsdp` and `expert`, and each layer's weights are gathered as it runs.
Where there are few (decoding) weights stay where they are, and the activations' model width is cut as theirs.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from audio_grpo.config import Config
from audio_grpo.errors import UserError

MESH_AXES = ("data", "fsdp", "expert", "tensor")
BATCH_AXES = ("data", "fsdp", "expert")
"""Mesh axes that share out prompts, completions and the cache."""

Rules = Mapping[str, tuple[str, ...]]
"""Mesh axes of each logical axis."""

WEIGHT_RULES: Rules = {
    "layers": (),
    "vocab": ("tensor", "fsdp", "expert"),
    "embed": ("fsdp", "expert"),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "expert": ("expert",),
    "expert_embed": ("fsdp",),
    "audio_embed": ("fsdp", "expert"),
    "audio_heads": ("tensor",),
    "audio_mlp": ("tensor",),
}
"""Of weights."""


def create_mesh(config: Config, devices: Sequence[Any] | None = None) -> Mesh:
    """Arrange devices, all of them by default, by the `ici_*` and `dcn_*_parallelism` keys; −1 takes what is left.

    Raises:
        UserError: the product of the axes is not the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    slices, by_process = _slices(config, devices)
    dcn = _sizes(config, "dcn", slices, "slices")
    ici = _sizes(config, "ici", len(devices) // slices, "devices" if slices == 1 else "devices of a slice")
    if slices == 1:
        arranged = mesh_utils.create_device_mesh(ici, devices, allow_split_physical_axes=True)
    else:
        arranged = mesh_utils.create_hybrid_device_mesh(
            ici, dcn, devices, process_is_granule=by_process, allow_split_physical_axes=True
        )
    return Mesh(arranged, MESH_AXES)


def single_device_mesh(device: Any) -> Mesh:
    """A mesh of one device."""
    return Mesh(np.asarray([device]).reshape(1, 1, 1, 1), MESH_AXES)


def _slices(config: Config, devices: Sequence[Any]) -> tuple[int, bool]:
    """Number of slices, and whether a slice is a process: so where devices know no slices but the keys ask for some."""
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    processes = len({device.process_index for device in devices})
    asked = any(getattr(config, f"dcn_{axis}_parallelism") > 1 for axis in MESH_AXES)
    return (processes, True) if slices == 1 and asked else (slices, False)


def _sizes(config: Config, network: str, count: int, things: str) -> tuple[int, ...]:
    """Sizes of the mesh axes within a slice ("ici") or across slices ("dcn")."""
    asked = {axis: getattr(config, f"{network}_{axis}_parallelism") for axis in MESH_AXES}
    fixed = math.prod(size for size in asked.values() if size > 0)
    sizes = tuple(count // fixed if size == -1 else size for size in asked.values())
    if math.prod(sizes) != count:
        given = " x ".join(f"{network}_{axis}_parallelism {size}" for axis, size in asked.items())
        raise UserError(
            f"{given} does not use exactly the {count} {things} present: make the product {count}, or set one of them "
            f"to -1 and the others to a product that divides {count}."
        )
    return sizes


def weight_sharding(
    mesh: Mesh, name: str, shape: Sequence[int], axes: Sequence[str | None], *, unit: int = 1
) -> NamedSharding:
    """Sharding of one weight by `WEIGHT_RULES`; axes of size 1 are left out.

    `unit` is the number of consecutive rows of a dimension over heads that must stay together: the head width.

    Raises:
        UserError: a dimension does not divide by its mesh axes, or two dimensions want the same one.
    """
    spec, taken = [], dict[str, str]()
    for size, logical in zip(shape, axes, strict=True):
        wanted = tuple(axis for axis in WEIGHT_RULES[logical] if mesh.shape[axis] > 1) if logical else ()
        for axis in wanted:
            if axis in taken:
                raise UserError(
                    f"{name}: dimensions {taken[axis]} and {logical} both want the mesh axis {axis}: give one of them "
                    "another axis in WEIGHT_RULES."
                )
            taken[axis] = str(logical)
        heads = logical is not None and logical.endswith("heads")
        _check_divides(mesh, name, logical, size // unit if heads else size, wanted)
        spec.append(wanted if len(wanted) > 1 else next(iter(wanted), None))
    return NamedSharding(mesh, PartitionSpec(*spec))


def _check_divides(mesh: Mesh, name: str, logical: str | None, size: int, axes: Sequence[str]) -> None:
    parts = math.prod(mesh.shape[axis] for axis in axes)
    if size % parts:
        common = math.gcd(size, mesh.size)
        possible = [n for n in range(1, common + 1) if common % n == 0]
        nearest = [*[n for n in possible if n < parts][-1:], *[n for n in possible if n > parts][:1]]
        sizes = " x ".join(f"{axis} {mesh.shape[axis]}" for axis in axes)
        keys = " or ".join(f"ici_{axis}_parallelism" for axis in axes)
        raise UserError(
            f"{name}: {size} {logical} can not be cut into {parts} equal parts ({sizes}); of the ways to share out "
            f"{mesh.size} devices the nearest are {' and '.join(map(str, nearest))}: change {keys} (or dcn_*, where it "
            "spans slices), and let ici_data_parallelism take the devices that are left."
        )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of a batch along its first dimension."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same value on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_shards(mesh: Mesh) -> int:
    """Parts into which a batch is split."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)
