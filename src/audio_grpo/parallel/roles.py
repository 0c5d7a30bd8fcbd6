"""Which devices learn and which sample: all do both, unless the `inference_*` keys set some apart to sample."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import mesh_utils
from jax.sharding import Mesh

from audio_grpo.config import Config
from audio_grpo.errors import UserError
from audio_grpo.parallel.mesh import MESH_AXES, create_mesh


class Roles(NamedTuple):
    """Meshes of the two roles."""

    learners: Mesh
    samplers: Mesh | None
    """Has none of the learners' devices; None where every device does both."""


def create_roles(config: Config, devices: Sequence[Any] | None = None) -> Roles:
    """Set the last `inference_devices_per_replica` × `inference_replicas` devices apart if that leaves some to learn.

    The learners' mesh follows the `ici_*` keys. Replicas of the samplers lie along `data`, and each cuts its weights
    over `expert`, or over `fsdp` where there are no experts or their number does not divide.

    Raises:
        UserError: the `ici_*` keys do not fit the learners, or devices that are set apart can not work together.
    """
    devices = list(jax.devices() if devices is None else devices)
    per_replica = config.inference_devices_per_replica or len(devices)
    count = per_replica * config.inference_replicas
    if count >= len(devices):
        return Roles(create_mesh(config, devices), None)
    learners, samplers = devices[:-count], devices[-count:]
    asked = f"inference_devices_per_replica {per_replica} x inference_replicas {config.inference_replicas}"
    try:
        _check_can_part(learners, samplers)
        return Roles(create_mesh(config, learners), _sampler_mesh(config, samplers))
    except UserError as error:
        raise UserError(f"With {asked}, {len(learners)} of {len(devices)} devices learn. {error}") from error


def _check_can_part(learners: Sequence[Any], samplers: Sequence[Any]) -> None:
    remedy = "set inference_devices_per_replica to null, for all devices to do both"
    processes = len({device.process_index for device in (*learners, *samplers)})
    if processes > 1:
        raise UserError(
            f"They belong to {processes} processes, but weights only move between devices of one: {remedy}, or run in "
            "one process."
        )
    for does, group in (("learn", learners), ("sample", samplers)):
        if group[0].platform == "tpu" and not _form_a_block([device.coords for device in group]):
            raise UserError(
                f"The {len(group)} TPU chips that {does} do not form a rectangular block: {remedy}, or set half of "
                "them apart."
            )


def _form_a_block(places: Sequence[Sequence[int]]) -> bool:
    return len(places) == math.prod(max(line) - min(line) + 1 for line in zip(*places, strict=True))


def _sampler_mesh(config: Config, devices: Sequence[Any]) -> Mesh:
    per_replica = len(devices) // config.inference_replicas
    cuts_experts = config.num_experts > 0 and config.num_experts % per_replica == 0
    sizes = {"data": config.inference_replicas, "expert" if cuts_experts else "fsdp": per_replica}
    shape = [sizes.get(axis, 1) for axis in MESH_AXES]
    return Mesh(mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True), MESH_AXES)
