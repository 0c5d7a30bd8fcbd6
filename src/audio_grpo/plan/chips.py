"""What one chip offers: Cloud TPUs from Google's figures, the local device measured."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from audio_grpo.errors import UserError
from audio_grpo.training.memory import GIB, device_memory


@dataclass(frozen=True)
class Chip:
    """One accelerator chip, or the local device.

    Attributes:
        name: kind, such as v4.
        memory: bytes of memory that a program may use.
        flops: floating-point operations a second at the peak.
        bandwidth: bytes a second between memory and the cores.
        link_bandwidth: bytes a second over one interconnect link in one direction.
        links: interconnect links of a chip.
    """

    name: str
    memory: int
    flops: float
    bandwidth: float
    link_bandwidth: float
    links: int


# FLOP/s are bfloat16. The rates are those of cloud.google.com/tpu/docs/v4, /v5e, /v5p and /v6e; a link's rate is the
# chip's "bidirectional inter-chip interconnect bandwidth" halved and divided by its ports (v4: Jouppi et al., 2023,
# arXiv:2304.01433). Memory is what XLA's compiler lets a program have of the nominal 32, 16, 95 and 32 GiB.
TPU_CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", int(30.75 * GIB), 275e12, 1228e9, 50e9, 6),
        Chip("v5e", int(15.75 * GIB), 197e12, 819e9, 50e9, 4),
        Chip("v5p", int(95.74 * GIB), 459e12, 2765e9, 100e9, 6),
        Chip("v6e", int(31.25 * GIB), 918e12, 1638e9, 100e9, 4),
    )
}

_DEVICE_KINDS = {"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e"}


def local_chip(dtype: DTypeLike) -> Chip:
    """The local default device.

    A TPU has Google's figures. Any other device has its memory from the device, or from the operating system on CPU;
    FLOP/s are the best of a few matrix products in `dtype` and bytes/s the best of a few copies, both measured here in
    under two seconds, so they are what this machine gives now and not a manufacturer's peak. Devices of one CPU share
    its memory and its cores equally, and exchange data through its memory.
    """
    device = jax.local_devices()[0]
    if device.device_kind in _DEVICE_KINDS:
        return TPU_CHIPS[_DEVICE_KINDS[device.device_kind]]
    on_cpu = device.platform == "cpu"
    size = 1024 if on_cpu else 8192
    square = jnp.ones((size, size), dtype, device=device)
    flops = 2 * size**3 / _seconds(jax.jit(lambda x: x @ x), square)
    long = jnp.ones((1 << 26 if on_cpu else 1 << 28,), jnp.float32, device=device)
    # In place, for fresh memory costs more than the copy does.
    bandwidth = 2 * long.nbytes / _seconds(jax.jit(lambda x: x + 1, donate_argnums=0), long)
    shares = jax.local_device_count() if on_cpu else 1
    memory = device_memory(device)
    if memory is None:
        raise UserError(f"{device.device_kind} does not tell its memory: name a TPU slice with --topology.")
    return Chip(device.device_kind, memory, flops / shares, bandwidth / shares, bandwidth, 1)


def _seconds(function: Callable[[jax.Array], jax.Array], x: jax.Array) -> float:
    """The best time of a call on its last result, over at least three calls and a quarter of a second."""
    x = function(x).block_until_ready()
    times = []
    while len(times) < 3 or sum(times) < 0.25:
        start = time.perf_counter()
        x = function(x).block_until_ready()
        times.append(time.perf_counter() - start)
    return min(times)
