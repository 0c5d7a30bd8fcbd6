"""What a run needs of a device's memory, told before any of it is taken, and what it gives back."""

import ctypes
import math
import os
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from audio_grpo.errors import UserError
from audio_grpo.training.programs import Abstract, Program, both_at_once, resident, run_programs
from audio_grpo.training.session import Session
from audio_grpo.training.telemetry import Phase

GIB = 1 << 30

_LARGEST = ("decode burst", "gradients")
"""Phases of which one needs most, or both together where a device samples ahead."""


def bytes_per_device(tree: Abstract) -> int:
    """Of the shards that one device holds."""

    def size(x: jax.ShapeDtypeStruct) -> int:
        shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
        words = 2 * 4 if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x.dtype.itemsize
        return math.prod(shape) * words

    return sum(size(leaf) for leaf in jax.tree.leaves(tree))


def device_memory(device: Any) -> int | None:
    """Bytes that programs may use: as one of this process's devices tells, None where it does not.

    On CPU, RAM shared among this process's devices.
    """
    if device.platform == "cpu":
        return host_memory() // jax.local_device_count()
    return (device.memory_stats() or {}).get("bytes_limit")


def host_memory() -> int:
    """Bytes of RAM, or the control group's limit where that is lower."""
    limits = [Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")]
    texts = [path.read_text().strip() for path in limits if path.exists()]
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([total, *(int(text) for text in texts if text.isdigit())])


def peak_memory(devices: Sequence[Any]) -> dict[str, float]:
    """The most that this process has taken since it began, in GiB, as a metric: the fullest of its devices.

    Devices that do not tell, such as CPUs, are left out; without any, it is the host's resident memory.
    """
    peaks = [stats["peak_bytes_in_use"] for device in devices if (stats := device.memory_stats())]
    if peaks:
        return {"memory/device_peak_gib": max(peaks) / GIB}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"memory/host_peak_gib": peak * (1 if sys.platform == "darwin" else 1024) / GIB}


def release_freed_memory(device: Any) -> None:
    """Give memory that was freed back to the system where the C library keeps it, as glibc does.

    Where `device` is a CPU, what a compiler took and a rollout's small arrays would otherwise lie beside gradients.
    """
    if device.platform == "cpu" and sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def check_fits(session: Session, phase: Phase, *, with_reference: bool) -> None:
    """Refuse a run that a device's memory can not hold, before a weight is read.

    What is kept from the first step to the last, and the gradients, are counted. Where what is kept takes more than
    half of the memory, the largest programs of GRPO are compiled too, which its run needs all the same. A device that
    samples ahead while it learns has what learns once more, and runs a program of each at once.

    Raises:
        UserError: it does not fit.
    """
    kept = resident(session)
    at_once = phase == "grpo" and both_at_once(session)
    needed = {
        "weights": bytes_per_device(kept.weights),
        "optimizer state": bytes_per_device(kept.optimizer),
        "reference": bytes_per_device(kept.reference) if with_reference else 0,
        "weights to sample ahead": bytes_per_device(kept.ahead) if at_once else 0,
    }
    memory = device_memory(session.mesh.local_devices[0])
    if memory is None:
        return
    _check(session, {**needed, "gradients": bytes_per_device(kept.gradients)}, memory)
    if sum(needed.values()) > memory / 2 and phase == "grpo":
        for program in run_programs(session):
            if program.phase in _LARGEST:
                kept_there = needed
                if program.session is not session:
                    kept_there = {"weights": bytes_per_device(program.session.abstract_weights)}
                size = program_memory(program, program.trace().lower())
                _check(program.session, {**kept_there, program.phase: size}, memory)
                if at_once:
                    needed[program.phase] = size


def program_memory(program: Program, lowered: jax.stages.Lowered) -> int:
    """Bytes on a device while a program runs, beyond what is `Resident`: inputs, caches and what the compiler makes."""
    analysis = lowered.compile().memory_analysis()
    if analysis is None:
        raise RuntimeError(f"The compiler does not tell the memory of {program.phase}.")
    made = analysis.temp_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return made + bytes_per_device((program.inputs, program.cache, program.beside))


def _check(session: Session, needed: dict[str, int], memory: int) -> None:
    if sum(needed.values()) > memory:
        told = ", ".join(f"{name} {size / GIB:.1f}" for name, size in needed.items() if size)
        raise UserError(
            f"{session.config.model_name} does not fit: each of {session.mesh.size} devices would hold {told} GiB, but "
            f"has {memory / GIB:.1f} GiB. `audio-grpo plan` tells what would; lora_rank=16 trains adapters only, "
            "mu_dtype=bfloat16 and nu_dtype=bfloat16 halve the moments, reference_offload=true keeps the reference in "
            "the host's memory and grpo_beta=0 keeps none, a smaller per_device_batch_size with more "
            "gradient_accumulation_steps takes less for each batch, and more devices share out the rest."
        )
