"""What a run needs of a device's memory, told before any of it is taken."""

import math
import os
from pathlib import Path
from typing import Any

import jax

from audio_grpo.errors import UserError
from audio_grpo.training.programs import Abstract, resident
from audio_grpo.training.session import Session

GIB = 1 << 30


def bytes_per_device(tree: Abstract) -> int:
    """Of the shards that one device holds."""

    def size(x: jax.ShapeDtypeStruct) -> int:
        shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
        return math.prod(shape) * x.dtype.itemsize

    return sum(size(leaf) for leaf in jax.tree.leaves(tree))


def device_memory(device: Any) -> int:
    """Bytes that programs may use: as the device tells; on CPU, RAM shared among this process's devices."""
    if device.platform == "cpu":
        return host_memory() // jax.local_device_count()
    return device.memory_stats()["bytes_limit"]


def host_memory() -> int:
    """Bytes of RAM, or the control group's limit where that is lower."""
    limits = [Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")]
    texts = [path.read_text().strip() for path in limits if path.exists()]
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([total, *(int(text) for text in texts if text.isdigit())])


def check_fits(session: Session) -> None:
    """Refuse a run whose weights and optimizer state alone exceed a device's memory; touches neither.

    Activations come on top: `audio-grpo plan` has the compiler count them.

    Raises:
        UserError: they do not fit.
    """
    kept = resident(session)
    sizes = {"weights": kept.weights, "optimizer state": kept.optimizer, "reference": kept.reference}
    needed = {name: bytes_per_device(tree) for name, tree in sizes.items()}
    memory = device_memory(session.mesh.devices.flat[0])
    if sum(needed.values()) > memory:
        told = ", ".join(f"{name} {size / GIB:.1f}" for name, size in needed.items() if size)
        raise UserError(
            f"{session.config.model_name} does not fit: each of {session.mesh.size} devices would hold {told} GiB, but "
            f"has {memory / GIB:.1f} GiB. `audio-grpo plan` tells what would; lora_rank=16 trains adapters only, "
            "grpo_beta=0 keeps no reference, and more devices share out the rest."
        )
