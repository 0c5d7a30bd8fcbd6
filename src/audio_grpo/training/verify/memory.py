"""Check of the memory that all this took."""

import os
import resource
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from audio_grpo.training.verify.check import Finding

_FULL = 0.95
"""Share of the limit above which the next checkpoint or evaluation may not find room."""


class MemoryUse(NamedTuple):
    """Memory of a device or of this process, in bytes."""

    name: str
    peak: int
    limit: int


def memory_use(devices: Sequence[Any]) -> list[MemoryUse]:
    """Peak and limit of each of this host's devices; of the process on the host where devices do not tell."""
    local = [device for device in devices if device.process_index == jax.process_index()]
    told = [(str(device), device.memory_stats()) for device in local]
    if any(not stats or "bytes_limit" not in stats for _, stats in told):
        return [_process_memory()]
    return [MemoryUse(name, stats["peak_bytes_in_use"], stats["bytes_limit"]) for name, stats in told]


def memory_suffices(uses: Sequence[MemoryUse]) -> Finding:
    """No device came near its limit."""
    fullest = max(uses, key=lambda use: use.peak / use.limit)
    share = fullest.peak / fullest.limit
    return Finding(
        share <= _FULL,
        f"{fullest.name}: peak {_gib(fullest.peak)} of {_gib(fullest.limit)}, {share:.1%}; at most {_FULL:.0%} asked",
    )


def _process_memory() -> MemoryUse:
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return MemoryUse("this process", peak, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
